#!/usr/bin/env bash
# What the recipes of docs/your_own_pictures.md bring, on kinds of pictures that the bundled model has not seen.
#   benchmarks/own_pictures.sh WORK PHOTOS HELD_OUT KIND RECIPE [OPTION ...]
# WORK: folder for packages, pictures and runs. PHOTOS, HELD_OUT: photographs. KIND: scripts, sprites, stamps or maps.
# RECIPE: adapt, adapt_keep_codes or adapt_decoder. Options go to the run. Run it again to resume. Needs Debian's `apt-get download`.
set -euo pipefail
cd "$(dirname "$0")/.."
work=$1 photos=$2 held_out=$3 kind=$4 recipe=$5
shift 5

if [ ! -d "$work/kinds" ]; then
    mkdir -p "$work/packages"
    (cd "$work/packages" && apt-get download fonts-noto-core fonts-noto-cjk tuxpaint-stamps-default wesnoth-1.18-data kgeography-data)
    for package in "$work"/packages/*.deb; do dpkg -x "$package" "$work/packages"; done
    rm -rf "$work/kinds.partial"
    python - "$work/packages" "$work/kinds.partial" <<'PY'
import sys
from collections import defaultdict
from pathlib import Path
from random import Random

from fontTools.ttLib import TTFont
from PIL import Image, ImageDraw, ImageFont

from svqvae_hf.models.image_files import to_rgb

SIDE, COUNTS, SEED = 512, {"train": 160, "test": 24}, 0
CJK = {"Han": (0x4E00, 0x9FA5), "Kana": (0x3041, 0x30FE), "Hangul": (0xAC00, 0xD7A3)}
OTHERS = ("", "Mono", "Display", "Math", "Symbols", "Symbols2", "Music")  # fonts without a script of their own
packages, out = map(Path, sys.argv[1:])
random = Random(SEED)


def find_scripts():
    """Fonts of each script that is not Latin, with its letters."""
    groups = defaultdict(list)
    for path in sorted(packages.rglob("fonts/*/noto/Noto*-Regular.tt[cf]")):
        script = path.stem.partition("-")[0].removeprefix("Noto")
        if "CJK" in script:
            for name, (low, high) in CJK.items():
                groups[name].append((path, [chr(code) for code in range(low, high)]))
            continue
        for style in ("Sans", "Serif", "Naskh", "Kufi"):
            script = script.removeprefix(style)
        letters = [chr(code) for code in TTFont(path, lazy=True).getBestCmap() if code > 0x2E0 and chr(code).isalpha()]
        if script not in OTHERS and len(letters) > 20:
            groups[script].append((path, letters))
    return groups


def draw_page(fonts):
    """A page of random words in one font."""
    path, letters = random.choice(fonts)
    size = round(11 * (48 / 11) ** random.random())
    is_light = random.random() < 0.7
    ground = "white" if is_light else tuple(random.randrange(90) for _ in range(3))
    ink = "black" if is_light else "white"
    if is_light and random.random() < 0.5:
        ink = tuple(random.randrange(100) for _ in range(3))
    page = Image.new("RGB", (SIDE, SIDE), ground)
    for y in range(4, SIDE, round(size * random.uniform(1.2, 1.7))):
        words = ("".join(random.choices(letters, k=random.randint(2, 8))) for _ in range(SIDE // (2 * size)))
        ImageDraw.Draw(page).text((8, y), " ".join(words), font=ImageFont.truetype(path, size), fill=ink)
    return page


def draw_sheet(sprites):
    """Figures of 72 x 72 pixels on a plain ground."""
    with Image.open(random.choice(terrain)) as tile:
        grounds = tile.convert("RGB").resize((1, 1)).getpixel((0, 0)), "white", (40, 40, 60)
    sheet = Image.new("RGB", (SIDE, SIDE), random.choice(grounds))
    for y in range(0, SIDE - 71, 73):
        for x in range(0, SIDE - 71, 73):
            sprite = Image.open(random.choice(sprites)).convert("RGBA")
            sheet.paste(sprite, (x, y), sprite)
    return sheet


def split(groups):
    """A fifth of the groups for the test, the others to train on."""
    names = sorted(groups)
    random.shuffle(names)
    print(f"seed {SEED}, test:", *sorted(names[: len(names) // 5]))
    return {"test": names[: len(names) // 5], "train": names[len(names) // 5 :]}


def save(images, folder):
    folder.mkdir(parents=True)
    for number, image in enumerate(images):
        image.save(folder / f"{number:04}.png")


units, stamps = defaultdict(list), defaultdict(list)
for path in sorted(packages.rglob("core/images/units/*/**/*.png")):
    if Image.open(path).size == (72, 72):
        units[path.parts[path.parts.index("units") + 1]].append(path)
for path in sorted(packages.rglob("stamps/**/*.png")):
    stamps["/".join(path.parts[-3:-1])].append(path)
terrain = sorted(packages.rglob("core/images/terrain/*/*.png"))
maps = {path.stem: [path] for path in packages.rglob("usr/share/kgeography/*.png")}
scripts, units = find_scripts(), {name: paths for name, paths in units.items() if len(paths) > 30}
for kind, draw, groups in (("scripts", draw_page, scripts), ("sprites", draw_sheet, units)):
    for part, names in split(groups).items():
        save((draw(groups[random.choice(names)]) for _ in range(COUNTS[part])), out / kind / part)
for kind, groups in (("stamps", stamps), ("maps", maps)):
    for part, names in split(groups).items():
        paths = [path for name in names for path in groups[name]]
        chosen = (to_rgb(Image.open(path)) for path in random.sample(paths, min(len(paths), 2 * COUNTS[part])))
        save((image for image in chosen if min(image.size) >= 128 and max(image.size) <= 3000), out / kind / part)
PY
    mv "$work/kinds.partial" "$work/kinds"
fi

accelerate launch --cpu --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no training/train.py \
    "training/configs/$recipe.yaml" --pretrained_model_name_or_path bundled --train_data_dir "$work/kinds/$kind/train" --mix_data_dir "$photos" \
    --validation_data_dir "$work/kinds/$kind/test" "$held_out" --output_dir "$work/$recipe-$kind" --dataloader_num_workers 0 "$@"

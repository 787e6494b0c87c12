"""Makes an image set of scenes: emoji on plain grounds, with captions.

    python training/bundled/make_scenes.py OUT --count 80000

A scene shows one object in one of two sizes, two to four of a kind, or two objects beside or above one another,
each shifted by 4 pixels. The objects come from Noto Color Emoji (Debian: `apt install fonts-noto-color-emoji`;
SIL OFL 1.1). `scene_captions.py` writes the captions. One in ten pairs of objects occurs only in the split `test`, and
one in four pairs of a phrase and a frame in no caption.
"""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random

import datasets
from PIL import Image, ImageDraw, ImageFont
from scene_captions import CaptionWriter, Recipe, plain_phrases

from svqvae_hf.trainer.scripts import one_line_errors, script_parser

SIDE = 96  # pixels of a scene
FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
FONT_SIZE = 109  # the only size of the font
GROUNDS = {
    **{"white": (255, 255, 255), "yellow": (255, 230, 120), "green": (150, 210, 130), "blue": (140, 190, 240)},
    **{"pink": (250, 180, 200), "grey": (190, 190, 195), "orange": (250, 180, 110), "purple": (190, 160, 230)},
    **{"red": (225, 85, 80), "black": (45, 45, 50)},
}
OBJECTS = dict(
    each.split(":")
    for each in (
        "airplane:✈ avocado:🥑 balloon:🎈 banana:🍌 bear:🐻 bell:🔔 bicycle:🚲 bus:🚌 camera:📷 carrot:🥕 "
        "cat:🐈 cow:🐄 crab:🦀 croissant:🥐 crown:👑 dog:🐕 dolphin:🐬 drum:🥁 duck:🦆 eagle:🦅 elephant:🐘 "
        "flamingo:🦩 fox:🦊 frog:🐸 giraffe:🦒 guitar:🎸 hamburger:🍔 hedgehog:🦔 helicopter:🚁 horse:🐎 "
        "house:🏠 key:🔑 lemon:🍋 lion:🦁 lizard:🦎 locomotive:🚂 mushroom:🍄 octopus:🐙 owl:🦉 panda:🐼 "
        "parrot:🦜 pear:🍐 penguin:🐧 pig:🐖 pineapple:🍍 pizza:🍕 rabbit:🐇 robot:🤖 rocket:🚀 rooster:🐓 "
        "rose:🌹 sailboat:⛵ shark:🦈 snail:🐌 spider:🕷 sunflower:🌻 taxi:🚕 teapot:🫖 tiger:🐅 "
        "tractor:🚜 tulip:🌷 turtle:🐢 whale:🐋 zebra:🦓"
    ).split()
)
SLOTS = {  # centre, and longer side of the object, in pixels
    "small": (48, 48, 40),
    "large": (48, 48, 60),
    "left": (24, 48, 40),
    "right": (72, 48, 40),
    "top": (48, 24, 40),
    "bottom": (48, 72, 40),
    "top left": (24, 24, 40),
    "top right": (72, 24, 40),
    "bottom left": (24, 72, 40),
    "bottom right": (72, 72, 40),
}
ONE, TWO, THREE = ("small", "large"), ("left", "right"), ("top left", "top right", "bottom")
FOUR = (*THREE[:2], "bottom left", "bottom right")
RELATIONS = (TWO, ("top", "bottom"))
WRITER = CaptionWriter(Recipe())
NUMBERS = {2: "two", 3: "three", 4: "four"}
CAPTIONS = 4  # of each scene, after the plain one
SHIFTS = (-4, 4)  # pixels; they differ by the 8 of an id, so ids repeat
PAIRS = [frozenset(pair) for pair in itertools.combinations(OBJECTS, 2)]
HELD_OUT_PAIRS = frozenset(Random(0).sample(PAIRS, len(PAIRS) // 10))


@dataclass(frozen=True)
class Scene:
    """A ground, and objects in their slots, in reading order."""

    ground: str
    objects: tuple[tuple[str, str], ...]

    @property
    def held_out(self) -> bool:
        """Whether the scene shows a held-out pair of objects."""
        return frozenset(name for _, name in self.objects) in HELD_OUT_PAIRS

    @property
    def kind(self) -> str:
        """Its key in the wordings."""
        slots = [slot for slot, _ in self.objects]
        if len(slots) == 1:
            return slots[0]
        if len(set(self.names)) == 1:
            return NUMBERS[len(slots)]
        return " ".join(slots)

    @property
    def names(self) -> list[str]:
        """Its objects."""
        return [name for _, name in self.objects]

    def plain(self) -> list[str]:
        """Plain captions that the scene fulfils, with and without its ground, the shortest full one first."""
        captions = []
        for phrase in plain_phrases(self.kind, self.names):
            captions += [f"{phrase} on {self.ground}", phrase]
        return captions

    def means(self, plain: str) -> bool:
        """Whether the scene fulfils a plain caption."""
        return plain in self.plain()

    def caption(self, random: Random, held_out: bool = False, writer: CaptionWriter = WRITER) -> str:
        """A caption in English; see [`CaptionWriter.write`]."""
        return writer.write(self.kind, self.names, self.ground, random, held_out)

    @classmethod
    def draw(cls, random: Random, held_out: bool) -> "Scene":
        """Draws a scene; `held_out` ones show a held-out pair."""
        names, kind = random.sample(list(OBJECTS), 2), random.random()
        slots: tuple[str, ...] = random.choice(RELATIONS)
        if not held_out and kind < 0.3:
            names, slots = names[:1], tuple(random.choices(ONE, (1, 4)))  # only here are objects large
        elif not held_out and kind < 0.5:
            slots = random.choice((TWO, THREE, FOUR))
            names = names[:1] * len(slots)
        scene = cls(random.choice(list(GROUNDS)), tuple(zip(slots, names, strict=True)))
        return scene if scene.held_out == held_out else cls.draw(random, held_out)

    def render(self, objects: Mapping[str, Image.Image], random: Random | None = None) -> Image.Image:
        """Draws the picture from objects in RGBA, shifted at random, or not at all."""
        picture = Image.new("RGB", (SIDE, SIDE), GROUNDS[self.ground])
        for slot, name in self.objects:
            x, y, side = SLOTS[slot]
            shape = objects[name].copy()
            shape.thumbnail((side, side), Image.Resampling.LANCZOS)
            dx, dy = (random.choice(SHIFTS) if random else 0 for _ in "xy")
            picture.paste(shape, (x + dx - shape.width // 2, y + dy - shape.height // 2), shape)
        return picture


def load_objects(font: Path = FONT) -> dict[str, Image.Image]:
    """Draws all objects, in RGBA and cropped to what is seen.

    Raises:
        FileNotFoundError: If the font is not there.
    """
    if not font.is_file():
        raise FileNotFoundError(
            f"`{font}` must be NotoColorEmoji.ttf. Install fonts-noto-color-emoji or pass `--font`."
        )
    face, shapes = ImageFont.truetype(font, FONT_SIZE), {}
    for name, character in OBJECTS.items():
        shape = Image.new("RGBA", (160, 160))
        ImageDraw.Draw(shape).text((12, 12), character, font=face, embedded_color=True)
        shapes[name] = shape.crop(shape.getbbox())
    return shapes


def make_rows(seed: int, count: int, held_out: bool, objects: Mapping[str, Image.Image]) -> Iterator[dict]:
    """Rows of a split."""
    for number in range(count):
        random = Random(f"{seed} {number}")
        scene = Scene.draw(random, held_out)
        image, plain = scene.render(objects, random), scene.plain()[0]
        captions = [plain, *(scene.caption(random) for _ in range(CAPTIONS))]
        yield {"image": image, "caption": captions, "short_caption": plain}


def main() -> None:
    """Reads the arguments and writes one Parquet file per split."""
    parser = script_parser(__doc__)
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--count", type=int, default=80000, help="scenes in the split train")
    parser.add_argument("--font", type=Path, default=FONT, help="NotoColorEmoji.ttf (default: Debian's)")
    options = parser.parse_args()
    objects = load_objects(options.font)
    options.out.mkdir(parents=True)
    text = datasets.Value("string")
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.List(text), "short_caption": text})
    for seed, (split, count) in enumerate({"train": options.count, "validation": 1000, "test": 1000}.items()):
        arguments = {"seed": seed, "count": count, "held_out": split == "test", "objects": objects}
        rows = datasets.Dataset.from_generator(make_rows, features, gen_kwargs=arguments)
        rows.to_parquet(options.out / f"{split}.parquet")


if __name__ == "__main__":
    with one_line_errors():
        main()

"""Grades a generator on scenes: `python benchmarks/scenes.py MODEL SCENES`.

MODEL is a language model with image tokens, or a next-scale pipeline that reads captions. SCENES is the folder of
`training/bundled/make_scenes.py`. The grader reads the ground from the edge of a picture, and then
finds the slots, shifts and objects with the smallest squared error. First it reads real scenes after the tokenizer,
which states its own errors. Then it grades one picture per caption:

- seen pairs: scenes of pairs of objects that training shows
- single objects, and several of a kind
- held-out pairs
- held-out wordings: of held-out pairs
- edited: one object of a held-out pair replaced by another one, which alone counts under "objects"
- everyday English: the prompts of `scene_prompts.tsv`, by a writer of the templates, though no template contains them,
  with plain captions of what must be seen; only the whole scene is graded
- strangers' prompts: of two writers who saw only the lists of objects, grounds and layouts

For a language model, the second table grades captions of real scenes; only the plain caption is right. It also has
the bits per id of the model, of a table of frequencies, and of a table of pairs of neighbours.
"""

import sys
import time
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

import datasets
import numpy as np
import torch
from diffusers.utils import make_image_grid
from measuring import Row, make_parser, parse_options, report
from PIL import Image

from svqvae_cli.loading import load_generator
from svqvae_hf import SVQVAENextScalePipeline
from svqvae_hf.language.image_language_model import ImageLanguageModel

sys.path.insert(0, str(Path(__file__).parent.parent / "training" / "bundled"))

from make_scenes import FONT, FOUR, GROUNDS, OBJECTS, ONE, RELATIONS, SHIFTS, SIDE, SLOTS, THREE, Scene, load_objects

Generator = ImageLanguageModel | SVQVAENextScalePipeline

KINDS = ("seen pairs", "single objects", "several of a kind")
LAYOUTS = [*((slot,) for slot in ONE), *RELATIONS, THREE, FOUR]
PROMPTS = Path(__file__).with_name("scene_prompts.tsv")
PROMPT_SETS = {
    "everyday English": PROMPTS,
    "stranger 1": PROMPTS.with_name("scene_prompts_stranger_1.tsv"),
    "stranger 2": PROMPTS.with_name("scene_prompts_stranger_2.tsv"),
}
BATCH = 32
TABLE_SCENES = 2000


class Grader:
    """Reads the scene from a picture.

    Args:
        objects (`Mapping[str, Image.Image]`): Objects of `load_objects`.
    """

    def __init__(self, objects: Mapping[str, Image.Image]):
        self.templates = {}
        for ground in GROUNDS:
            for slot in ONE:
                pictures = [Scene(ground, ((slot, name),)).render(objects) for name in OBJECTS]
                windows = [window(offsets(picture, ground), slot) for picture in pictures]
                self.templates[ground, SLOTS[slot][2]] = np.stack(windows)

    def __call__(self, picture: Image.Image) -> Scene:
        """Returns the scene that fits a picture best."""
        pixels = np.asarray(picture.convert("RGB"))
        edge = np.median(np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]]), axis=0)
        ground = min(GROUNDS, key=lambda name: np.square(edge - GROUNDS[name]).sum())
        found = {slot: self.find(offsets(picture, ground), ground, slot) for slot in SLOTS}
        slots = min(LAYOUTS, key=lambda layout: sum(found[slot][0] for slot in layout))
        return Scene(ground, tuple((slot, found[slot][1]) for slot in slots))

    def find(self, pixels: np.ndarray, ground: str, slot: str) -> tuple[float, str]:
        """Finds the object that fits a slot best. Returns its squared error minus the bare ground's, and its name."""
        templates = self.templates[ground, SLOTS[slot][2]]
        windows = np.stack([window(pixels, slot, dx, dy) for dx in SHIFTS for dy in SHIFTS], axis=1)
        errors = np.square(templates).sum(1) - 2 * (templates @ windows).max(1)
        return float(errors.min()), list(OBJECTS)[int(errors.argmin())]


def offsets(picture: Image.Image, ground: str) -> np.ndarray:
    """Differences of the pixels from a ground, `(height, width, 3)`; 1 is white minus black."""
    return (np.asarray(picture.convert("RGB"), np.float32) - np.float32(GROUNDS[ground])) / 255


def window(pixels: np.ndarray, slot: str, dx: int = 0, dy: int = 0) -> np.ndarray:
    """Pixels of a shifted slot, in one row."""
    x, y, side = SLOTS[slot]
    top, left = y + dy - side // 2, x + dx - side // 2
    return pixels[top : top + side, left : left + side].ravel()


def grade(name: str, seen: Sequence[Scene], asked: Sequence[Scene], seconds: float = 0.0) -> Row:
    """Percentages of what was asked for, and seconds per picture."""
    pairs = list(zip(seen, asked, strict=True))
    objects = [item in own.objects for own, other in pairs for item in other.objects]
    slots = [[slot for slot, _ in own.objects] == [slot for slot, _ in other.objects] for own, other in pairs]
    grounds = [own.ground == other.ground for own, other in pairs]
    shares = {"scene": [own == other for own, other in pairs], "objects": objects, "places": slots, "ground": grounds}
    row = {"pictures": name} | {key: percent(values) for key, values in shares.items()}
    return row | {"s per image": f"{seconds / len(pairs):.2f}"}


def group(scene: Scene) -> str:
    """Which of `KINDS` a scene is."""
    if len(scene.objects) == 1:
        return "single objects"
    if len(set(scene.names)) == 1:
        return "several of a kind"
    return "seen pairs"


def read_prompts(path: Path) -> tuple[list[str], list[str]]:
    """Prompts, and plain captions of what must be seen."""
    prompts = []
    meanings = []
    for line in path.read_text("utf-8").splitlines():
        prompt, meaning = line.split("\t")
        prompts.append(prompt)
        meanings.append(meaning)
    return prompts, meanings


def percent(values: Sequence[bool]) -> str:
    """Share of what is true."""
    return f"{100 * np.mean(values):.1f}"


def draw_batch(model: Generator, captions: Sequence[str], options: Namespace, **arguments: Any) -> list[Image.Image]:
    """One picture per caption."""
    for name in ("guidance_scale", "temperature", "top_k"):
        if getattr(options, name) is not None:
            arguments[name] = getattr(options, name)
    if isinstance(model, ImageLanguageModel):
        return model.draw(captions, **arguments)
    return model(prompt=captions, **arguments).images


def draw(model: Generator, captions: Sequence[str], options: Namespace) -> tuple[list[Image.Image], float]:
    """One picture per caption, and the seconds that all took."""
    pictures, start = [], time.perf_counter()
    for index in range(0, len(captions), BATCH):
        batch = captions[index : index + BATCH]
        generators = [torch.Generator().manual_seed(options.seed + index + number) for number in range(len(batch))]
        pictures += draw_batch(model, batch, options, generator=generators)
    return pictures, time.perf_counter() - start


def edit(
    model: Generator, pictures: Sequence[Image.Image], scenes: Sequence[Scene], options: Namespace
) -> tuple[list[Image.Image], list[Scene], list[tuple[str, str]]]:
    """Replaces one object of each pair by another one: the pictures, what was asked for, and the new objects."""
    random, results, asked, added = Random(options.seed), [], [], []
    for start in range(0, len(scenes), BATCH):
        masks = []
        for scene in scenes[start : start + BATCH]:
            replaced, _ = random.choice(scene.objects)
            new = random.choice([name for name in OBJECTS if name not in dict(scene.objects).values()])
            objects = ((slot, new if slot == replaced else name) for slot, name in scene.objects)
            asked.append(Scene(scene.ground, tuple(objects)))
            added.append((replaced, new))
            x, y, _ = SLOTS[replaced]
            masks.append(Image.new("L", (SIDE, SIDE)))
            masks[-1].paste(255, (x - 24, y - 24, x + 24, y + 24))
        captions = [scene.plain()[0] for scene in asked[start:]]
        originals = pictures[start : start + BATCH]
        generator = torch.Generator().manual_seed(options.seed + start)
        results += draw_batch(model, captions, options, generator=generator, image=originals, mask_image=masks)
    return results, asked, added


@torch.inference_mode()
def encode(model: Generator, pictures: Sequence[Image.Image]) -> torch.Tensor:
    """Ids `(pictures, h, w)`."""
    samples = model.image_processor([*pictures])["pixel_values"].split(BATCH)
    return torch.cat([model.vqvae.encode_tokens(sample) for sample in samples])


def nearest(pictures: Sequence[Image.Image], rows: datasets.Dataset) -> list[Image.Image]:
    """Training scenes with the smallest squared errors."""
    asked = np.stack([np.float32(picture).ravel() for picture in pictures]) / 255
    best, found = np.full(len(pictures), np.inf), [0] * len(pictures)
    for start in range(0, len(rows), TABLE_SCENES):
        batch = rows[start : start + TABLE_SCENES]["image"]
        shown = np.stack([np.float32(picture).ravel() for picture in batch]) / 255
        errors = np.square(shown).sum(1) - 2 * asked @ shown.T
        for index in np.flatnonzero(errors.min(1) < best):
            best[index], found[index] = errors[index].min(), start + int(errors[index].argmin())
    return [rows[index]["image"] for index in found]


@torch.inference_mode()
def bits_per_id(model: ImageLanguageModel, captions: Sequence[str], grids: Sequence[torch.Tensor]) -> float:
    """Mean bits of an id after its caption and the ids before."""
    vocabulary, processor, bits = model.processor.vocabulary, model.processor, []
    for caption, ids in zip(captions, grids, strict=True):
        asked = processor.apply_chat_template([{"role": "user", "content": caption}], add_generation_prompt=True)
        tokens = torch.tensor([processor.tokenizer(asked).input_ids + vocabulary.encode(ids)[:-1]])
        logits = model.language_model(input_ids=tokens).logits[0, -ids.numel() - 1 : -1].float()
        logits = logits[:, vocabulary.first_token : vocabulary.begin]
        bits.append(-logits.log_softmax(-1).gather(1, ids.view(-1, 1)).mean() / np.log(2))
    return float(torch.stack(bits).mean())


def table_bits(train: torch.Tensor, test: torch.Tensor, codes: int) -> tuple[float, float]:
    """Bits per id of ids `(n, h, w)` by a table of frequencies, and by a table of pairs of neighbours."""
    counts = torch.bincount(train.flatten(), minlength=codes).double() + 0.1
    single = counts / counts.sum()
    pairs = torch.bincount((train[..., :-1] * codes + train[..., 1:]).flatten(), minlength=codes**2).view(codes, codes)
    before, after = test[..., :-1].flatten(), test[..., 1:].flatten()
    mixed = (pairs[before, after] + 8 * single[after]) / (pairs.sum(1)[before] + 8)
    return float(-single[test].log2().mean()), float(-mixed.log2().mean())


def main() -> None:
    """Prints one table."""
    parser = make_parser(__doc__, rounds=1)
    parser.add_argument("model", help="folder or Hub id of the generator")
    parser.add_argument("scenes", help="folder of make_scenes.py")
    parser.add_argument("--font", type=Path, default=FONT, help="NotoColorEmoji.ttf")
    parser.add_argument("--count", type=int, default=256, help="captions of each kind")
    parser.add_argument("--guidance-scale", type=float, help="default: the model's")
    parser.add_argument("--temperature", type=float, help="default: the model's")
    parser.add_argument("--top-k", type=int, help="default: the model's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sheet", type=Path, help="PNG of the first 64 pictures of held-out pairs")
    parser.add_argument("--neighbours", type=Path, help="PNG of the first 16, each above the nearest training scene")
    options, machine = parse_options(parser, "cpu")
    if not 64 <= options.count <= 1000:
        parser.error(f"--count must be in [64, 1000], got {options.count}.")
    grader, model = Grader(load_objects(options.font)), load_generator(options.model, "cpu", "float32")
    random = Random(options.seed)
    sets = datasets.load_dataset(options.scenes)
    chosen, scenes = {}, {}
    for seed, name in enumerate(("validation", "test"), start=1):
        numbers = random.sample(range(1000), options.count)
        chosen[name] = sets[name].select(numbers)
        scenes[name] = [Scene.draw(Random(f"{seed} {number}"), name == "test") for number in numbers]
    drawn = [Scene.draw(random, held_out=False) for _ in range(8 * options.count)]
    asked = {name: [scene for scene in drawn if group(scene) == name][: options.count] for name in KINDS}
    asked["held-out pairs"] = scenes["test"]
    captions = {name: [scene.plain()[0] for scene in each] for name, each in asked.items()}
    asked["held-out wordings"] = scenes["test"]
    captions["held-out wordings"] = [scene.caption(random, held_out=True) for scene in scenes["test"]]
    grids = {name: encode(model, rows["image"]) for name, rows in chosen.items()}
    with torch.inference_mode():
        again = model.image_processor.postprocess(model.vqvae.decode_tokens(grids["test"]))
    grades = [grade("real, after the tokenizer", [*map(grader, again)], scenes["test"])]
    for name, texts in captions.items():
        pictures, seconds = draw(model, texts, options)
        grades.append(grade(name, [*map(grader, pictures)], asked[name], seconds))
        if options.sheet and name == "held-out pairs":
            make_image_grid(pictures[:64], rows=4, cols=16).save(options.sheet)
        if options.neighbours and name == "held-out pairs":
            shown = pictures[:16] + nearest(pictures[:16], sets["train"])
            make_image_grid(shown, rows=2, cols=16).save(options.neighbours)
    pictures, edited, added = edit(model, chosen["test"]["image"], scenes["test"], options)
    found = [*map(grader, pictures)]
    new = [item in scene.objects for scene, item in zip(found, added, strict=True)]
    grades.append(grade("edited", found, edited) | {"objects": percent(new)})
    for name, path in PROMPT_SETS.items():
        prompts, meanings = read_prompts(path)
        pictures, _ = draw(model, prompts, options)
        right = [grader(picture).means(meaning) for picture, meaning in zip(pictures, meanings, strict=True)]
        grades.append(dict.fromkeys(grades[0], "") | {"pictures": name, "scene": percent(right)})
    tables = {"Pictures of captions": grades}

    if isinstance(model, ImageLanguageModel):
        shown = encode(model, sets["train"].select(range(TABLE_SCENES))["image"])
        rows = []
        for name, split in (("seen", "validation"), ("held-out pairs", "test")):
            written = model.caption(chosen[split]["image"])
            right = [text == scene.plain()[0] for text, scene in zip(written, scenes[split], strict=True)]
            bits = bits_per_id(model, chosen[split]["short_caption"], grids[split])
            single, pairs = table_bits(shown, grids[split], model.processor.vocabulary.codebook_size)
            rows.append(
                {
                    "scenes": name,
                    "captions right, %": percent(right),
                    "bits per id": f"{bits:.2f}",
                    "by frequencies": f"{single:.2f}",
                    "by pairs": f"{pairs:.2f}",
                }
            )
        tables["Captions of pictures"] = rows
    report(options, machine, tables)


if __name__ == "__main__":
    main()

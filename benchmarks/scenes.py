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
- strangers' prompts: of four writers who saw only the lists of objects, grounds and layouts

For a language model, the second table grades captions of real scenes; only the plain caption is right. It also has
the bits per id of the model, of a table of frequencies, and of a table of pairs of neighbours.
"""

import math
import sys
import time
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import datasets
import numpy as np
import torch
import torch.nn.functional as F
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
STRANGERS = (1, 2, 3, 4)
PROMPT_SETS = {"everyday English": PROMPTS}
for number in STRANGERS:
    PROMPT_SETS[f"stranger {number}"] = PROMPTS.with_name(f"scene_prompts_stranger_{number}.tsv")
BATCH = 32
TABLE_SCENES = 2000


class Grader:
    """Reads the scene from a picture.

    Args:
        objects (`Mapping[str, Image.Image]`): Objects of `load_objects`.
    """

    def __init__(self, objects: Mapping[str, Image.Image]):
        self.templates = {}  # pixels of all objects `(objects, pixels)`, by the ground and the side of the slot
        for ground in GROUNDS:
            for slot in ONE:
                windows = []
                for name in OBJECTS:
                    picture = Scene(ground, ((slot, name),)).render(objects)
                    windows.append(window(offsets(picture, ground), slot))
                self.templates[ground, side_of(slot)] = np.stack(windows)

    def __call__(self, picture: Image.Image) -> Scene:
        """Returns the scene that fits a picture best."""
        ground = read_ground(picture)
        pixels = offsets(picture, ground)
        errors = {}
        names = {}
        for slot in SLOTS:
            errors[slot], names[slot] = self.find(pixels, ground, slot)

        def error_of(layout: Sequence[str]) -> float:
            return sum(errors[slot] for slot in layout)

        slots = min(LAYOUTS, key=error_of)
        return Scene(ground, tuple((slot, names[slot]) for slot in slots))

    def find(self, pixels: np.ndarray, ground: str, slot: str) -> tuple[float, str]:
        """Finds the object that fits a slot best. Returns its squared error minus the bare ground's, and its name."""
        templates = self.templates[ground, side_of(slot)]  # (objects, pixels)
        windows = []
        for dx in SHIFTS:
            for dy in SHIFTS:
                windows.append(window(pixels, slot, dx, dy))
        products = templates @ np.stack(windows, axis=1)  # (objects, shifts)
        errors = np.square(templates).sum(1) - 2 * products.max(1)
        best = int(errors.argmin())
        return float(errors[best]), list(OBJECTS)[best]


def read_ground(picture: Image.Image) -> str:
    """The ground whose colour is nearest to the edge of a picture."""
    pixels = np.asarray(picture.convert("RGB"))
    edges = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    colour = np.median(edges, axis=0)
    distances = {name: np.square(colour - ground).sum() for name, ground in GROUNDS.items()}
    return min(distances, key=distances.__getitem__)


def offsets(picture: Image.Image, ground: str) -> np.ndarray:
    """Differences of the pixels from a ground, `(height, width, 3)`; 1 is white minus black."""
    return (np.asarray(picture.convert("RGB"), np.float32) - np.float32(GROUNDS[ground])) / 255


def window(pixels: np.ndarray, slot: str, dx: int = 0, dy: int = 0) -> np.ndarray:
    """Pixels of a shifted slot, in one row."""
    x, y, side = SLOTS[slot]
    top = y + dy - side // 2
    left = x + dx - side // 2
    return pixels[top : top + side, left : left + side].ravel()


def side_of(slot: str) -> int:
    """Side of a slot in pixels."""
    return SLOTS[slot][2]


def grade(name: str, seen_scenes: Sequence[Scene], asked_scenes: Sequence[Scene], seconds: float = 0.0) -> Row:
    """Percentages of what was asked for, and seconds per picture."""
    scenes: list[bool] = []
    objects: list[bool] = []
    places: list[bool] = []
    grounds: list[bool] = []
    for seen, asked in zip(seen_scenes, asked_scenes, strict=True):
        scenes.append(seen == asked)
        objects += [item in seen.objects for item in asked.objects]
        places.append(slots_of(seen) == slots_of(asked))
        grounds.append(seen.ground == asked.ground)
    return {
        "pictures": name,
        "scene": percent(scenes),
        "objects": percent(objects),
        "places": percent(places),
        "ground": percent(grounds),
        "s per image": f"{seconds / len(scenes):.2f}",
    }


def slots_of(scene: Scene) -> list[str]:
    """Slots of the objects of a scene."""
    return [slot for slot, _ in scene.objects]


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
    pictures = []
    start_time = time.perf_counter()
    for start in range(0, len(captions), BATCH):
        batch = captions[start : start + BATCH]
        seeds = range(options.seed + start, options.seed + start + len(batch))
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        pictures += draw_batch(model, batch, options, generator=generators)
    return pictures, time.perf_counter() - start_time


@dataclass
class Edit:
    """An object of a scene that another one shall replace.

    Args:
        scene (`Scene`): Scene that is asked for.
        slot (`str`): Slot of the object.
        name (`str`): Name of the new object.
    """

    scene: Scene
    slot: str
    name: str

    @classmethod
    def draw(cls, scene: Scene, random: Random) -> "Edit":
        """Chooses an object of a scene, and another one in its place."""
        slot, _ = random.choice(scene.objects)
        new_name = random.choice([name for name in OBJECTS if name not in scene.names])
        objects = dict(scene.objects) | {slot: new_name}
        return cls(Scene(scene.ground, tuple(objects.items())), slot, new_name)

    def mask(self) -> Image.Image:
        """White where the picture is drawn anew."""
        x, y, _ = SLOTS[self.slot]
        mask = Image.new("L", (SIDE, SIDE))
        mask.paste(255, (x - 24, y - 24, x + 24, y + 24))
        return mask


def draw_edits(
    model: Generator, pictures: Sequence[Image.Image], edits: Sequence[Edit], options: Namespace
) -> list[Image.Image]:
    """Draws a part of each picture anew."""
    edited = []
    for start in range(0, len(edits), BATCH):
        batch = edits[start : start + BATCH]
        captions = [edit.scene.plain()[0] for edit in batch]
        masks = [edit.mask() for edit in batch]
        originals = pictures[start : start + BATCH]
        generator = torch.Generator().manual_seed(options.seed + start)
        edited += draw_batch(model, captions, options, generator=generator, image=originals, mask_image=masks)
    return edited


@torch.inference_mode()
def encode(model: Generator, pictures: Sequence[Image.Image]) -> torch.Tensor:
    """Ids `(pictures, h, w)`."""
    samples = model.image_processor(list(pictures))["pixel_values"].split(BATCH)
    return torch.cat([model.vqvae.encode_tokens(sample) for sample in samples])


def nearest(pictures: Sequence[Image.Image], rows: datasets.Dataset) -> list[Image.Image]:
    """Training scenes with the smallest squared errors."""
    pixels = pixels_of(pictures)
    smallest_errors = np.full(len(pictures), np.inf)
    nearest_rows = [0] * len(pictures)
    for start in range(0, len(rows), TABLE_SCENES):
        scenes = pixels_of(rows[start : start + TABLE_SCENES]["image"])
        errors = np.square(scenes).sum(1) - 2 * pixels @ scenes.T  # (pictures, scenes), up to a number per picture
        for picture in np.flatnonzero(errors.min(1) < smallest_errors):
            smallest_errors[picture] = errors[picture].min()
            nearest_rows[picture] = start + int(errors[picture].argmin())
    return [rows[row]["image"] for row in nearest_rows]


def pixels_of(pictures: Sequence[Image.Image]) -> np.ndarray:
    """Pixels `(pictures, values)` in [0, 1]."""
    return np.stack([np.float32(picture).ravel() for picture in pictures]) / 255


@torch.inference_mode()
def bits_per_id(model: ImageLanguageModel, captions: Sequence[str], grids: Sequence[torch.Tensor]) -> float:
    """Mean bits of an id after its plain caption and the ids before."""
    processor = model.processor
    vocabulary = processor.vocabulary
    nats = []
    for caption, ids in zip(captions, grids, strict=True):
        prompt = processor.apply_chat_template([{"role": "user", "content": caption}], add_generation_prompt=True)
        if model.rewrites:
            prompt += caption
        tokens = processor.tokenizer(prompt).input_ids + vocabulary.encode(ids)[:-1]
        logits = model.language_model(input_ids=torch.tensor([tokens])).logits[0]  # (tokens, vocab_size)
        logits_of_ids = logits[
            -ids.numel() - 1 : -1, vocabulary.first_token : vocabulary.begin
        ].float()  # (ids, codes)
        nats.append(F.cross_entropy(logits_of_ids, ids.flatten()))
    return float(torch.stack(nats).mean()) / math.log(2)


def table_bits(train: torch.Tensor, test: torch.Tensor, codes: int) -> tuple[float, float]:
    """Bits per id of ids `(n, h, w)` by a table of frequencies, and by a table of pairs of neighbours."""
    counts = torch.bincount(train.flatten(), minlength=codes).double() + 0.1
    frequencies = counts / counts.sum()  # (codes,)
    pairs_of_ids = train[..., :-1] * codes + train[..., 1:]  # a number per pair of neighbours
    pairs = torch.bincount(pairs_of_ids.flatten(), minlength=codes**2).view(codes, codes)
    left = test[..., :-1].flatten()
    right = test[..., 1:].flatten()
    probabilities = (pairs[left, right] + 8 * frequencies[right]) / (pairs.sum(1)[left] + 8)
    return float(-frequencies[test].log2().mean()), float(-probabilities.log2().mean())


@dataclass
class ChosenScenes:
    """Scenes of a split, which training does not show.

    Args:
        rows (`datasets.Dataset`): Rows of the scenes, with `image` and `short_caption`.
        scenes (`list[Scene]`): The scenes.
        grids (`torch.Tensor` of shape `(scenes, h, w)`): Ids of their pictures.
    """

    rows: datasets.Dataset
    scenes: list[Scene]
    grids: torch.Tensor


def choose_scenes(
    model: Generator, rows: datasets.Dataset, seed: int, held_out: bool, numbers: Sequence[int]
) -> ChosenScenes:
    """Chooses scenes of a split by their numbers. `seed` is the one that make_scenes.py drew the split with."""
    chosen_rows = rows.select(numbers)
    scenes = [Scene.draw(Random(f"{seed} {number}"), held_out) for number in numbers]
    return ChosenScenes(chosen_rows, scenes, encode(model, chosen_rows["image"]))


def read_options() -> tuple[Namespace, Row]:
    """Options of the command line, and a description of the machine."""
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
    return options, machine


def grade_tokenizer(model: Generator, grader: Grader, test: ChosenScenes) -> Row:
    """Grades real scenes after the tokenizer, whose errors are its own."""
    with torch.inference_mode():
        pictures = model.image_processor.postprocess(model.vqvae.decode_tokens(test.grids))
    return grade("real, after the tokenizer", [grader(picture) for picture in pictures], test.scenes)


def grade_edits(model: Generator, grader: Grader, test: ChosenScenes, options: Namespace) -> Row:
    """Grades pictures in which an object is replaced. Under "objects" the new one alone counts."""
    random = Random(options.seed)
    edits = [Edit.draw(scene, random) for scene in test.scenes]
    pictures = draw_edits(model, test.rows["image"], edits, options)
    seen = [grader(picture) for picture in pictures]
    has_new_object = [(edit.slot, edit.name) in scene.objects for scene, edit in zip(seen, edits, strict=True)]
    return grade("edited", seen, [edit.scene for edit in edits]) | {"objects": percent(has_new_object)}


def grade_prompts(model: Generator, grader: Grader, path: Path, options: Namespace) -> str:
    """Percentage of the prompts of a file whose pictures show what they mean."""
    prompts, meanings = read_prompts(path)
    pictures, _ = draw(model, prompts, options)
    is_right = [grader(picture).means(meaning) for picture, meaning in zip(pictures, meanings, strict=True)]
    return percent(is_right)


def rate_captions(model: ImageLanguageModel, name: str, test: ChosenScenes, train_grids: torch.Tensor) -> Row:
    """Grades the captions that a language model writes, and states bits per id."""
    captions = model.caption(test.rows["image"])
    is_right = [caption == scene.plain()[0] for caption, scene in zip(captions, test.scenes, strict=True)]
    bits = bits_per_id(model, test.rows["short_caption"], test.grids)
    by_frequencies, by_pairs = table_bits(train_grids, test.grids, model.processor.vocabulary.codebook_size)
    return {
        "scenes": name,
        "captions right, %": percent(is_right),
        "bits per id": f"{bits:.2f}",
        "by frequencies": f"{by_frequencies:.2f}",
        "by pairs": f"{by_pairs:.2f}",
    }


def main() -> None:
    """Prints one table of pictures and, for a language model, one of captions."""
    options, machine = read_options()
    grader = Grader(load_objects(options.font))
    model = load_generator(options.model, "cpu", "float32")
    random = Random(options.seed)
    splits = datasets.load_dataset(options.scenes)
    validation_numbers = random.sample(range(1000), options.count)
    validation = choose_scenes(model, splits["validation"], 1, False, validation_numbers)
    test_numbers = random.sample(range(1000), options.count)
    test = choose_scenes(model, splits["test"], 2, True, test_numbers)

    # What is asked for, and by which captions
    drawn = [Scene.draw(random, held_out=False) for _ in range(8 * options.count)]
    asked = {}
    for kind in KINDS:
        asked[kind] = [scene for scene in drawn if group(scene) == kind][: options.count]
    asked["held-out pairs"] = test.scenes
    captions = {}
    for name, scenes in asked.items():
        captions[name] = [scene.plain()[0] for scene in scenes]
    asked["held-out wordings"] = test.scenes
    captions["held-out wordings"] = [scene.caption(random, held_out=True) for scene in test.scenes]

    # Pictures of captions
    grades = [grade_tokenizer(model, grader, test)]
    for name, scenes in asked.items():
        pictures, seconds = draw(model, captions[name], options)
        grades.append(grade(name, [grader(picture) for picture in pictures], scenes, seconds))
        if options.sheet and name == "held-out pairs":
            make_image_grid(pictures[:64], rows=4, cols=16).save(options.sheet)
        if options.neighbours and name == "held-out pairs":
            shown = pictures[:16] + nearest(pictures[:16], splits["train"])
            make_image_grid(shown, rows=2, cols=16).save(options.neighbours)
    grades.append(grade_edits(model, grader, test, options))
    empty_row = dict.fromkeys(grades[0], "")
    for name, path in PROMPT_SETS.items():
        grades.append(empty_row | {"pictures": name, "scene": grade_prompts(model, grader, path, options)})
    tables = {"Pictures of captions": grades}

    # Captions of pictures
    if isinstance(model, ImageLanguageModel):
        train_grids = encode(model, splits["train"].select(range(TABLE_SCENES))["image"])
        tables["Captions of pictures"] = [
            rate_captions(model, "seen", validation, train_grids),
            rate_captions(model, "held-out pairs", test, train_grids),
        ]
    report(options, machine, tables)


if __name__ == "__main__":
    main()

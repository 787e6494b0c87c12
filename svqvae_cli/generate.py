"""Generates images with a trained pipeline.

Writes each image at each scale, such as class_cat_0_x1.png, and sheet.png
with a row per class: at most 16 rows and columns. The same command resumes
an interrupted run.

  svqvae generate --prompt "a whale above a guitar on pink" --output out
"""

import argparse
import re
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from svqvae_cli.arguments import Parser, grid, not_empty, path_or_name, positive, scale
from svqvae_cli.files import check_absent, check_source
from svqvae_cli.runs import Run

if TYPE_CHECKING:
    from PIL import Image

    from svqvae_hf import SVQVAEAutoregressivePipeline, SVQVAENextScalePipeline
    from svqvae_hf.language.image_language_model import ImageLanguageModel

SAMPLING = ("guidance_scale", "temperature", "top_k", "top_p")  # arguments that a pipeline has under the same names
SHEET_SIDE = 16  # rows and columns of the sheet, at most


def add_arguments(parser: Parser) -> None:
    """Adds the arguments."""
    help = "folder or Hub id of the generator (default: the bundled language model, which draws scenes of emoji)"
    parser.option("model", path_or_name, "MODEL", help, nargs="?")
    parser.add_output()
    parser.flag("--overwrite", "generate existing images again (default: keep them)")
    parser.option("--adapter", path_or_name, "LORA", "folder or Hub id of a LoRA adapter of the language model")
    parser.flag("--steps-pictures", "also write class_cat_0_steps.png and so on, with all scales from coarse to fine")
    condition = parser.add_mutually_exclusive_group()
    help = "classes by name or number (default: images without a class)"
    condition.add_argument("--class", dest="class_labels", nargs="+", metavar="CLASS", help=help)
    help = "captions in quotes, instead of classes"
    condition.add_argument("--prompt", nargs="+", type=not_empty, metavar="TEXT", help=help)
    parser.option("--num-images", positive, "N", "images per class or caption (default: 1)", dest="count", default=1)
    parser.option("--batch-size", positive, "COUNT", "images generated at once (default: 16)", default=16)
    help = "scales of an autoregressive pipeline to decode (default: 1)"
    parser.option("--scales", scale, "SCALE", help, nargs="+")
    help = "grid of codes of a language model, rows x columns, such as 16x24 (default: its first)"
    parser.option("--grid", grid, "GRID", help)
    parser.option("--steps", positive, "N", "scales of a next-scale pipeline (default: as in training)")
    help = "scale of classifier-free guidance (default, here and below: a language model's own, otherwise 1)"
    parser.option("--guidance-scale", float, "SCALE", help)
    parser.option("--temperature", float, "T", "temperature; 0 takes the likeliest ids (default: 1)")
    parser.option("--top-k", int, "K", "sample from the K likeliest ids (default: all)")
    parser.option("--top-p", float, "P", "sample from the likeliest ids of total probability P (default: 1)")
    parser.option("--seed", int, "S", "seed of the first image; image i has S + i (default: 0)", default=0)
    parser.add_device()
    parser.add_dtype()


def run(args: argparse.Namespace) -> None:
    """Generates images in batches, and writes each to files."""
    check_source(args.model)
    names = _row_names(args)
    scales = args.scales or [1.0]
    endings = [f"_x{each:g}.png" for each in scales] + ["_steps.png"] * args.steps_pictures
    stems = [f"{name}_{index}" for name in names for index in range(args.count)]
    sheet = args.output / "sheet.png"
    targets = {stem: [args.output / f"{stem}{ending}" for ending in endings] for stem in stems}
    with Run(args, targets, "images") as work:
        if not args.overwrite and not work.record.exists():
            check_absent(sheet)
        if work.left:
            _generate(args, work, scales)
        rows = [[f"{name}_{index}_x{max(scales):g}.png" for index in range(args.count)] for name in names]
        _write_sheet([[args.output / file for file in row[:SHEET_SIDE]] for row in rows[:SHEET_SIDE]], sheet)


def _row_names(args: argparse.Namespace) -> list[str]:
    """Starts of the file names of each class or caption."""
    if args.prompt:
        return [f"prompt_{index}" for index in range(len(args.prompt))]
    classes = args.class_labels or []
    names = ["class_" + re.sub(r"\W+", "-", text).strip("-") for text in classes] or ["image"]
    if len(set(names)) < len(names):
        raise ValueError(
            f"--class must name each class once, got {' '.join(classes)}. Ask for more images with --num-images."
        )
    return names


def _generate(args: argparse.Namespace, work: Run[str], scales: list[float]) -> None:
    import torch

    from svqvae_cli.loading import load_generator
    from svqvae_hf.files.outputs import save_png

    pipeline = load_generator(args.model, args.device, args.dtype, args.adapter)
    kind, labels = type(pipeline).__name__, []
    sample, excluded = GENERATORS[kind]
    for name in excluded:
        if getattr(args, name):
            option = name.removesuffix("_labels").replace("_", "-")
            raise ValueError(f"--{option} does not apply to MODEL, whose class is {kind}. Leave it out.")
    if "class_labels" not in excluded:
        pipeline.set_progress_bar_config(position=1, leave=False, disable=None)
        class_names = pipeline.config["class_names"] or []
        labels = [_class_label(text, class_names) for text in args.class_labels or []]
    numbers = {stem: number for number, stem in enumerate(work.targets)}
    for batch in _batches(work.files(), args.batch_size):
        rows = [numbers[stem] // args.count for stem in batch]
        sampling: dict[str, Any] = {
            "class_labels": [labels[row] for row in rows] if labels else None,
            "num_images_per_prompt": 1 if labels or args.prompt else len(batch),
            "generator": [torch.Generator().manual_seed(args.seed + numbers[stem]) for stem in batch],
            **({"prompt": [args.prompt[row] for row in rows]} if args.prompt else {}),
            **{name: getattr(args, name) for name in SAMPLING if getattr(args, name) is not None},
        }
        images = sample(pipeline, args, sampling, scales)
        for stem, pictures in zip(batch, zip(*images, strict=True), strict=True):
            with work.attempt(stem):
                for path, picture in zip(work.outputs(stem), pictures, strict=True):
                    save_png(picture, path)


Images = list[list["Image.Image"]]  # by scale, and by steps picture


def _sample_autoregressive(
    pipeline: "SVQVAEAutoregressivePipeline", args: argparse.Namespace, sampling: dict[str, Any], scales: list[float]
) -> Images:
    """Samples images at some scales and, for pictures of the steps, at all."""
    steps = [*pipeline.layout.scales] if args.steps_pictures else []
    asked = [*scales, *(each for each in steps if each not in scales)]
    images = dict(zip(asked, pipeline(scales=asked, **sampling)[0], strict=True))
    return [*(images[each] for each in scales), *_steps_pictures([images[each] for each in steps])]


def _sample_next_scale(
    pipeline: "SVQVAENextScalePipeline", args: argparse.Namespace, sampling: dict[str, Any], _scales: list[float]
) -> Images:
    """Samples images and, for pictures of the steps, decodes each step."""
    steps: Images = []

    def decode(_pipeline: object, _step: int, _size: Sequence[int], tensors: dict[str, Any]) -> None:
        sample = pipeline.vqvae.decode_tokens(tensors["ids"])
        steps.append(pipeline.image_processor.postprocess(sample, output_type="pil"))

    callback = decode if args.steps_pictures else None
    images = pipeline(num_inference_steps=args.steps, callback_on_step_end=callback, **sampling)[0]
    return [images, *_steps_pictures([*steps[:-1], images] if steps else [])]


def _sample_language_model(
    model: "ImageLanguageModel", args: argparse.Namespace, sampling: dict[str, Any], _scales: list[float]
) -> Images:
    """Draws an image for each caption, or without a caption."""
    del sampling["class_labels"]
    count = sampling.pop("num_images_per_prompt")
    return [model.draw(sampling.pop("prompt", [None] * count), args.grid, **sampling)]


def _steps_pictures(steps: Images) -> Images:
    """Joins the steps of each image, enlarged to the last one. No steps give no pictures."""
    from diffusers.utils import make_image_grid

    rows = [[image.resize(row[-1].size) for image in row] for row in zip(*steps, strict=True)]
    return [[make_image_grid(row, rows=1, cols=len(row)) for row in rows]] if rows else []


def _write_sheet(rows: list[list[Path]], sheet: Path) -> None:
    from diffusers.utils import make_image_grid
    from PIL import Image

    from svqvae_hf.files.outputs import save_png

    images = []
    for path in sum(rows, []):
        with Image.open(path) as image:
            images.append(image.convert("RGB"))
    save_png(make_image_grid(images, rows=len(rows), cols=len(rows[0])), sheet)


def _batches(stems: Iterator[str], size: int) -> Iterator[list[str]]:
    while batch := list(islice(stems, size)):
        yield batch


def _class_label(text: str, names: list[str]) -> int | str:
    """A name of a class, or its number; a name that is a number counts as a name."""
    return int(text) if text not in names and text.removeprefix("-").isdecimal() else text


GENERATORS: dict[str, tuple[Any, Sequence[str]]] = {  # how they sample, and options that do not apply to them
    "SVQVAEAutoregressivePipeline": (_sample_autoregressive, ("steps", "grid")),
    "SVQVAENextScalePipeline": (_sample_next_scale, ("scales", "grid")),
    "ImageLanguageModel": (_sample_language_model, ("class_labels", "scales", "steps", "steps_pictures")),
}

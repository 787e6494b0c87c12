"""Generates images with a trained pipeline.

Writes each image, such as class_cat_0.png. The same command resumes an
interrupted run.

  svqvae generate --prompt "a whale above a guitar on pink" --output out
"""

import argparse
import re
import sys
from itertools import islice
from typing import Any

from svqvae_cli.arguments import Parser, grid, model, not_empty, path_or_name, positive
from svqvae_cli.files import check_source
from svqvae_cli.runs import Run
from svqvae_files.file_names import DEFAULT_GENERATOR

SAMPLING = ("guidance_scale", "temperature", "top_k", "top_p")  # arguments that a pipeline has under the same names


def add_arguments(parser: Parser) -> None:
    """Adds the arguments."""
    help = "folder or Hub id of the generator (default: the bundled language model, which draws scenes of emoji)"
    parser.option("model", model, "MODEL", help, nargs="?")
    parser.add_output()
    parser.flag("--overwrite", "generate existing images again (default: keep them)")
    parser.option("--adapter", path_or_name, "LORA", "folder or Hub id of a LoRA adapter of the language model")
    condition = parser.add_mutually_exclusive_group()
    help = "classes by name or number (default: images without a class)"
    condition.add_argument("--class", dest="class_labels", nargs="+", metavar="CLASS", help=help)
    help = "captions in quotes, instead of classes"
    condition.add_argument("--prompt", nargs="+", type=not_empty, metavar="TEXT", help=help)
    parser.option("--num-images", positive, "N", "images per class or caption (default: 1)", default=1)
    parser.option("--batch-size", positive, "COUNT", "images generated at once (default: 16)", default=16)
    help = "grid of codes of a language model, rows x columns, such as 16x24 (default: its first)"
    parser.option("--grid", grid, "GRID", help)
    parser.option("--steps", positive, "N", "scales of a next-scale pipeline (default: as in training)")
    help = "scale of classifier-free guidance (default: a language model's own, otherwise 1)"
    parser.option("--guidance-scale", float, "SCALE", help)
    parser.option("--temperature", float, "T", "temperature; 0 takes the likeliest ids (default: the model's, or 1)")
    parser.option("--top-k", int, "K", "sample from the K likeliest ids (default: the model's, or all)")
    parser.option("--top-p", float, "P", "sample from the likeliest ids of probability P (default: the model's, or 1)")
    parser.option("--seed", int, "S", "seed of the first image; image i has S + i (default: 0)", default=0)
    parser.add_device()
    parser.add_dtype()


def run(args: argparse.Namespace) -> None:
    """Generates images in batches, and writes each to a file."""
    check_source(args.model)
    check_source(args.adapter)
    stems = [f"{name}_{index}" for name in _row_names(args) for index in range(args.num_images)]
    with Run(args, {stem: [args.output / f"{stem}.png"] for stem in stems}, "images", DEFAULT_GENERATOR) as work:
        if work.todo:
            _generate(args, work)


def _row_names(args: argparse.Namespace) -> list[str]:
    """Starts of the file names of each class or caption."""
    if args.prompt:
        return [f"prompt_{index}" for index in range(len(args.prompt))]
    classes = args.class_labels or []
    names = ["class_" + re.sub(r"\W+", "-", text).strip("-") for text in classes] or ["image"]
    if len(set(names)) < len(names):
        raise ValueError(f"--class must name each class once, got {' '.join(classes)}. For more, use --num-images.")
    return names


def _generate(args: argparse.Namespace, work: Run[str]) -> None:
    import torch

    from svqvae_cli.loading import load_generator
    from svqvae_files.outputs import save_png
    from svqvae_hf.pipelines.captions import keep_known_words, say_unknown, unknown_words

    pipeline = load_generator(args.model, args.device, args.dtype, args.adapter)
    _check_options(pipeline, args)
    leaves_out = args.prompt and pipeline.tokenizer and not hasattr(pipeline, "text_encoder")  # T5 reads any word
    if leaves_out and keep_known_words(pipeline.tokenizer, args.prompt) != args.prompt:
        print(f"svqvae: {say_unknown(unknown_words(pipeline.tokenizer, args.prompt))}", file=sys.stderr)
    numbers = {stem: number for number, stem in enumerate(work.targets)}
    sampling = {name: getattr(args, name) for name in SAMPLING if getattr(args, name) is not None}
    stems = work.files()
    while batch := list(islice(stems, args.batch_size)):
        generator = [torch.Generator().manual_seed(args.seed + numbers[stem]) for stem in batch]
        rows = [numbers[stem] // args.num_images for stem in batch]
        images = _sample(pipeline, args, rows, generator=generator, **sampling)
        for stem, image in zip(batch, images, strict=True):
            with work.attempt(stem):
                save_png(image, *work.outputs(stem))


def _check_options(pipeline: Any, args: argparse.Namespace) -> None:
    """Raises for an option of another kind of generator."""
    draws, by_scale = hasattr(pipeline, "draw"), hasattr(pipeline, "trained_schedule")
    foreign = {"--class": draws and args.class_labels, "--grid": not draws and args.grid}
    foreign |= {"--steps": not by_scale and args.steps}
    kind = type(pipeline).__name__
    for option, given in foreign.items():
        if given:
            raise ValueError(f"{option} does not apply to MODEL, whose class is {kind}. Leave it out.")
    if args.class_labels:
        _class_labels(pipeline, args.class_labels)  # raises for an unknown one


def _sample(pipeline: Any, args: argparse.Namespace, rows: list[int], **sampling: Any) -> list[Any]:
    """Samples an image for each of some rows, the numbers of its class or caption."""
    prompts = [args.prompt[row] for row in rows] if args.prompt else None
    if hasattr(pipeline, "draw"):
        return pipeline.draw(prompts or [None] * len(rows), args.grid, **sampling)
    pipeline.set_progress_bar_config(position=1, leave=False, disable=None)
    if args.steps:
        sampling["num_inference_steps"] = args.steps
    if prompts:
        return pipeline(prompt=prompts, **sampling).images
    if not args.class_labels:
        return pipeline(num_images_per_prompt=len(rows), **sampling).images
    labels = _class_labels(pipeline, args.class_labels)
    return pipeline(class_labels=[labels[row] for row in rows], **sampling).images


def _class_labels(pipeline: Any, texts: list[str]) -> list[int]:
    """Numbers of classes, given by name or number; a name that is a number counts as a name."""
    from svqvae_hf.pipelines.labels import encode_labels

    names = pipeline.config["class_names"] or []
    labels = [int(text) if text not in names and text.removeprefix("-").isdecimal() else text for text in texts]
    return encode_labels(labels, pipeline.num_classes, pipeline.config["class_names"]).tolist()

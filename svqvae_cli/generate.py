"""Generates images with a trained pipeline.

Writes each image, such as class_cat_0.png. The same command resumes an
interrupted run. Other prompts or classes need another folder.

  svqvae generate --prompt "a whale above a guitar on pink" --output out
"""

import argparse
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from svqvae_cli.arguments import Parser, grid, model, not_empty, path_or_name, positive, seed
from svqvae_cli.files import check_source, check_trained
from svqvae_cli.runs import Run
from svqvae_files.file_names import DEFAULT_GENERATOR

LOW_TEMPERATURE = 0.5  # up to which most images of a caption are the same
SAMPLING = ("guidance_scale", "temperature", "top_k", "top_p")  # arguments that a pipeline has under the same names


@dataclass(frozen=True)
class PlannedImage:
    """An image that the command line asks for.

    Args:
        name (`str`): Name of its file without suffix, such as `class_cat_0`.
        seed (`int`): Seed of its random numbers.
        prompt (`str`, *optional*): Its caption.
        class_label (`str`): Its class, by name or by number, as the user typed it; empty without a class.
    """

    name: str
    seed: int
    prompt: str | None
    class_label: str


def add_arguments(parser: Parser) -> None:
    """Adds the arguments."""
    help = "folder or Hub id of the generator (default: the bundled language model, which draws scenes of emoji)"
    parser.option("--model", model, "MODEL", help)
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
    parser.option("--seed", seed, "S", "seed of the first image; image i has S + i (default: 0)", default=0)
    parser.add_device()
    parser.add_dtype()


def run(args: argparse.Namespace) -> None:
    """Generates images in batches, and writes each to a file."""
    check_source(args.model)
    check_trained(args.model)
    check_source(args.adapter)
    images = {image.name: image for image in _plan_images(args)}
    targets = {name: [args.output / f"{name}.png"] for name in images}
    with Run(args, targets, "images", DEFAULT_GENERATOR) as work:
        if work.todo:
            _generate(args, work, images)


def _plan_images(args: argparse.Namespace) -> list[PlannedImage]:
    """All images that the command line asks for, in order. Image i has the seed of the first one plus i."""
    images: list[PlannedImage] = []
    for condition, condition_name in enumerate(_condition_names(args)):
        prompt = None
        class_label = ""
        if args.prompt:
            prompt = args.prompt[condition]
        if args.class_labels:
            class_label = args.class_labels[condition]
        for index in range(args.num_images):
            image = PlannedImage(
                name=f"{condition_name}_{index}",
                seed=args.seed + len(images),
                prompt=prompt,
                class_label=class_label,
            )
            images.append(image)
    return images


def _condition_names(args: argparse.Namespace) -> list[str]:
    """Name of each class or caption, with which the names of its files start."""
    if args.prompt:
        return [f"prompt_{index}" for index in range(len(args.prompt))]
    if not args.class_labels:
        return ["image"]
    if len(set(args.class_labels)) < len(args.class_labels):
        shown = " ".join(args.class_labels)
        raise ValueError(f"--class must name each class once, got {shown}. For more, use --num-images.")
    names: list[str] = []
    for label in args.class_labels:
        stem = "class_" + re.sub(r"\W+", "-", label).strip("-")
        name = stem
        number = len(names)  # position of the class on the command line
        while name in names:  # C# and C++ would both be `class_C`, so the second one has its position in its name
            name = f"{stem}-{number}"
            number += 1
        names.append(name)
    return names


def _generate(args: argparse.Namespace, work: Run[str], images: Mapping[str, PlannedImage]) -> None:
    """Generates the images that are not there yet, and writes each to its file.

    Args:
        args (`argparse.Namespace`): Parsed command line.
        work ([`Run`]): The run. Its inputs are the names of all images.
        images (`Mapping[str, PlannedImage]`): All images, by name.
    """
    import torch

    from svqvae_cli.loading import load_generator
    from svqvae_files.outputs import save_png

    pipeline = load_generator(args.model, args.device, args.dtype, args.adapter)
    _check_options(pipeline, args)
    _report_prompts(pipeline, args.prompt or [])
    missing_names = work.files()  # names of the images that are not there yet
    for names in _batches(missing_names, args.batch_size):
        batch = [images[name] for name in names]
        generators = [torch.Generator().manual_seed(image.seed) for image in batch]
        pictures = _sample(pipeline, args, batch, generators)
        for name, picture in zip(names, pictures, strict=True):
            with work.attempt(name):
                (path,) = work.outputs(name)
                save_png(picture, path)
    _advise_temperature(pipeline, args)  # at the end, when the user looks at the images


def _report_prompts(pipeline: Any, prompts: list[str]) -> None:
    """Says on stderr what a generator makes of captions: things that it cannot draw, and new captions."""
    _warn_of_undrawable_things(pipeline, prompts)
    _tell_rewritten_prompts(pipeline, prompts)


def _sampling_options(args: argparse.Namespace) -> dict[str, Any]:
    """Options of sampling on the command line. Others have the defaults of the pipeline."""
    options = {}
    for name in SAMPLING:
        value = getattr(args, name)
        if value is not None:
            options[name] = value
    return options


def _batches(names: Iterator[str], size: int) -> Iterator[list[str]]:
    """Yields the names of images in lists of one size. The last one may be shorter."""
    batch = list(islice(names, size))
    while batch:
        yield batch
        batch = list(islice(names, size))


def _advise_temperature(pipeline: Any, args: argparse.Namespace) -> None:
    """Advises a higher temperature if a model has a low one of its own, at which seeds hardly change an image."""
    defaults = getattr(pipeline, "sampling", None)  # only language models have defaults of sampling
    is_chosen_by_user = args.temperature is not None
    if defaults is None or is_chosen_by_user:
        return
    temperature = defaults["temperature"]
    if temperature > LOW_TEMPERATURE:
        return
    print(
        f"svqvae: the model's temperature is {temperature:g}, so seeds hardly change an image. "
        "For others, pass --temperature 1.",
        file=sys.stderr,
    )


def _warn_of_undrawable_things(pipeline: Any, prompts: list[str]) -> None:
    """Says on stderr which things of captions a language model cannot draw, if it knows."""
    from svqvae_hf.pipelines.known_objects import say_undrawable

    if not hasattr(pipeline, "undrawable"):
        return
    things = pipeline.undrawable(prompts)
    if things:
        print(f"svqvae: {say_undrawable(things)}", file=sys.stderr)


def _tell_rewritten_prompts(pipeline: Any, prompts: list[str]) -> None:
    """Says on stderr which caption a language model draws for each prompt that it rewrites to say something else."""
    from svqvae_hf.pipelines.known_objects import say_rewritten

    if not hasattr(pipeline, "rewrite"):
        return
    for prompt, caption in zip(prompts, pipeline.rewrite(prompts), strict=True):
        note = say_rewritten(prompt, caption, pipeline.known_objects)
        if note:
            print(f"svqvae: {prompt!r} is {note}", file=sys.stderr)


def _check_options(pipeline: Any, args: argparse.Namespace) -> None:
    """Raises for an option of another kind of generator."""
    is_language_model = _is_language_model(pipeline)
    is_next_scale = hasattr(pipeline, "trained_schedule")
    if is_language_model and args.class_labels:
        raise _foreign_option_error("--class", pipeline, args)
    if args.grid and not is_language_model:
        raise _foreign_option_error("--grid", pipeline, args)
    if args.steps and not is_next_scale:
        raise _foreign_option_error("--steps", pipeline, args)
    has_text_encoder = getattr(pipeline, "text_encoder", None) is not None
    if args.prompt and not is_language_model and not has_text_encoder:
        raise ValueError(
            f"--prompt needs a generator with a text encoder, but {_name_of_model(args)} has none. Leave it out, or "
            "pass --class."
        )
    if args.class_labels:
        if not pipeline.num_classes:
            raise ValueError(
                f"--class needs a generator with classes, but {_name_of_model(args)} has none. Leave it out."
            )
        _class_numbers(pipeline, args.class_labels)  # raises for an unknown class


def _foreign_option_error(option: str, pipeline: Any, args: argparse.Namespace) -> ValueError:
    """The error of an option that a generator of this kind does not have."""
    class_name = type(pipeline).__name__
    return ValueError(
        f"{option} does not apply to {_name_of_model(args)}, whose class is {class_name}. Leave it out, or change "
        "--model."
    )


def _name_of_model(args: argparse.Namespace) -> str:
    """Name of the generator, for errors."""
    if args.model is None:
        return "the bundled model"
    return f"`{args.model}`"


def _sample(
    pipeline: Any, args: argparse.Namespace, images: Sequence[PlannedImage], generators: list[Any]
) -> list[Any]:
    """Samples images at once.

    Args:
        pipeline: Generator.
        args (`argparse.Namespace`): Parsed command line.
        images (`Sequence[PlannedImage]`): The images. All have captions, or all have classes, or none has either.
        generators (`list[torch.Generator]`): Source of random numbers of each image.

    Returns:
        `list[PIL.Image.Image]`: The images.
    """
    options = _sampling_options(args)
    options["generator"] = generators
    if _is_language_model(pipeline):
        prompts = [image.prompt for image in images]
        return pipeline.draw(prompts, args.grid, **options)
    if args.steps:
        options["num_inference_steps"] = args.steps
    if args.prompt:
        options["prompt"] = [image.prompt for image in images]
    elif args.class_labels:
        class_labels = [image.class_label for image in images]
        options["class_labels"] = _class_numbers(pipeline, class_labels)
    else:
        options["num_images_per_prompt"] = len(images)
    pipeline.set_progress_bar_config(position=1, leave=False, disable=None)  # below the bar of the run
    return pipeline(**options).images


def _is_language_model(pipeline: Any) -> bool:
    """Whether a generator is a language model. Only language models have a method `draw`."""
    return hasattr(pipeline, "draw")


def _class_numbers(pipeline: Any, texts: list[str]) -> list[int]:
    """Numbers of classes, which are called by name or by number. A name that is a number counts as a name."""
    from svqvae_hf.pipelines.labels import encode_labels

    class_names = pipeline.config["class_names"]
    labels: list[int | str] = []
    for text in texts:
        is_name = class_names is not None and text in class_names
        is_number = text.removeprefix("-").isdecimal()
        if is_number and not is_name:
            labels.append(int(text))
        else:
            labels.append(text)
    return encode_labels(labels, pipeline.num_classes, class_names).tolist()

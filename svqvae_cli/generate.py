"""`svqvae generate`."""

import argparse
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from svqvae_cli.arguments import (
    Commands,
    add_command,
    add_device,
    add_dtype,
    add_output,
    path,
    path_or_name,
    positive,
    scale,
)
from svqvae_cli.files import check_absent, check_output

if TYPE_CHECKING:
    from PIL import Image

    from svqvae_hf import SVQVAEAutoregressivePipeline, SVQVAENextScalePipeline


def add_to(commands: Commands) -> None:
    """Adds the command and its arguments."""
    parser = add_command(
        commands,
        "generate",
        run,
        "generate images with an autoregressive or next-scale pipeline",
        "Writes one image per class, index and scale, class_cat_0_x1.png and so on, or\n"
        "prompt_0_0_x1.png for the first caption, or image_0_x1.png without --class and\n"
        "--prompt, and all at their finest scale on sheet.png, one row per class or\n"
        "caption. All images are sampled as one batch. A next-scale pipeline writes one\n"
        "scale.",
        "org/dreams --class cat 7 --num-images 4 --output out",
    )
    parser.add_argument("model", type=path_or_name, metavar="MODEL", help="folder or Hub id of the pipeline")
    add_output(parser, "folder to write to")
    parser.add_argument("--overwrite", action="store_true", help="replace output files that exist (default: an error)")
    parser.add_argument(
        "--steps-picture",
        type=path,
        metavar="FILE",
        help="PNG file for a picture of all scales: a row per image, from coarse to fine",
    )
    condition = parser.add_mutually_exclusive_group()
    condition.add_argument(
        "--class",
        dest="class_labels",
        nargs="+",
        metavar="CLASS",
        help="classes by name or number, one row of images each (default: images without a class)",
    )
    condition.add_argument(
        "--prompt", nargs="+", metavar="TEXT", help="captions in quotes, one row of images each, instead of classes"
    )
    parser.add_argument(
        "--num-images", type=int, default=1, metavar="COUNT", help="images per class or caption (default: 1)"
    )
    parser.add_argument(
        "--scales",
        nargs="+",
        type=scale,
        metavar="SCALE",
        help="scales to decode, among an autoregressive pipeline's own (default: the finest)",
    )
    parser.add_argument(
        "--steps", type=positive, metavar="N", help="scales of a next-scale pipeline (default: as in training)"
    )
    parser.add_argument(
        "--guidance-scale",
        type=float,
        default=1.0,
        metavar="SCALE",
        help="scale of classifier-free guidance (default: 1)",
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=1.0,
        metavar="T",
        help="sampling temperature; 0 takes the most likely ids (default: 1)",
    )
    parser.add_argument(
        "--top-k", type=int, default=0, metavar="K", help="sample from the K most likely ids (default: all)"
    )
    parser.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        metavar="P",
        help="sample from the most likely ids with total probability P (default: 1)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="S", help="seed of the first image; image i has S + i (default: 0)"
    )
    add_device(parser)
    add_dtype(parser)


def run(args: argparse.Namespace) -> None:
    """Samples images, and writes each to a file and all to one sheet."""
    import diffusers
    import torch
    import transformers

    from svqvae_cli.loading import load_generator
    from svqvae_hf import SVQVAENextScalePipeline
    from svqvae_hf.files.outputs import save_png, scale_endings

    check_output(args.output)
    if args.steps_picture and args.steps_picture.suffix != ".png":
        raise ValueError(f"--steps-picture must end in .png, got `{args.steps_picture}`.")
    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()  # while loading
    pipeline = load_generator(args.model, args.device, args.dtype)
    classes = args.class_labels or []
    labels = [_class_label(text, pipeline.config["class_names"]) for text in classes] or None
    prompt_names = [f"prompt_{index}" for index in range(len(args.prompt or []))]
    names = [_class_file_name(text) for text in classes] or prompt_names or ["image"]
    if len(set(names)) < len(names):
        raise ValueError(
            f"--class must name each class once, got {' '.join(classes)}. Ask for more images with --num-images."
        )
    count = args.num_images
    is_next_scale = isinstance(pipeline, SVQVAENextScalePipeline)
    scales = [1.0] if is_next_scale else args.scales or list(pipeline.layout.scales[-1:])
    files = [
        [args.output / f"{name}_{index}{ending}" for name in names for index in range(count)]
        for ending in scale_endings(scales)
    ]
    pictures = [args.output / "sheet.png", *([args.steps_picture] if args.steps_picture else [])]
    for file in [*sum(files, []), *pictures]:
        if not args.overwrite:
            check_absent(file)
    sampling: dict[str, Any] = {
        "class_labels": labels,
        "guidance_scale": args.guidance_scale,
        "temperature": args.temperature,
        "top_k": args.top_k,
        "top_p": args.top_p,
        "generator": [torch.Generator().manual_seed(args.seed + index) for index in range(len(names) * count)],
        "num_images_per_prompt": count,
    }
    sample = _sample_next_scale if is_next_scale else _sample_autoregressive
    images, steps = sample(pipeline, args, sampling, scales)
    for files_at_scale, images_at_scale in zip(files, images, strict=True):
        for file, image in zip(files_at_scale, images_at_scale, strict=True):
            save_png(image, file)
    finest = images[scales.index(max(scales))]
    save_png(diffusers.utils.make_image_grid(finest, rows=len(names), cols=count), args.output / "sheet.png")
    if args.steps_picture:
        rows = [image.resize(row[-1].size) for row in zip(*steps, strict=True) for image in row]
        save_png(diffusers.utils.make_image_grid(rows, rows=len(finest), cols=len(steps)), args.steps_picture)
    print(f"written  {args.output} (images: {sum(map(len, files))})")


Images = list[list["Image.Image"]]  # by scale


def _sample_autoregressive(
    pipeline: "SVQVAEAutoregressivePipeline", args: argparse.Namespace, sampling: dict[str, Any], scales: list[float]
) -> tuple[Images, Images]:
    """Samples images at some scales and, for a picture, at all."""
    if args.steps is not None:
        raise ValueError("--steps belongs to next-scale pipelines, but MODEL is autoregressive. Leave it out.")
    pipeline.set_progress_bar_config(unit="row", disable=None)
    steps = [*pipeline.layout.scales] if args.steps_picture else []
    asked = [*scales, *(each for each in steps if each not in scales)]
    images = dict(zip(asked, pipeline(prompt=args.prompt, scales=asked, **sampling)[0], strict=True))
    return [images[each] for each in scales], [images[each] for each in steps]


def _sample_next_scale(
    pipeline: "SVQVAENextScalePipeline", args: argparse.Namespace, sampling: dict[str, Any], scales: list[float]
) -> tuple[Images, Images]:
    """Samples images and, for a picture, decodes each step."""
    for flag, value in {"--prompt": args.prompt, "--scales": args.scales}.items():
        if value is not None:
            raise ValueError(f"{flag} belongs to autoregressive pipelines, but MODEL is next-scale. Leave it out.")
    pipeline.set_progress_bar_config(unit="scale", disable=None)
    steps: Images = []

    def decode(_pipeline: object, _step: int, _size: Sequence[int], tensors: dict[str, Any]) -> None:
        sample = pipeline.vqvae.decode_tokens(tensors["ids"])
        steps.append(pipeline.image_processor.postprocess(sample, output_type="pil"))

    callback = decode if args.steps_picture else None
    images = pipeline(num_inference_steps=args.steps, callback_on_step_end=callback, **sampling)[0]
    return [images], [*steps[:-1], images] if steps else []


def _class_file_name(text: str) -> str:
    return "class_" + re.sub(r"\W+", "-", text).strip("-")


def _class_label(text: str, names: list[str] | None) -> int | str:
    """A name of a class, or its number; a name that is a number counts as a name."""
    return int(text) if text not in (names or []) and text.removeprefix("-").isdecimal() else text

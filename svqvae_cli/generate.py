"""`svqvae generate`."""

import argparse
import re

from svqvae_cli.arguments import Commands, add_command, add_device, add_dtype, add_output, path_or_name, scale


def add_to(commands: Commands) -> None:
    """Adds the command and its arguments."""
    parser = add_command(
        commands,
        "generate",
        run,
        "generate images with an autoregressive pipeline",
        "Writes one image per class, index and scale, class_cat_0_x1.png and so on, or\n"
        "prompt_0_0_x1.png for the first caption, or image_0_x1.png without --class and\n"
        "--prompt, and all at their finest scale on sheet.png, one row per class or\n"
        "caption. All images are sampled as one batch.",
        "org/dreams --class cat 7 --num-images 4 --output out",
    )
    parser.add_argument("model", type=path_or_name, metavar="MODEL", help="folder or Hub id of the pipeline")
    add_output(parser, "folder to write to")
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
        help="scales to decode, among the pipeline's own (default: the finest)",
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

    from svqvae_cli.loading import load_pretrained
    from svqvae_hf import SVQVAEAutoregressivePipeline
    from svqvae_hf.atomic_io import save_png
    from svqvae_hf.paths import check_output, scale_endings

    check_output(args.output)
    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()  # while loading
    pipeline = load_pretrained(SVQVAEAutoregressivePipeline, args.model, args.device, args.dtype)
    pipeline.set_progress_bar_config(unit="row", disable=None)
    scales = args.scales or pipeline.layout.scales[-1:]
    endings = scale_endings(scales)
    classes = args.class_labels or []
    labels = [_class_label(text, pipeline.config["class_names"]) for text in classes] or None
    prompt_names = [f"prompt_{index}" for index in range(len(args.prompt or []))]
    names = [_class_file_name(text) for text in classes] or prompt_names or ["image"]
    if len(set(names)) < len(names):
        raise ValueError(
            f"--class must name each class once, got {' '.join(classes)}. Ask for more images with --num-images."
        )
    count = args.num_images
    images = pipeline(
        labels,
        prompt=args.prompt,
        scales=scales,
        guidance_scale=args.guidance_scale,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        generator=[torch.Generator().manual_seed(args.seed + index) for index in range(len(names) * count)],
        num_images_per_prompt=count,
    ).images
    for images_at_scale, ending in zip(images, endings, strict=True):
        for index, image in enumerate(images_at_scale):
            save_png(image, args.output / f"{names[index // count]}_{index % count}{ending}")
    finest = images[scales.index(max(scales))]
    save_png(diffusers.utils.make_image_grid(finest, rows=len(names), cols=count), args.output / "sheet.png")


def _class_file_name(text: str) -> str:
    return "class_" + re.sub(r"\W+", "-", text).strip("-")


def _class_label(text: str, names: list[str] | None) -> int | str:
    """A name of a class, or its number; a name that is a number counts as a name."""
    return int(text) if text not in (names or []) and text.removeprefix("-").isdecimal() else text

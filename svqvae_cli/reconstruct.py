"""Encodes and decodes images, and measures the difference.

Writes one image per scale, NAME_x0.5.png and so on, in the subfolder that the
image was found in. Prints for each of them: tokens, bits per pixel of the
original, PSNR against the original resized to that scale, and the fraction of
the codebook that is used. For several images the last lines give totals, bits
per pixel of all pixels, mean PSNR, and the fraction of the codebook that all
images together use. Images that cannot be read, or are too large for memory,
are named and skipped. The same command resumes an interrupted run.

  svqvae reconstruct photo.jpg --output out --scales 0.25 0.5 1 --side-by-side
"""

import argparse
from collections.abc import Sequence
from typing import Any

from tqdm import tqdm

from svqvae_cli.arguments import Parser
from svqvae_cli.errors import one_line, prefix_errors
from svqvae_cli.files import InputFile, find_images
from svqvae_cli.runs import Run


def add_arguments(parser: Parser) -> None:
    """Adds the arguments."""
    parser.add_encoding()
    parser.flag("--side-by-side", "also write NAME_side_by_side.png with the original and all scales")


def run(args: argparse.Namespace) -> None:
    """Writes the reconstruction of each image at each scale, and prints how close it is."""
    endings = [f"_x{scale:g}.png" for scale in args.scales]
    endings += ["_side_by_side.png"] * args.side_by_side
    inputs = find_images(args)
    targets = {file: [file.target(args.output, ending) for ending in endings] for file in inputs}
    with Run(args, targets, "images") as work:
        if work.todo:
            _reconstruct(args, work)


def _reconstruct(args: argparse.Namespace, work: Run[InputFile]) -> None:
    from svqvae_cli.loading import load_encoder
    from svqvae_files.outputs import save_png
    from svqvae_hf.evaluation import reconstruction_table as table
    from svqvae_hf.models.image_files import load_image
    from svqvae_hf.tokens.image_tokens import choose_tiles, decode_image, encode_image

    model = load_encoder(args)
    width = max(map(len, ["1,000 images", *(one_line(str(file.name)) for file in work.targets)]))

    def write_row(name: str, figures: Sequence[Any]) -> None:
        tqdm.write(table.table_row(width, name, figures, model.config["codebook_size"]))  # above the progress bars

    measured: list[list[Any]] = []  # per image, one per scale
    try:
        for file, original in work.read(load_image):
            with work.attempt(file, ValueError):
                with prefix_errors(file.path):
                    asked = args.scales, args.tile_size, args.overlap
                    tiles = choose_tiles(model, original.height, original.width, *asked)
                tokens = encode_image(model, original, args.scales, args.scale_from, tiles)
                images = decode_image(model, tokens, tiles=tiles)
                figures = table.measure_reconstructions(original, tokens, images)
                sheet = [table.side_by_side(original, images, figures)] if args.side_by_side else []
                for image, path in zip([*images, *sheet], work.outputs(file), strict=True):
                    save_png(image, path)
                if not measured:
                    tqdm.write(table.table_header(width))
                measured.append(figures)
                for each in figures:
                    write_row(one_line(str(file.name)), [each])
    finally:  # also if the run is interrupted
        if len(measured) > 1:
            for at_scale in zip(*measured, strict=True):
                write_row(f"{len(measured):,} images", at_scale)

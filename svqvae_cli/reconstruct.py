"""Encodes and decodes images, and measures the difference.

Writes one image per scale, NAME_x0.5.png and so on, in the subfolder that the
image was found in. Prints for each of them: tokens, bits per pixel of the
original, PSNR against the original resized to that scale, and the fraction of
the codebook that is used. For several images the last lines give totals, bits
per pixel of all pixels, mean PSNR, and the fraction of the codebook that all
images together use. Images that cannot be read, or are too large for memory,
are named and skipped. The same command resumes an interrupted run. The totals
of a resumed run cover only the images that it still had to do.

  svqvae reconstruct photo.jpg --output out --scales 0.25 0.5 1 --side-by-side
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from svqvae_cli.arguments import Parser
from svqvae_cli.errors import one_line, prefix_errors
from svqvae_cli.files import InputFile, find_images
from svqvae_cli.runs import Run
from svqvae_files.outputs import scale_endings


def add_arguments(parser: Parser) -> None:
    """Adds the arguments."""
    parser.add_encoding()
    parser.flag("--side-by-side", "also write NAME_side_by_side.png with the original and all scales")


def run(args: argparse.Namespace) -> None:
    """Writes the reconstruction of each image at each scale, and prints how close it is."""
    endings = scale_endings(args.scales)
    if args.side_by_side:
        endings.append("_side_by_side.png")
    targets = {}
    for file in find_images(args):
        paths = [file.target(args.output, ending) for ending in endings]
        targets[file] = paths
    with Run(args, targets, "images") as work:
        if work.todo:
            _reconstruct(args, work)


def _reconstruct(args: argparse.Namespace, work: Run[InputFile]) -> None:
    """Encodes and decodes the images that are not done yet."""
    from svqvae_cli.loading import load_encoder
    from svqvae_files.outputs import save_png
    from svqvae_hf.evaluation.reconstruction_table import measure_reconstructions, side_by_side
    from svqvae_hf.models.image_files import load_image
    from svqvae_hf.tokens.image_tokens import choose_tiles, decode_image, encode_image

    model = load_encoder(args)
    table = _Table([file.name for file in work.targets], model.config["codebook_size"])
    try:
        for file, original in work.read(load_image):
            with work.attempt(file, ValueError):  # skips the image if a ValueError is raised here
                with prefix_errors(file.path):  # an error of `choose_tiles` does not name the image by itself
                    tiles = choose_tiles(
                        model, original.height, original.width, args.scales, args.tile_size, args.overlap
                    )
                tokens = encode_image(model, original, args.scales, args.scale_from, tiles)
                images = decode_image(model, tokens, tiles=tiles)
                figures = measure_reconstructions(original, tokens, images)
                if args.side_by_side:
                    images = [*images, side_by_side(original, images, figures)]
                for image, path in zip(images, work.outputs(file), strict=True):
                    save_png(image, path)
                table.add(file.name, figures)
    finally:  # also if the run is interrupted
        table.print_totals()


class _Table:
    """The table of a run, printed row by row above the progress bar.

    Args:
        names (`Sequence[Path]`): Names of all images, which set the width of the first column.
        codebook_size (`int`): Number of codes.
    """

    def __init__(self, names: Sequence[Path], codebook_size: int):
        self.label_width = len("1,000 images")
        for name in names:
            self.label_width = max(self.label_width, len(one_line(str(name))))
        self.codebook_size = codebook_size
        self.figures_of_images: list[Sequence[Any]] = []  # per image, its figures at each scale

    def add(self, name: Path, figures: Sequence[Any]) -> None:
        """Prints the rows of an image, one for its figures at each scale."""
        from svqvae_hf.evaluation.reconstruction_table import table_header

        if not self.figures_of_images:
            tqdm.write(table_header(self.label_width))
        self.figures_of_images.append(figures)
        label = one_line(str(name))
        for figures_at_scale in figures:
            self._print_row(label, [figures_at_scale])  # a row about this image alone

    def print_totals(self) -> None:
        """Prints a row per scale about all images, if there are several."""
        num_images = len(self.figures_of_images)
        if num_images < 2:
            return
        label = f"{num_images:,} images"
        for figures_at_scale in zip(*self.figures_of_images, strict=True):  # of all images at one scale
            self._print_row(label, figures_at_scale)

    def _print_row(self, label: str, figures: Sequence[Any]) -> None:
        """Prints a row about images at one scale, from the figures of each of them."""
        from svqvae_hf.evaluation.reconstruction_table import table_row

        tqdm.write(table_row(self.label_width, label, figures, self.codebook_size))

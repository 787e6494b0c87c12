"""`--large` in encode and decode: images larger than memory."""

import argparse
import logging
from pathlib import Path

from svqvae_cli.arguments import flag
from svqvae_cli.errors import require_extra


def add_large(parser: argparse.ArgumentParser) -> None:
    """Adds the option for images larger than memory."""
    flag(parser, "--large", "work from TIFF to file by rows of tiles, so that memory does not grow with the image")


def check_large(args: argparse.Namespace) -> None:
    """Raises ValueError for an option that `--large` excludes, or if its extra is missing."""
    if not args.large:
        return
    if getattr(args, "scales", [1.0]) != [1.0]:
        raise ValueError(
            "--large works at scale 1 alone, because other scales resize the whole image or all latents at once. "
            "Resize the file first, or leave out --scales or --large."
        )
    for option in ("min_psnr", "max_bits", "full_size"):
        if getattr(args, option, None):
            raise ValueError(
                f"--{option.replace('_', '-')} resizes the whole image at once. Leave it out, or leave out --large."
            )
    for option in ("compress", "preview"):
        if getattr(args, option, False):
            raise ValueError(f"--large takes token files that are not compressed. Leave out --{option} or --large.")
    with require_extra("--large", "large"):
        import tifffile  # noqa: F401
    logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # errors say what it would log


def check_large_image(path: Path) -> None:
    """Raises OSError or ValueError if an image cannot be read as TIFF, by its first bytes and its first page."""
    from svqvae_hf.large.tiff_reader import open_large_image

    with open_large_image(path):
        pass

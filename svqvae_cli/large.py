"""`--large` in encode and decode: images larger than memory."""

import argparse
import logging
from pathlib import Path

from svqvae_cli.arguments import Parser, forbid_options
from svqvae_cli.errors import require_extra


def add_large(parser: Parser) -> None:
    """Adds the option for images larger than memory."""
    parser.flag("--large", "process TIFF files by rows of tiles, so that memory does not grow with the image")


def check_large(args: argparse.Namespace) -> None:
    """Raises ValueError for an option that `--large` excludes, or if its extra is missing."""
    if not args.large:
        return
    forbid_options(args, "is not for --large, which works at scale 1", "scales")
    with require_extra("--large", "large"):
        import tifffile  # noqa: F401
    logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # errors say what it would log


def check_large_image(path: Path) -> None:
    """Raises OSError or ValueError if an image cannot be read as TIFF, by its first bytes and its first page."""
    from svqvae_hf.large.tiff_reader import open_large_image

    with open_large_image(path):
        pass

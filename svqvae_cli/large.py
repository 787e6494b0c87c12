"""Options and checks of `--large` in encode, decode and reconstruct: images larger than memory."""

import argparse
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from svqvae_hf.files.inputs import InputFile

RESUME = "the same command and --resume"


def add_large(parser: argparse.ArgumentParser) -> None:
    """Adds the options of images larger than memory."""
    parser.add_argument(
        "--large",
        action="store_true",
        help="work by rows of tiles, so that memory does not grow with the image; images are TIFF files",
    )
    parser.add_argument(
        "--resume", action="store_true", help="with --large: resume an interrupted run of the same command"
    )


def check_large(args: argparse.Namespace) -> None:
    """Raises ValueError for an option that needs `--large`, or that `--large` excludes."""
    if args.resume and not args.large:
        raise ValueError("--resume is for large images. Add --large, or leave out --resume.")
    if args.large and getattr(args, "scales", [1.0]) != [1.0]:
        raise ValueError(
            "--large works at scale 1 alone, because other scales resize the whole image or all latents at once. "
            "Resize the file first, or leave out --scales or --large."
        )
    for option in ("min_psnr", "max_bits", "full_size"):
        if args.large and getattr(args, option, None):
            raise ValueError(
                f"--{option.replace('_', '-')} resizes the whole image at once. Leave it out, or leave out --large."
            )
    if args.large and getattr(args, "side_by_side", False):
        raise ValueError("--side-by-side is for images that fit into memory. Leave out --side-by-side or --large.")


def unfinished(
    files: "Iterable[InputFile]", targets: "Mapping[InputFile, Sequence[Path]]", resume: bool
) -> "Iterator[InputFile]":
    """Yields each input without a complete output.

    Args:
        files (`Iterable[InputFile]`): Inputs.
        targets (`Mapping[InputFile, Sequence[Path]]`): One output of each.
        resume (`bool`): Whether to resume an interrupted run.

    Raises:
        ValueError: There is an interrupted run, but `resume` is false.
    """
    from svqvae_hf.large.run_record import check_not_interrupted, record_path

    logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # errors say what it would log
    if not resume:
        for (target,) in targets.values():
            check_not_interrupted(target)
    for file in files:
        (target,) = targets[file]
        if not (resume and target.exists() and not record_path(target).exists()):
            yield file

"""Encodes an image set to a token set.

Writes the ids of all images as Parquet files, which `datasets` loads. The same
command resumes a run that was interrupted. On many machines, each makes a part.

  svqvae tokenize photos --output tokens --crops centre --resolution 256
"""

import argparse
import math
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from svqvae_cli.arguments import Parser, image_set_options, not_empty, path_or_url, positive
from svqvae_cli.errors import check_none_skipped, one_line
from svqvae_cli.files import check_data, check_source, check_tiles
from svqvae_cli.logs import lines_in_log
from svqvae_files.file_names import DEFAULT_MODEL
from svqvae_files.outputs import check_new_folder

CROPS = ("whole", "whole-flip", "centre", "centre-flip", "ten-crop")  # as in `svqvae_hf.token_sets.crops`
MAX_WORKERS = 4  # that read images, by default


def add_arguments(parser: Parser) -> None:
    """Adds the arguments."""
    parser.add_image_set()
    parser.add_model()
    parser.option("--output", path_or_url, "OUT", "folder or URL to write to", required=True)
    parser.add_scales(default=[1.0])
    parser.option("--sides", positive, "IDS", "sides of square grids of ids, in place of --scales", nargs="+")
    parser.add_compress()
    parser.choice("--crops", CROPS, "crops of an image that become rows (default: whole)", "whole")
    parser.option("--resolution", positive, "PIXELS", "side of the crops, if they are not whole images")
    keep_help = "columns to keep besides label, caption, text, cls, txt, json"
    parser.option("--keep", not_empty, "NAME", keep_help, nargs="+", default=[])
    batch_size_help = "crops to encode together; rounding may change a few ids (default: up to 64)"
    parser.option("--batch-size", int, "N", batch_size_help)
    parser.option("--part", int, "I", "make only this part, counted from 0 (default: all)")
    parser.flag("--overwrite", "delete the token set in OUT and start over")
    parser.option("--num-parts", int, "N", "number of parts (default: one per 10,000 images or file, at most 1,000)")
    parser.option("--workers", int, "N", "processes that read images (default: one per core, at most 4)")
    parser.option("--license", not_empty, "ID", "licence of the images for the card, by its id on the Hub")
    parser.add_tiles()


def run(args: argparse.Namespace) -> None:
    """Encodes an image set to a token set."""
    process = _read_process()
    _check(args, process)

    from svqvae_cli.loading import load_model, require_context_model
    from svqvae_hf.data.image_sets import open_images
    from svqvae_hf.token_sets.cards import public_names
    from svqvae_hf.token_sets.writer import check_out, count_parts, tokenize_set

    check_out(args.output)
    images = open_images(args.data, columns=args.keep, results=args.output, **image_set_options(args))
    num_parts = count_parts(images, args.num_parts)
    if process.rank == 0:
        _tell_classes(images)
    model = load_model(args.model, _device(args, process), args.dtype)
    if process.rank == 0:
        _tell_padding(args.resolution, model.f)
    context_model = None
    if args.compress:
        context_model = require_context_model(model, args.model)
    with _explained_interruption(args.output), lines_in_log("svqvae_hf.token_sets.writer"):
        report = tokenize_set(
            model,
            images,
            args.output,
            **public_names(args.data, args.model or DEFAULT_MODEL),
            context_model=context_model,
            parts=_parts(args, process, num_parts),
            num_parts=num_parts,
            num_workers=_num_workers(args),
            scales=_scales(args, model.f),
            scale_from=args.scale_from,
            crops=args.crops,
            resolution=args.resolution,
            batch_size=args.batch_size,
            overwrite=args.overwrite,
            license=args.license,
            tile_size=args.tile_size,
            overlap=args.overlap,
        )
    print(report)
    is_scheduled = process.is_launched or args.part is not None
    if not is_scheduled:  # a scheduler would take the exit code for skipped images for a crash
        check_none_skipped(report.skipped, report.images)


def _tell_classes(images: Any) -> None:
    """Prints the classes of an image set, because they may be names of folders that were not meant as classes."""
    from svqvae_hf.token_sets.classes import describe_classes

    origin = ""
    if images.has_folder_labels:
        origin = ", the names of subfolders"
    for column, classes in describe_classes(images.features).items():
        line = one_line(f"{column}{origin}: {classes}")
        print(f"classes  {line}")


def _tell_padding(resolution: int | None, downsampling: int) -> None:
    """Says on stderr that crops are padded, because a resolution cannot be changed once a part is made."""
    if resolution is None or resolution % downsampling == 0:
        return
    side = math.ceil(resolution / downsampling)
    padded = side * downsampling
    print(
        f"svqvae: --resolution {resolution} is not a multiple of {downsampling}, the f of the model. Each crop is "
        f"padded to {padded} x {padded} pixels, and has {side} x {side} ids.",
        file=sys.stderr,
    )


@dataclass(frozen=True)
class Process:
    """This process among those that `torchrun` or `accelerate launch` has started.

    Args:
        is_launched (`bool`): Whether one of them has started it.
        rank (`int`): Its number.
        world_size (`int`): Number of processes.
        local_rank (`int`, *optional*): Its number on this machine.
    """

    is_launched: bool
    rank: int
    world_size: int
    local_rank: int | None


def _parts(args: argparse.Namespace, process: Process, num_parts: int) -> Sequence[int]:
    """Numbers of the parts that this process makes: one of the command line, or its share of all."""
    if args.part is not None:
        return [args.part]
    return range(process.rank, num_parts, process.world_size)


def _scales(args: argparse.Namespace, downsampling: int) -> list[float]:
    """Scales to encode at. `--sides` states them as sides in ids. An id has `downsampling` pixels along each side."""
    if not args.sides:
        return args.scales
    crop_side = math.ceil(args.resolution / downsampling)  # in ids
    return [side / crop_side for side in args.sides]


def _num_workers(args: argparse.Namespace) -> int:
    """Number of processes that read images."""
    if args.workers is not None:
        return args.workers

    from svqvae_hf.data.workers import usable_cores

    return min(MAX_WORKERS, usable_cores())


def _device(args: argparse.Namespace, process: Process) -> str | None:
    """Device of the command line; otherwise the GPU with the number of this process, or `None` for the default."""
    if args.device is not None or process.local_rank is None:
        return args.device

    from svqvae_cli.loading import find_device

    default_device = find_device(None)
    if default_device.type == "cpu":  # which all processes share
        return None
    return f"{default_device.type}:{process.local_rank}"


def _read_process() -> Process:
    """Reads the environment variables of this process, which launchers set."""
    rank = _read_variable("RANK")
    world_size = _read_variable("WORLD_SIZE")
    local_rank = _read_variable("LOCAL_RANK")
    is_alone = rank is None and world_size in (None, 1)
    if is_alone:
        return Process(is_launched=False, rank=0, world_size=1, local_rank=local_rank)
    if rank is None or world_size is None or rank >= world_size:
        raise ValueError(
            "the environment variables RANK and WORLD_SIZE must be the number of this process and the number of "
            f"processes, got {rank} and {world_size}. Start with `accelerate launch`, or unset both."
        )
    return Process(is_launched=True, rank=rank, world_size=world_size, local_rank=local_rank)


def _read_variable(name: str) -> int | None:
    """Number in an environment variable; `None` if it is not set."""
    text = os.environ.get(name)
    if text is None:
        return None
    if not re.fullmatch("[0-9]+", text):
        raise ValueError(f"the environment variable {name} must be a number, got {text!r}. Unset it.")
    return int(text)


def _check(args: argparse.Namespace, process: Process) -> None:
    """Raises ValueError for paths and options that are wrong, before anything slow is imported."""
    if args.sides and args.resolution is None:
        raise ValueError("--sides needs square crops of one size. Add --crops centre --resolution PIXELS.")
    has_scales = args.scales != [1.0]
    if args.sides and has_scales:
        raise ValueError("--sides and --scales both state the scales. Leave out one of them.")
    are_whole_images = args.crops in ("whole", "whole-flip")
    if args.resolution is None and not are_whole_images:
        raise ValueError(f"--crops {args.crops} needs --resolution PIXELS.")
    is_one_of_several = process.world_size > 1
    if args.overwrite and is_one_of_several:
        raise ValueError("--overwrite deletes all parts, so one process must make them. Or delete the folder first.")
    check_source(args.model)
    check_tiles(args.model, args.tile_size)
    check_data(args.data)
    if os.path.isfile(args.output):  # whether a folder can become a token set is checked later
        check_new_folder(Path(args.output))  # raises for a file


@contextmanager
def _explained_interruption(out: str) -> Iterator[None]:
    """Says which parts are finished if the block is interrupted, or ends with a full disk or a network error."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, OSError):
        _print_progress(out)
        raise


def _print_progress(out: str) -> None:
    """Prints how many parts of an interrupted token set are finished, and how to resume it."""
    from svqvae_hf.token_sets.parts import describe_state

    try:
        facts = describe_state(out)
    except (ValueError, OSError):  # no part was started, or the folder cannot be read
        return
    progress = facts["parts"]  # such as "8 (not complete; finished: 3)"
    print(f"parts    {progress}")
    print(f"svqvae: `{out}` is not complete. Run the same command again to resume.", file=sys.stderr)

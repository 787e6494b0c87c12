"""`svqvae tokenize`."""

import argparse
import math
import os

from svqvae_cli.arguments import (
    OVERLAP,
    TILE_SIZE,
    Commands,
    add_command,
    add_image_set,
    add_model,
    add_push,
    add_scales,
    add_tiles,
    image_set_options,
    not_empty,
    path,
)
from svqvae_cli.errors import check_none_skipped, explain_resume

CROPS = ("whole", "whole-flip", "centre", "centre-flip", "ten-crop")  # as in `svqvae_hf.token_sets.crops`
MAX_WORKERS = 4  # by default


def add_to(commands: Commands) -> None:
    """Adds the command and its arguments."""
    parser = add_command(
        commands,
        "tokenize",
        run,
        "encode an image set to a token set",
        "Writes the ids of all images as Parquet files, which `datasets` loads. The same\n"
        "command resumes a run that was killed. On several GPUs:\n"
        "  accelerate launch -m svqvae_cli tokenize DATA OUT",
        "photos tokens --crops centre --resolution 256 --scales 0.5 1",
    )
    add_image_set(parser)
    parser.add_argument("out", type=path, metavar="OUT", help="folder to create")
    add_scales(parser, [1.0], sides=True)
    parser.add_argument(
        "--crops",
        choices=CROPS,
        default="whole",
        help="crops of an image that become rows: the whole image or the centre square, each also with its mirror "
        "image, or ten crops (default: whole)",
    )
    parser.add_argument("--resolution", type=int, metavar="PIXELS", help="side of centre and ten crops")
    parser.add_argument(
        "--keep",
        nargs="+",
        type=not_empty,
        default=[],
        metavar="NAME",
        help="further columns of the data set to keep, besides label, caption, text, cls, txt and json",
    )
    parser.add_argument(
        "--min-side", type=int, metavar="PIXELS", help="skip images with a smaller side (default: none)"
    )
    parser.add_argument(
        "--batch-size",
        type=int,
        default=1,
        metavar="N",
        help="crops of one size to encode together; above 1, rounding may change a few ids (default: 1)",
    )
    parser.add_argument(
        "--shard-size", type=int, default=1000, metavar="N", help="images per Parquet file (default: 1000)"
    )
    parser.add_argument(
        "--workers", type=int, metavar="N", help="processes that read images (default: one per core, at most 4)"
    )
    parser.add_argument("--license", type=not_empty, help="licence of the images for the card, by its id on the Hub")
    add_push(parser, "the token set")
    add_model(parser)
    add_tiles(parser, str(TILE_SIZE), str(OVERLAP), TILE_SIZE, OVERLAP)


def run(args: argparse.Namespace) -> None:
    """Encodes an image set to a token set."""
    from datetime import timedelta
    from pathlib import Path

    from accelerate import PartialState

    from svqvae_cli.loading import find_device, load_model, process_device
    from svqvae_hf import DEFAULT_MODEL
    from svqvae_hf.atomic_io import check_new_folder
    from svqvae_hf.data.image_sets import is_hub_set, open_images
    from svqvae_hf.token_sets.cards import BUNDLED_MODEL
    from svqvae_hf.token_sets.writer import tokenize_set

    if args.sides and args.resolution is None:
        raise ValueError("--sides needs square crops of one size. Add --crops centre --resolution PIXELS.")
    check_new_folder(args.out)
    # Processes wait for each other at the end, and may finish hours apart.
    state = PartialState(cpu=find_device(args.device).type == "cpu", timeout=timedelta(weeks=1))
    images = open_images(args.data, columns=args.keep, **image_set_options(args))
    model = load_model(args.model, process_device(args.device, state), args.dtype)
    model.enable_tiling(args.tile_size, args.overlap)
    if args.model is None or Path(args.model).resolve() == Path(DEFAULT_MODEL).resolve():
        model_name = BUNDLED_MODEL
    else:
        model_name = Path(args.model).resolve().name if Path(args.model).exists() else args.model  # not a private path
    if args.sides:
        args.scales = [side / math.ceil(args.resolution / model.f) for side in args.sides]
    with explain_resume(args.out, "the same command"):
        report = tokenize_set(
            model,
            images,
            args.out,
            model_name=model_name,
            source_set=args.data[0] if len(args.data) == 1 and is_hub_set(args.data[0]) else None,
            scales=args.scales,
            scale_from=args.scale_from,
            crops=args.crops,
            resolution=args.resolution,
            min_side=args.min_side,
            batch_size=args.batch_size,
            shard_size=args.shard_size,
            num_workers=min(MAX_WORKERS, os.cpu_count() or 1) if args.workers is None else args.workers,
            license=args.license,
            push_to_hub=args.push_to_hub,
            private=args.private,
        )
    if state.is_main_process:
        print(report)
    state.destroy_process_group()
    if state.num_processes == 1:  # launchers take any other exit code than 0 for a crash
        check_none_skipped(len(report.skipped), report.images)

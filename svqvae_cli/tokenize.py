"""Encodes an image set to a token set.

Writes the ids of all images as Parquet files, which `datasets` loads. The same
command resumes a run that was interrupted. On many machines, each makes a part.

  svqvae tokenize photos tokens --crops centre --resolution 256 --scales 0.5 1
"""

import argparse
import math
import os
import sys
from contextlib import suppress
from pathlib import Path

from svqvae_cli.arguments import Parser, image_set_options, not_empty, positive
from svqvae_cli.errors import check_none_skipped
from svqvae_cli.files import check_data, check_source, check_tiles
from svqvae_files.outputs import check_new_folder

CROPS = ("whole", "whole-flip", "centre", "centre-flip", "ten-crop")  # as in `svqvae_hf.token_sets.crops`
# Of `tokenize_set`, under the same names
OPTIONS = ("scales", "scale_from", "crops", "resolution", "batch_size", "overwrite", "license", "tile_size", "overlap")


def add_arguments(parser: Parser) -> None:
    """Adds the arguments."""
    parser.add_image_set()
    parser.option("out", not_empty, "OUT", "folder or URL to write to")
    parser.add_scales([1.0])
    parser.option("--sides", positive, "IDS", "scales of square crops by their sides in ids", nargs="+")
    parser.add_compress()
    parser.choice("--crops", CROPS, "crops of an image that become rows (default: whole)", "whole")
    parser.option("--resolution", positive, "PIXELS", "side of the crops, if they are not whole images")
    help = "columns to keep besides label, caption, text, cls, txt, json"
    parser.option("--keep", not_empty, "NAME", help, nargs="+", default=[])
    help = "crops to encode together; rounding may change a few ids (default: up to 64)"
    parser.option("--batch-size", int, "N", help)
    parser.option("--part", int, "I", "make only this part, counted from 0 (default: all)")
    parser.flag("--overwrite", "delete the token set in OUT and start over")
    parser.option("--num-parts", int, "N", "number of parts (default: one per 10,000 images or file, at most 1,000)")
    parser.option("--workers", int, "N", "processes that read images (default: one per core, at most 4)")
    parser.option("--license", not_empty, "ID", "licence of the images for the card, by its id on the Hub")
    parser.add_model()
    parser.add_tiles()


def run(args: argparse.Namespace) -> None:
    """Encodes an image set to a token set."""
    if args.sides and args.resolution is None:
        raise ValueError("--sides needs square crops of one size. Add --crops centre --resolution PIXELS.")
    if args.sides and args.scales != [1.0]:
        raise ValueError("--sides stands for the scales. Leave out --sides or --scales.")
    if args.resolution is None and not args.crops.startswith("whole"):
        raise ValueError(f"--crops {args.crops} needs --resolution PIXELS.")
    if args.overwrite and os.environ.get("WORLD_SIZE", "1") != "1":
        raise ValueError("--overwrite deletes all parts, so one process must make them. Or delete the folder first.")
    check_source(args.model)
    check_tiles(args.model, args.tile_size)
    check_data(args.data)
    if os.path.isfile(args.out):
        check_new_folder(Path(args.out))
    from svqvae_cli.loading import find_device, load_model, require_context_model
    from svqvae_hf import DEFAULT_MODEL
    from svqvae_hf.data.image_sets import open_images
    from svqvae_hf.token_sets.cards import public_names
    from svqvae_hf.token_sets.parts import describe_state
    from svqvae_hf.token_sets.writer import check_out, count_parts, tokenize_set

    check_out(args.out)
    images = open_images(args.data, columns=args.keep, results=args.out, **image_set_options(args))
    num_parts = count_parts(images, args.num_parts)
    rank, local_rank, world_size = (os.environ.get(name) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
    own = range(num_parts)[int(rank or 0) :: int(world_size or 1)]  # of this process under torchrun or accelerate
    device = find_device(args.device)
    is_numbered = local_rank is not None and args.device is None and device.type != "cpu"
    model = load_model(args.model, f"{device}:{local_rank}" if is_numbered else args.device, args.dtype)
    if args.sides:
        args.scales = [side / math.ceil(args.resolution / model.f) for side in args.sides]
    try:
        report = tokenize_set(
            model,
            images,
            args.out,
            **public_names(args.data, args.model or DEFAULT_MODEL),
            context_model=require_context_model(model, args.model) if args.compress else None,
            parts=own if args.part is None else [args.part],
            num_parts=num_parts,
            num_workers=min(4, os.cpu_count() or 1) if args.workers is None else args.workers,
            **{name: getattr(args, name) for name in OPTIONS},
        )
    except (KeyboardInterrupt, SystemExit, OSError):  # of a full disk or an image that cannot be fetched
        with suppress(ValueError, OSError):  # it was not started yet
            print(f"parts    {describe_state(args.out)['parts']}")
            print(f"svqvae: `{args.out}` is not complete. Run the same command again to resume.", file=sys.stderr)
        raise
    print(report)
    if rank is None and args.part is None:  # schedulers take any other exit code than 0 for a crash
        check_none_skipped(report.skipped, report.images)

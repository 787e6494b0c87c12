"""Speed and memory of encoding and decoding: `python benchmarks/speed.py --original CHECKOUT`.

All networks have the widths of the released SVQVAE (68 M parameters, f = 8) and random weights. Our model and the
original share theirs. diffusers' VQModel is the same network weight by weight; AutoencoderKL has the same widths.

Images of `--sides` are processed as a whole. The fraction of the matmul rate divides the operations of the plain
network by the rate of 2048 x 2048 matrix products, which are timed in the same turns. Agreement is the PSNR against
the float32 output of the original, or against our own without `--original`. The image of `--tiled-side` is processed
by tiles of 256 pixels at four scales, by our model and the original, whose tiles fail in bfloat16.
"""

import argparse
import functools
import math
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from contestants import KL, ORIGINAL, OURS, VQ_MODEL, Contestant, Tiles, count_operations, make_checkpoint, prepare
from measuring import DTYPES, Row, add_dtypes, in_own_process, make_parser, parse_options, report, take_turns

MATMUL_SIDE = 2048
MATMULS = 5  # per run


def multiply(left: torch.Tensor, right: torch.Tensor) -> None:
    """Computes `MATMULS` matrix products, one after the other."""
    for _ in range(MATMULS):
        left @ right


def compare_models(side: int, contestants: list[Contestant], options: argparse.Namespace) -> list[Row]:
    """Compares the models at one image size, with a row per contestant."""
    runs = {}
    outputs = {}
    for contestant in contestants:
        run = prepare(contestant, side)
        runs[contestant.label] = run
        outputs[contestant.label] = run()
    products = matrix_products(contestants, options.device)
    seconds, medians = take_turns(runs | products, options.rounds, options.device)
    del runs, run  # the models, which are not to be in memory below
    reference = find_reference(contestants).label
    operations = count_operations(options.base_channels, side)
    rows = []
    for contestant in contestants:
        label = contestant.label
        rate = MATMULS * 2 * MATMUL_SIDE**3 / medians[matmul_label(contestant.dtype)]
        agreement = None
        if contestant.name in (OURS, ORIGINAL):  # with the same weights
            agreement = agreement_db(outputs[label], outputs[reference])
        cost = in_own_process(options.device, options.threads, prepare, contestant, side)
        row = {
            "contestant": label,
            "seconds": medians[label],
            f"times as fast as {reference}": medians[reference] / medians[label],
            "fraction of the matmul rate": operations / medians[label] / rate,
            "matmul, GFLOP/s": rate / 1e9,
            "peak memory, MiB": cost.peak_mib,
            "agreement, dB": agreement,
            "rounds": seconds[label],
        }
        rows.append(row)
    return rows


def matmul_label(dtype: torch.dtype) -> str:
    """Name of the matrix products of a precision."""
    return f"matmul, {dtype}"


def matrix_products(contestants: list[Contestant], device: str) -> dict[str, Callable[[], None]]:
    """Matrix products in the precision of each contestant, by [`matmul_label`]."""
    matrices = torch.randn(2, MATMUL_SIDE, MATMUL_SIDE, device=device)
    products = {}
    for contestant in contestants:
        left, right = matrices.to(contestant.dtype)
        products[matmul_label(contestant.dtype)] = functools.partial(multiply, left, right)
    return products


def find_reference(contestants: list[Contestant]) -> Contestant:
    """The original if it takes part, otherwise the first contestant."""
    for contestant in contestants:
        if contestant.name == ORIGINAL:
            return contestant
    return contestants[0]


def agreement_db(output: torch.Tensor, reference: torch.Tensor) -> float | None:
    """PSNR in dB of samples in [0, 1]; `None` if they are equal."""
    error = (output.float() - reference.float()).square().mean().item()
    if error == 0:
        return None
    return -10 * math.log10(error)


def compare_tiles(contestants: list[Contestant], options: argparse.Namespace) -> list[Row]:
    """Compares our model and the original by tiles, with a row per contestant."""
    side = options.tiled_side
    tiles = Tiles(options.tile_size, options.overlap, tuple(options.patch_nums))
    runs = {contestant.label: prepare(contestant, side, tiles) for contestant in contestants}
    seconds, medians = take_turns(runs, options.rounds, options.device)
    del runs
    first = contestants[0].label
    rows = []
    for contestant in contestants:
        label = contestant.label
        cost = in_own_process(options.device, options.threads, prepare, contestant, side, tiles)
        row = {
            "contestant": label,
            "seconds": medians[label],
            f"times as fast as {first}": medians[first] / medians[label],
            "peak memory, MiB": cost.peak_mib,
            "rounds": seconds[label],
        }
        rows.append(row)
    return rows


def main() -> None:
    """Reads the arguments, runs the benchmark and reports."""
    parser = make_parser(__doc__, rounds=5)
    parser.add_argument("--sides", type=int, nargs="*", default=[256, 512], metavar="PIXELS", help="default: 256 512")
    parser.add_argument("--tiled-side", type=int, default=1024, metavar="PIXELS", help="default: 1024; 0: no tiles")
    parser.add_argument("--tile-size", type=int, default=256, metavar="PIXELS", help="default: 256")
    parser.add_argument("--overlap", type=int, default=32, metavar="PIXELS", help="default: 32")
    parser.add_argument("--patch-nums", type=int, nargs="+", default=[4, 8, 16, 32], help="default: 4 8 16 32")
    parser.add_argument("--original", type=Path, metavar="CHECKOUT", help="folder with the original's svqvae.py")
    add_dtypes(parser)
    parser.add_argument("--base-channels", type=int, default=128, help="a multiple of 32 (default: 128, as released)")
    options, machine = parse_options(parser)
    tables: dict[str, list[Row]] = {}
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder, "svqvae.safetensors")
        make_checkpoint(checkpoint, options.base_channels)

        def make(*names: str) -> list[Contestant]:
            contestants = []
            for dtype in options.dtypes:
                for name in names:
                    contestant = Contestant(name, DTYPES[dtype], checkpoint, options.original, options.device)
                    contestants.append(contestant)
            return contestants

        ours = make(OURS)
        originals = make(ORIGINAL) if options.original else []
        for side in options.sides:
            contestants = ours + originals + make(VQ_MODEL, KL)
            tables[f"{side} x {side}, as a whole"] = compare_models(side, contestants, options)
        if options.tiled_side:
            title = f"{options.tiled_side} x {options.tiled_side}, by tiles, patch_nums {options.patch_nums}"
            exact_originals = [original for original in originals if original.dtype == torch.float32]
            tables[title] = compare_tiles(exact_originals + ours, options)
    report(options, machine, tables)


if __name__ == "__main__":
    main()

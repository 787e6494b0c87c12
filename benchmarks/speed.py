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
    runs = {each.label: prepare(each, side) for each in contestants}
    outputs = {label: run() for label, run in runs.items()}
    matrices = torch.randn(2, MATMUL_SIDE, MATMUL_SIDE, device=options.device)
    products = {
        f"matmul, {dtype}": functools.partial(multiply, *matrices.to(dtype))
        for dtype in {each.dtype for each in contestants}
    }
    seconds, medians = take_turns(runs | products, options.rounds, options.device)
    del runs
    reference = next((each for each in contestants if each.name == ORIGINAL), contestants[0]).label
    rows = []
    for each in contestants:
        rate = MATMULS * 2 * MATMUL_SIDE**3 / medians[f"matmul, {each.dtype}"]
        operations = count_operations(options.base_channels, side)
        same_weights = each.name in (OURS, ORIGINAL)
        error = (outputs[each.label].float() - outputs[reference].float()).square().mean().item()
        rows.append(
            {
                "contestant": each.label,
                "seconds": medians[each.label],
                f"times as fast as {reference}": medians[reference] / medians[each.label],
                "fraction of the matmul rate": operations / medians[each.label] / rate,
                "matmul, GFLOP/s": rate / 1e9,
                "peak memory, MiB": in_own_process(options.device, options.threads, prepare, each, side).peak_mib,
                "agreement, dB": -10 * math.log10(error) if same_weights and error else None,
                "rounds": seconds[each.label],
            }
        )
    return rows


def compare_tiles(contestants: list[Contestant], options: argparse.Namespace) -> list[Row]:
    """Compares our model and the original by tiles, with a row per contestant."""
    work = (options.tiled_side, Tiles(options.tile_size, options.overlap, tuple(options.patch_nums)))
    runs = {each.label: prepare(each, *work) for each in contestants}
    seconds, medians = take_turns(runs, options.rounds, options.device)
    del runs
    first = contestants[0].label
    return [
        {
            "contestant": each.label,
            "seconds": medians[each.label],
            f"times as fast as {first}": medians[first] / medians[each.label],
            "peak memory, MiB": in_own_process(options.device, options.threads, prepare, each, *work).peak_mib,
            "rounds": seconds[each.label],
        }
        for each in contestants
    ]


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

        def make(name: str, dtype: str) -> Contestant:
            return Contestant(name, DTYPES[dtype], checkpoint, options.original, options.device)

        ours = [make(OURS, dtype) for dtype in options.dtypes]
        original = [make(ORIGINAL, dtype) for dtype in options.dtypes] if options.original else []
        others = [make(name, dtype) for dtype in options.dtypes for name in (VQ_MODEL, KL)]
        for side in options.sides:
            tables[f"{side} x {side}, as a whole"] = compare_models(side, ours + original + others, options)
        if options.tiled_side:
            title = f"{options.tiled_side} x {options.tiled_side}, by tiles, patch_nums {options.patch_nums}"
            tables[title] = compare_tiles([each for each in original if each.dtype == torch.float32] + ours, options)
    report(options, machine, tables)


if __name__ == "__main__":
    main()

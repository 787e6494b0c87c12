"""Speed and memory of encoding and decoding without tiles: `python benchmarks/speed.py --original CHECKOUT`.

All networks have the widths of the released SVQVAE (68 M parameters, f = 8) and random weights. Our model and the
original share theirs. diffusers' VQModel is the same network weight by weight; AutoencoderKL has the same widths.
The fraction of the matmul rate divides the operations of the plain network by the rate of 2048 x 2048 matrix products,
which are timed in the same turns. Agreement is the PSNR against the float32 output of the original, or against our own
without `--original`.

`--layers` profiles our model and the original by layer instead.
"""

import argparse
import functools
import math
import statistics
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from contestants import (
    KL,
    ORIGINAL,
    OURS,
    VQ_MODEL,
    Contestant,
    count_operations,
    make_checkpoint,
    prepare_reconstruction,
)
from layers import profile_layers
from measuring import DTYPES, Row, add_dtypes, describe_machine, in_own_process, make_parser, report, take_turns

MATMUL_SIDE = 2048
MATMULS = 5  # per run


def multiply(left: torch.Tensor, right: torch.Tensor) -> None:
    """Computes `MATMULS` matrix products, one after the other."""
    for _ in range(MATMULS):
        left @ right


def matmuls(device: str, dtypes: Iterable[torch.dtype]) -> dict[str, Callable[[], None]]:
    """Products of random square matrices in each precision, as contestants."""
    matrices = torch.randn(2, MATMUL_SIDE, MATMUL_SIDE, device=device)
    return {f"matmul, {dtype}": functools.partial(multiply, *matrices.to(dtype)) for dtype in dtypes}


def compare_models(
    side: int, contestants: list[Contestant], base_channels: int, options: argparse.Namespace
) -> list[Row]:
    """Compares the models at one image size, with a row per contestant."""
    runs = {each.label: prepare_reconstruction(each, side, side) for each in contestants}
    outputs = {label: run() for label, run in runs.items()}
    products = matmuls(options.device, {each.dtype for each in contestants})
    seconds = take_turns(runs | products, options.rounds, options.device)
    del runs
    medians = {label: statistics.median(times) for label, times in seconds.items()}
    reference = next((each for each in contestants if each.name == ORIGINAL), contestants[0]).label
    rows = []
    for each in contestants:
        rate = MATMULS * 2 * MATMUL_SIDE**3 / medians[f"matmul, {each.dtype}"]
        operations = count_operations(base_channels, side, side)
        cost = in_own_process(options.device, options.threads, prepare_reconstruction, each, side, side)
        same_weights = each.name in (OURS, ORIGINAL)
        error = (outputs[each.label].float() - outputs[reference].float()).square().mean().item()
        rows.append(
            {
                "contestant": each.label,
                "seconds": medians[each.label],
                f"times as fast as {reference}": medians[reference] / medians[each.label],
                "fraction of the matmul rate": operations / medians[each.label] / rate,
                "matmul, GFLOP/s": rate / 1e9,
                "peak memory, MiB": cost.peak_mib,
                "agreement, dB": -10 * math.log10(error) if same_weights and error else None,
                "rounds": seconds[each.label],
            }
        )
    return rows


def main() -> None:
    """Reads the arguments, runs the benchmark and reports."""
    parser = make_parser(__doc__, rounds=5)
    parser.add_argument("--sides", type=int, nargs="+", default=[256, 512], metavar="PIXELS", help="default: 256 512")
    parser.add_argument("--original", type=Path, metavar="CHECKOUT", help="folder with the original's svqvae.py")
    add_dtypes(parser)
    parser.add_argument("--base-channels", type=int, default=128, help="a multiple of 32 (default: 128, as released)")
    parser.add_argument(
        "--channels-last", action="store_true", help="use the channels-last memory format for all models"
    )
    parser.add_argument("--compile", action="store_true", help="compile all models")
    parser.add_argument("--layers", action="store_true", help="profile our model and the original by layer")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    machine = describe_machine(options.device, options.threads)
    names = [OURS] + ([ORIGINAL] if options.original else []) + ([] if options.layers else [VQ_MODEL, KL])
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder, "svqvae.safetensors")
        make_checkpoint(checkpoint, options.base_channels)
        contestants = [
            Contestant(
                *(name, DTYPES[dtype], checkpoint, options.original),
                *(options.device, options.channels_last, options.compile),
            )
            for dtype in options.dtypes
            for name in names
        ]
        tables: dict[str, list[Row]] = {}
        for side in options.sides:
            if options.layers:
                tables |= {
                    f"{each.label}, {side} x {side}: milliseconds by layer and operation": profile_layers(
                        each, side, options.rounds
                    )
                    for each in contestants
                }
            else:
                rows = compare_models(side, contestants, options.base_channels, options)
                tables[f"{side} x {side}, encoded and decoded"] = rows
    report(options, machine, tables)


if __name__ == "__main__":
    main()

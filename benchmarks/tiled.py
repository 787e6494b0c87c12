"""Tiles in memory: `python benchmarks/tiled.py --original CHECKOUT --side 1024`.

The networks of speed.py, in three parts. `scales` compares our model and the original by tiles at four scales.
`diffusers` compares our model, AutoencoderKL and VQModel (which has no tiling) at scale 1, by tiles and as a whole.
`ratio` compares the time per pixel of an image a little larger than a tile (300 pixels for tiles of 256) and of an
image that is one tile.
"""

import argparse
import functools
import statistics
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from contestants import KL, LATENT_PIXELS, ORIGINAL, OURS, VQ_MODEL, Contestant, make_checkpoint
from measuring import DTYPES, Row, add_dtypes, describe_machine, in_own_process, make_parser, report, take_turns
from torch import nn

PARTS = ("scales", "diffusers", "ratio")


class Tiles(NamedTuple):
    """Side and overlap of tiles in pixels, and `patch_nums` of the original: latents per tile side at each scale."""

    side: int
    overlap: int
    patch_nums: tuple[int, ...]


def reconstruct(contestant: Contestant, model: nn.Module, sample: torch.Tensor, tiles: Tiles | None) -> Any:
    """Encodes, quantises and decodes, as a whole if `tiles` is None."""
    if tiles is None:
        return contestant.reconstruct(model, sample)
    with torch.inference_mode():
        if contestant.name == KL:
            model.enable_tiling()
            model.tile_sample_min_size, model.tile_latent_min_size = tiles.side, tiles.side // LATENT_PIXELS
            model.tile_overlap_factor = tiles.overlap / tiles.side
            return model(sample).sample
        output = model(sample, patch_nums=tiles.patch_nums, tile_size=tiles.side, overlap=tiles.overlap)
        return output[0] if contestant.name == ORIGINAL else output.sample


def prepare(contestant: Contestant, side: int, tiles: Tiles | None) -> Callable[[], Any]:
    """Loads and warms up a model, and returns its reconstruction of an image as a function."""
    model = contestant.load()
    small = LATENT_PIXELS if tiles is None else tiles.side + LATENT_PIXELS
    reconstruct(contestant, model, contestant.sample(small, small), tiles)
    return functools.partial(reconstruct, contestant, model, contestant.sample(side, side), tiles)


def compare_runs(runs: Mapping[str, tuple[Contestant, int, Tiles | None]], options: argparse.Namespace) -> list[Row]:
    """Compares runs (contestant, side of the image, tiles) with the first of them, with a row per run."""
    prepared = {name: prepare(*run) for name, run in runs.items()}
    seconds = take_turns(prepared, options.rounds, options.device)
    del prepared
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    first = next(iter(runs))
    return [
        {
            "contestant": name,
            "side": side,
            "seconds": medians[name],
            f"times as fast as {first}": medians[first] / medians[name],
            "microseconds per pixel": medians[name] / side**2 * 1e6,
            "peak memory, MiB": in_own_process(
                options.device, options.threads, prepare, contestant, side, tiles
            ).peak_mib,
            "rounds": seconds[name],
        }
        for name, (contestant, side, tiles) in runs.items()
    ]


def make_tables(checkpoint: Path, options: argparse.Namespace) -> dict[str, list[Row]]:
    """Runs the chosen parts."""

    def make(name: str, dtype: torch.dtype) -> Contestant:
        return Contestant(name, dtype, checkpoint, options.original, options.device)

    side = options.side
    tiles = Tiles(options.tile_size, options.overlap, tuple(options.patch_nums))
    plain = Tiles(options.tile_size, options.overlap, (options.tile_size // LATENT_PIXELS,))
    tables = {}
    if "scales" in options.parts:
        # The original's tiles fail in bfloat16.
        contestants = [make(ORIGINAL, torch.float32)] if options.original else []
        contestants += [make(OURS, DTYPES[dtype]) for dtype in options.dtypes]
        title = f"{side} x {side}, tiles of {tiles.side}, overlap {tiles.overlap}, patch_nums {list(tiles.patch_nums)}"
        tables[title] = compare_runs({each.label: (each, side, tiles) for each in contestants}, options)
    if "diffusers" in options.parts:
        variants = [
            (KL, plain, "tiles"),
            (OURS, plain, "tiles"),
            (KL, None, "whole"),
            (VQ_MODEL, None, "whole"),
            (OURS, None, "whole"),
        ]
        for dtype in options.dtypes:
            runs = {
                f"{make(name, DTYPES[dtype]).label}, {method}": (make(name, DTYPES[dtype]), side, cut)
                for name, cut, method in variants
            }
            tables[f"{side} x {side}, scale 1, {dtype}"] = compare_runs(runs, options)
    if "ratio" in options.parts:
        for dtype in options.dtypes:
            each = make(OURS, DTYPES[dtype])
            sides = (tiles.side, tiles.side * 75 // 64)
            rows = compare_runs({f"{each.label}, {size} x {size}": (each, size, plain) for size in sides}, options)
            ratio = rows[1]["microseconds per pixel"] / rows[0]["microseconds per pixel"]
            tables[f"A little larger than a tile, {each.label}: {ratio:.2f} times the time per pixel"] = rows
    return tables


def main() -> None:
    """Reads the arguments, runs the benchmark and reports."""
    parser = make_parser(__doc__, rounds=3)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="default: all")
    parser.add_argument("--side", type=int, default=1024, metavar="PIXELS", help="side of the image (default: 1024)")
    parser.add_argument("--tile-size", type=int, default=256, metavar="PIXELS", help="default: 256")
    parser.add_argument("--overlap", type=int, default=32, metavar="PIXELS", help="default: 32")
    parser.add_argument("--patch-nums", type=int, nargs="+", default=[4, 8, 16, 32], help="default: 4 8 16 32")
    parser.add_argument("--original", type=Path, metavar="CHECKOUT", help="folder with the original's svqvae.py")
    add_dtypes(parser)
    parser.add_argument("--base-channels", type=int, default=128, help="a multiple of 32 (default: 128, as released)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    machine = describe_machine(options.device, options.threads)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder, "svqvae.safetensors")
        make_checkpoint(checkpoint, options.base_channels)
        tables = make_tables(checkpoint, options)
    report(options, machine, tables)


if __name__ == "__main__":
    main()

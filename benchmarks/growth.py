"""How time and memory grow with the image's area: `python benchmarks/growth.py [--model MODEL]`.

Encodes an image to ids and decodes them: as a whole, by tiles in memory, and from TIFF to token file to TIFF as with
`--large`. Each run has a process of its own. Peak memory excludes the loaded model and an image held in memory.
"""

import argparse
import functools
import itertools
import re
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import tifffile
import torch
from measuring import Cost, Row, in_own_process, make_parser, median_cost, parse_options, report

from svqvae_hf import DEFAULT_MODEL, SVQVAE
from svqvae_hf.large.large_images import decode_large, encode_large
from svqvae_hf.tokens.token_files import load_tokens, save_tokens

WHOLE, TILES, FILES = "whole", "tiles", "tiles, TIFF to TIFF"
SCAN_TILE = 256
Size = tuple[int, int]


def read_size(text: str) -> Size:
    """Parses `WIDTHxHEIGHT`."""
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"must be a size such as 2048x1024, got {text!r}")
    return int(match[1]), int(match[2])


def scan_path(folder: str, size: Size) -> Path:
    """Path of the TIFF of a size."""
    width, height = size
    return Path(folder, f"{width}x{height}.tif")


def write_scan(path: Path, size: Size) -> None:
    """Writes a tiled TIFF that repeats one tile of noise, without holding the image in memory."""
    width, height = size
    tile = np.random.default_rng(0).integers(256, size=(SCAN_TILE, SCAN_TILE, 3), dtype=np.uint8)
    count = -(-width // SCAN_TILE) * -(-height // SCAN_TILE)
    tifffile.imwrite(
        path,
        itertools.repeat(tile, count),
        shape=(height, width, 3),
        dtype=np.uint8,
        tile=(SCAN_TILE, SCAN_TILE),
        photometric="rgb",
        bigtiff=True,
    )


def reconstruct_files(model: SVQVAE, scan: Path) -> None:
    """Encodes a TIFF to a token file and decodes it to a TIFF."""
    ids = scan.with_suffix(".safetensors")
    save_tokens(ids, encode_large(model, scan))
    decode_large(model, load_tokens(ids), scan.with_name("decoded.tif"))
    ids.unlink()
    scan.with_name("decoded.tif").unlink()


@torch.inference_mode()
def reconstruct_in_memory(model: SVQVAE, sample: torch.Tensor) -> None:
    """Encodes a sample to ids and decodes them."""
    model.decode_tokens(model.encode_tokens(sample))


def prepare(method: str, size: Size, scan: Path, options: argparse.Namespace) -> Callable[[], None]:
    """Loads and warms up the model, and returns the work on an image as a function."""
    model = SVQVAE.from_pretrained(options.model, torch_dtype=getattr(torch, options.dtype)).eval().to(options.device)
    reconstruct_in_memory(model, torch.rand(1, 3, model.f, model.f).to(model.device, model.dtype))
    if method != WHOLE:
        model.enable_tiling(options.tile_size, options.overlap)
    if method == FILES:
        return functools.partial(reconstruct_files, model, scan)
    width, height = size
    sample = torch.rand(1, 3, height, width).to(model.device, model.dtype)
    return functools.partial(reconstruct_in_memory, model, sample)


def growth_parser() -> argparse.ArgumentParser:
    """Makes the parser."""
    sides = [f"{side}x{side}" for side in (256, 512, 1024, 2048, 4096)]
    files = ["2048x2048", "8192x8192", "32768x2048"]
    parser = make_parser(__doc__, rounds=1)
    for name, default in (("whole", sides[:3]), ("tiles", sides), ("files", files)):
        parser.add_argument(
            f"--{name}",
            type=read_size,
            nargs="*",
            default=[read_size(size) for size in default],
            metavar="WxH",
            help=f"sizes of images (default: {' '.join(default)})",
        )
    parser.add_argument("--model", default=DEFAULT_MODEL, help="folder or Hub id (default: the bundled model)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="default: float32")
    parser.add_argument("--tile-size", type=int, default=256, metavar="PIXELS", help="default: 256")
    parser.add_argument("--overlap", type=int, default=32, metavar="PIXELS", help="default: 32")
    return parser


def make_row(method: str, size: Size, costs: Sequence[Cost]) -> Row:
    """Medians of one method and size."""
    width, height = size
    median = median_cost(costs)
    return {
        "method": method,
        "image": f"{width} x {height}",
        "seconds": median.seconds,
        "microseconds per pixel": median.seconds / (width * height) * 1e6,
        "CPU microseconds per pixel": median.cpu_seconds / (width * height) * 1e6,
        "peak memory, MiB": median.peak_mib,
        "rounds": [cost._asdict() for cost in costs],
    }


def main() -> None:
    """Reads the arguments, runs the benchmark and reports."""
    options, machine = parse_options(growth_parser())
    sizes = {WHOLE: options.whole, TILES: options.tiles, FILES: options.files}
    costs: dict[tuple[str, Size], list[Cost]] = {}
    for method, sizes_of_method in sizes.items():
        for size in sizes_of_method:
            costs[method, size] = []
    with tempfile.TemporaryDirectory() as folder:
        for size in options.files:
            write_scan(scan_path(folder, size), size)
        for _ in range(options.rounds):
            for (method, size), costs_of_run in costs.items():
                scan = scan_path(folder, size)
                cost = in_own_process(options.device, options.threads, prepare, method, size, scan, options)
                costs_of_run.append(cost)
    rows = [make_row(method, size, costs_of_run) for (method, size), costs_of_run in costs.items()]
    report(options, machine, {"Pixels to ids to pixels": rows})


if __name__ == "__main__":
    main()

"""What tiles cost in quality: `python benchmarks/tiles.py IMAGES [--model MODEL]`.

As means over the images: PSNR whole and by tiles, agreement of the two, the share of ids that they have in common, and
the squared error along tile borders and along the image border, each relative to elsewhere. What lies along a tile
border may be hard in itself: so two lines are about the same pixels where they have no border, whole and with the grid
moved by half a tile. Two more say how many ids stay when it moves, and how far the results agree.
Then time and memory of the first image, whole and by tiles, each in a process of its own.
"""

import argparse
import functools
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from measuring import Cost, Row, describe_machine, in_own_process, make_parser, median_cost, report
from tqdm import tqdm

from svqvae_hf import DEFAULT_MODEL, SVQVAE, SVQVAEImageProcessor
from svqvae_hf.evaluation.metrics import psnr
from svqvae_hf.models.image_processing_svqvae import IMAGE_SUFFIXES
from svqvae_hf.models.tiling import Tile, tile_axis
from svqvae_hf.paths import find_files

BAND = 4  # pixels on each side of a border
FRAME = 16  # pixels cut off each side first: scans such as Kodak's have dark lines there, which would pass for errors


def border_bands(length: int, model: SVQVAE) -> tuple[torch.Tensor, torch.Tensor]:
    """Which pixels of an axis lie along a tile border, and along the end of the image."""
    f = model.f
    tiles = tile_axis(-(-length // f), model.tile_size // f, model.overlap // f)
    places = torch.arange(length)
    along_tiles = torch.zeros(length, dtype=torch.bool)
    for tile in tiles[:-1]:
        along_tiles |= (places >= tile.core_stop * f - BAND) & (places < tile.core_stop * f + BAND)
    return along_tiles, (places < BAND) | (places >= length - BAND)


def moved_axis(length: int, tile: int, overlap: int) -> list[Tile]:
    """The grid of [`tile_axis`] with its borders moved to the middle of its cores: one tile more, the same halo."""
    tiles = tile_axis(length, tile, overlap)
    if len(tiles) == 1:
        return tiles
    cuts = [0, *((each.core_start + each.core_stop) // 2 for each in tiles), length]
    cores = list(zip(cuts, cuts[1:], strict=False))
    window = max(min(stop + overlap, length) - max(0, start - overlap) for start, stop in cores)
    starts = [min(max(0, start - overlap), length - window) for start, _ in cores]
    return [Tile(start, start + window, *core) for start, core in zip(starts, cores, strict=True)]


def reconstruct(model: SVQVAE, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids of an image, and what they decode to."""
    ids = model.encode_tokens(image)
    return ids, model.resize_to_image(model.decode(ids).sample, image.shape[-2:], scale=1)


@torch.inference_mode()
def measure(model: SVQVAE, image: torch.Tensor, with_whole: bool = True) -> dict[str, float]:
    """Figures of one image `(1, 3, height, width)`, larger than a tile, without its frame."""
    image = image[..., FRAME:-FRAME, FRAME:-FRAME]
    (rows, top), (columns, left) = (border_bands(length, model) for length in image.shape[-2:])
    along_image = top[:, None] | left
    along_tiles = (rows[:, None] | columns) & ~along_image
    inside = ~along_tiles & ~along_image

    def error(output: torch.Tensor, where: torch.Tensor) -> float:
        return (output - image).square().mean((0, 1))[where].mean().item()

    def agreement(output: torch.Tensor, other: torch.Tensor) -> float:
        return psnr(output, other, data_range=1.0).item()

    model.enable_tiling(model.tile_size, model.overlap)
    ids, tiled = reconstruct(model, image)
    with patch("svqvae_hf.models.tiling.tile_axis", moved_axis):
        moved_ids, moved = reconstruct(model, image)
    figures = {
        "PSNR tiled, dB": agreement(tiled, image),
        "error along tile borders": error(tiled, along_tiles) / error(tiled, inside),
        "the same over that when the grid moves": error(tiled, along_tiles) / error(moved, along_tiles),
        "error along image border": error(tiled, along_image) / error(tiled, inside),
        "ids kept when the grid moves": (moved_ids == ids).float().mean().item(),
        "agreement when the grid moves, dB": agreement(moved, tiled),
    }
    if not with_whole:
        return figures
    model.disable_tiling()
    whole_ids, whole = reconstruct(model, image)
    return figures | {
        "PSNR whole, dB": agreement(whole, image),
        "the same pixels, whole": error(whole, along_tiles) / error(whole, inside),
        "agreement, dB": agreement(tiled, whole),
        "ids kept": (ids == whole_ids).float().mean().item(),
    }


def load(options: argparse.Namespace) -> tuple[SVQVAE, SVQVAEImageProcessor]:
    """Model, with its tiles, and processor."""
    model = SVQVAE.from_pretrained(options.model).eval().to(options.device)
    model.enable_tiling(options.tile_size, options.overlap)
    return model, SVQVAEImageProcessor(pixel_range=(0, 1))


def prepare(path: Path, tiled: bool, options: argparse.Namespace) -> Callable[[], object]:
    """The reconstruction of an image as a function, after that of a small one."""
    model, processor = load(options)
    if not tiled:
        model.disable_tiling()
    run = torch.inference_mode()(functools.partial(reconstruct, model))
    run(torch.rand(1, 3, model.f, model.f, device=options.device))
    return functools.partial(run, processor(path)["pixel_values"].to(options.device))


def main() -> None:
    """Reads the arguments, runs and reports."""
    parser = make_parser(__doc__, rounds=1)
    parser.add_argument("images", type=Path, help="folder of images larger than a tile")
    parser.add_argument("--model", default=str(DEFAULT_MODEL), help="folder or Hub id (default: the bundled model)")
    parser.add_argument("--tile-size", type=int, default=256, metavar="PIXELS", help="default: 256")
    parser.add_argument("--overlap", type=int, default=32, metavar="PIXELS", help="default: 32")
    parser.add_argument("--tiled-only", action="store_true", help="for images too large to be taken whole")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    machine = describe_machine(options.device, options.threads)
    paths = find_files([str(options.images)], IMAGE_SUFFIXES)
    model, processor = load(options)
    each = [
        measure(model, processor(path)["pixel_values"].to(options.device), not options.tiled_only)
        for path in tqdm(paths)
    ]
    quality: list[Row] = [
        {"figure": name, "mean": np.mean(values).item(), "images": values}
        for name, values in ((name, [figures[name] for figures in each]) for name in each[0])
    ]
    ways = {"tiles": True} if options.tiled_only else {"whole": False, "tiles": True}
    costs: dict[str, list[Cost]] = {name: [] for name in ways}
    for _ in range(options.rounds):
        for name, tiled in ways.items():
            costs[name].append(in_own_process(options.device, options.threads, prepare, paths[0], tiled, options))
    cost_rows: list[Row] = []
    for name, measured in costs.items():
        cost = median_cost(measured)
        cost_rows.append({"way": name, "seconds": cost.seconds, "peak memory, MiB": cost.peak_mib})
    tables = {f"Means over {len(paths)} images": quality, f"Cost of {paths[0].name}": cost_rows}
    report(options, machine, tables)


if __name__ == "__main__":
    main()

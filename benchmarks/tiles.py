"""Quality and cost of tiles: `python benchmarks/tiles.py IMAGES [--model MODEL]`.

Means over the images: PSNR as a whole and by tiles, agreement between the two, the fraction of
equal ids, and the squared error along tile borders and along the image border, relative to the error elsewhere. Pixels
along a tile border may be hard to reconstruct anyway. Two rows therefore measure the same pixels without a border: in
the whole image, and with the grid moved by half a tile. Two more rows compare ids and results of the two grids.
"""

from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from measuring import Row, make_parser, parse_options, report
from tqdm import tqdm

from svqvae_cli.files import find_inputs
from svqvae_files.file_names import IMAGE_SUFFIXES
from svqvae_hf import DEFAULT_MODEL, SVQVAE, SVQVAEImageProcessor
from svqvae_hf.evaluation.metrics import psnr
from svqvae_hf.models.tiling import tile_axis

BAND = 4  # pixels on each side of a border
FRAME = 16  # pixels cut off each side first, because scans such as Kodak's have dark lines there


def border_bands(length: int, model: SVQVAE) -> tuple[torch.Tensor, torch.Tensor]:
    """Masks of the pixels of an axis along a tile border, and along the ends of the image."""
    f = model.f
    tiles = tile_axis(-(-length // f), model.tile_size // f, model.overlap // f)
    positions = torch.arange(length)
    along_tiles = torch.zeros(length, dtype=torch.bool)
    for _, core in tiles[:-1]:
        along_tiles |= (positions >= core.stop * f - BAND) & (positions < core.stop * f + BAND)
    return along_tiles, (positions < BAND) | (positions >= length - BAND)


def moved_axis(length: int, tile: int, overlap: int) -> list[tuple[slice, slice]]:
    """Moves the borders of [`tile_axis`] to the middle of its cores: one tile more, with the same overlap."""
    tiles = tile_axis(length, tile, overlap)
    if len(tiles) == 1:
        return tiles
    cores = []
    start = 0
    for _, core in tiles:
        middle = (core.start + core.stop) // 2
        cores.append(slice(start, middle))
        start = middle
    cores.append(slice(start, length))
    window = 0  # length of the longest core with its overlap, which all tiles have
    for core in cores:
        window = max(window, min(core.stop + overlap, length) - max(0, core.start - overlap))
    moved = []
    for core in cores:
        first = min(max(0, core.start - overlap), length - window)
        moved.append((slice(first, first + window), core))
    return moved


class Measurement:
    """Errors of one image `(1, 3, height, width)`, larger than a tile, without its frame."""

    def __init__(self, model: SVQVAE, image: torch.Tensor):
        self.model = model
        self.image = image[..., FRAME:-FRAME, FRAME:-FRAME]
        height, width = self.image.shape[-2:]
        rows_along_tiles, rows_along_image = border_bands(height, model)
        columns_along_tiles, columns_along_image = border_bands(width, model)
        self.along_image = rows_along_image[:, None] | columns_along_image  # (height, width)
        self.along_tiles = (rows_along_tiles[:, None] | columns_along_tiles) & ~self.along_image
        self.inside = ~self.along_tiles & ~self.along_image
        model.enable_tiling(model.tile_size, model.overlap)
        self.ids, self.tiled = self.reconstruct()

    @torch.inference_mode()
    def reconstruct(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the ids of the image and its reconstruction."""
        ids = self.model.encode_tokens(self.image)
        decoded = self.model.decode(ids).sample
        return ids, self.model.resize_to_image(decoded, self.image.shape[-2:], scale=1)

    def error(self, output: torch.Tensor, where: torch.Tensor) -> float:
        """Mean squared error in a region."""
        return (output - self.image).square().mean((0, 1))[where].mean().item()

    def measure_tiles(self) -> dict[str, float]:
        """Figures of the tiled reconstruction."""
        inside = self.error(self.tiled, self.inside)
        return {
            "PSNR tiled, dB": agreement(self.tiled, self.image),
            "error along tile borders": self.error(self.tiled, self.along_tiles) / inside,
            "error along image border": self.error(self.tiled, self.along_image) / inside,
        }

    def compare_with_moved_grid(self) -> dict[str, float]:
        """Figures of the tiled reconstruction relative to one with the grid moved by half a tile."""
        with patch("svqvae_hf.models.tiling.tile_axis", moved_axis):
            ids, moved = self.reconstruct()
        ratio = self.error(self.tiled, self.along_tiles) / self.error(moved, self.along_tiles)
        return {
            "error along tile borders, relative to a moved grid": ratio,
            "ids equal when the grid moves": (ids == self.ids).float().mean().item(),
            "agreement when the grid moves, dB": agreement(moved, self.tiled),
        }

    def compare_with_whole(self) -> dict[str, float]:
        """Figures of the reconstruction as a whole, and of its agreement with the tiled one."""
        self.model.disable_tiling()
        ids, whole = self.reconstruct()
        ratio = self.error(whole, self.along_tiles) / self.error(whole, self.inside)
        return {
            "PSNR whole, dB": agreement(whole, self.image),
            "error of the same pixels in the whole image": ratio,
            "agreement, dB": agreement(self.tiled, whole),
            "ids equal": (self.ids == ids).float().mean().item(),
        }


def agreement(output: torch.Tensor, reference: torch.Tensor) -> float:
    """PSNR in dB of two samples in [0, 1]."""
    return psnr(output, reference, data_range=1.0).item()


def measure(model: SVQVAE, image: torch.Tensor, with_whole: bool) -> dict[str, float]:
    """All figures of one image."""
    measurement = Measurement(model, image)
    figures = measurement.measure_tiles() | measurement.compare_with_moved_grid()
    if with_whole:
        figures |= measurement.compare_with_whole()
    return figures


def main() -> None:
    """Reads the arguments, runs the benchmark and reports."""
    parser = make_parser(__doc__, rounds=1)
    parser.add_argument("images", type=Path, help="folder of images larger than a tile")
    parser.add_argument("--model", default=DEFAULT_MODEL, help="folder or Hub id (default: the bundled model)")
    parser.add_argument("--tile-size", type=int, default=256, metavar="PIXELS", help="default: 256")
    parser.add_argument("--overlap", type=int, default=32, metavar="PIXELS", help="default: 32")
    parser.add_argument(
        "--tiled-only", action="store_true", help="skip the whole image, for images that do not fit memory"
    )
    options, machine = parse_options(parser)
    paths = [file.path for file in find_inputs([str(options.images)], IMAGE_SUFFIXES)]
    model = SVQVAE.from_pretrained(options.model, pixel_range=(0, 1)).eval().to(options.device)
    model.enable_tiling(options.tile_size, options.overlap)
    processor = SVQVAEImageProcessor(pixel_range=(0, 1))
    figures_of_images = []
    for path in tqdm(paths):
        image = processor(path)["pixel_values"].to(options.device)
        figures_of_images.append(measure(model, image, not options.tiled_only))
    rows: list[Row] = []
    for name in figures_of_images[0]:
        values = [figures[name] for figures in figures_of_images]
        rows.append({"figure": name, "mean": np.mean(values).item(), "images": values})
    report(options, machine, {f"Means over {len(paths)} images": rows})


if __name__ == "__main__":
    main()

"""What tiles cost in quality: `python benchmarks/tiles.py IMAGES [--model MODEL]`.

Prints, as means over the images: PSNR whole and by tiles, agreement of the two, the share of ids that they have in
common, and the squared error along tile borders and along the image border, each relative to elsewhere. What lies
along a tile border may be hard in itself: the line below it gives the same figure for the whole image, which has no
such border.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from svqvae_hf import DEFAULT_MODEL, SVQVAE, SVQVAEImageProcessor
from svqvae_hf.metrics import psnr
from svqvae_hf.tiling import tile_axis

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


def reconstruct(model: SVQVAE, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids of an image, and what they decode to."""
    ids = model.encode_tokens(image)
    return ids, model.fit(model.decode(ids).sample, image.shape[-2:], scale=1)


@torch.inference_mode()
def measure(model: SVQVAE, image: torch.Tensor) -> dict[str, float]:
    """Figures of one image `(1, 3, height, width)`, without its frame."""
    image = image[..., FRAME:-FRAME, FRAME:-FRAME]
    model.disable_tiling()
    whole_ids, whole = reconstruct(model, image)
    model.enable_tiling(model.tile_size, model.overlap)
    tiled_ids, tiled = reconstruct(model, image)
    (rows, top), (columns, left) = (border_bands(length, model) for length in image.shape[-2:])
    along_tiles, along_image = rows[:, None] | columns, top[:, None] | left
    inside = ~along_tiles & ~along_image
    error, whole_error = ((output - image).square().mean((0, 1)) for output in (tiled, whole))
    return {
        "PSNR whole, dB": psnr(whole, image, data_range=1.0).item(),
        "PSNR tiled, dB": psnr(tiled, image, data_range=1.0).item(),
        "agreement, dB": psnr(tiled, whole, data_range=1.0).item(),
        "ids kept": (tiled_ids == whole_ids).float().mean().item(),
        "error along tile borders": (error[along_tiles & ~along_image].mean() / error[inside].mean()).item(),
        "the same pixels, whole": (whole_error[along_tiles & ~along_image].mean() / whole_error[inside].mean()).item(),
        "error along image border": (error[along_image].mean() / error[inside].mean()).item(),
    }


def main() -> None:
    """Reads the arguments and prints the means."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path, help="folder of PNG images larger than a tile")
    parser.add_argument("--model", default=DEFAULT_MODEL, help="model folder or Hub id (default: the bundled model)")
    parser.add_argument("--tile-size", type=int, default=256, metavar="PIXELS")
    parser.add_argument("--overlap", type=int, default=32, metavar="PIXELS")
    options = parser.parse_args()
    model = SVQVAE.from_pretrained(options.model).eval()
    model.enable_tiling(options.tile_size, options.overlap)
    processor = SVQVAEImageProcessor(pixel_range=model.config["pixel_range"])
    figures = [measure(model, processor(path)["pixel_values"]) for path in tqdm(sorted(options.images.glob("*.png")))]
    for name in figures[0]:
        print(f"{name:26} {np.mean([each[name] for each in figures]):.3f}")


if __name__ == "__main__":
    main()

"""Measures models on each kind of picture: a table for the card, and a picture of the worst cases.

    python benchmarks/kinds.py svqvae_hf/pretrained --folders KODAK DRAWINGS/test/* --worst worst.jpg

Each of FOLDERS is a kind. Further kinds are made here: colours of the whole RGB cube, new ones in every run unless
`--seed` names some, and small images: centres of the pictures of at least 512 pixels, compared with the same pixels
of a reconstruction of 512 pixels.
"""

import argparse
import secrets
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.utils import make_grid, save_image

from svqvae_hf import SVQVAE, SVQVAEImageProcessor

COLOURS, COLOUR_SIDE, BATCH = 500, 128, 20
SMALL, LARGE = (32, 64, 96), 512  # pixels
SCALE_2 = 6  # pictures of a kind that are measured at scale 2, which takes four times as long
WORST, SHOWN = 2, 256  # pictures of a kind that are shown, and their side in pixels


def reconstruct(model: SVQVAE, sample: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """Reconstruction of images at a scale from the image, in 8 bits."""
    (output,) = model(sample, [scale], scale_from="image").sample
    return output.clamp(0, 1).mul(255).round() / 255


def psnr(image: torch.Tensor, other: torch.Tensor) -> float:
    """PSNR in dB."""
    return -10 * (image - other).square().mean().clamp(min=1e-10).log10().item()


def measure_folder(model: SVQVAE, images: Sequence[torch.Tensor]) -> tuple[dict[str, float], list[torch.Tensor]]:
    """PSNR at scale 1, gain of scale 2 over scale 1 enlarged, and the worst pictures beside their output."""
    outputs = [reconstruct(model, image) for image in images]
    figures = [psnr(image, output) for image, output in zip(images, outputs, strict=True)]
    gains = []
    for image, output in list(zip(images, outputs, strict=True))[:SCALE_2]:
        large, enlarged = (F.interpolate(each, scale_factor=2, mode="bicubic").clamp(0, 1) for each in (image, output))
        gains.append(psnr(large, reconstruct(model, image, 2.0)) - psnr(large, enlarged))
    order = sorted(range(len(images)), key=figures.__getitem__)[:WORST]
    pairs = [shown(each[index]) for index in order for each in (images, outputs)]
    return {"PSNR, dB": fmean(figures), "scale 2 over scale 1 enlarged, dB": fmean(gains)}, pairs


def shown(image: torch.Tensor) -> torch.Tensor:
    """A square of an image for the page: its centre, or all of a small one, enlarged."""
    cut = centre(image, min(SHOWN, *image.shape[-2:]))
    return F.interpolate(cut, size=(SHOWN, SHOWN), mode="nearest")


def measure_colours(model: SVQVAE, seed: int) -> dict[str, float]:
    """Mean error of flat images in levels of 255: mean over colours, 95th percentile, maximum."""
    errors = []
    for colours in torch.rand(COLOURS, 3, generator=torch.Generator().manual_seed(seed)).split(BATCH):
        sample = colours.mul(255).round()[..., None, None].expand(-1, -1, COLOUR_SIDE, COLOUR_SIDE) / 255
        errors.append(255 * (reconstruct(model, sample) - sample).abs().mean((1, 2, 3)))
    every = torch.cat(errors)
    return {"mean": every.mean().item(), "95 % below": every.quantile(0.95).item(), "maximum": every.max().item()}


def measure_small(model: SVQVAE, images: Sequence[torch.Tensor]) -> dict[str, float]:
    """PSNR of cropped centres minus PSNR of the same pixels within the larger picture."""
    figures: dict[str, list[float]] = {f"{side} pixels": [] for side in SMALL}
    for image in images:
        large = centre(image, LARGE)
        output = reconstruct(model, large)
        for side in SMALL:
            small = centre(large, side)
            difference = psnr(small, reconstruct(model, small)) - psnr(small, centre(output, side))
            figures[f"{side} pixels"].append(difference)
    return {name: fmean(values) for name, values in figures.items()}


def centre(image: torch.Tensor, side: int) -> torch.Tensor:
    """Centre of an image, on the grid of 8 pixels."""
    top, left = ((length - side) // 16 * 8 for length in image.shape[-2:])
    return image[..., top : top + side, left : left + side]


def load(folder: Path, count: int | None) -> list[torch.Tensor]:
    """The first images of a folder in [0, 1]."""
    processor = SVQVAEImageProcessor()
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in Image.registered_extensions())
    return [processor(path)["pixel_values"] for path in files[:count]]


@torch.inference_mode()
def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="model folders")
    parser.add_argument("--folders", nargs="+", type=Path, required=True, help="folder of each kind")
    parser.add_argument("--count", type=int, help="images of a kind (default: all)")
    parser.add_argument("--seed", type=int, default=secrets.randbelow(2**31), help="seed of the colours")
    parser.add_argument("--worst", type=Path, help="picture to write: the worst of each kind for the last model")
    options = parser.parse_args()
    kinds = {str(folder): load(folder, options.count) for folder in options.folders}
    rows: dict[str, list[float]] = {}
    for name in options.models:
        worst = []
        model = SVQVAE.from_pretrained(name, torch_dtype=torch.float32).eval()
        figures = {f"colours of seed {options.seed}": measure_colours(model, options.seed)}
        for kind, images in kinds.items():
            figures[kind], pairs = measure_folder(model, images)
            worst += pairs
            if large := [image for image in images if min(image.shape[-2:]) >= LARGE]:
                figures[f"{kind}, centres alone against within {LARGE}"] = measure_small(model, large)
        for kind, numbers in figures.items():
            for figure, value in numbers.items():
                rows.setdefault(f"{kind} | {figure}", []).append(value)
    if options.worst:
        save_image(make_grid(torch.cat(worst), nrow=2 * WORST), options.worst)
    print("| kind | figure |", " | ".join(options.models), "|")
    print("|---" * (2 + len(options.models)) + "|")
    for row, values in rows.items():
        print(f"| {row} |", " | ".join(f"{value:.2f}" for value in values), "|")


if __name__ == "__main__":
    main()

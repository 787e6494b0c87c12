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

COLOURS = 500
COLOUR_SIDE = 128  # of a flat image, in pixels
BATCH = 20
SMALL = (32, 64, 96)  # sides of small images, in pixels
LARGE = 512  # side of the images that they are cut from
SCALE_2 = 6  # pictures of a kind that are measured at scale 2, which takes four times as long
WORST = 2  # pictures of a kind that are shown
SHOWN = 256  # their side in pixels


def reconstruct(model: SVQVAE, sample: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """Reconstruction of images at a scale from the image, in 8 bits."""
    (output,) = model(sample, [scale], scale_from="image").sample
    return output.clamp(0, 1).mul(255).round() / 255


def psnr(image: torch.Tensor, output: torch.Tensor) -> float:
    """PSNR in dB."""
    return -10 * (image - output).square().mean().clamp(min=1e-10).log10().item()


def measure_folder(model: SVQVAE, images: Sequence[torch.Tensor]) -> tuple[dict[str, float], list[torch.Tensor]]:
    """PSNR at scale 1, gain of scale 2 over scale 1 enlarged, and the worst pictures beside their output."""
    outputs = []
    decibels = []
    gains = []
    for image in images:
        output = reconstruct(model, image)
        outputs.append(output)
        decibels.append(psnr(image, output))
        if len(gains) < SCALE_2:
            gains.append(gain_of_scale_2(model, image, output))
    worst_first = sorted(range(len(images)), key=lambda index: decibels[index])
    pictures = []
    for index in worst_first[:WORST]:
        pictures += [show(images[index]), show(outputs[index])]
    return {"PSNR, dB": fmean(decibels), "scale 2 over scale 1 enlarged, dB": fmean(gains)}, pictures


def gain_of_scale_2(model: SVQVAE, image: torch.Tensor, output: torch.Tensor) -> float:
    """PSNR of a reconstruction at scale 2 minus PSNR of the enlarged reconstruction at scale 1."""
    target = enlarge(image)
    return psnr(target, reconstruct(model, image, 2.0)) - psnr(target, enlarge(output))


def enlarge(image: torch.Tensor) -> torch.Tensor:
    """Image of twice the size, bicubic."""
    return F.interpolate(image, scale_factor=2, mode="bicubic").clamp(0, 1)


def show(image: torch.Tensor) -> torch.Tensor:
    """A square of an image for the page: its centre, or all of a small one, enlarged."""
    height, width = image.shape[-2:]
    cut = centre(image, min(SHOWN, height, width))
    return F.interpolate(cut, size=(SHOWN, SHOWN), mode="nearest")


def measure_colours(model: SVQVAE, seed: int) -> dict[str, float]:
    """Mean error of flat images in levels of 255: mean over colours, 95th percentile, maximum."""
    colours = torch.rand(COLOURS, 3, generator=torch.Generator().manual_seed(seed)).mul(255).round()
    batch_errors = []
    for batch in colours.split(BATCH):
        sample = batch[..., None, None].expand(-1, -1, COLOUR_SIDE, COLOUR_SIDE) / 255  # (batch, 3, side, side)
        difference = reconstruct(model, sample) - sample
        batch_errors.append(255 * difference.abs().mean((1, 2, 3)))
    errors = torch.cat(batch_errors)  # (COLOURS,)
    return {
        "mean": errors.mean().item(),
        "95 % below": errors.quantile(0.95).item(),
        "maximum": errors.max().item(),
    }


def measure_small(model: SVQVAE, images: Sequence[torch.Tensor]) -> dict[str, float]:
    """PSNR of cropped centres minus PSNR of the same pixels within the larger picture."""
    differences: dict[int, list[float]] = {side: [] for side in SMALL}
    for image in images:
        large = centre(image, LARGE)
        output = reconstruct(model, large)
        for side in SMALL:
            small = centre(large, side)
            alone = psnr(small, reconstruct(model, small))
            within = psnr(small, centre(output, side))
            differences[side].append(alone - within)
    return {f"{side} pixels": fmean(values) for side, values in differences.items()}


def centre(image: torch.Tensor, side: int) -> torch.Tensor:
    """Centre of an image, on the grid of 8 pixels."""
    height, width = image.shape[-2:]
    top = (height - side) // 16 * 8
    left = (width - side) // 16 * 8
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
            figures[kind], pictures = measure_folder(model, images)
            worst += pictures
            large_images = [image for image in images if min(image.shape[-2:]) >= LARGE]
            if large_images:
                figures[f"{kind}, centres alone against within {LARGE}"] = measure_small(model, large_images)
        for kind, numbers in figures.items():
            for figure, value in numbers.items():
                rows.setdefault(f"{kind} | {figure}", []).append(value)
    if options.worst:
        save_image(make_grid(torch.cat(worst), nrow=2 * WORST), options.worst)
    print("| kind | figure |", " | ".join(options.models), "|")
    print("|---" * (2 + len(options.models)) + "|")
    for row, values in rows.items():
        cells = [f"{value:.2f}" for value in values]
        print(f"| {row} |", " | ".join(cells), "|")


if __name__ == "__main__":
    main()

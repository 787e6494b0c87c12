"""Figures of one image's reconstructions, and the ways to show them: a table for the terminal, a sheet of pictures.

This needs no package beyond the base installation. [`evaluate`][svqvae_hf.evaluation.evaluate] measures whole sets.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from svqvae_hf.evaluation.pictures import Panel, contact_sheet
from svqvae_hf.tokens.image_tokens import resize_image
from svqvae_hf.tokens.token_files import ImageTokens

COLUMN_WIDTHS = {"scale": 5, "size": 9, "tokens": 7, "bits/pixel": 10, "PSNR dB": 7, "codes used": 10}


class ReconstructionFigures(NamedTuple):
    """Figures of one image at one scale. The reference for PSNR is the original, resized to the reconstruction."""

    scale: float
    width: int
    height: int
    tokens: int
    codes: np.ndarray  # distinct ids in use
    original_pixels: int
    bits_per_pixel: float  # of the original
    psnr: float


def measure_reconstructions(
    original: Image.Image, tokens: ImageTokens, images: Sequence[Image.Image]
) -> list[ReconstructionFigures]:
    """Measures the reconstructions of one image.

    Args:
        original (`PIL.Image.Image`): The image that was encoded.
        tokens ([`ImageTokens`]): Its ids.
        images (`Sequence[PIL.Image.Image]`): Images decoded from the ids, one per scale of `tokens`.
    """
    if len(images) != len(tokens.scales):
        raise ValueError(f"`images` must be one per scale, got {len(images)} for {len(tokens.scales)} scales.")
    all_figures = []
    for index, image in enumerate(images):
        ids = tokens.ids[index]
        figures = ReconstructionFigures(
            scale=tokens.scales[index],
            width=image.width,
            height=image.height,
            tokens=ids.numel(),
            codes=np.unique(ids.numpy()),
            original_pixels=original.width * original.height,
            bits_per_pixel=tokens.bits_per_pixel(index),
            psnr=_psnr(original, image),
        )
        all_figures.append(figures)
    return all_figures


def table_header(name_width: int) -> str:
    """First line of the table."""
    return _line(name_width, "image", list(COLUMN_WIDTHS))


def table_row(name_width: int, name: str, figures: Sequence[ReconstructionFigures], codebook_size: int) -> str:
    """Line for one or several images at one scale.

    Tokens and pixels are summed, PSNR is averaged, and a code counts as used if any of the images uses it.
    """
    scale = figures[0].scale
    num_tokens = sum(image_figures.tokens for image_figures in figures)
    bits_per_pixel = _bits_per_pixel(figures)
    mean_psnr = np.mean([image_figures.psnr for image_figures in figures])
    usage = _usage(figures, codebook_size)
    cells = [
        f"{scale:g}",
        _common_size(figures),
        str(num_tokens),
        f"{bits_per_pixel:.4f}",
        f"{mean_psnr:.2f}",
        f"{usage:.1%}",
    ]
    return _line(name_width, name, cells)


def side_by_side(
    original: Image.Image, images: Sequence[Image.Image], figures: Sequence[ReconstructionFigures]
) -> Image.Image:
    """Sheet of the original and its reconstructions, with their figures as captions."""
    panels = [Panel(original, title="original", caption=f"{original.width} x {original.height}")]
    for image, image_figures in zip(images, figures, strict=True):
        title = f"scale {image_figures.scale:g}"
        facts = [
            f"{image_figures.width} x {image_figures.height}",
            f"tokens: {image_figures.tokens}",
            f"{image_figures.bits_per_pixel:.3f} bits/pixel",
            f"{image_figures.psnr:.2f} dB",
        ]
        panels.append(Panel(image, title, caption=" · ".join(facts)))
    return contact_sheet(panels)


def _common_size(figures: Sequence[ReconstructionFigures]) -> str:
    """Size of the images; no text if they differ."""
    sizes = {f"{image_figures.width}x{image_figures.height}" for image_figures in figures}
    if len(sizes) > 1:
        return ""
    return sizes.pop()


def _bits_per_pixel(figures: Sequence[ReconstructionFigures]) -> float:
    """Bits of all images over pixels of all original images."""
    bits = 0.0
    pixels = 0
    for image_figures in figures:
        bits += image_figures.bits_per_pixel * image_figures.original_pixels
        pixels += image_figures.original_pixels
    return bits / pixels


def _usage(figures: Sequence[ReconstructionFigures], codebook_size: int) -> float:
    """Fraction of the codebook that the images use together."""
    codes = np.concatenate([image_figures.codes for image_figures in figures])
    return np.unique(codes).size / codebook_size


def _psnr(original: Image.Image, image: Image.Image) -> float:
    """PSNR in dB of an image, with the original at its size as reference."""
    reference = resize_image(original, image.size)
    difference = np.asarray(image, np.float64) - np.asarray(reference, np.float64)
    mean_squared_error = np.square(difference).mean()
    if mean_squared_error == 0:
        return math.inf
    return 10 * math.log10(255**2 / mean_squared_error)


def _line(name_width: int, name: str, cells: Sequence[str]) -> str:
    """Line of the table: the name of the image, and a cell per column."""
    padded_cells = [name.ljust(name_width)]
    for cell, width in zip(cells, COLUMN_WIDTHS.values(), strict=True):
        padded_cells.append(cell.rjust(width))
    return "  ".join(padded_cells)

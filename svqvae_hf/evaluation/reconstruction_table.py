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

COLUMNS = (("scale", 5), ("size", 9), ("tokens", 7), ("bits/pixel", 10), ("PSNR dB", 7), ("codes used", 10))


class ReconstructionFigures(NamedTuple):
    """Figures of one image at one scale. The reference for PSNR is the original, resized to the reconstruction."""

    scale: float
    width: int
    height: int
    tokens: int
    codes: np.ndarray  # distinct ids in use
    bits_per_pixel: float
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
    return [
        ReconstructionFigures(
            scale=scale,
            width=image.width,
            height=image.height,
            tokens=ids.numel(),
            codes=np.unique(ids.numpy()),
            bits_per_pixel=tokens.bits_per_pixel(index),
            psnr=_psnr(original, image),
        )
        for index, (scale, ids, image) in enumerate(zip(tokens.scales, tokens.ids, images, strict=True))
    ]


def table_header(name_width: int) -> str:
    """First line of the table."""
    return _row(name_width, "image", [title for title, _ in COLUMNS])


def table_row(name_width: int, name: str, figures: Sequence[ReconstructionFigures], codebook_size: int) -> str:
    """Line for one or several images at one scale.

    Tokens and pixels are summed, PSNR is averaged, and a code counts as used if any of the images uses it.
    """
    tokens = sum(each.tokens for each in figures)
    tokens_per_bit_rate = sum(each.tokens / each.bits_per_pixel for each in figures)  # pixels over the bits of a token
    sizes = {f"{each.width}x{each.height}" for each in figures}
    used = np.unique(np.concatenate([each.codes for each in figures])).size / codebook_size
    cells = [
        f"{figures[0].scale:g}",
        sizes.pop() if len(sizes) == 1 else "",
        str(tokens),
        f"{tokens / tokens_per_bit_rate:.4f}",
        f"{np.mean([each.psnr for each in figures]):.2f}",
        f"{used:.1%}",
    ]
    return _row(name_width, name, cells)


def side_by_side(
    original: Image.Image, images: Sequence[Image.Image], figures: Sequence[ReconstructionFigures]
) -> Image.Image:
    """Sheet of the original and its reconstructions, with their figures as captions."""
    panels = [Panel(original, "original", f"{original.width} x {original.height}")]
    for image, each in zip(images, figures, strict=True):
        caption = [
            f"{each.width} x {each.height}",
            f"tokens: {each.tokens}",
            f"{each.bits_per_pixel:.3f} bits/pixel",
            f"{each.psnr:.2f} dB",
        ]
        panels.append(Panel(image, f"scale {each.scale:g}", " · ".join(caption)))
    return contact_sheet(panels)


def _psnr(original: Image.Image, image: Image.Image) -> float:
    reference = resize_image(original, image.size)
    error = np.square(np.asarray(image, np.float64) - np.asarray(reference, np.float64)).mean()
    return 10 * math.log10(255**2 / error) if error else math.inf


def _row(name_width: int, name: str, cells: Sequence[str]) -> str:
    padded = [f"{cell:>{width}}" for cell, (_, width) in zip(cells, COLUMNS, strict=True)]
    return "  ".join([f"{name:<{name_width}}", *padded])

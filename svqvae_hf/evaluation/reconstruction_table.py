"""What reconstructed images come to, in numbers: rows of a table and captions under images."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from svqvae_hf.evaluation.contact_sheet import Panel, contact_sheet
from svqvae_hf.tokens.token_files import ImageTokens

COLUMNS = (("scale", 5), ("size", 9), ("tokens", 7), ("bits/pixel", 10), ("PSNR dB", 7), ("codes used", 10))


class Result(NamedTuple):
    """What one image came to at one scale; the PSNR is against the original resized to the image's size."""

    scale: float
    width: int
    height: int
    tokens: int
    codes: np.ndarray  # those that are used, each once
    bits_per_pixel: float
    psnr: float


def measure(original: Image.Image, tokens: ImageTokens, images: Sequence[Image.Image]) -> list[Result]:
    """Compares the images of an original's tokens with it, one per scale."""
    return [
        Result(
            scale=scale,
            width=image.width,
            height=image.height,
            tokens=ids.numel(),
            codes=np.unique(ids.numpy()),
            bits_per_pixel=tokens.bits_per_pixel(index),
            psnr=_psnr(original, image, scale),
        )
        for index, (scale, ids, image) in enumerate(zip(tokens.scales, tokens.ids, images, strict=True))
    ]


def header(name_width: int) -> str:
    """The first line of the table."""
    return _row(name_width, "image", [title for title, _ in COLUMNS])


def table_row(name_width: int, name: str, results: Sequence[Result], codebook_size: int) -> str:
    """A line for results of one scale: tokens in all, means of bits and PSNR, codes that any of them uses."""
    sizes = {f"{result.width}x{result.height}" for result in results}
    used = np.unique(np.concatenate([result.codes for result in results])).size / codebook_size
    cells = [
        f"{results[0].scale:g}",
        sizes.pop() if len(sizes) == 1 else "",
        str(sum(result.tokens for result in results)),
        f"{np.mean([result.bits_per_pixel for result in results]):.4f}",
        f"{np.mean([result.psnr for result in results]):.2f}",
        f"{used:.1%}",
    ]
    return _row(name_width, name, cells)


def token_count(tokens: int) -> str:
    """The number with its noun."""
    return f"{tokens} token{'s' if tokens != 1 else ''}"


def side_by_side(original: Image.Image, images: Sequence[Image.Image], results: Sequence[Result]) -> Image.Image:
    """A sheet of the original and its images, each with its numbers."""
    panels = [Panel(original, "original", f"{original.width} x {original.height}")]
    for image, result in zip(images, results, strict=True):
        facts = [
            f"{result.width} x {result.height}",
            token_count(result.tokens),
            f"{result.bits_per_pixel:.3f} bits/pixel",
            f"{result.psnr:.2f} dB",
        ]
        panels.append(Panel(image, f"scale {result.scale:g}", " · ".join(facts)))
    return contact_sheet(panels)


def psnr_of_error(mean_squared_error: float) -> float:
    """PSNR in dB of a mean squared error of 8-bit values; infinite without one."""
    return 10 * math.log10(255**2 / mean_squared_error) if mean_squared_error else math.inf


def resized_original(original: Image.Image, size: tuple[int, int], scale: float) -> Image.Image:
    """The original in the size of its image at a scale: what that is measured against."""
    return original.resize(size, Image.Resampling.BOX if scale < 1 else Image.Resampling.BICUBIC)


def _psnr(original: Image.Image, image: Image.Image, scale: float) -> float:
    reference = resized_original(original, image.size, scale)
    error = np.square(np.asarray(image, np.float64) - np.asarray(reference, np.float64)).mean()
    return psnr_of_error(error)


def _row(name_width: int, name: str, cells: Sequence[str]) -> str:
    padded = [f"{cell:>{width}}" for cell, (_, width) in zip(cells, COLUMNS, strict=True)]
    return "  ".join([f"{name:<{name_width}}", *padded])

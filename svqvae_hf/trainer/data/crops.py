"""Crops of images: how they are cut, each from a seed of its own."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from svqvae_hf.data.image_rows import ImageRow, fault_of, read_image
from svqvae_hf.models.image_processing_svqvae import SVQVAEImageProcessor

SIDE = 0  # first word of the seed of sides
CENTRE = (0.5, 0.5)  # position (x, y) of a crop: 0 is left or top, 1 is right or bottom


@dataclass(frozen=True)
class CropPolicy:
    """How crops are cut. All crops of a step have one side, drawn at random for each step.

    A step of a smaller side has more crops, of as many pixels in all.

    Args:
        sides (`Sequence[int]`): Sides in pixels; the largest is a multiple of each.
        center_crop (`bool`): Cut at the centre, not at random positions.
        random_flip (`bool`): Flip half of the crops, left to right.
        resize_range (`Sequence[float]`): Range of the random factor by which an image is resized before it is
            cropped. An image that would not hold the crop then is shrunk less, or enlarged.
        synthetic_fraction (`float`, defaults to 0.0): Fraction of the crops that [`synthetic_crop`] replaces.
    """

    sides: Sequence[int]
    center_crop: bool
    random_flip: bool
    resize_range: Sequence[float]
    synthetic_fraction: float = 0.0

    def sides_of(self, num_steps: int, seed: int) -> np.ndarray:
        """Side of the crops of each step, the same for the first steps of more steps."""
        draws = np.random.default_rng((SIDE, seed)).random(num_steps)  # in [0, 1)
        indices = (draws * len(self.sides)).astype(int)
        return np.array(self.sides)[indices]

    def cut(self, image: Image.Image, side: int, seed: Sequence[int]) -> Image.Image:
        """Cuts a crop of an image, at random as the seed says."""
        rng = np.random.default_rng(seed)
        low, high = self.resize_range
        factor = rng.uniform(low, high)
        # The position is drawn even for centre crops, so that both kinds of crops have the same flips.
        random_position = rng.random(2).tolist()
        is_flipped = self.random_flip and rng.random() < 0.5
        position = CENTRE if self.center_crop else random_position
        crop = _crop(image, side, factor, position)
        if is_flipped:
            return crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return crop


@dataclass(frozen=True)
class CentreCrops:
    """Centres of images.

    Args:
        sample (`torch.Tensor` of shape `(B, 3, side, side)`): The crops.
        skipped (`list[tuple[str, str]]`): Keys of images that cannot be read, with reasons.
    """

    sample: torch.Tensor
    skipped: list[tuple[str, str]]


def centre_crops(images: Iterable[ImageRow], count: int, side: int, pixel_range: tuple[float, float]) -> CentreCrops:
    """Cuts the centres of the first readable images.

    Args:
        images (`Iterable[ImageRow]`): From [`~svqvae_hf.data.image_sets.open_images`].
        count (`int`): Maximum number of crops.
        side (`int`): Side in pixels. A smaller image is enlarged to hold it.
        pixel_range (`tuple[float, float]`): Values of black and white.
    """
    crops: list[Any] = []
    skipped: list[tuple[str, str]] = []
    for row in images:
        try:
            image = read_image(row)
        except (OSError, ValueError) as error:
            skipped.append((row.key, fault_of(error)))
            continue
        crops.append(_crop(image, side, factor=1.0, position=CENTRE))
        if len(crops) == count:
            break
    if not crops:
        return CentreCrops(torch.empty(0, 3, side, side), skipped)
    sample = SVQVAEImageProcessor(pixel_range=pixel_range).preprocess(crops)["pixel_values"]
    return CentreCrops(sample, skipped)


def _crop(image: Image.Image, side: int, factor: float, position: Sequence[float]) -> Image.Image:
    """Cuts a square of an image resized by `factor`, at a position such as `CENTRE`.

    An image that would not hold the crop then is shrunk less, or enlarged.
    """
    # Side, in pixels of the image, of the square that becomes the crop
    square_side = min(side / factor, image.width, image.height)
    if square_side == side:
        return _crop_whole_pixels(image, side, position)
    return _crop_resized(image, side, square_side, position)


def _crop_whole_pixels(image: Image.Image, side: int, position: Sequence[float]) -> Image.Image:
    """Cuts a square without resizing it. All whole pixels at which it can start are equally likely."""
    x, y = position
    num_columns = image.width - side + 1  # at which the square can start
    num_rows = image.height - side + 1
    first_column = math.floor(x * num_columns)
    first_row = math.floor(y * num_rows)
    return image.crop((first_column, first_row, first_column + side, first_row + side))


def _crop_resized(image: Image.Image, side: int, square_side: float, position: Sequence[float]) -> Image.Image:
    """Cuts a square of `square_side` pixels, which may start within a pixel, and resizes it to `side`."""
    x, y = position
    first_column = x * (image.width - square_side)
    first_row = y * (image.height - square_side)
    square = (first_column, first_row, first_column + square_side, first_row + square_side)
    return image.resize((side, side), Image.Resampling.BICUBIC, box=square)

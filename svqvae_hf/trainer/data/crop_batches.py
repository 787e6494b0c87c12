"""Batches of crops, cut from images that are read one by one."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from svqvae_hf.data.image_parts import IndexedRows
from svqvae_hf.data.image_rows import ImageRow, fault_of, read_image
from svqvae_hf.data.image_sets import ImageSet
from svqvae_hf.models.image_processing_svqvae import SVQVAEImageProcessor
from svqvae_hf.trainer.data.crops import CropPolicy
from svqvae_hf.trainer.data.sample_order import Share
from svqvae_hf.trainer.data.synthetic import synthetic_crop

CROP, SYNTHETIC, MIXED = 1, 4, 5  # first words of the seeds of crops, synthetic crops and mixed images
NO_LABEL = -1  # of `datasets.ClassLabel`
MAX_IN_A_ROW = 1000  # unreadable images, before the image set is given up


class CropBatch(NamedTuple):
    """Crops of one side.

    Args:
        sample (`torch.Tensor` of shape `(batch, 3, side, side)`): Crops in the cutter's `pixel_range`, float32.
        labels (`list`): Label of each crop's image; None without `label_column`.
        skipped (`list[tuple[str, str]]`): Keys of images that others replaced, with reasons: unreadable or no label.
        enlarged (`int`): Number of crops whose image is smaller than they are.
    """

    sample: torch.Tensor
    labels: list[Any]
    skipped: list[tuple[str, str]]
    enlarged: int


@dataclass(frozen=True)
class _Crop:
    """A crop.

    Args:
        pixels (`torch.Tensor` of shape `(3, side, side)`): The crop in the cutter's `pixel_range`.
        label: Label of its image.
        is_enlarged (`bool`): Whether the image is smaller than the crop.
    """

    pixels: torch.Tensor
    label: Any
    is_enlarged: bool


class _SkippedError(ValueError):
    """An image that no crop can be cut from."""


def has_label(label: Any) -> bool:
    """Whether an image has a label. Sets on the Hub write -1 for images without one."""
    return label is not None and label != NO_LABEL


@dataclass
class CropCutter:
    """Cuts the crops of a batch. All crops of a step have one side.

    Args:
        policy ([`CropPolicy`]): How crops are cut.
        pixel_range (`tuple[float, float]`): Values of black and white.
        share ([`Share`]): Share of this process in the crops of a step that has the largest side.
        num_steps (`int`): Number of steps.
        seed (`int`): Seed of the sides, the positions, the factors and the flips.
        label_column (`str`, *optional*): Column of the labels.
        mixed ([`~svqvae_hf.data.image_sets.ImageSet`], *optional*): Other images that are mixed in.
        mix_fraction (`float`, defaults to 0.0): Fraction of the crops that are cut from them.

    Attributes:
        sides (`np.ndarray` of shape `(num_steps,)`): Side of the crops of each step, in pixels.
        crops_per_largest (`np.ndarray` of shape `(num_steps,)`): Number of crops of each step that have as many pixels
            as one crop of the largest side. It is 4 if the side of the step is half of the largest.
        crops_per_largest_before (`np.ndarray` of shape `(num_steps,)`): Sum of `crops_per_largest` of all steps before
            each step.
    """

    policy: CropPolicy
    pixel_range: tuple[float, float]
    share: Share
    num_steps: int
    seed: int
    label_column: str | None = None
    mixed: ImageSet | None = None
    mix_fraction: float = 0.0

    def __post_init__(self) -> None:
        self.sides = self.policy.sides_of(self.num_steps, self.seed)
        self.crops_per_largest = (max(self.policy.sides) // self.sides) ** 2
        self.crops_per_largest_before = np.cumsum(self.crops_per_largest) - self.crops_per_largest
        self.processor = SVQVAEImageProcessor(pixel_range=self.pixel_range)

    def step_of(self, batch: int) -> int:
        """Number of the step that a batch of the run belongs to."""
        batches_per_step = self.share.batches
        return batch // batches_per_step

    def num_crops(self, step: int) -> int:
        """Number of crops of a step, of all its batches and all processes."""
        return int(self.crops_per_largest[step]) * self.share.step_size

    def num_crops_before(self, step: int) -> int:
        """Number of crops of all steps before a step, of all processes."""
        return int(self.crops_per_largest_before[step]) * self.share.step_size

    def cut_batch(self, batch: int, images_for: Callable[[int, int], Iterator[ImageRow]]) -> CropBatch:
        """Cuts the crops of this process in a batch.

        All crops of a step, of all its batches and all processes, are numbered from 0. The number of a crop decides,
        by the seed, whether it is cut from an image of `mixed` or of the training set.

        Args:
            batch (`int`): Number of the batch in the run.
            images_for (`Callable`): Takes the numbers of a step and of a crop in it. Returns images of the training
                set without an end: the first one is for the crop, and the others replace it if it is unreadable.

        Raises:
            ValueError: If 1000 images in a row are unreadable.
        """
        step = self.step_of(batch)
        # A step whose side is half of the largest has 4 times as many crops, so that it has as many pixels.
        crops_per_largest = int(self.crops_per_largest[step])
        crop_numbers = self.share.numbers(batch, factor=crops_per_largest)  # of this process in this batch
        crops: list[_Crop] = []
        skipped: list[tuple[str, str]] = []
        for crop_number in crop_numbers:
            images = images_for(step, crop_number)
            if self._is_of_mixed_set(step, crop_number):
                images = self._images_of_mixed_set(step, crop_number)
            crop, skipped_images = self._first_readable_crop(images, step, crop_number)
            crops.append(crop)
            skipped += skipped_images
        pixels = [crop.pixels for crop in crops]
        labels = [crop.label for crop in crops]
        num_enlarged = sum(crop.is_enlarged for crop in crops)
        return CropBatch(torch.stack(pixels), labels, skipped, num_enlarged)

    def _is_of_mixed_set(self, step: int, crop_number: int) -> bool:
        """Whether a crop of a step is cut from an image of the other set, as its seed says."""
        if self.mixed is None:
            return False
        draw = self._mixing_rng(step, crop_number).random()
        return draw < self.mix_fraction

    def _images_of_mixed_set(self, step: int, crop_number: int) -> Iterator[ImageRow]:
        """Yields random images of the other set for a crop, without an end."""
        rows = self._rows_of_mixed_set()
        rng = self._mixing_rng(step, crop_number)
        rng.random()  # the draw of `_is_of_mixed_set`
        while True:
            row = int(rng.integers(len(rows)))
            yield rows[row]

    def _mixing_rng(self, step: int, crop_number: int) -> np.random.Generator:
        """Source of randomness for the mixing of a crop."""
        return np.random.default_rng((MIXED, self.seed, step, crop_number))

    def _rows_of_mixed_set(self) -> IndexedRows:
        """Images of the other set. Raises ValueError if they are a stream."""
        if self.mixed is None or self.mixed.rows is None:
            raise ValueError("Images that are mixed in must have random access. Open them with `copy=True`.")
        return self.mixed.rows

    def _first_readable_crop(
        self, images: Iterator[ImageRow], step: int, crop_number: int
    ) -> tuple[_Crop, list[tuple[str, str]]]:
        """Cuts a crop from the first image that is readable.

        Args:
            images (`Iterator[ImageRow]`): Images to try, without an end.
            step (`int`): Number of the step.
            crop_number (`int`): Number of the crop in the step.

        Returns:
            `tuple`: The crop, and the skipped images before it: the key of each, and the reason.

        Raises:
            ValueError: If 1000 images in a row are unreadable.
        """
        side = int(self.sides[step])
        seed = self._seed_of_crop(step, crop_number)
        skipped: list[tuple[str, str]] = []
        while len(skipped) < MAX_IN_A_ROW:
            image = next(images)
            try:
                crop = self._cut(image, side, seed)
                return crop, skipped
            except _SkippedError as error:
                skipped.append((image.key, str(error)))
        last_key, last_reason = skipped[-1]
        raise ValueError(f"{MAX_IN_A_ROW} images in a row are not readable, the last one `{last_key}`: {last_reason}")

    def _seed_of_crop(self, step: int, crop_number: int) -> tuple[int, ...]:
        """Seed of the position, the factor and the flip of a crop. Seeds for other uses do not begin with `CROP`."""
        return (CROP, self.seed, step, crop_number)

    def _cut(self, row: ImageRow, side: int, seed: tuple[int, ...]) -> _Crop:
        """Cuts a crop, or draws a synthetic one in its place, for which the image is not read.

        Raises:
            _SkippedError: The image cannot be read, or has no label.
        """
        rng = np.random.default_rng((SYNTHETIC, *seed))
        is_synthetic = rng.random() < self.policy.synthetic_fraction
        if is_synthetic:
            crop = synthetic_crop(side, rng)
            # No run has both synthetic crops and labels.
            return _Crop(self._pixels(crop), label=None, is_enlarged=False)
        label = None
        if self.label_column is not None:
            label = row.values[self.label_column]
        try:
            image = read_image(row)
        except (OSError, ValueError) as error:
            raise _SkippedError(fault_of(error)) from error
        if self.label_column is not None and not has_label(label):
            raise _SkippedError("it has no label.")
        cropped_image = self.policy.cut(image, side, seed)
        is_enlarged = min(image.size) < side
        return _Crop(self._pixels(cropped_image), label, is_enlarged)

    def _pixels(self, crop: Image.Image | np.ndarray) -> torch.Tensor:
        """Converts a crop to a tensor of shape `(3, side, side)` in `pixel_range`."""
        return self.processor.preprocess(crop)["pixel_values"][0]

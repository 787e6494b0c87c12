"""Batches of crops, cut from images that are read one by one."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count, islice
from typing import Any, NamedTuple

import numpy as np
import torch

from svqvae_hf.data.image_parts import IndexedRows
from svqvae_hf.data.image_rows import ImageRow, fault_of, read_image
from svqvae_hf.models.image_processing_svqvae import SVQVAEImageProcessor
from svqvae_hf.trainer.data.crops import CropPolicy
from svqvae_hf.trainer.data.sample_order import Share
from svqvae_hf.trainer.data.synthetic import synthetic_crop

CROP, SYNTHETIC, MIXED = 1, 4, 5  # first words of the seeds of crops, synthetic crops and mixed images
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
        mixed ([`~svqvae_hf.data.image_parts.IndexedRows`], *optional*): Other images that are mixed in.
        mix_fraction (`float`, defaults to 0.0): Fraction of the crops that are cut from them.
    """

    policy: CropPolicy
    pixel_range: tuple[float, float]
    share: Share
    num_steps: int
    seed: int
    label_column: str | None = None
    mixed: IndexedRows | None = None
    mix_fraction: float = 0.0

    def __post_init__(self) -> None:
        self.sides = self.policy.sides_of(self.num_steps, self.seed)
        self.times = (max(self.policy.sides) // self.sides) ** 2  # crops in the place of one of the largest side
        self.first = np.cumsum(self.times) - self.times  # times of the steps before
        self.processor = SVQVAEImageProcessor(pixel_range=self.pixel_range)

    def cut_batch(self, batch: int, images_for: Callable[[int], Iterator[ImageRow]]) -> CropBatch:
        """Cuts a batch.

        Args:
            batch (`int`): Number of the batch in the run.
            images_for (`Callable`): Returns the image for a number of the step, and images that may replace it.

        Raises:
            ValueError: If 1000 images in a row are unreadable.
        """
        step = batch // self.share.batches
        crops: list[tuple[torch.Tensor, Any, bool]] = []
        skipped: list[tuple[str, str]] = []
        for number in self.share.numbers(batch, int(self.times[step])):
            for image in islice(self._mixed(step, number) or images_for(number), MAX_IN_A_ROW):
                crop = self._cut(image, int(self.sides[step]), (CROP, self.seed, step, number))
                if not isinstance(crop, str):
                    crops.append(crop)
                    break
                skipped.append((image.key, crop))
            else:
                name, reason = skipped[-1]
                raise ValueError(f"{MAX_IN_A_ROW} images in a row are not readable, the last one `{name}`: {reason}")
        pixels, labels, enlarged = zip(*crops, strict=True)
        return CropBatch(torch.stack(pixels), [*labels], skipped, sum(enlarged))

    def _mixed(self, step: int, number: int) -> Iterator[ImageRow] | None:
        """Random images of the other set for a number of a step, or None if its image is of the set itself."""
        rng, rows = np.random.default_rng((MIXED, self.seed, step, number)), self.mixed
        if rows is None or rng.random() >= self.mix_fraction:
            return None
        return (rows[int(rng.integers(len(rows)))] for _ in count())

    def _cut(self, row: ImageRow, side: int, seed: tuple[int, ...]) -> tuple[torch.Tensor, Any, bool] | str:
        """Returns a crop, its label and whether the image is smaller than the crop, or the reason without one."""
        label = None if self.label_column is None else row.values[self.label_column]
        synthetic, enlarged = np.random.default_rng((SYNTHETIC, *seed)), False
        if self.policy.synthetic_fraction and synthetic.random() < self.policy.synthetic_fraction:
            crop: Any = synthetic_crop(side, synthetic)
        else:
            try:
                image = read_image(row)
            except (OSError, ValueError) as error:
                return fault_of(error)
            if label is None and self.label_column is not None:
                return "it has no label."
            crop, enlarged = self.policy.cut(image, side, seed), min(image.size) < side
        return self.processor.preprocess(crop)["pixel_values"][0], label, enlarged

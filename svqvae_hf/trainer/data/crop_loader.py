"""Loader of crops that depends on its seed alone, and resumes exactly."""

import itertools
import signal
from collections.abc import Iterator
from dataclasses import InitVar, dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from svqvae_hf.data.image_rows import fault_of, read_image
from svqvae_hf.data.image_sets import ImageSet
from svqvae_hf.models.image_processing_svqvae import SVQVAEImageProcessor
from svqvae_hf.trainer.data.crops import CropPolicy
from svqvae_hf.trainer.data.resumable import Resumable
from svqvae_hf.trainer.data.row_order import row_order
from svqvae_hf.trainer.data.synthetic import synthetic_crop

SIDE, CROP, SYNTHETIC = 0, 1, 4  # first words of the seeds of sides, crops and synthetic crops; row_order.py uses 2
MAX_IN_A_ROW = 1000  # unreadable images, before the image set is given up
SIGNALS = (signal.SIGINT, signal.SIGTERM)  # that end a run, and that its whole process group may get


class Crop(NamedTuple):
    """A crop `(3, side, side)`, and the label of its image."""

    pixels: torch.Tensor
    label: Any


class Skipped(NamedTuple):
    """An image without a crop: its key, and the reason."""

    key: str
    reason: str


class CropBatch(NamedTuple):
    """Crops of one side.

    Args:
        sample (`torch.Tensor` of shape `(batch, 3, side, side)`): Crops in the loader's `pixel_range`, float32.
        labels (`list`): Label of each crop's image; None without `label_column`.
        skipped (`list[Skipped]`): Images that are unreadable or without a label, which the next ones replaced.
    """

    sample: torch.Tensor
    labels: list[Any]
    skipped: list[Skipped]


@dataclass
class CropLoader(Resumable, Dataset[CropBatch]):
    """Batches of crops, cut in advance by worker processes.

    A batch depends only on the image set, the policy, the seed, the process and the batch's number: not on workers or
    global random states. In the same batch, all processes have crops of one side. In an epoch, each image is seen
    once, by one process, in a new random order. An unreadable image is replaced by the next readable one of the
    process, which is then seen twice.

    Args:
        images ([`ImageSet`]): From [`~svqvae_hf.data.image_sets.open_images`], with `rows`.
        policy ([`CropPolicy`]): How crops are cut.
        pixel_range (`tuple[float, float]`): Values of black and white.
        seed (`int`): Seed of the order, the sides, the positions, the factors and the flips.
        num_workers (`int`): Processes that cut crops; 0: this process.
        process_index (`int`): Index of this process of the training.
        num_processes (`int`): Processes that share the set.
        num_batches (`int`): Batches in all, including those before the loaded state.
        label_column (`str`, *optional*): Column of the labels.
    """

    unit = "images"

    images: InitVar[ImageSet]
    policy: CropPolicy
    pixel_range: tuple[float, float]
    seed: int = field(kw_only=True)
    num_workers: int = field(kw_only=True)
    process_index: int = field(kw_only=True)
    num_processes: int = field(kw_only=True)
    num_batches: int = field(kw_only=True)
    label_column: str | None = None

    def __post_init__(self, images: ImageSet) -> None:
        if images.rows is None:
            raise ValueError("The image set must have random access. Open it with `copy=True`.")
        self.rows, self.num_rows = images.rows, len(images.rows)
        self.processor = SVQVAEImageProcessor(pixel_range=self.pixel_range)

    def __iter__(self) -> Iterator[CropBatch]:
        """Yields the remaining batches.

        Raises:
            ValueError: If 1000 images in a row are unreadable.
        """
        loader = DataLoader(
            self,
            batch_size=None,
            sampler=self._places(),
            num_workers=self.num_workers,
            generator=torch.Generator(),  # not the global one
            worker_init_fn=_leave_signals_to_the_trainer,
            pin_memory=torch.cuda.is_available(),
        )
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # a new worker would die of one
        batches = iter(loader)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        for batch in batches:
            self.batch += 1
            yield batch

    def _places(self) -> Iterator[tuple[int, int]]:
        """Number of each remaining batch, and place of its first image in the order of all epochs."""
        place, first = 0, self.batch
        for batch in range(self.num_batches):
            if batch >= first:
                yield batch, place
            place += self.shape(batch)[1] * self.num_processes

    def shape(self, batch: int) -> tuple[int, int]:
        """Side of the crops of a batch, and their number in each process."""
        policy = self.policy
        side = int(np.random.default_rng((SIDE, self.seed, batch)).choice(policy.sides_of(batch)))
        return side, policy.batch_size * (max(policy.sides) // side) ** 2

    def __getitem__(self, place: tuple[int, int]) -> CropBatch:
        """Cuts a batch, in any process, given its number and the place of its first image.

        Raises:
            ValueError: If 1000 images in a row are unreadable.
        """
        batch, first = place
        side, count = self.shape(batch)
        end = first + count * self.num_processes
        crops: list[Crop] = []
        skipped: list[Skipped] = []
        for number in range(self.process_index, count * self.num_processes, self.num_processes):
            spares = itertools.count(end + self.process_index, self.num_processes)
            for position in itertools.islice(itertools.chain([first + number], spares), MAX_IN_A_ROW):
                epoch, offset = divmod(position, self.num_rows)
                row = int(row_order(self.num_rows, self.seed, epoch)[offset])
                crop = self.cut(row, side, (CROP, self.seed, batch, number))
                if isinstance(crop, Crop):
                    break
                skipped.append(crop)
            else:
                raise ValueError(
                    f"The image set must hold readable images, but {MAX_IN_A_ROW} in a row are not, the last one "
                    f"`{skipped[-1].key}`: {skipped[-1].reason}"
                )
            crops.append(crop)
        return CropBatch(torch.stack([crop.pixels for crop in crops]), [crop.label for crop in crops], skipped)

    def cut(self, number: int, side: int, seed: tuple[int, ...]) -> Crop | Skipped:
        """Returns a crop, or why the image is skipped."""
        row = self.rows[number]
        label = None if self.label_column is None else row.values[self.label_column]
        synthetic = np.random.default_rng((SYNTHETIC, *seed))
        if self.policy.synthetic_fraction and synthetic.random() < self.policy.synthetic_fraction:
            return Crop(self.processor.preprocess(synthetic_crop(side, synthetic))["pixel_values"][0], label)
        try:
            image = read_image(row)
        except (OSError, ValueError) as error:
            return Skipped(row.key, fault_of(error))
        if label is None and self.label_column is not None:
            return Skipped(row.key, "it has no label.")
        crop = self.policy.cut(image, side, seed)
        return Crop(self.processor.preprocess(crop)["pixel_values"][0], label)


def _leave_signals_to_the_trainer(worker: int) -> None:
    """Ignores signals, because the trainer needs batches until it has saved."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)

"""Loader of crops whose samples depend on the seed and the step, and which resumes exactly."""

import itertools
import signal
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import gather_object
from torch.utils.data import DataLoader, Dataset

from svqvae_files.identity import value_digest
from svqvae_hf.data.image_parts import IndexedRows
from svqvae_hf.data.image_rows import ImageRow
from svqvae_hf.data.image_sets import ImageSet
from svqvae_hf.data.workers import end_with_parent
from svqvae_hf.trainer.data.crop_batches import CropBatch, CropCutter
from svqvae_hf.trainer.data.crop_stream import CropStream, Place
from svqvae_hf.trainer.data.sample_order import OrderedLoader, row_at


@dataclass
class CropRows(Dataset[CropBatch]):
    """Batches of crops of a set with random access. Each is a function of its number.

    Args:
        rows ([`IndexedRows`]): The set.
        cutter ([`CropCutter`]): Cuts the batches.
    """

    rows: IndexedRows
    cutter: CropCutter

    def __getitem__(self, batch: int) -> CropBatch:
        """Cuts a batch, in any process."""
        return self.cutter.cut_batch(batch, self._images_for)

    def _images_for(self, step: int, crop_number: int) -> Iterator[ImageRow]:
        """Yields the image of a crop, and then images that may replace it, without an end.

        The images of all epochs stand in one random order, and each crop takes one position in it. With 4 crops per
        step, step 0 has the positions 0 to 3, and step 1 has the positions 4 to 7. If the image at position 5 is
        unreadable, the one at position 9 replaces it, then the one at 13, and so on.
        """
        cutter = self.cutter
        position_of_crop = cutter.num_crops_before(step) + crop_number
        crops_of_step = cutter.num_crops(step)
        for position in itertools.count(start=position_of_crop, step=crops_of_step):
            row = row_at(position, len(self.rows), cutter.seed)
            yield self.rows[row]


class CropLoader(OrderedLoader):
    """Batches of crops, cut in advance by worker processes.

    With random access to the images, the samples of a step depend only on the image set, the cutter and the step: not
    on processes, workers or global random states. In an epoch, each image is seen once, in a new random order,
    unless a crop of another set or a synthetic one takes its place. An unreadable image is replaced by one of a later
    step, which is then seen twice.

    Otherwise the set is a stream. In an epoch, each worker of each process reads its share of the shards, so that each
    image is seen once. Unreadable images are left out. A worker whose shards are smaller starts the next epoch before
    the others. The samples of a step depend on the numbers of processes and workers as well.

    Args:
        images ([`ImageSet`]): From [`~svqvae_hf.data.image_sets.open_images`].
        cutter ([`CropCutter`]): Cuts the batches.
        num_workers (`int`): Processes that cut crops; 0: this process.
        shuffle_buffer (`int`, defaults to 1000): Images of a stream that a worker shuffles at a time.

    Raises:
        ValueError: If a stream has fewer shards than there are workers of all processes.
    """

    def __init__(self, images: ImageSet, cutter: CropCutter, num_workers: int, shuffle_buffer: int = 1000):
        self.images = images
        self.rows = images.rows  # `None` for a stream, whose images can only be read one after the other
        self.cutter = cutter
        self.num_workers = num_workers
        self.shuffle_buffer = shuffle_buffer
        # Each worker is a reader of a stream. Without workers, this process is the only reader.
        self.num_readers = max(1, num_workers)
        self.places = [Place()] * self.num_readers  # of each reader in its shards
        if self.rows is None:
            self._check_shards()
            contents = f"images of {self._num_shards:,} shards"
            settings = self._stream_settings()
        else:
            contents = f"{len(self.rows):,} images"
            settings = {"seed": cutter.seed, "number of images": len(self.rows)}
        super().__init__(cutter.share, contents, settings)

    @property
    def _num_shards(self) -> int:
        """Number of shards of a stream. Each of them is a part of the image set."""
        return len(self.images.parts)

    @property
    def _num_processes(self) -> int:
        """Number of processes that train. Each of them has a loader like this one."""
        return self.cutter.share.num_processes

    def _stream_settings(self) -> dict[str, int]:
        """Settings that decide which samples of a stream each step has.

        A checkpoint records them. A run can only resume with the same settings.
        """
        return {
            "seed": self.cutter.seed,
            "number of processes": self._num_processes,
            "number of workers": self.num_readers,
            "shuffle buffer": self.shuffle_buffer,
            "number of shards": self._num_shards,
        }

    def _check_shards(self) -> None:
        """Raises ValueError if a stream has fewer shards than there are workers of all processes."""
        readers_of_all_processes = self._num_processes * self.num_readers
        if self._num_shards < readers_of_all_processes:
            raise ValueError(
                f"A stream must have a shard per worker, but has {self._num_shards} for `--dataloader_num_workers` "
                f"{self.num_readers} x {self._num_processes} processes. Start fewer, make more shards, or leave out "
                "`--streaming`."
            )

    def __iter__(self) -> Iterator[CropBatch]:
        """Yields the remaining batches.

        Raises:
            ValueError: If 1000 images in a row are unreadable.
        """
        batches_per_step = self.share.batches
        num_batches = self.cutter.num_steps * batches_per_step
        batches = range(self.batch, num_batches)
        if self.rows is None:
            yield from self._batches_of_stream(batches)
        else:
            yield from self._batches_of_rows(self.rows, batches)

    def _batches_of_rows(self, rows: IndexedRows, batches: range) -> Iterator[CropBatch]:
        """Yields batches of a set with random access, and counts them."""
        for crops in self._load(CropRows(rows, self.cutter), batches):
            self.batch += 1
            yield crops

    def _batches_of_stream(self, batches: range) -> Iterator[CropBatch]:
        """Yields batches of a stream, counts them, and remembers the place of the reader that cut each."""
        stream = CropStream(self.images.parts, self.cutter, batches, list(self.places), self.shuffle_buffer)
        for place, crops in self._load(stream, None):
            reader = self.batch % self.num_readers
            self.places[reader] = place
            self.batch += 1
            yield crops

    def _load(self, dataset: Dataset, batches: range | None) -> DataLoader[Any]:
        """Makes PyTorch's loader of batches.

        Args:
            dataset (`Dataset`): [`CropRows`], or [`CropStream`] for a stream. Each of its items is a whole batch.
            batches (`range`, *optional*): Numbers of the batches; `None` for a stream, which knows them.
        """
        return DataLoader(
            dataset,
            batch_size=None,  # items are not put together to batches
            sampler=batches,  # the indices of the items
            num_workers=self.num_workers,
            generator=torch.Generator(),  # not the global one
            worker_init_fn=prepare_worker,
            pin_memory=torch.cuda.is_available(),
        )

    def identity(self) -> str:
        """Digest of the image set, and of the one that is mixed in."""
        if self.cutter.mixed is None:
            return value_digest([self.images.fingerprint])
        return value_digest([self.images.fingerprint, self.cutter.mixed.fingerprint])

    def state_dict(self) -> dict[str, Any]:
        """State that is equal on all processes. For a stream, all of them must call it."""
        state = super().state_dict()
        if self.rows is None:
            places = [tuple(place) for place in self.places]
            state["places"] = gather_object([places])  # of the readers of each process
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Sets the step at which iteration continues.

        Raises:
            ValueError: If the state is of a loader with another order or other steps, or of another set.
        """
        super().load_state_dict(state)
        if self.rows is None:
            places_of_process = state["places"][self.share.process]
            self.places = [Place(*place) for place in places_of_process]


def prepare_worker(worker: int) -> None:
    """Leaves signals to the trainer, which needs batches until it has saved, and ends with it."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    end_with_parent()

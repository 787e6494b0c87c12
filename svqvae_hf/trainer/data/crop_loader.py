"""Loader of crops whose samples depend on the seed and the step, and which resumes exactly."""

import itertools
import signal
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import gather_object
from torch.utils.data import DataLoader, Dataset

from svqvae_hf.data.image_parts import IndexedRows
from svqvae_hf.data.image_rows import ImageRow, read_image
from svqvae_hf.data.image_sets import ImageSet
from svqvae_hf.data.workers import end_with_parent
from svqvae_hf.trainer.data.crop_batches import CropBatch, CropCutter
from svqvae_hf.trainer.data.crop_stream import CropStream, Place
from svqvae_hf.trainer.data.sample_order import OrderedLoader, row_at, spread


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
        cutter, step = self.cutter, batch // self.cutter.share.batches
        first, size = (int(each[step]) * cutter.share.step_size for each in (cutter.first, cutter.times))

        def images_for(number: int) -> Iterator[ImageRow]:
            """Images with this number in this step, and in later ones as if they were equally large."""
            positions = itertools.count(first + number, size)
            return (self.rows[row_at(position, len(self.rows), cutter.seed)] for position in positions)

        return cutter.cut_batch(batch, images_for)


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
        self.rows, self.shards, self.cutter = images.rows, images.parts, cutter
        self.num_workers, self.shuffle_buffer = num_workers, shuffle_buffer
        self.places = [Place()] * max(1, num_workers)
        count, processes, workers = images.max_parts, cutter.share.num_processes, len(self.places)
        if self.rows is not None:
            super().__init__(cutter.share, f"{count:,} images", {"seed": cutter.seed, "number of images": count})
            return
        settings = {"number of processes": processes, "number of workers": workers, "shuffle buffer": shuffle_buffer}
        settings |= {"seed": cutter.seed, "number of shards": count}
        super().__init__(cutter.share, f"images of {count:,} shards", settings)
        if count < processes * workers:
            raise ValueError(
                f"A stream must have a shard per worker, but has {count} for `--dataloader_num_workers` {workers} x "
                f"{processes} processes. Start fewer, make more shards, or leave out `--streaming`."
            )

    def __iter__(self) -> Iterator[CropBatch]:
        """Yields the remaining batches.

        Raises:
            ValueError: If 1000 images in a row are unreadable.
        """
        batches = range(self.batch, self.cutter.num_steps * self.share.batches)
        stream = CropStream(self.shards, self.cutter, batches, [*self.places], self.shuffle_buffer)
        loader: DataLoader[Any] = DataLoader(
            stream if self.rows is None else CropRows(self.rows, self.cutter),
            batch_size=None,
            sampler=None if self.rows is None else batches,
            num_workers=self.num_workers,
            generator=torch.Generator(),  # not the global one
            worker_init_fn=_prepare_worker,
            pin_memory=torch.cuda.is_available(),
        )
        for crops in loader:
            if self.rows is None:
                self.places[self.batch % len(self.places)], crops = crops
            self.batch += 1
            yield crops

    def samples(self) -> Iterator[bytes]:
        """Yields some images as bytes, each with its key, or the names of a stream's shards."""
        if self.rows is None:
            yield from (shard.name.encode() for shard in self.shards)
        for rows in (rows for rows in (self.rows, self.cutter.mixed) if rows is not None):
            for row in [rows[number] for number in spread(len(rows))]:
                yield row.key.encode()
                with suppress(OSError, ValueError):  # unreadable
                    yield read_image(row).resize((8, 8)).tobytes()

    def state_dict(self) -> dict[str, Any]:
        """State that is equal on all processes. For a stream, all of them must call it."""
        state = super().state_dict()
        return state if self.rows is not None else state | {"places": gather_object([[*map(tuple, self.places)]])}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Sets the step at which iteration continues.

        Raises:
            ValueError: If the state is of a loader with another order or other steps, or of another set.
        """
        super().load_state_dict(state)
        if self.rows is None:
            self.places = [Place(*place) for place in state["places"][self.share.process]]


def _prepare_worker(worker: int) -> None:
    """Leaves signals to the trainer, which needs batches until it has saved, and ends with it."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    end_with_parent()

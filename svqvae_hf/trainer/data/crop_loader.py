"""Loader of crops that depends on its seed alone, and resumes exactly."""

import itertools
import signal
from collections import deque
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from svqvae_hf.data.image_sets import ImageSet
from svqvae_hf.trainer.data.crops import Crop, CropPolicy, Cutter, Job, Skipped
from svqvae_hf.trainer.data.readers import OPEN_SHARDS, Item, RowReader, StreamReader

MAX_IN_A_ROW = 1000  # unreadable images, before the image set is given up
SIDE, CROP = 0, 1  # first words of the seeds of sides and crops; readers.py uses 2 and 3


@dataclass(frozen=True)
class CropBatch:
    """Crops of one side.

    Args:
        sample (`torch.Tensor` of shape `(batch, 3, side, side)`): Crops in the loader's `pixel_range`, float32.
        labels (`list`): Label of each crop's image; None without `label_column`.
        skipped (`list[Skipped]`): Images that are unreadable or too small, which the next ones replaced.
        num_read (`int`): Images tried, including the skipped ones.
    """

    sample: torch.Tensor
    labels: list[Any]
    skipped: list[Skipped]
    num_read: int


@dataclass(frozen=True)
class Pending:
    """A job that workers are cutting, with the images after it and the reader's state after it."""

    job: Job
    lookahead: Iterator[Item]
    reader_state: dict[str, Any] | None


class CropLoader:
    """Batches of crops, cut in advance by worker processes.

    A batch depends only on the image set, the policy, the seed, the process and the batch's number: not on workers or
    global random states. In the same batch, all processes have crops of one side. In an epoch, each image is seen
    once, by one process, in a new random order. An unreadable image is replaced by the next readable one of the
    process, which is then seen twice.

    A stream is split between processes by shards if their number is a multiple of the number of processes; otherwise
    each process skips the images of the others. Eight shards are read at the same time, each by a thread that reads
    ahead, so that the latency of a disk or network does not add up. `shuffle_buffer` images are shuffled at a time.

    Iteration continues after the last batch yielded, also after `load_state_dict`.

    Args:
        images ([`ImageSet`]): From [`~svqvae_hf.data.image_sets.open_images`]. It is a stream unless it has `rows`.
        policy ([`CropPolicy`]): How crops are cut.
        pixel_range (`tuple[float, float]`): Values of black and white.
        seed (`int`): Seed of the order, the sides, the positions, the factors and the flips.
        num_workers (`int`): Processes that cut crops; 0: this process.
        process_index (`int`): Index of this process of the training.
        num_processes (`int`): Processes that share the set.
        num_batches (`int`): Batches in all, including those before the loaded state.
        shuffle_buffer (`int`, defaults to 1000): Images of a stream that are shuffled at a time.
        label_column (`str`, *optional*): Column of the labels.
    """

    def __init__(
        self,
        images: ImageSet,
        policy: CropPolicy,
        pixel_range: tuple[float, float],
        *,
        seed: int,
        num_workers: int,
        process_index: int,
        num_processes: int,
        num_batches: int,
        shuffle_buffer: int = 1000,
        label_column: str | None = None,
    ):
        self.images = images
        self.policy = policy
        self.seed = seed
        self.num_workers = num_workers
        self.process_index = process_index
        self.num_processes = num_processes
        self.num_batches = num_batches
        self.shuffle_buffer = shuffle_buffer
        rows = images.rows
        streaming = rows is None
        self.cutter = Cutter(rows, label_column, policy, pixel_range)
        self.order = {
            "seed": seed,
            "streaming": streaming,
            "shuffle_buffer": shuffle_buffer if streaming else None,
            "open_shards": OPEN_SHARDS if streaming else None,
            "num_shards": len(images.parts) if streaming else None,
            "num_rows": None if rows is None else len(rows),
        }
        self.batch = 0
        self.reader_state: dict[str, Any] | None = None

    @property
    def contents(self) -> str:
        """Size of the image set, for the log."""
        if self.order["streaming"]:
            return f"a stream of images in {len(self.images.parts):,} shards"
        return f"{self.images.length:,} images"

    def state_dict(self) -> dict[str, Any]:
        """Position after the last batch yielded, small: numbers, strings and dictionaries."""
        return deepcopy({"order": self.order, "batch": self.batch, "reader": self.reader_state})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Sets the position at which iteration continues.

        Raises:
            ValueError: If the state is of a loader with another order, or of a set with another number of rows, or of
                shards in a stream.
        """
        for name, value in self.order.items():
            if state["order"].get(name) != value:
                raise ValueError(
                    f"`{name}` must be {state['order'].get(name)} as when the state was saved, but is {value}."
                )
        self.batch, self.reader_state = state["batch"], deepcopy(state["reader"])

    def __iter__(self) -> Iterator[CropBatch]:
        """Yields the remaining batches.

        Raises:
            ValueError: If 1000 images in a row are unreadable, or a process gets no images.
        """
        queue: deque[Pending] = deque()
        loader = DataLoader(
            self.cutter,
            batch_size=None,
            sampler=self._jobs(queue),
            num_workers=self.num_workers,
            generator=torch.Generator(),  # not the global one
            worker_init_fn=_leave_signals_to_the_trainer,
            pin_memory=torch.cuda.is_available(),
        )
        for sample, labels, failed in loader:
            pending = queue.popleft()
            skipped = [image for _, image in failed]
            for slot, _ in failed:
                sample[slot], labels[slot] = self._replacement(pending, slot, skipped)
            self.batch, self.reader_state = self.batch + 1, pending.reader_state
            # Each slot in `failed`, and each later failure, took one more try.
            yield CropBatch(sample, labels, skipped, num_read=len(pending.job.items) + len(skipped))

    def _jobs(self, queue: deque[Pending]) -> Iterator[Job]:
        """Yields the jobs for the workers, and queues what the main process needs when a batch comes back."""
        reader = self._reader()
        for batch in range(self.batch, self.num_batches):
            side = int(np.random.default_rng((SIDE, self.seed, batch)).choice(self.policy.sides_of(batch)))
            count = self.policy.batch_size * (max(self.policy.sides) // side) ** 2
            items: list[Item] = [reader.next() for _ in range(count)]
            numbers = range(self.process_index, count * self.num_processes, self.num_processes)
            job = Job(side, items, [(CROP, self.seed, batch, number) for number in numbers])
            queue.append(Pending(job, reader.lookahead(), reader.state()))
            yield job

    def _reader(self) -> RowReader | StreamReader:
        rows, place = self.images.rows, (self.process_index, self.num_processes)
        if rows is not None:
            return RowReader(len(rows), self.seed, *place, self.reader_state)
        return StreamReader(self.images.parts, self.seed, self.shuffle_buffer, *place, self.reader_state)

    def _replacement(self, pending: Pending, slot: int, skipped: list[Skipped]) -> Crop:
        for item in itertools.islice(pending.lookahead, MAX_IN_A_ROW):
            crop = self.cutter.cut(item, pending.job.side, pending.job.seeds[slot])
            if isinstance(crop, Crop):
                return crop
            skipped.append(crop)
        raise ValueError(
            f"The image set must hold readable images, but {MAX_IN_A_ROW} in a row are not, the last one "
            f"`{skipped[-1].key}`: {skipped[-1].reason}"
        )


def _leave_signals_to_the_trainer(worker: int) -> None:
    """Ignores signals, which the whole process group may get, because the trainer needs batches until it has saved."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)

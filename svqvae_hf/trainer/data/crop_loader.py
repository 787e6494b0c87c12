"""Loader of crops that depends on its seed alone, and resumes exactly."""

import itertools
import signal
from collections import deque
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from svqvae_hf.data.image_sets import ImageSet
from svqvae_hf.trainer.data.crops import Crop, CropPolicy, Cutter, Job, Skipped
from svqvae_hf.trainer.data.readers import Item, RowReader, StreamReader

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


@dataclass
class CropLoader:
    """Batches of crops, cut in advance by worker processes.

    A batch depends only on the image set, the policy, the seed, the process and the batch's number: not on workers or
    global random states. In the same batch, all processes have crops of one side. In an epoch, each image is seen
    once, by one process, in a new random order. An unreadable image is replaced by the next readable one of the
    process, which is then seen twice.

    [`StreamReader`] defines the order of a stream.

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

    images: ImageSet
    policy: CropPolicy
    pixel_range: tuple[float, float]
    seed: int = field(kw_only=True)
    num_workers: int = field(kw_only=True)
    process_index: int = field(kw_only=True)
    num_processes: int = field(kw_only=True)
    num_batches: int = field(kw_only=True)
    shuffle_buffer: int = 1000
    label_column: str | None = None

    def __post_init__(self) -> None:
        rows, parts = self.images.rows, self.images.parts
        self.cutter = Cutter(rows, self.label_column, self.policy, self.pixel_range)
        self.order: dict[str, int | None] = {"seed": self.seed}
        self.order |= {"number of images": None, "number of shards": None, "shuffle_buffer": None}
        if rows is None:
            self.order |= {"number of shards": len(parts), "shuffle_buffer": self.shuffle_buffer}
        else:
            self.order |= {"number of images": len(rows)}
        self.batch = 0
        self.reader_state: dict[str, Any] | None = None

    @property
    def contents(self) -> str:
        """Size of the image set, for the log."""
        shards = self.order["number of shards"]
        return f"{self.images.length:,} images" if shards is None else f"a stream of images in {shards:,} shards"

    def state_dict(self) -> dict[str, Any]:
        """Position after the last batch yielded, small: numbers, strings and dictionaries."""
        return deepcopy({"order": self.order, "batch": self.batch, "reader": self.reader_state})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Sets the position at which iteration continues.

        Raises:
            ValueError: If the state is of a loader with another order, or of another set.
        """
        for name, value in self.order.items():
            if (saved := state["order"].get(name)) != value:
                raise ValueError(
                    f"The {name} must be {saved} as when the checkpoint was written, but is {value}. Restore it, or "
                    "start a new run in another `--output_dir`."
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
        rows, state = self.images.rows, self.reader_state
        if rows is not None:
            position = state["position"] if state else self.process_index
            return RowReader(len(rows), self.seed, position, self.num_processes)
        place = self.process_index, self.num_processes
        return StreamReader(self.images.parts, self.seed, self.shuffle_buffer, *place, state)

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

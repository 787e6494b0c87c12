"""Loader of crops that depends on its seed alone, and resumes exactly."""

import itertools
import signal
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from svqvae_hf.data.image_sets import ImageSet
from svqvae_hf.trainer.data.crops import Crop, CropPolicy, Cutter, Job, Skipped
from svqvae_hf.trainer.data.row_order import row_order

MAX_IN_A_ROW = 1000  # unreadable images, before the image set is given up
SIDE, CROP = 0, 1  # first words of the seeds of sides and crops; row_order.py uses 2
SIGNALS = (signal.SIGINT, signal.SIGTERM)  # that end a run, and that its whole process group may get


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
    """A job that workers are cutting, and the position after it."""

    job: Job
    position: int


@dataclass
class CropLoader:
    """Batches of crops, cut in advance by worker processes.

    A batch depends only on the image set, the policy, the seed, the process and the batch's number: not on workers or
    global random states. In the same batch, all processes have crops of one side. In an epoch, each image is seen
    once, by one process, in a new random order. An unreadable image is replaced by the next readable one of the
    process, which is then seen twice.

    Iteration continues after the last batch yielded, also after `load_state_dict`.

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

    images: ImageSet
    policy: CropPolicy
    pixel_range: tuple[float, float]
    seed: int = field(kw_only=True)
    num_workers: int = field(kw_only=True)
    process_index: int = field(kw_only=True)
    num_processes: int = field(kw_only=True)
    num_batches: int = field(kw_only=True)
    label_column: str | None = None

    def __post_init__(self) -> None:
        if self.images.rows is None:
            raise ValueError("The image set must have random access. Open it with `copy=True`.")
        self.num_rows = len(self.images.rows)
        self.cutter = Cutter(self.images.rows, self.label_column, self.policy, self.pixel_range)
        self.order = {"seed": self.seed, "number of images": self.num_rows}
        self.batch, self.position = 0, self.process_index

    @property
    def contents(self) -> str:
        """Size of the image set, for the log."""
        return f"{self.num_rows:,} images"

    def state_dict(self) -> dict[str, Any]:
        """Position after the last batch yielded, small: numbers, strings and dictionaries."""
        return {"order": dict(self.order), "batch": self.batch, "reader": {"position": self.position}}

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
        self.batch, self.position = state["batch"], state["reader"]["position"]

    def __iter__(self) -> Iterator[CropBatch]:
        """Yields the remaining batches.

        Raises:
            ValueError: If 1000 images in a row are unreadable.
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
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # a new worker would die of one
        batches = iter(loader)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        for sample, labels, failed in batches:
            pending = queue.popleft()
            skipped = [image for _, image in failed]
            for slot, _ in failed:
                sample[slot], labels[slot] = self._replacement(pending, slot, skipped)
            self.batch, self.position = self.batch + 1, pending.position
            # Each slot in `failed`, and each later failure, took one more try.
            yield CropBatch(sample, labels, skipped, num_read=len(pending.job.rows) + len(skipped))

    def _jobs(self, queue: deque[Pending]) -> Iterator[Job]:
        """Yields the jobs for the workers, and queues what the main process needs when a batch comes back."""
        position = self.position
        for batch in range(self.batch, self.num_batches):
            side = int(np.random.default_rng((SIDE, self.seed, batch)).choice(self.policy.sides_of(batch)))
            count = self.policy.batch_size * (max(self.policy.sides) // side) ** 2
            rows = list(itertools.islice(self._rows(position), count))
            numbers = range(self.process_index, count * self.num_processes, self.num_processes)
            job = Job(side, rows, [(CROP, self.seed, batch, number) for number in numbers])
            position += count * self.num_processes
            queue.append(Pending(job, position))
            yield job

    def _rows(self, position: int) -> Iterator[int]:
        """Yields the rows of this process from a position on: every `num_processes`-th in the order of all epochs."""
        for place in itertools.count(position, self.num_processes):
            epoch, offset = divmod(place, self.num_rows)
            yield int(row_order(self.num_rows, self.seed, epoch)[offset])

    def _replacement(self, pending: Pending, slot: int, skipped: list[Skipped]) -> Crop:
        for row in itertools.islice(self._rows(pending.position), MAX_IN_A_ROW):
            crop = self.cutter.cut(row, pending.job.side, pending.job.seeds[slot])
            if isinstance(crop, Crop):
                return crop
            skipped.append(crop)
        raise ValueError(
            f"The image set must hold readable images, but {MAX_IN_A_ROW} in a row are not, the last one "
            f"`{skipped[-1].key}`: {skipped[-1].reason}"
        )


def _leave_signals_to_the_trainer(worker: int) -> None:
    """Ignores signals, because the trainer needs batches until it has saved."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)

"""Order and randomness of the samples of a run: functions of the seed and the step, for any number of processes."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from svqvae_hf.trainer.options import RunOptions

DIGEST = "digest of the set"
ORDER = 2  # first word of the seeds of random orders; crop_batches.py and crop_stream.py use others

SAMPLES_PER_STEP = "product of `--per_device_train_batch_size`, `--gradient_accumulation_steps` and process count"


@lru_cache(maxsize=2)
def row_order(num_rows: int, *seed: int) -> np.ndarray:
    """Random order of the rows of a set in an epoch, which is the last word of the seed."""
    return np.random.default_rng((ORDER, *seed)).permutation(num_rows)


def row_at(position: int, num_rows: int, seed: int) -> int:
    """Row at a position in the order of all epochs."""
    epoch, offset = divmod(position, num_rows)
    return int(row_order(num_rows, seed, epoch)[offset])


def batch_generator(*seed: int) -> torch.Generator:
    """Random generator with a seed of several numbers: such as the seed of the run and the step."""
    words = np.random.SeedSequence(seed).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(words[0] >> 1))


@dataclass(frozen=True)
class Share:
    """Share of a process in the samples of each step.

    The samples of a step are numbered. Its batches hold them one after the other, and within a batch the processes
    take turns. So a step holds the same samples for any division into batches and processes of the same product. With
    2 processes, 2 batches per step and a batch size of 2, process 1 has the samples 1 and 3 of each step in its first
    batch, and 5 and 7 in its second.

    Args:
        batch_size (`int`): Samples of a batch of one process.
        batches (`int`, defaults to 1): Batches of a step.
        process (`int`, defaults to 0): Index of the process.
        num_processes (`int`, defaults to 1): Number of processes.
    """

    batch_size: int
    batches: int = 1
    process: int = 0
    num_processes: int = 1

    @classmethod
    def of(cls, options: RunOptions, accelerator: Accelerator) -> "Share":
        """Share of this process in a run."""
        batches = options.gradient_accumulation_steps
        return cls(options.per_device_train_batch_size, batches, accelerator.process_index, accelerator.num_processes)

    @property
    def step_size(self) -> int:
        """Samples of a step."""
        return self.batch_size * self.batches * self.num_processes

    def numbers(self, batch: int, factor: int = 1) -> range:
        """Numbers, in their step, of the samples of this process in a batch.

        Args:
            batch (`int`): Number of the batch in the run.
            factor (`int`, defaults to 1): Factor by which the step has more samples than an ordinary one.
        """
        samples_of_all_processes = self.batch_size * factor * self.num_processes
        batch_of_step = batch % self.batches
        first = batch_of_step * samples_of_all_processes
        stop = first + samples_of_all_processes
        return range(first + self.process, stop, self.num_processes)


def check_same(name: str, saved: Any, now: Any) -> None:
    """Raises ValueError unless a setting is as when a checkpoint was written."""
    if saved != now:
        raise ValueError(
            f"The {name} must be {saved} as when the checkpoint was written, but is {now}. Restore it, or start a new "
            "run in another `--output_dir`."
        )


class OrderedLoader(ABC):
    """A loader whose samples are a function of the seed and the step.

    Iteration continues after the last batch yielded, also after `load_state_dict`.

    Args:
        share ([`Share`]): Share of this process.
        contents (`str`): Size of the set, for the log.
        settings (`dict[str, int]`): Settings that decide, with the step, which samples it holds.
    """

    batch = 0  # batches yielded

    def __init__(self, share: Share, contents: str, settings: dict[str, int]):
        self.share = share
        self.contents = f"{contents}, {share.step_size} per step"
        self.settings = settings | {SAMPLES_PER_STEP: share.step_size}

    @abstractmethod
    def identity(self) -> str:
        """Digest of the set."""

    @cached_property
    def digest(self) -> str:
        """Digest of the set, which is computed once, because it reads the properties of all files."""
        return self.identity()

    def state_dict(self) -> dict[str, Any]:
        """Steps done, the settings, and the digest of the set; equal on all processes."""
        return {"step": self.batch // self.share.batches, "settings": self.settings | {DIGEST: self.digest}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Sets the step at which iteration continues.

        Raises:
            ValueError: If the state is of a loader with other settings, or of another set.
        """
        for name, value in (self.settings | {DIGEST: self.digest}).items():
            check_same(name, state["settings"].get(name), value)
        self.batch = state["step"] * self.share.batches

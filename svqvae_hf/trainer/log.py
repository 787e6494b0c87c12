"""The log of a run: means of numbers, rates, progress, and the trackers."""

import time
from collections import Counter, defaultdict
from collections.abc import Mapping
from datetime import timedelta

import psutil
import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from torch import nn

from svqvae_hf.trainer.options import RunOptions

CARD_NUMBERS = ("train/loss", "validation/loss", "validation/accuracy", "validation/bits_per_id")

logger = get_logger(__name__, log_level="INFO")


class Log:
    """Log of a run, on the terminal and in the trackers.

    Args:
        options ([`RunOptions`]): Options.
        accelerator (`Accelerator`): Accelerator whose processes are logged together.
        network (`nn.Module`): Network that is trained.
        contents (`str`): Size of the training set, in words.
        first_step (`int`): Steps done before.
    """

    def __init__(
        self, options: RunOptions, accelerator: Accelerator, network: nn.Module, contents: str, first_step: int
    ):
        self.options, self.accelerator, self.first_step = options, accelerator, first_step
        self.numbers: dict[str, list[torch.Tensor]] = defaultdict(list)
        self.amounts = Counter[str]()
        self.card_rows: dict[str, str] = {}  # last values of the numbers that cards show
        self.started = self.logged = time.monotonic()
        if accelerator.log_with:
            accelerator.init_trackers("svqvae")
        sizes = {each: each.numel() for each in network.parameters()}
        trained = sum(size for each, size in sizes.items() if each.requires_grad)
        count = accelerator.num_processes
        logger.info(
            f"Training on {contents}: {trained:,} of {sum(sizes.values()):,} parameters, "
            f"{options.max_steps - first_step:,} of {options.max_steps:,} steps left, {count} "
            f"process{'es' * (count > 1)} on {accelerator.device.type}"
        )

    def add(self, numbers: Mapping[str, torch.Tensor], **amounts: float) -> None:
        """Adds numbers of a batch, whose means are logged, and amounts, whose rates per second are logged."""
        for name, value in numbers.items():
            self.numbers[name].append(value.detach())
        self.amounts.update(amounts)

    def write_training(self, steps_done: int, numbers: Mapping[str, float]) -> None:
        """Logs what was added since the last call, over all processes, and other numbers.

        All processes must have added the same names.
        """
        own = {name: torch.stack(values).mean() for name, values in self.numbers.items()}
        means = {name: self.accelerator.reduce(value, "mean").item() for name, value in own.items()}
        numbers = means | dict(numbers)
        rate = self.accelerator.num_processes / (time.monotonic() - self.logged)
        numbers |= {f"{name}_per_second": rate * amount for name, amount in self.amounts.items()}
        self.numbers.clear()
        self.amounts.clear()
        self.logged = time.monotonic()
        self.write(steps_done, {f"train/{name}": value for name, value in numbers.items()})

    def write(self, steps_done: int, numbers: Mapping[str, float]) -> None:
        """Logs numbers, with progress, time and memory."""
        self.accelerator.log(dict(numbers), step=steps_done)
        self.card_rows |= {name: f"{numbers[name]:.4g}" for name in CARD_NUMBERS if name in numbers}
        elapsed = time.monotonic() - self.started
        left = elapsed / max(1, steps_done - self.first_step) * (self.options.max_steps - steps_done)
        memory = memory_in_use(self.accelerator.device) / 2**30
        logger.info(
            f"step {steps_done} of {self.options.max_steps} ({timedelta(seconds=round(elapsed))} elapsed, "
            f"{timedelta(seconds=round(left))} left, {memory:.1f} GiB): "
            + ", ".join(f"{name} {value:.4g}" for name, value in numbers.items())
        )


def memory_in_use(device: torch.device) -> int:
    """Bytes: the peak of this process on a GPU, or its memory on a CPU now."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss

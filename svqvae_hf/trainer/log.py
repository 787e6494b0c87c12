"""The log of a run: means of numbers, rates, progress, and the trackers."""

import time
from collections import Counter, defaultdict
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import psutil
import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from torch import nn

from svqvae_hf.trainer.options import RunOptions

# Numbers that a line of the log shows. Trackers get all numbers, and the log shows the others at level DEBUG.
SHOWN = (
    "loss",
    "l2",
    "usage@1",
    "accuracy",
    "bits_per_id",
    "ids_kept",
    "reset_codes",
    "lr",
    "images_per_second",
)
# Numbers whose last values the model card of the result shows.
ON_CARDS = ("train/loss", "validation/loss", "validation/accuracy", "validation/bits_per_id")

logger = get_logger(__name__, log_level="INFO")


class Log:
    """Log of a run, on the terminal and in the trackers.

    Args:
        options ([`RunOptions`]): Options.
        accelerator (`Accelerator`): Accelerator whose processes are logged together.

    Attributes:
        card_rows (`dict[str, str]`): Last values of the numbers that cards show, by name.
    """

    def __init__(self, options: RunOptions, accelerator: Accelerator):
        self.options = options
        self.accelerator = accelerator
        # What was added since the last line about training: scalars of each batch, whose means are logged, and sums of
        # amounts, which are logged per second.
        self.batch_numbers: dict[str, list[torch.Tensor]] = defaultdict(list)
        self.amounts = Counter[str]()
        self.card_rows: dict[str, str] = {}
        self.first_step = 0
        self.start_time = time.monotonic()
        self.last_time = self.start_time  # when the last line about training was written

    def start(self, network: nn.Module, contents: str, first_step: int) -> None:
        """Opens the trackers, and logs what is trained.

        Args:
            network (`nn.Module`): Network that is trained.
            contents (`str`): Size of the training set, in words.
            first_step (`int`): Steps done before.
        """
        self.first_step = first_step
        self.start_time = time.monotonic()
        self.last_time = self.start_time
        if self.accelerator.log_with:
            self.accelerator.init_trackers("svqvae")
        num_parameters = 0
        num_trained = 0
        for parameter in network.parameters():
            num_parameters += parameter.numel()
            if parameter.requires_grad:
                num_trained += parameter.numel()
        max_steps = self.options.max_steps
        steps_left = max_steps - first_step
        num_processes = self.accelerator.num_processes
        processes = "1 process" if num_processes == 1 else f"{num_processes} processes"
        logger.info(
            f"Training on {contents}: {num_trained:,} of {num_parameters:,} parameters, {steps_left:,} of "
            f"{max_steps:,} steps left, {processes} on {self.accelerator.device.type}"
        )

    def add(self, numbers: Mapping[str, torch.Tensor], **amounts: float) -> None:
        """Adds numbers of a batch, whose means are logged, and amounts, whose rates per second are logged."""
        for name, value in numbers.items():
            self.batch_numbers[name].append(value.detach())
        self.amounts.update(amounts)

    def write_training(self, steps_done: int, further_numbers: Mapping[str, float]) -> None:
        """Logs what was added since the last call, over all processes, together with further numbers.

        All processes must have added the same names.
        """
        line = {}
        for name, values in self.batch_numbers.items():
            mean_of_process = torch.stack(values).mean()
            line[f"train/{name}"] = self.accelerator.reduce(mean_of_process, "mean").item()
        for name, value in further_numbers.items():
            line[f"train/{name}"] = value
        seconds = time.monotonic() - self.last_time
        for name, amount in self.amounts.items():
            amount_of_all_processes = self.accelerator.num_processes * amount
            line[f"train/{name}_per_second"] = amount_of_all_processes / seconds
        self.batch_numbers.clear()
        self.amounts.clear()
        self.last_time = time.monotonic()
        self.write(steps_done, line)

    def write(self, steps_done: int, numbers: Mapping[str, float]) -> None:
        """Logs numbers, some of them on the terminal with progress, time and memory. Remembers those for the card."""
        self.accelerator.log(dict(numbers), step=steps_done)
        for name in ON_CARDS:
            if name in numbers:
                self.card_rows[name] = f"{numbers[name]:.4g}"
        shown = []
        hidden = []
        for name, value in numbers.items():
            text = f"{name} {value:.4g}"
            if is_shown(name, value):
                shown.append(text)
            else:
                hidden.append(text)
        logger.info(
            f"step {steps_done} of {self.options.max_steps} ({self._progress(steps_done)}): {', '.join(shown)}"
        )
        if hidden:
            logger.debug(f"step {steps_done} of {self.options.max_steps}: {', '.join(hidden)}")

    def _progress(self, steps_done: int) -> str:
        """Time that has passed, time that is left, and memory."""
        elapsed = time.monotonic() - self.start_time
        times = describe_time(elapsed, steps_done - self.first_step, self.options.max_steps - steps_done)
        gibibytes = memory_in_use(self.accelerator.device) / 2**30
        return f"{times}, {gibibytes:.1f} GiB"

    def state_dict(self) -> dict[str, Any]:
        """Rows of the card, so that a run which is resumed after its last line has them all."""
        return {"card_rows": self.card_rows}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from a state."""
        self.card_rows = dict(state["card_rows"])


def is_shown(name: str, value: float) -> bool:
    """Whether a line of the log shows a number. Skipped steps are shown if there are any."""
    _, _, name_without_group = name.rpartition("/")  # without "train/" or the name of a set
    if name_without_group == "skipped":
        return value > 0
    return name_without_group.startswith("psnr@") or name_without_group in SHOWN


def memory_in_use(device: torch.device) -> int:
    """Bytes of this process: on a GPU, the most that it has used; on a CPU, what it uses now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return psutil.Process().memory_info().rss


def describe_time(elapsed: float, steps_of_process: int, steps_left: int) -> str:
    """Time that has passed and time that is left, which is not known before the first step.

    Args:
        elapsed (`float`): Seconds since the start of the process.
        steps_of_process (`int`): Steps since then.
        steps_left (`int`): Steps to the end of the run.
    """
    if steps_of_process == 0:
        return f"{_duration(elapsed)} elapsed"
    remaining = elapsed / steps_of_process * steps_left
    return f"{_duration(elapsed)} elapsed, {_duration(remaining)} left"


def _duration(seconds: float) -> timedelta:
    """A time in whole seconds, which prints as `1:23:45`."""
    return timedelta(seconds=round(seconds))

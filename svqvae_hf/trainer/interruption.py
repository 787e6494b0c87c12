"""Signals that end a run after its step."""

import os
import signal
from types import FrameType

import psutil
from accelerate import Accelerator

LAUNCHED = "ACCELERATE_MIXED_PRECISION"  # set by `accelerate launch`, and by users


class Interruption:
    """Turns SIGTERM, Ctrl-C and the end of the launcher into a request that all processes see at the end of a step.

    A second signal ends the process at once.

    Args:
        accelerator (`Accelerator`): Accelerator whose processes stop together.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.launcher = _find_launcher()
        self.exit_code = 128 + signal.SIGTERM

    def __enter__(self) -> "Interruption":
        self.handlers = {}
        for number in (signal.SIGTERM, signal.SIGINT):
            self.handlers[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def requested(self) -> bool:
        """Returns whether any process got a signal or lost its launcher. All processes must call it."""
        if self.launcher is not None and os.getppid() != self.launcher:
            self.accelerator.set_trigger()
        return self.accelerator.check_trigger()

    def _request(self, number: int, frame: FrameType | None) -> None:
        """Handles a signal, and restores the former handlers, so that a second signal ends the process at once."""
        self.__exit__()
        self.exit_code = 128 + number
        self.accelerator.set_trigger()


def stop_message(steps_done: int, resumed_from: str | None) -> str:
    """Says after which step a run has stopped, and how it goes on.

    Args:
        steps_done (`int`): Steps of the checkpoint.
        resumed_from (`str`, *optional*): The option `resume_from_checkpoint` of the run.
    """
    stopped = f"Stopped by a signal at step {steps_done}. Resume: the same command"
    if resumed_from == "latest":
        return f"{stopped}."
    return f"{stopped} with --resume_from_checkpoint latest."


def _find_launcher() -> int | None:
    """Process id of `accelerate launch`, which does not pass signals on; `None` if it did not start this process."""
    parent = psutil.Process().parent()
    if LAUNCHED not in os.environ or parent is None:
        return None
    if any("accelerate" in word for word in parent.cmdline()):
        return parent.pid
    return None

"""Training runs inside the tests' own process."""

import contextlib
import logging
import os
import re
from collections.abc import Iterator

import pytest
from accelerate.state import AcceleratorState, GradientState, PartialState


@contextlib.contextmanager
def cpu() -> Iterator[None]:
    os.environ["ACCELERATE_USE_CPU"] = "true"
    yield
    del os.environ["ACCELERATE_USE_CPU"]


def forget_accelerate() -> None:
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


@pytest.fixture
def _one_accelerator() -> Iterator[None]:
    """Each run sets up accelerate anew, and leaves the log as it was."""
    handlers = logging.root.handlers[:]
    yield
    logging.root.handlers[:] = handlers
    forget_accelerate()


def run(session_class, options_class, **options):
    """Runs a session to its end, and gives it."""
    with cpu():
        session = session_class(options_class(**options))
        session.run()
    forget_accelerate()
    return session


def logged(caplog: pytest.LogCaptureFixture, name: str) -> dict[int, float]:
    """Values of a number by step."""
    found = re.findall(rf"step (\d+): .*?{re.escape(name)} (\S+?)(?:,|$)", caplog.text, re.MULTILINE)
    return {int(step): float(value) for step, value in found}

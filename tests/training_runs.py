"""Training runs inside the tests' own process."""

import contextlib
import logging
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from safetensors.torch import load_file


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


def check_resumption(train, weights, options):
    """Trains with everything that has a state, at once and in two parts, and compares the weights bit by bit."""
    options = options | {"max_train_steps": 4, "checkpointing_steps": 2}
    options |= {"use_ema": True, "gradient_accumulation_steps": 2}
    train(**options)
    output_dir = Path(options["output_dir"])
    whole = load_file(output_dir / weights)
    shutil.rmtree(output_dir / "checkpoint-4")
    (output_dir / weights).unlink()
    train(**options, resume_from_checkpoint="latest")
    resumed = load_file(output_dir / weights)
    assert resumed.keys() == whole.keys()
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)

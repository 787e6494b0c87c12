"""Training runs inside the tests' own process."""

import contextlib
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState, GradientState, PartialState
from safetensors.torch import load_file

from svqvae_hf.trainer.options import RunOptions
from svqvae_hf.trainer.run import run_training


@contextlib.contextmanager
def cpu() -> Iterator[None]:
    os.environ["ACCELERATE_USE_CPU"] = "true"
    try:
        yield
    finally:
        del os.environ["ACCELERATE_USE_CPU"]


def forget_accelerate() -> None:
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def run(train: Callable[..., None], options_class: type[RunOptions], /, **options) -> None:
    """Runs a script to its end."""
    with cpu():
        run_training(train, options_class(**options))
    forget_accelerate()


def logged(caplog: pytest.LogCaptureFixture, name: str) -> dict[int, float]:
    """Logged values of a number by step."""
    found = re.findall(rf"step (\d+) of .*?: .*?{re.escape(name)} (\S+?)(?:,|$)", caplog.text, re.MULTILINE)
    return {int(step): float(value) for step, value in found}


def assert_no_private_path(folder: Path, repository: Path) -> None:
    """Asserts that no text of a repository holds the path of a folder of this machine."""
    texts = [path for path in repository.rglob("*.*") if path.suffix in (".md", ".yaml", ".json", ".txt")]
    assert not [path.name for path in texts if str(folder) in path.read_text()]


def train_at_once_and_resumed(train, weights, options):
    """Trains with everything that has a state, at once and in two parts, and returns the weights of both."""
    options = options | {"max_steps": 4, "save_steps": 2}
    options |= {"use_ema": True, "gradient_accumulation_steps": 2}
    train(**options)
    output_dir = Path(options["output_dir"])
    whole = load_file(output_dir / weights)
    shutil.rmtree(output_dir / "checkpoint-4")
    for name in (weights, "finished_run.json"):
        (output_dir / name).unlink()
    train(**options, resume_from_checkpoint="latest")
    return whole, load_file(output_dir / weights)

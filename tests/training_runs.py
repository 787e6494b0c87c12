"""Training runs inside the tests' own process."""

import contextlib
import os
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState, GradientState, PartialState
from processes import start
from safetensors.torch import load_file

from svqvae_hf.trainer.options import RunOptions
from svqvae_hf.trainer.run import run_training
from svqvae_hf.trainer.weights import Weights


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


def train_at_once_and_interrupted(train, options_class, options):
    """Trains with everything that has a state, at once and killed, stopped and resumed; returns both weights."""
    options = options | {"max_steps": 4, "save_steps": 2, "use_ema": True, "gradient_accumulation_steps": 2}
    output_dir, found = Path(options["output_dir"]), []
    for signals in ([], [signal.SIGKILL, signal.SIGTERM]):
        for number in signals:
            process = start(run_until_signal, number, train, options_class, options)
            process.join()
            assert process.exitcode == (128 + number if number == signal.SIGTERM else -number)
            options["resume_from_checkpoint"] = "latest"
        run(train, options_class, **options)
        found.append(load_file(output_dir / "transformer" / "diffusion_pytorch_model.safetensors"))
        shutil.rmtree(output_dir)
    return found


def run_until_signal(number, train, options_class, options):
    """Runs a script, and sends its process a signal before the third update."""

    def update_or_end(weights):
        if weights.lr_scheduler.last_epoch == 2:
            os.kill(os.getpid(), number)
        return update(weights)

    update, Weights.update = Weights.update, update_or_end
    run(train, options_class, **options)

"""Training runs inside the tests' own process."""

import contextlib
import dataclasses
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from accelerate.state import AcceleratorState, GradientState, PartialState
from safetensors.torch import load_file

from svqvae_hf.trainer.options import RunOptions
from svqvae_hf.trainer.run import Run


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


def run(main: Callable[[RunOptions], None], options_class: type[RunOptions], **options) -> None:
    """Runs the main function of a script to its end."""
    with cpu():
        main(options_class(**options))
    forget_accelerate()


def logged(caplog: pytest.LogCaptureFixture, name: str) -> dict[int, float]:
    """Logged values of a number by step."""
    found = re.findall(rf"step (\d+): .*?{re.escape(name)} (\S+?)(?:,|$)", caplog.text, re.MULTILINE)
    return {int(step): float(value) for step, value in found}


def assert_no_private_path(folder: Path, repository: Path) -> None:
    """Asserts that no text of a repository holds the path of a folder of this machine."""
    texts = [path for path in repository.rglob("*.*") if path.suffix in (".md", ".yaml", ".json", ".txt")]
    assert not [path.name for path in texts if str(folder) in path.read_text()]


NEW_RUN_OPTIONS = {
    **{"max_train_steps": 4, "learning_rate": 0.5, "lr_scheduler": "linear", "lr_warmup_steps": 3, "adam_beta1": 0.8},
    **{"adam_beta2": 0.7, "adam_weight_decay": 0.3, "max_grad_norm": 0.5, "max_skipped_steps": 3, "ema_decay": 0.5},
    **{"checkpointing_steps": 3, "checkpoints_total_limit": 1, "validation_steps": 3, "logging_steps": 1},
    **{"report_to": "tensorboard", "mixed_precision": "bf16", "license": "mit"},
}
# by a run without uploads and faults
UNREAD_OPTIONS = {"push_to_hub", "hub_model_id", "private", "max_unreadable_share"}


def train_at_once_and_resumed(train, weights, options):
    """Trains with everything that has a state, at once and in two parts, and returns the weights of both."""
    options = options | {"max_train_steps": 4, "checkpointing_steps": 2}
    options |= {"use_ema": True, "gradient_accumulation_steps": 2}
    train(**options)
    output_dir = Path(options["output_dir"])
    whole = load_file(output_dir / weights)
    shutil.rmtree(output_dir / "checkpoint-4")
    (output_dir / weights).unlink()
    train(**options, resume_from_checkpoint="latest")
    return whole, load_file(output_dir / weights)


def assert_resumed_run_reads_changed_options(
    monkeypatch: pytest.MonkeyPatch,
    main: Callable[[RunOptions], None],
    options_class: type[RunOptions],
    options: dict[str, Any],
    changes: dict[str, Any],
    unread: set[str],
) -> Run[Any]:
    """Asserts that a run resumed with each changeable option changed reads all of them, and returns the run.

    Args:
        monkeypatch: Patches for this test.
        main: Main function of the script.
        options_class: Options of the script.
        options: Options of the first two steps.
        changes: New value of every changeable option, except those in `unread`.
        unread: Changeable options that this run cannot read, for example because it must not download.
    """
    changeable = {each.name for each in dataclasses.fields(options_class) if "changeable" in each.metadata}
    assert changes.keys() | unread == changeable, "a changeable option needs a changed value here"
    run(main, options_class, **(options | {"max_train_steps": 2}))
    read, runs, start = set(), [], Run.start

    def note(self, name):
        if sys._getframe(1).f_globals["__name__"] != "dataclasses":
            read.add(name)
        return object.__getattribute__(self, name)

    def start_and_keep(self, *args):
        runs.append(self)
        start(self, *args)

    resumed = options_class(**(options | changes | {"resume_from_checkpoint": "latest"}))
    monkeypatch.setattr(options_class, "__getattribute__", note)
    monkeypatch.setattr(Run, "start", start_and_keep)
    with cpu():
        main(resumed)
    forget_accelerate()
    assert sorted(changes.keys() - read) == [], "changed on resume, but never read"
    assert runs[0].first_step == 2
    return runs[0]

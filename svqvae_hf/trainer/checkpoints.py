"""Checkpoints of a run, folders `checkpoint-N`: complete, or absent."""

import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError

RUN_STATE = "run_state.pt"
NAME = re.compile(r"checkpoint-\d+")


def find_checkpoint(output_dir: str | Path, wanted: str | None) -> Path | None:
    """Finds the checkpoint to resume from. Returns None for a new run in a folder without checkpoints.

    Args:
        output_dir (`str` or `Path`): Folder of the run.
        wanted (`str`, *optional*): A checkpoint folder, the name of one in `output_dir`, or `latest`.

    Raises:
        ValueError: If the checkpoint is absent, if `output_dir` has newer ones, or if it has some and none is wanted.
    """
    newest = max(_checkpoints(output_dir), key=checkpoint_step, default=None)
    if wanted is None and newest is not None:
        raise ValueError(
            f"A new run needs an `--output_dir` without checkpoints, but `{output_dir}` has {newest.name}. Resume it "
            "with `--resume_from_checkpoint latest`, or choose another folder."
        )
    if wanted in (None, "latest"):
        return newest
    for path in (Path(wanted), Path(output_dir, wanted)):
        if path.is_dir() and NAME.fullmatch(path.name):
            if newest is not None and checkpoint_step(path) < checkpoint_step(newest):
                raise ValueError(  # `latest` and the limit are by step
                    f"A run resumed from {path.name} needs an `--output_dir` without newer checkpoints, but "
                    f"`{output_dir}` has {newest.name}. Move the newer ones away, or choose another folder and name "
                    f"`{path}`."
                )
            return path
    raise ValueError(
        "`--resume_from_checkpoint` must be a checkpoint folder, the name of one in `--output_dir`, or 'latest', but "
        f"is {wanted!r}."
    )


def checkpoint_step(path: Path) -> int:
    """Steps done before a checkpoint was written."""
    return int(path.name.rsplit("-", 1)[1])


def save_checkpoint(
    accelerator: Accelerator,
    output_dir: str | Path,
    step: int,
    run_state: Mapping[str, Any],
    total_limit: int | None,
) -> None:
    """Writes a checkpoint under another name, renames it to `checkpoint-STEP`, and removes the oldest ones.

    All processes call it.

    Args:
        accelerator (`Accelerator`): Accelerator whose models, optimizers and random states are saved.
        output_dir (`str` or `Path`): Folder of the run, shared by all processes.
        step (`int`): Steps done.
        run_state (`Mapping`): Other state that is equal on all processes: tensors and plain values.
        total_limit (`int`, *optional*): Number of newest checkpoints to keep; all by default.

    Raises:
        OSError: If it cannot be written. There is no `checkpoint-STEP` then; a `.partial` may be left, which the next
            save of this step removes.
    """
    path = Path(output_dir, f"checkpoint-{step}")
    partial = path.with_name(path.name + ".partial")
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
    accelerator.wait_for_everyone()
    try:
        accelerator.save_state(str(partial))
        if accelerator.is_main_process:
            # Not accelerate's `register_for_checkpointing`, because it loads with `weights_only=False`.
            torch.save({**run_state, "num_processes": accelerator.num_processes}, partial / RUN_STATE)
    except (OSError, RuntimeError, SafetensorError) as error:  # a full disk is any of them
        shutil.rmtree(partial, ignore_errors=True)
        raise OSError(
            f"`{path}` cannot be written: {' '.join(str(error).split())}. Older ones are complete."
        ) from error
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        os.replace(partial, path)
        if total_limit is not None:
            for old in sorted(_checkpoints(output_dir), key=checkpoint_step)[:-total_limit]:
                shutil.rmtree(old)
    accelerator.wait_for_everyone()


def load_checkpoint(accelerator: Accelerator, path: Path, names: Iterable[str]) -> dict[str, Any]:
    """Loads models, optimizers and random states, and returns the run's state.

    Args:
        accelerator (`Accelerator`): Accelerator whose models, optimizers and random states are loaded.
        path (`Path`): Folder of the checkpoint.
        names (`Iterable[str]`): Names that the run's state must hold.

    Raises:
        ValueError: If it was written by another number of processes, or by a run with another network or without some
            parts of this run, or if it is damaged.
    """
    with _one_line_reason(path):
        run_state = torch.load(path / RUN_STATE, map_location="cpu", weights_only=True)
    if run_state["num_processes"] != accelerator.num_processes:
        raise ValueError(
            f"`{path}` must be resumed by as many processes as wrote it, {run_state['num_processes']}, but there are "
            f"{accelerator.num_processes}. Start as many, or start a new run from the model with "
            "`--pretrained_model_name_or_path`."
        )
    missing = sorted(set(names) - run_state.keys())
    if missing:
        raise ValueError(
            f"`{path}` must hold the state of all parts of the run, but lacks {', '.join(missing)}. Use the options "
            "of the run that wrote it, or start a new run from its model with `--pretrained_model_name_or_path`."
        )
    with _one_line_reason(path):
        accelerator.load_state(str(path))
    return dict(run_state)


@contextmanager
def _one_line_reason(path: Path) -> Iterator[None]:
    """Turns an error of reading a checkpoint into one line, with the first fault of many."""
    try:
        yield
    except Exception as error:  # damaged files raise errors of nearly any kind
        faults = [line.strip() for line in str(error).splitlines()] or [repr(error)]
        fault = faults[1] if faults[0].startswith("Error(s) in loading state_dict") else faults[0]
        raise ValueError(
            f"`{path}` must be a complete checkpoint of the same network and options, but cannot be loaded: "
            f"{fault.partition('. ')[0].rstrip('.')}. Use the options of the run that wrote it, or another checkpoint."
        ) from error


def _checkpoints(output_dir: str | Path) -> list[Path]:
    return [path for path in Path(output_dir).glob("checkpoint-*") if NAME.fullmatch(path.name)]

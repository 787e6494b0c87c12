"""Checkpoints of a run, folders `checkpoint-N`: complete, or absent. A run resumes from one exactly."""

import json
import os
import re
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from hashlib import file_digest
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.logging import get_logger
from safetensors import SafetensorError
from torch.distributed.checkpoint.stateful import Stateful
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from svqvae_files.folders import Folder
from svqvae_files.outputs import write_file
from svqvae_hf.trainer.interruption import Interruption
from svqvae_hf.trainer.options import RunOptions, public_values

RUN_STATE, CHECKSUMS = "run_state.pt", "checksums.json"
NAME = re.compile(r"checkpoint-\d+")

logger = get_logger(__name__, log_level="INFO")


class Checkpoints:
    """Resumes a run from a checkpoint, if there is one, and saves new ones.

    Args:
        options ([`RunOptions`]): Options.
        accelerator (`Accelerator`): Accelerator that prepared the models and optimizers.
        checkpoint (`Path`, *optional*): From [`find_checkpoint`].
        states (`Mapping[str, Stateful]`): Anything else with a state, equal on all processes.

    Attributes:
        first_step (`int`): Steps done before.

    Raises:
        ValueError: If the checkpoint is of a run with other options.
    """

    def __init__(
        self, options: RunOptions, accelerator: Accelerator, checkpoint: Path | None, states: Mapping[str, Stateful]
    ):
        self.options, self.accelerator, self.states = options, accelerator, states
        self.first_step = 0
        if checkpoint is not None:
            saved = load_checkpoint(accelerator, checkpoint, states, options.optimizer)
            for name, holder in states.items():
                holder.load_state_dict(saved[name])
            self.first_step = checkpoint_step(checkpoint)
            logger.info(f"Resumed from {checkpoint}")
            old, new = saved["options"], public_values(asdict(options))
            for name in sorted(new.keys() & old.keys() - {"resume_from_checkpoint", "output_dir"}):
                if new[name] != old[name]:
                    logger.info(f"Changed on resume: --{name} from {old[name]} to {new[name]}")

    def steps(self) -> Iterator[int]:
        """Yields the number of each remaining step. After a step, saves a checkpoint if one is due.

        Raises:
            SystemExit: After a signal, once a checkpoint is saved.
        """
        options, accelerator = self.options, self.accelerator
        on_terminal = accelerator.is_local_main_process and sys.stderr.isatty()
        steps = range(self.first_step, options.max_steps)
        bar = tqdm(steps, initial=self.first_step, total=options.max_steps, unit="step", disable=not on_terminal)
        with logging_redirect_tqdm(), Interruption(accelerator) as interruption:
            for step in bar:
                yield step
                steps_done = step + 1
                interrupted = interruption.requested()
                due = steps_done % options.save_steps == 0 or steps_done == options.max_steps
                if due or interrupted:
                    state: dict[str, Any] = {name: holder.state_dict() for name, holder in self.states.items()}
                    state["options"] = public_values(asdict(options))
                    save_checkpoint(accelerator, options.output_dir, steps_done, state, options.save_total_limit)
                if interrupted:
                    logger.info(f"Stopped by a signal at step {steps_done}. Resume: --resume_from_checkpoint latest.")
                    sys.exit(interruption.exit_code)


def find_checkpoint(output_dir: str | Path, wanted: str | None, steps: int) -> Path | None:
    """Finds the checkpoint to resume from. Returns None for a new run in a folder without checkpoints.

    Args:
        output_dir (`str` or `Path`): Folder of the run.
        wanted (`str`, *optional*): A checkpoint folder, the name of one in `output_dir`, or `latest`.
        steps (`int`): Steps of the run.

    Raises:
        ValueError: If the checkpoint is absent or has more steps, if `output_dir` has newer ones, or if it has some
            and none is wanted.
    """
    newest = max(_checkpoints(output_dir), key=checkpoint_step, default=None)
    if wanted is None and newest is not None:
        raise ValueError(
            f"A new run needs an `--output_dir` without checkpoints, but `{output_dir}` has {newest.name}. Resume it "
            "with `--resume_from_checkpoint latest`, or choose another folder."
        )
    found = newest
    if wanted not in (None, "latest"):
        paths = Path(wanted), Path(output_dir, wanted)
        found = next((path for path in paths if path.is_dir() and NAME.fullmatch(path.name)), None)
        if found is None:
            raise ValueError(f"`--resume_from_checkpoint` must be a folder, its name, or 'latest', got {wanted!r}.")
    if found is not None and newest is not None and checkpoint_step(found) < checkpoint_step(newest):
        raise ValueError(  # `latest` and the limit are by step
            f"A run resumed from {found.name} needs an `--output_dir` without newer checkpoints, but `{output_dir}` "
            f"has {newest.name}. Move the newer ones away, or choose another folder and name `{found}`."
        )
    if found is not None and checkpoint_step(found) > steps:
        raise ValueError(f"`--max_steps` must be at least {checkpoint_step(found)}, as in `{found}`, got {steps}.")
    return found


def checkpoint_step(path: Path) -> int:
    """Steps done before a checkpoint was written."""
    return int(path.name.rsplit("-", 1)[1])


def save_checkpoint(
    accelerator: Accelerator, output_dir: str | Path, step: int, run_state: Mapping[str, Any], total_limit: int | None
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
            torch.save(dict(run_state), partial / RUN_STATE)
        write_checksums(partial)
    except (OSError, RuntimeError, SafetensorError) as error:  # a full disk is any of them
        shutil.rmtree(partial, ignore_errors=True)
        raise OSError(f"`{path}` cannot be written: {' '.join(str(error).split())}. Older ones are intact.") from error
    if accelerator.is_main_process:
        os.replace(partial, path)
        if total_limit is not None:
            for old in sorted(_checkpoints(output_dir), key=checkpoint_step)[:-total_limit]:
                shutil.rmtree(old)
    accelerator.wait_for_everyone()


def load_checkpoint(accelerator: Accelerator, path: Path, names: Iterable[str], optimizer: str) -> dict[str, Any]:
    """Loads models, optimizers and random states, and returns the run's state.

    Args:
        accelerator (`Accelerator`): Accelerator whose models, optimizers and random states are loaded.
        path (`Path`): Folder of the checkpoint.
        names (`Iterable[str]`): Names that the run's state must hold.
        optimizer (`str`): Optimizer of this run.

    Raises:
        ValueError: If it was written by a run with another network or optimizer, or without some parts of this run,
            or if it is damaged.
    """
    with _one_line_reason(path):
        check_files(path)
        run_state = torch.load(path / RUN_STATE, map_location="cpu", weights_only=True)
    missing = sorted(set(names) - run_state.keys())
    if missing:
        raise ValueError(
            f"`{path}` must hold the state of all parts of the run, but lacks {', '.join(missing)}. Use the options "
            "of the run that wrote it, or start a new run from its model with `--pretrained_model_name_or_path`."
        )
    if (old := run_state["options"]["optimizer"]) != optimizer:
        raise ValueError(f"`--optimizer` must be {old} as in `{path}`, got {optimizer}.")
    with _one_line_reason(path):
        accelerator.load_state(str(path))
        accelerator.step = 0  # of accumulated batches, which a checkpoint has none of
    return dict(run_state)


def write_checksums(checkpoint: Path) -> None:
    """Records the SHA-256 of each file of a checkpoint in it, once all processes have written theirs. All call it."""
    state = PartialState()
    state.wait_for_everyone()
    if state.is_main_process:
        write_file(checkpoint / CHECKSUMS, json.dumps(_checksums(checkpoint)).encode())


def check_files(checkpoint: Path) -> None:
    """Raises ValueError if a file of a checkpoint is not as it was written. Older checkpoints are not checked."""
    recorded = Folder(checkpoint).read_json(CHECKSUMS)
    found = {} if recorded is None else _checksums(checkpoint)
    if damaged := [name for name, checksum in (recorded or {}).items() if found.get(name) != checksum]:
        raise ValueError(f"`{checkpoint / damaged[0]}` is missing or damaged")


def _checksums(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != CHECKSUMS)
    found = {}
    for path in files:
        with path.open("rb") as file:
            found[path.relative_to(folder).as_posix()] = file_digest(file, "sha256").hexdigest()
    return found


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

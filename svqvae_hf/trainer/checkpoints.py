"""Checkpoints of a run, folders `checkpoint-N`: complete, or absent. A run resumes from one exactly."""

import json
import os
import re
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.logging import get_logger
from torch.distributed.checkpoint.stateful import Stateful
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from svqvae_files.identity import output_identity
from svqvae_files.json_files import read_json_object
from svqvae_files.outputs import write_file
from svqvae_hf.trainer.data.sample_order import check_same
from svqvae_hf.trainer.disk import WRITE_ERRORS, write_fault
from svqvae_hf.trainer.identity import RunIdentity, changed_names, check_sources
from svqvae_hf.trainer.interruption import Interruption, stop_message
from svqvae_hf.trainer.options import RunOptions

RUN_STATE = "run_state.pt"
STEP = "step"  # in that file
IDENTITY = "run_identity.json"
CHECKSUMS = "checksums.json"
VALIDATION = "validation_"  # start of the names of options whose sets are measured, and not trained on
# Decide which weights and states a checkpoint holds, or what the images of its set are labelled with.
FIXED_OPTIONS = ("optimizer", "optim", "optim_args", "optim_target_modules", "lora_rank", "label_column")
NAME = re.compile(r"checkpoint-\d+")

logger = get_logger(__name__, log_level="INFO")


class Checkpoints:
    """Resumes a run from a checkpoint, if there is one, and saves new ones.

    Args:
        options ([`RunOptions`]): Options.
        accelerator (`Accelerator`): Accelerator that prepared the models and optimizers.
        checkpoint (`Path`, *optional*): From [`find_checkpoint`].
        states (`Mapping[str, Stateful]`): Anything else with a state, equal on all processes.
        identity ([`~svqvae_hf.trainer.identity.RunIdentity`]): What the run is made from.

    Attributes:
        first_step (`int`): Steps done before.

    Raises:
        ValueError: If the checkpoint is damaged, or of a run with other parts.
    """

    def __init__(
        self,
        options: RunOptions,
        accelerator: Accelerator,
        checkpoint: Path | None,
        states: Mapping[str, Stateful],
        identity: RunIdentity,
    ):
        self.options = options
        self.accelerator = accelerator
        self.states = states
        self.identity = identity
        self.interruption = Interruption(accelerator)
        self.first_step = 0
        if checkpoint is not None:
            self.first_step = checkpoint_step(checkpoint)
            self._resume(checkpoint)

    def _resume(self, checkpoint: Path) -> None:
        """Loads models, optimizers and all other states."""
        run_state = load_checkpoint(self.accelerator, checkpoint, [STEP, *self.states])
        check_step(checkpoint, run_state[STEP])
        for name, holder in self.states.items():
            holder.load_state_dict(run_state[name])
        logger.info(f"Resumed from {checkpoint}")

    def steps(self) -> Iterator[int]:
        """Yields the number of each remaining step, with a progress bar on a terminal.

        During the steps, a signal does not end the process. [`after`] saves a checkpoint and ends it.
        """
        max_steps = self.options.max_steps
        remaining_steps = range(self.first_step, max_steps)
        is_on_terminal = self.accelerator.is_local_main_process and sys.stderr.isatty()
        bar = tqdm(remaining_steps, initial=self.first_step, total=max_steps, unit="step", disable=not is_on_terminal)
        with logging_redirect_tqdm(), self.interruption:
            yield from bar

    def after(self, step: int) -> None:
        """Saves a checkpoint if one is due after a step, or if a signal came. All processes call it.

        Raises:
            SystemExit: After a signal, once the checkpoint is saved.
        """
        steps_done = step + 1
        is_last = steps_done == self.options.max_steps
        is_due = is_last or steps_done % self.options.save_steps == 0
        is_interrupted = self.interruption.requested()
        if is_due or is_interrupted:
            self._save(steps_done)
        if is_interrupted:
            logger.info(stop_message(steps_done, self.options.resume_from_checkpoint))
            sys.exit(self.interruption.exit_code)

    def _save(self, steps_done: int) -> None:
        """Saves models, optimizers and all other states."""
        run_state: dict[str, Any] = {name: holder.state_dict() for name, holder in self.states.items()}
        run_state[STEP] = steps_done
        save_checkpoint(
            self.accelerator,
            self.options.output_dir,
            steps_done,
            run_state,
            self.options.save_total_limit,
            self.identity,
        )


# Finding


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
    if wanted is None:
        _check_no_checkpoint(output_dir, newest)
        return None
    checkpoint = newest if wanted == "latest" else _find_named(output_dir, wanted)
    if checkpoint is None:
        return None
    if newest is not None:
        _check_not_newer(output_dir, newest, checkpoint)
    steps_done = checkpoint_step(checkpoint)
    if steps_done > steps:
        raise ValueError(f"`--max_steps` must be at least {steps_done}, as in `{checkpoint}`, got {steps}.")
    return checkpoint


def check_unchanged(output_dir: Path, checkpoint: Path | None, checkpoint_now: Path | None) -> None:
    """Raises ValueError if another run has saved a checkpoint before this run locked the folder."""
    if checkpoint_now != checkpoint:
        raise ValueError(
            f"Another run has saved a checkpoint to `{output_dir}` since this one started. Start it again."
        )


def _check_no_checkpoint(output_dir: str | Path, newest: Path | None) -> None:
    """Raises ValueError if the folder of a new run has a checkpoint."""
    if newest is not None:
        raise ValueError(
            f"A new run needs an `--output_dir` without checkpoints, but `{output_dir}` has {newest.name}. Resume "
            "it with `--resume_from_checkpoint latest`, or choose another folder."
        )


def _check_not_newer(output_dir: str | Path, newest: Path, checkpoint: Path) -> None:
    """Raises ValueError if the folder of a run has checkpoints of more steps than the one that it resumes from.

    An earlier run has left them. They would count as newer than those that this run saves. So `latest` would later
    resume the earlier run, and `--save_total_limit` would delete the checkpoints of this one.
    """
    if checkpoint_step(newest) > checkpoint_step(checkpoint):
        raise ValueError(
            f"A run resumed from {checkpoint.name} needs an `--output_dir` without newer checkpoints, but "
            f"`{output_dir}` has {newest.name}. Move the newer ones away, or choose another folder and name "
            f"`{checkpoint}`."
        )


def _find_named(output_dir: str | Path, name: str) -> Path:
    """Finds a checkpoint by its path, or by its name in the folder of the run."""
    for path in (Path(name), Path(output_dir, name)):
        if path.is_dir() and NAME.fullmatch(path.name):
            return path
    raise ValueError(f"`--resume_from_checkpoint` must be a folder, its name, or 'latest', got {name!r}.")


def _checkpoints(output_dir: str | Path) -> list[Path]:
    """Complete checkpoints in the folder of a run, in any order."""
    return [path for path in Path(output_dir).glob("checkpoint-*") if NAME.fullmatch(path.name)]


def checkpoint_step(path: Path) -> int:
    """Steps done before a checkpoint was written, from its name."""
    return int(path.name.rpartition("-")[2])


def check_step(checkpoint: Path, step: int) -> None:
    """Raises ValueError if a checkpoint was renamed, because its name says how many steps are done."""
    if step != checkpoint_step(checkpoint):
        raise ValueError(f"`{checkpoint}` must be called checkpoint-{step}, as when it was written. Rename it.")


def check_resumable(checkpoint: Path, identity: RunIdentity) -> None:
    """Compares a run with its checkpoint, and logs which options have changed.

    Other validation sets are allowed: they change no weight. Runs that compare validations check them on their own.

    Args:
        checkpoint (`Path`): Folder of the checkpoint.
        identity ([`~svqvae_hf.trainer.identity.RunIdentity`]): What this run is made from.

    Raises:
        ValueError: If the checkpoint is damaged, or was made from other models or sets, or with other parts.
    """
    with _one_line_reason(checkpoint):
        check_files(checkpoint)
        recorded = RunIdentity.from_file(checkpoint / IDENTITY)
    for change in compare_with_checkpoint(checkpoint, recorded, identity):
        logger.info(change)


def compare_with_checkpoint(checkpoint: Path, recorded: RunIdentity, identity: RunIdentity) -> list[str]:
    """Compares a run with the one that wrote its checkpoint, and returns a line for each option that has changed.

    Args:
        checkpoint (`Path`): Folder of the checkpoint.
        recorded ([`~svqvae_hf.trainer.identity.RunIdentity`]): What the checkpoint was made from.
        identity ([`~svqvae_hf.trainer.identity.RunIdentity`]): What this run is made from.

    Raises:
        ValueError: If the checkpoint was made from other models or sets, with examples in another order, or with
            other parts.
    """
    check_sources(checkpoint, recorded.models, identity.models)
    check_sources(checkpoint, _training_sets(recorded), _training_sets(identity))
    _check_same_order(recorded, identity)
    # A checkpoint holds a record of its options, which leaves out those that do not change the result, such as
    # `output_dir`. The options of this run are compared in the form that such a record gives them.
    recorded_options = recorded.options
    options = identity.to_record()["options"]
    changes = []
    for name in changed_names(recorded_options, options):
        before = recorded_options.get(name)
        now = options.get(name)
        if name in FIXED_OPTIONS:
            raise ValueError(f"`--{name}` must be {before} as in `{checkpoint}`, got {now}.")
        changes.append(f"Changed on resume: --{name} from {before} to {now}")
    return changes


def _check_same_order(recorded: RunIdentity, identity: RunIdentity) -> None:
    """Raises ValueError if a setting that decides the order of the examples has changed, such as the seed."""
    recorded_settings = recorded.order
    settings = identity.order
    for name in changed_names(recorded_settings, settings):
        check_same(name, recorded_settings.get(name), settings.get(name))


def _training_sets(identity: RunIdentity) -> dict[str, str]:
    """Digests of the sets that a run is trained on, without those that are only measured."""
    return {name: digest for name, digest in identity.sets.items() if not name.startswith(VALIDATION)}


# Saving


def save_checkpoint(
    accelerator: Accelerator,
    output_dir: str | Path,
    step: int,
    run_state: Mapping[str, Any],
    total_limit: int | None,
    identity: RunIdentity,
) -> None:
    """Writes a checkpoint under another name, renames it to `checkpoint-STEP`, and removes the oldest ones.

    All processes call it.

    Args:
        accelerator (`Accelerator`): Accelerator whose models, optimizers and random states are saved.
        output_dir (`str` or `Path`): Folder of the run, shared by all processes.
        step (`int`): Steps done.
        run_state (`Mapping`): Other state that is equal on all processes: tensors and plain values.
        total_limit (`int`, *optional*): Number of newest checkpoints to keep; all by default.
        identity ([`~svqvae_hf.trainer.identity.RunIdentity`]): What the run is made from.

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
            write_file(partial / IDENTITY, json.dumps(identity.to_record()).encode())
        write_checksums(partial)  # waits for the files of all processes; then only the main process writes
    except WRITE_ERRORS as error:
        reason = write_fault(path.parent, error)
        shutil.rmtree(partial, ignore_errors=True)
        raise OSError(f"`{path}` cannot be written: {reason}. Older checkpoints are intact.") from error
    if accelerator.is_main_process:
        os.replace(partial, path)
        if total_limit is not None:
            _remove_oldest(output_dir, total_limit)
    accelerator.wait_for_everyone()


def _remove_oldest(output_dir: str | Path, total_limit: int) -> None:
    """Removes all checkpoints but the newest `total_limit`, and what a killed run has left of others."""
    oldest_first = sorted(_checkpoints(output_dir), key=checkpoint_step)
    for checkpoint in oldest_first[:-total_limit]:
        # Renamed first, so that a run that reads it finds all of its files, or that it is gone.
        os.replace(checkpoint, checkpoint.with_name(checkpoint.name + ".partial"))
    for partial in Path(output_dir).glob("checkpoint-*.partial"):
        shutil.rmtree(partial)


def write_checksums(checkpoint: Path) -> None:
    """Records the SHA-256 of each file of a checkpoint in it, once all processes have written theirs. All call it."""
    processes = PartialState()
    processes.wait_for_everyone()
    if processes.is_main_process:
        text = json.dumps(_checksums(checkpoint))
        write_file(checkpoint / CHECKSUMS, text.encode())


# Loading


def load_checkpoint(accelerator: Accelerator, path: Path, names: Iterable[str]) -> dict[str, Any]:
    """Loads models, optimizers and random states, and returns the run's state.

    Args:
        accelerator (`Accelerator`): Accelerator whose models, optimizers and random states are loaded.
        path (`Path`): Folder of the checkpoint, from [`check_resumable`].
        names (`Iterable[str]`): Names that the run's state must hold.

    Raises:
        ValueError: If it was written by a run with another network, or without some parts of this run, or if it
            cannot be read.
    """
    with _one_line_reason(path):
        run_state = torch.load(path / RUN_STATE, map_location="cpu", weights_only=True)
    missing = sorted(set(names) - run_state.keys())
    if missing:
        raise ValueError(
            f"`{path}` must hold the state of all parts of the run, but lacks {', '.join(missing)}. Use the options "
            "of the run that wrote it, or start a new run from its model with `--pretrained_model_name_or_path`."
        )
    with _one_line_reason(path):
        accelerator.load_state(str(path))
        accelerator.step = 0  # no batches are accumulated, because a checkpoint is written between steps
    return dict(run_state)


def check_files(checkpoint: Path) -> None:
    """Raises ValueError if a file of a checkpoint is not as it was written.

    A checkpoint without checksums passes: transformers' `Trainer` leaves one if its run is killed just before they are
    written.
    """
    if not (checkpoint / CHECKSUMS).exists():
        return
    recorded_checksums = read_json_object(checkpoint / CHECKSUMS)
    checksums = _checksums(checkpoint)
    for name, recorded_checksum in recorded_checksums.items():
        if checksums.get(name) != recorded_checksum:
            raise ValueError(f"`{checkpoint / name}` is missing or damaged")


def _checksums(folder: Path) -> dict[str, str]:
    """SHA-256 of each file of a checkpoint, by its path in the folder."""
    checksums = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != CHECKSUMS:
            checksums[path.relative_to(folder).as_posix()] = output_identity(path).checksum
    return checksums


# Errors


@contextmanager
def _one_line_reason(path: Path) -> Iterator[None]:
    """Turns an error of reading a checkpoint into one line, with the first fault of many."""
    try:
        yield
    except Exception as error:  # damaged files raise errors of nearly any kind
        if not path.exists():
            raise ValueError(f"Another run has deleted `{path}` since this one started. Start it again.") from error
        raise ValueError(
            f"`{path}` must be a complete checkpoint of the same network and options, but cannot be loaded: "
            f"{_first_fault(error)}. Use the options of the run that wrote it, or another checkpoint."
        ) from error


def _first_fault(error: Exception) -> str:
    """First sentence of an error. PyTorch's errors of state dicts have a heading above it."""
    lines = str(error).splitlines()
    if not lines:
        return repr(error).rstrip(".")
    has_heading = lines[0].strip().startswith("Error(s) in loading state_dict")
    if has_heading and len(lines) > 1:
        line = lines[1].strip()
    else:
        line = lines[0].strip()
    first_sentence, _, _ = line.partition(". ")
    return first_sentence.rstrip(".")

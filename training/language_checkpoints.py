"""Checkpoints of transformers' `Trainer`: which are complete, what they are made from, and when one is saved."""

import shutil
import sys
import time
from pathlib import Path
from typing import Any

from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from svqvae_files.json_files import read_json_object
from svqvae_hf.trainer.checkpoints import CHECKSUMS, NAME, RUN_STATE, check_step, write_checksums
from svqvae_hf.trainer.identity import RunIdentity
from svqvae_hf.trainer.interruption import Interruption
from svqvae_hf.trainer.log import describe_time
from svqvae_hf.trainer.optimization import hyperparameters, resume_schedule

TRAINER_STATE = "trainer_state.json"  # in a checkpoint, written last
BEST_CHECKPOINT = "best_model_checkpoint"  # in that file: path of the best checkpoint when it was written
# Settings of an optimizer that come from options. A checkpoint brings other settings, such as counts of steps.
OPTIMIZER_OPTIONS = ("initial_lr", "betas", "eps", "weight_decay")
PARTIAL = "partial-"  # start of the names of checkpoints that a killed run left unfinished


def set_aside_partial_checkpoints(output_dir: Path) -> None:
    """Renames checkpoints that a killed run left unfinished, so that none is resumed or counted."""
    for folder in output_dir.glob("checkpoint-*"):
        if NAME.fullmatch(folder.name) is None:
            continue
        if not _is_complete(folder):
            new_folder = output_dir / f"{PARTIAL}{folder.name}"
            shutil.rmtree(new_folder, ignore_errors=True)
            folder.rename(new_folder)


def delete_partial_checkpoints(output_dir: Path) -> None:
    """Deletes the checkpoints that [`set_aside_partial_checkpoints`] has renamed."""
    for folder in output_dir.glob(f"{PARTIAL}checkpoint-*"):
        if NAME.fullmatch(folder.name.removeprefix(PARTIAL)):
            shutil.rmtree(folder)


def _is_complete(checkpoint: Path) -> bool:
    """Whether a checkpoint has the file that its writer saves last.

    Checkpoints of other scripts have `RUN_STATE`. Those of transformers' `Trainer` have `CHECKSUMS`, or only a whole
    `TRAINER_STATE` if the run was killed before it added the checksums.
    """
    if (checkpoint / RUN_STATE).exists() or (checkpoint / CHECKSUMS).exists():
        return True
    if not (checkpoint / TRAINER_STATE).exists():
        return False
    try:
        read_json_object(checkpoint / TRAINER_STATE)
    except ValueError:  # the run was killed while writing it
        return False
    return True


def read_identity(checkpoint: Path) -> RunIdentity:
    """Reads what a checkpoint was made from, as [`CheckpointOnSignal`] recorded it.

    Raises:
        ValueError: The checkpoint is damaged or was renamed, or another script wrote it.
    """
    path = checkpoint / TRAINER_STATE
    state = read_json_object(path)
    check_step(checkpoint, state.get("global_step", 0))
    callbacks = state.get("stateful_callbacks", {})
    if CheckpointOnSignal.__name__ not in callbacks:
        raise ValueError(f"`{checkpoint}` must be a checkpoint of this script, but was written by another one.")
    return RunIdentity.from_record(callbacks[CheckpointOnSignal.__name__].get("attributes", {}), path)


def find_best_checkpoint(checkpoint: Path) -> Path | None:
    """Finds the best checkpoint of the run that wrote a checkpoint; `None` if it had none yet.

    Checkpoints record its path. If the folder of the run was moved, the best one lies beside the others all the same.

    Raises:
        ValueError: The best checkpoint is gone.
    """
    recorded = read_json_object(checkpoint / TRAINER_STATE).get(BEST_CHECKPOINT)
    if recorded is None:
        return None
    recorded_path = Path(recorded)
    for path in (checkpoint.with_name(recorded_path.name), recorded_path):
        if path.is_dir():
            return path
    raise ValueError(
        f"`--load_best_model_at_end` needs the best checkpoint of the run, {recorded_path.name}, but it is not beside "
        f"`{checkpoint}`. Put it back, or leave the option out."
    )


class CheckpointOnSignal(TrainerCallback, ExportableState):
    """Saves a checkpoint and stops after SIGTERM or Ctrl-C. Checkpoints record what the run is made from.

    It replaces transformers' `enable_jit_checkpoint`, which waits 3 seconds, lets each process decide for itself and
    does not know Ctrl-C.

    Args:
        interruption ([`Interruption`]): Signals of the run.
        identity ([`~svqvae_hf.trainer.identity.RunIdentity`]): What the run is made from.
    """

    def __init__(self, interruption: Interruption, identity: RunIdentity):
        self.interruption = interruption
        self.identity = identity
        self.stopped = False

    def state(self) -> dict[str, dict[str, Any]]:
        """Record of the run that a checkpoint stores."""
        return {"args": {}, "attributes": self.identity.to_record()}

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Adds checksums to a checkpoint."""
        write_checksums(Path(args.output_dir, f"checkpoint-{state.global_step}"))

    def on_step_end(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        """Requests a checkpoint and the end, if any process got a signal."""
        if self.interruption.requested():
            control.should_save = True
            control.should_training_stop = True
            self.stopped = True
            args.save_total_limit = None  # otherwise the Trainer deletes this checkpoint, unless it is the best


class OptionsOnResume(TrainerCallback):
    """Sets the optimizer and the best checkpoint of a resumed run, because the checkpoint brought older ones.

    Args:
        best_checkpoint (`Path`, *optional*): Best checkpoint of the run so far.
    """

    def __init__(self, best_checkpoint: Path | None = None):
        self.best_checkpoint = best_checkpoint
        # Options of each group of parameters of the optimizer, such as `[{"initial_lr": 1e-4, "weight_decay": 0.1}]`.
        # None until `remember` is called.
        self.remembered_options: list[dict[str, Any]] | None = None

    def remember(self, scheduler: LambdaLR) -> None:
        """Remembers the options of a new optimizer, by its schedule, before a checkpoint replaces them."""
        self.remembered_options = []
        for settings in hyperparameters(scheduler):
            options = {name: settings[name] for name in OPTIMIZER_OPTIONS if name in settings}
            self.remembered_options.append(options)

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Restores the options of the optimizer, and sets the best checkpoint, after a checkpoint was loaded.

        The Trainer loads the optimizer from the checkpoint, with the learning rate and other options of the run that
        wrote it. The user may have changed them for this run.
        """
        is_resumed = state.global_step > 0
        if is_resumed:
            if state.is_world_process_zero:
                print(f"Resumed from checkpoint-{state.global_step}", file=sys.stderr)
            self._restore_options(kwargs["lr_scheduler"], state.global_step)
            self._set_best_checkpoint(state)

    def _restore_options(self, scheduler: LambdaLR, steps_done: int) -> None:
        """Sets the optimizer and its schedule to the options that [`remember`] has stored.

        A schedule of another class than `LambdaLR`, such as `reduce_lr_on_plateau`, is not remembered. The optimizer
        then goes on with the options from the checkpoint.
        """
        if self.remembered_options is not None:
            resume_schedule(scheduler, steps_done, self.remembered_options)

    def _set_best_checkpoint(self, state: TrainerState) -> None:
        """Sets the path of the best checkpoint, which may differ from the recorded path if the run was moved."""
        if self.best_checkpoint is not None:
            state.best_model_checkpoint = str(self.best_checkpoint)


class ProgressLines(TrainerCallback):
    """Prints the numbers of the log as lines, with the step and the time left, where there is no progress bar."""

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Starts the clock."""
        self.start_time = time.monotonic()
        self.first_step = state.global_step

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
        """Prints a line."""
        if not state.is_world_process_zero:
            return
        texts = []
        for name, value in logs.items():
            if name == "total_flos":
                continue
            text = f"{value:.4g}" if isinstance(value, float) else str(value)
            texts.append(f"{name} {text}")
        elapsed = time.monotonic() - self.start_time
        times = describe_time(elapsed, state.global_step - self.first_step, state.max_steps - state.global_step)
        line = f"step {state.global_step} of {state.max_steps} ({times}): {', '.join(texts)}"
        print(line, flush=True)  # otherwise, a log file would get it only minutes later

"""Checkpoints of transformers' `Trainer`: which are complete, what they are made from, and when one is saved."""

import shutil
from pathlib import Path
from typing import Any

from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from svqvae_files.json_files import read_json_object
from svqvae_hf.trainer.checkpoints import CHECKSUMS, NAME, RUN_STATE, check_step, write_checksums
from svqvae_hf.trainer.identity import RunIdentity
from svqvae_hf.trainer.interruption import Interruption
from svqvae_hf.trainer.optimization import hyperparameters, resume_schedule

TRAINER_STATE = "trainer_state.json"  # in a checkpoint, written last
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
    """Whether a checkpoint has the file that its writer saves last: this script's, or another one's."""
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

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Sets the hyperparameters of a resumed run to its own options, because the checkpoint brought older ones."""
        scheduler = kwargs["lr_scheduler"]
        is_resumed = state.global_step > 0
        if not is_resumed or not isinstance(scheduler, LambdaLR):
            return
        # Copies, of the weights that decay and of the others; transformers and Muon have this order.
        decayed_group, other_group = hyperparameters(scheduler)
        decayed_group["weight_decay"] = args.weight_decay
        other_group["weight_decay"] = 0.0
        groups = [decayed_group, other_group]
        for group in groups:
            group["initial_lr"] = args.learning_rate
            group["betas"] = (args.adam_beta1, args.adam_beta2)
        resume_schedule(scheduler, state.global_step, groups)

    def on_step_end(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        """Requests a checkpoint and the end, if any process got a signal."""
        if self.interruption.requested():
            control.should_save = True
            control.should_training_stop = True
            self.stopped = True
            args.save_total_limit = None  # otherwise the Trainer deletes this checkpoint, unless it is the best

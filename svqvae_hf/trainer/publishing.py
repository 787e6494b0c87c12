"""The result of a run: its folder, its repository on the Hub, and the record that it is finished."""

import json
import shutil
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from accelerate.logging import get_logger

from svqvae_files.outputs import write_file
from svqvae_hf.hub.origin import STARTED_FROM, Origin, find_origin
from svqvae_hf.hub.repositories import prepare_repo, push_folder
from svqvae_hf.trainer.disk import WRITE_ERRORS, write_fault
from svqvae_hf.trainer.identity import RunIdentity, changed_names, check_sources

OPTIONS, FINISHED = "train_config.yaml", "finished_run.json"
UNPUBLISHED = (
    "result.partial"  # folder of a result that is being saved; a killed run leaves it, and the next deletes it
)
BASES = ("pretrained_model", "model", "pipeline")  # in the names of options, for what is trained further
SETS = ("token_set", "dataset_name", "train_data_dir", "mix_data_dir")

logger = get_logger(__name__, log_level="INFO")


class Result:
    """Result of a run, in its output folder and, with `--push_to_hub`, on the Hub.

    Makes the repository and writes `train_config.yaml` before the first step, so that an error comes first.

    Args:
        options ([`RunOptions`] or `TrainingArguments`): Options of the folder and of the repository.
        identity ([`~svqvae_hf.trainer.identity.RunIdentity`]): What the run is made from.
        origin ([`~svqvae_hf.hub.origin.Origin`]): Licence and sources of the weights.
        push_to_hub (`bool`): Whether the result is uploaded.
        is_main (`bool`): Whether this process publishes.

    Raises:
        OSError: If the repository cannot be made.
    """

    def __init__(self, options: Any, identity: RunIdentity, origin: Origin, push_to_hub: bool, is_main: bool):
        self.identity = identity
        self.origin = origin
        self.push_to_hub = push_to_hub
        self.output_dir = Path(options.output_dir)
        self.name = options.hub_model_id or self.output_dir.absolute().name
        if is_main:
            if push_to_hub:
                self.name = prepare_repo(self.name, private=options.hub_private_repo or None, license=origin.license)
            self.output_dir.mkdir(parents=True, exist_ok=True)
            listed = yaml.safe_dump(identity.options, sort_keys=False)
            write_file(self.output_dir / OPTIONS, listed.encode())

    def publish(self, save_pretrained: Callable[..., Any], card: str) -> None:
        """Saves the result with its card in the output folder, and uploads it with `--push_to_hub`.

        Only the main process calls it. Existing files are replaced one by one, weights before their config.

        Args:
            save_pretrained (`Callable`): Writes the result into an empty folder.
            card (`str`): Text of README.md.

        Raises:
            OSError: If it cannot be written or uploaded.
        """
        folder = self.output_dir / UNPUBLISHED
        shutil.rmtree(folder, ignore_errors=True)
        try:
            folder.mkdir()
            save_pretrained(folder)
        except WRITE_ERRORS as error:
            reason = write_fault(self.output_dir, error)
            shutil.rmtree(folder, ignore_errors=True)
            raise OSError(
                f"The result cannot be written to `{self.output_dir}`: {reason}. Checkpoints are intact. Resume the "
                "run with `--resume_from_checkpoint latest`."
            ) from error
        saved = move_files(folder, self.output_dir)
        shutil.rmtree(folder)
        write_file(self.output_dir / "README.md", card.encode())
        logger.info(f"Saved to {self.output_dir}")
        if self.push_to_hub:
            files = [*saved, "README.md", "samples/*.png", OPTIONS]
            push_folder(self.output_dir, self.name, "Upload the trained model", files=files)
        record = json.dumps(self.identity.to_record(), indent=2)
        write_file(self.output_dir / FINISHED, record.encode())  # the run is finished


def find_sources(options: Any) -> Origin:
    """Licence and sources of a run's result. Its licence is the option's or, by default, its sources'.

    Raises:
        ValueError: If sources have different licences and none is given.
    """
    models = {}
    sets = {}
    for name, source in vars(options).items():
        role, is_model, _ = name.partition("_name_or_path")
        if name in SETS:
            sets[name.replace("_", " ")] = source
        elif is_model and source is not None and role != "model_config":
            row = STARTED_FROM if role in BASES else role.replace("_", " ")
            models[row] = source
    return find_origin(models, sets, options.license)


def provenance(script: str, steps: int, batch: int, examples: str) -> dict[str, str]:
    """Rows of a card that say how the weights were made.

    Args:
        script (`str`): The script, such as `training/train.py`.
        steps (`int`): Number of steps.
        batch (`int`): Examples of a step.
        examples (`str`): Name of the examples, such as `images`.
    """
    return {
        "trained by": f"`{script}` of svqvae-hf {version('svqvae-hf')}, options in `train_config.yaml`",
        "steps": f"{steps:,} of {batch} {examples}",
    }


def refuse_finished(output_dir: Path, identity: RunIdentity) -> None:
    """Ends a run whose result is already in its folder, before anything is written.

    Args:
        output_dir (`Path`): Folder of the run.
        identity ([`~svqvae_hf.trainer.identity.RunIdentity`]): What this run is made from. A longer run may resume
            from a checkpoint.

    Raises:
        SystemExit: With code 0, if a run with the same options, models and sets has finished here.
        ValueError: If it had others.
    """
    path = output_dir / FINISHED
    if not path.exists():
        return
    finished = RunIdentity.from_file(path)
    options = identity.to_record()["options"]
    old_steps = finished.options.get("max_steps", 0)
    steps = options["max_steps"]
    has_checkpoint = any(output_dir.glob("checkpoint-*"))
    if steps > old_steps and has_checkpoint:
        return
    changed = changed_names(finished.options, options)
    if changed:
        values = ", ".join(f"--{name} {options.get(name)}" for name in changed)
        if has_checkpoint:
            advice = "or raise `--max_steps` to train it further"
        else:
            advice = "because it has no checkpoint from which it could be trained further"
        raise ValueError(
            f"`{output_dir}` holds the result of a finished run of {old_steps} steps, but this run has other options "
            f"({values}). Choose another `--output_dir`, {advice}."
        )
    check_sources(output_dir, finished.models, identity.models)
    check_sources(output_dir, finished.sets, identity.sets)
    sys.stderr.write(f"The run in `{output_dir}` has finished its {steps} steps. Nothing changed.\n")
    sys.exit(0)


def move_files(source: Path, target: Path) -> list[str]:
    """Moves all files below a folder to the same paths below another one, weights before their config.

    Returns:
        `list[str]`: Their paths relative to the folders.
    """
    names = [path.relative_to(source) for path in source.rglob("*") if path.is_file()]
    readable = target.stat().st_mode & 0o666  # safetensors makes files that only their owner can read
    for name in sorted(names, reverse=True):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).replace(target / name)
        (target / name).chmod(readable)
    return [name.as_posix() for name in names]

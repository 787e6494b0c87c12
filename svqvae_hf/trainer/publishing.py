"""The result of a run: its folder, its repository on the Hub, and the record that it is finished."""

import json
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from accelerate.logging import get_logger

from svqvae_files.identity import output_identity
from svqvae_files.json_files import read_json_object
from svqvae_files.outputs import write_file
from svqvae_files.version import __version__
from svqvae_hf.hub.origin import STARTED_FROM, Origin, find_origin
from svqvae_hf.hub.repositories import prepare_repo, push_folder
from svqvae_hf.trainer.disk import WRITE_ERRORS, write_fault
from svqvae_hf.trainer.identity import TOKEN_SET_OPTIONS, RunIdentity, changed_names, check_sources
from svqvae_hf.trainer.options import MODEL_SUFFIX

# In the output folder
OPTIONS_FILE = "train_config.yaml"
FINISHED_FILE = "finished_run.json"
RESULT_FILES = "files"  # in that file: size and checksum of each file of the result but its card, by its path
CARD_FILE = "README.md"
SAMPLES = "samples/*.png"
PARTIAL_RESULT = "result.partial"  # holds a result while it is saved; the next run deletes it if this one is killed

# Options that name what a result is made from
SET_OPTIONS = ("token_set", "dataset_name", "train_data_dir", "mix_data_dir")  # sets that it is trained on
# Models that are trained further. All other options that end with `MODEL_SUFFIX` name parts of the result that stay
# frozen, such as `text_encoder_name_or_path`.
BASE_OPTIONS = ("pretrained_model_name_or_path", "model_name_or_path", "pipeline_name_or_path")
CONFIG_OPTION = "model_config_name_or_path"  # the exception: config of a new model, without weights

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
        if is_main and push_to_hub:  # only the main process publishes, so only it needs the name of the repository
            is_private = True if options.hub_private_repo else None  # with `None`, the Hub's settings decide
            self.name = prepare_repo(self.name, private=is_private, license=origin.license)
        if is_main:
            self._write_options()

    def _write_options(self) -> None:
        """Writes `train_config.yaml` into the output folder."""
        self.output_dir.mkdir(parents=True, exist_ok=True)
        options_text = yaml.safe_dump(self.identity.options, sort_keys=False)
        write_file(self.output_dir / OPTIONS_FILE, options_text.encode())

    def publish(self, save_pretrained: Callable[..., Any], card: str) -> None:
        """Saves the result with its card in the output folder, and uploads it with `--push_to_hub`.

        Only the main process calls it. Existing files are replaced one by one, weights before their config.

        Args:
            save_pretrained (`Callable`): Writes the result into an empty folder.
            card (`str`): Text of README.md.

        Raises:
            OSError: If it cannot be written or uploaded.
        """
        partial_result = self._save_partial(save_pretrained)
        result_files = move_files(partial_result, self.output_dir)
        shutil.rmtree(partial_result)
        write_file(self.output_dir / CARD_FILE, card.encode())
        logger.info(f"Saved to {self.output_dir}")
        if self.push_to_hub:
            uploaded = result_files + [CARD_FILE, SAMPLES, OPTIONS_FILE]
            push_folder(self.output_dir, self.name, "Upload the trained model", files=uploaded)
        self._record_end(result_files)  # last: from now on the run is finished

    def _record_end(self, result_files: Sequence[str]) -> None:
        """Records that the run is finished, and what the files of its result are, except for its card."""
        identities = {}
        for name in result_files:
            if name != CARD_FILE:  # which users edit
                identities[name] = vars(output_identity(self.output_dir / name))
        record = self.identity.to_record() | {RESULT_FILES: identities}
        write_file(self.output_dir / FINISHED_FILE, json.dumps(record, indent=2).encode())

    def _save_partial(self, save_pretrained: Callable[..., Any]) -> Path:
        """Saves the result in a new folder inside the output folder, and returns the new folder."""
        folder = self.output_dir / PARTIAL_RESULT
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
        return folder


def find_sources(options: Any) -> Origin:
    """Licence and sources of a run's result. Its licence is the option's or, by default, its sources'.

    Raises:
        ValueError: If the sources have different licences, and the options have none.
    """
    # Folders, files, URLs or Hub ids, by the names of their rows in the card
    sets: dict[str, str] = {}
    models: dict[str, str] = {}
    for option, source in vars(options).items():
        if source is None:
            continue
        if option in SET_OPTIONS:
            sets[_row_name(option)] = source
        elif option in BASE_OPTIONS:
            models[STARTED_FROM] = source
        elif _names_frozen_part(option):
            part = option.removesuffix(MODEL_SUFFIX)
            models[_row_name(part)] = source
    return find_origin(models, sets, options.license)


def _names_frozen_part(option: str) -> bool:
    """Whether an option that is not in `BASE_OPTIONS` names a model that becomes a frozen part of the result.

    An example is `text_encoder_name_or_path`. The config of a new model has no weights, so it is not such a part.
    """
    names_model = option.endswith(MODEL_SUFFIX)
    return names_model and option != CONFIG_OPTION


def _row_name(option: str) -> str:
    """Name of an option in the card, such as "token set" for `token_set`."""
    return option.replace("_", " ")


def provenance(script: str, steps: int, batch: int, examples: str) -> dict[str, str]:
    """Rows of a card that say how the weights were made.

    Args:
        script (`str`): The script, such as `training/train.py`.
        steps (`int`): Number of steps.
        batch (`int`): Number of examples per step.
        examples (`str`): What an example is, in the plural, such as `images`.
    """
    return {
        "trained by": f"`{script}` of svqvae-hf {__version__}, options in `train_config.yaml`",
        "steps": f"{steps:,} of {batch} {examples}",
    }


def refuse_sources(output_dir: str | Path, options: Any) -> None:
    """Raises ValueError if the result would replace files of a model or token set that the options name."""
    output_folder = os.path.realpath(output_dir)
    for name, source in vars(options).items():
        names_folder = name.endswith(MODEL_SUFFIX) or name in TOKEN_SET_OPTIONS
        if not names_folder or source is None:
            continue
        if os.path.realpath(source) == output_folder:
            raise ValueError(
                f"`--output_dir` must not be the folder of `--{name}`, whose files would be replaced, but both are "
                f"`{source}`. Choose another."
            )


def refuse_finished(output_dir: Path, identity: RunIdentity) -> None:
    """Ends a run whose output folder holds the result of a finished run, before anything is written.

    A run may go on if it is longer than the finished one and a checkpoint is there, from which it can resume.

    Args:
        output_dir (`Path`): Folder of the run.
        identity ([`~svqvae_hf.trainer.identity.RunIdentity`]): What this run is made from.

    Raises:
        SystemExit: With code 0, if a run with the same options, models and sets has finished here.
        ValueError: If the finished run had other options, models or sets, or a file of its result is missing or has
            changed.
    """
    path = output_dir / FINISHED_FILE
    if not path.exists():
        return
    record = read_json_object(path)
    finished_run = RunIdentity.from_record(record, path)
    finished_steps = finished_run.options.get("max_steps", 0)
    steps = identity.options["max_steps"]
    has_checkpoint = any(output_dir.glob("checkpoint-*"))
    trains_further = steps > finished_steps and has_checkpoint
    if trains_further:
        return
    _check_same_options(output_dir, finished_run, identity, has_checkpoint)
    check_sources(output_dir, finished_run.models, identity.models)
    check_sources(output_dir, finished_run.sets, identity.sets)
    _check_result(output_dir, record, has_checkpoint)
    sys.stderr.write(f"The run in `{output_dir}` has finished its {steps} steps. Nothing changed.\n")
    sys.exit(0)


def _check_same_options(output_dir: Path, finished: RunIdentity, identity: RunIdentity, has_checkpoint: bool) -> None:
    """Raises ValueError if a run has other options than the finished run in its folder.

    Models and sets are compared by their digests, so a folder that was moved counts as the same.
    """
    options = identity.to_record()["options"]  # only those that change the result
    # `models` and `sets` hold a digest for each option that names a model or a set.
    options_with_digest = identity.models.keys() | identity.sets.keys()
    flags = []
    for name in changed_names(finished.options, options):
        if name not in options_with_digest:
            flags.append(f"--{name} {options.get(name)}")
    if not flags:
        return
    if has_checkpoint:
        advice = "or raise `--max_steps` to train it further"
    else:
        advice = "because it has no checkpoint from which it could be trained further"
    finished_steps = finished.options.get("max_steps", 0)
    raise ValueError(
        f"`{output_dir}` holds the result of a finished run of {finished_steps} steps, but this run has other options "
        f"({', '.join(flags)}). Choose another `--output_dir`, {advice}."
    )


def _check_result(output_dir: Path, record: Mapping[str, Any], has_checkpoint: bool) -> None:
    """Raises ValueError if a file of the result of a finished run is missing or has changed."""
    identities = record.get(RESULT_FILES)
    if not isinstance(identities, dict):
        raise ValueError(f"`{output_dir / FINISHED_FILE}` must hold the record of a run, but has no `{RESULT_FILES}`.")
    for name, identity in identities.items():
        path = output_dir / name
        if path.is_file() and vars(output_identity(path)) == identity:
            continue
        fault = "has changed since" if path.exists() else "is missing"
        advice = "or train again in another `--output_dir`"
        if has_checkpoint:
            advice = f"or delete `{FINISHED_FILE}` and write the result again with `--resume_from_checkpoint latest`"
        raise ValueError(
            f"`{path}` must be as the finished run in `{output_dir}` wrote it, but {fault}. Restore it, {advice}."
        )


def move_files(source: Path, target: Path) -> list[str]:
    """Moves all files below a folder to the same paths below another one, weights before their config.

    A folder with a config passes for a model, so the weights must be there first. The files get the permissions of the
    target folder, because safetensors makes files that only their owner can read.

    Returns:
        `list[str]`: Paths of the files relative to either folder.
    """
    files = [path for path in source.rglob("*") if path.is_file()]
    permissions = target.stat().st_mode & 0o666  # without the right to execute
    moved = []
    weights_first = sorted(files, reverse=True)  # "model.safetensors" before "config.json"
    for file in weights_first:
        relative_path = file.relative_to(source)
        new_path = target / relative_path
        new_path.parent.mkdir(parents=True, exist_ok=True)
        file.replace(new_path)
        new_path.chmod(permissions)
        moved.append(relative_path.as_posix())
    return moved

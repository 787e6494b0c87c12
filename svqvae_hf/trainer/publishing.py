"""The result of a run: its folder, its repository on the Hub, and the record that it is finished."""

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml
from accelerate import Accelerator
from accelerate.logging import get_logger

from svqvae_files.folders import Folder
from svqvae_files.outputs import write_file
from svqvae_hf.hub.origin import STARTED_FROM, Origin, find_origin
from svqvae_hf.hub.repositories import prepare_repo, push_folder
from svqvae_hf.trainer.options import RunOptions, public_values

OPTIONS, FINISHED = "train_config.yaml", "finished_run.json"
BASES = ("pretrained_model", "model", "pipeline")  # in the names of options, for what is trained further
SETS = ("token_set", "dataset_name", "train_data_dir", "mix_data_dir")
OF_THE_START = ("output_dir", "resume_from_checkpoint")  # options that do not change the result

logger = get_logger(__name__, log_level="INFO")


class Result:
    """Result of a run, in its output folder and, with `--push_to_hub`, on the Hub.

    Makes the repository and writes `train_config.yaml` before the first step, so that an error comes first.

    Args:
        options ([`RunOptions`] or `TrainingArguments`): Options of the folder and of the repository.
        described (`Mapping`): All options as they may be published, by name.
        origin ([`~svqvae_hf.hub.origin.Origin`]): Licence and sources of the weights.
        push_to_hub (`bool`): Whether the result is uploaded.
        is_main (`bool`): Whether this process publishes.

    Raises:
        OSError: If the repository cannot be made.
    """

    def __init__(self, options: Any, described: Mapping[str, Any], origin: Origin, push_to_hub: bool, is_main: bool):
        self.origin = origin
        self.described, self.push_to_hub, self.output_dir = described, push_to_hub, Path(options.output_dir)
        self.name = options.hub_model_id or self.output_dir.absolute().name
        if is_main:
            if push_to_hub:
                self.name = prepare_repo(self.name, private=options.hub_private_repo or None, license=origin.license)
            self.output_dir.mkdir(parents=True, exist_ok=True)
            write_file(self.output_dir / OPTIONS, yaml.safe_dump(dict(described), sort_keys=False).encode())

    @classmethod
    def of(cls, options: RunOptions, accelerator: Accelerator) -> "Result":
        """Result of a run with [`RunOptions`]."""
        is_main = accelerator.is_main_process
        return cls(options, public_values(asdict(options)), find_sources(options), options.push_to_hub, is_main)

    def publish(self, save_pretrained: Callable[..., Any], card: str) -> None:
        """Saves the result with its card in the output folder, and uploads it with `--push_to_hub`.

        Only the main process calls it. Existing files are replaced one by one, weights before their config.

        Args:
            save_pretrained (`Callable`): Writes the result into an empty folder.
            card (`str`): Text of README.md.
        """
        with TemporaryDirectory(dir=self.output_dir) as folder:
            save_pretrained(Path(folder))
            saved = move_files(Path(folder), self.output_dir)
        write_file(self.output_dir / "README.md", card.encode())
        logger.info(f"Saved to {self.output_dir}")
        if self.push_to_hub:
            files = [*saved, "README.md", "samples/*.png", OPTIONS]
            push_folder(self.output_dir, self.name, "Upload the trained model", files=files)
        write_file(self.output_dir / FINISHED, _text(self.described).encode())  # the run is finished


def find_sources(options: Any) -> Origin:
    """Licence and sources of a run's result. Its licence is the option's or, by default, its sources'.

    Raises:
        ValueError: If sources have different licences and none is given.
    """
    models, sets = {}, {}
    for name, source in vars(options).items():
        role, is_model, _ = name.partition("_name_or_path")
        if is_model and source is not None and role != "model_config":
            models[STARTED_FROM if role in BASES else role.replace("_", " ")] = source
        elif name in SETS:
            sets[name.replace("_", " ")] = source
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


def refuse_finished(output_dir: Path, options: Mapping[str, Any]) -> None:
    """Ends a run whose result is already in its folder, before anything is written.

    Args:
        output_dir (`Path`): Folder of the run.
        options (`Mapping`): Options of the run, by name. A longer run may resume from a checkpoint.

    Raises:
        SystemExit: With code 0, if a run with the same options has finished here.
        ValueError: If they are others.
    """
    old, new = Folder(output_dir).read_json(FINISHED), json.loads(_text(options))
    if old is None:
        return
    if old == new:
        sys.stderr.write(f"The run in `{output_dir}` has finished its {new['max_steps']} steps. Nothing changed.\n")
        sys.exit(0)
    if new["max_steps"] > old["max_steps"] and any(output_dir.glob("checkpoint-*")):
        return
    changed = ", ".join(f"--{name} {new[name]}" for name in sorted(new) if new[name] != old.get(name))
    raise ValueError(
        f"`{output_dir}` holds the result of a finished run of {old['max_steps']} steps, but this run has other "
        f"options ({changed}). Choose another `--output_dir`, or raise `--max_steps` to train it further."
    )


def move_files(source: Path, target: Path) -> list[str]:
    """Moves all files below a folder to the same paths below another one, weights before their config.

    Returns:
        `list[str]`: Their paths relative to the folders.
    """
    names = [path.relative_to(source) for path in source.rglob("*") if path.is_file()]
    for name in sorted(names, reverse=True):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).replace(target / name)
        (target / name).chmod(target.stat().st_mode & 0o666)  # safetensors makes files that only their owner can read
    return [name.as_posix() for name in names]


def _text(options: Mapping[str, Any]) -> str:
    return json.dumps({name: value for name, value in options.items() if name not in OF_THE_START}, indent=2)

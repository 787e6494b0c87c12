"""Records the progress of a run beside its output, so that an interrupted run can be resumed."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from svqvae_hf.files.outputs import write_file
from svqvae_hf.models.modeling_svqvae import SVQVAE


def record_path(target: Path) -> Path:
    """Path of the record of an interrupted run, which exists as long as the output is incomplete."""
    return target.with_name(f"{target.name}.partial.json")


def check_not_interrupted(target: Path) -> None:
    """Raises ValueError if an interrupted run has begun the output."""
    path = record_path(target)
    if path.exists():
        raise ValueError(
            f"`{target}` belongs to an interrupted run. Resume it with --resume, or remove `{path}` to start again."
        )


class RunRecord:
    """Record of one run: its input, model and options, and how many rows of tiles are finished.

    Args:
        target (`Path`): Output of the run.
        model ([`SVQVAE`]): Its model, with its tiles set.
        source (`Path`): Its input.
        resume (`bool`): Whether to resume an interrupted run.

    Raises:
        ValueError: If there is a record but `resume` is false, or the record is of another input, model or options.
    """

    def __init__(self, target: Path, model: SVQVAE, source: Path, resume: bool):
        self.target = target
        self.path = record_path(target)
        status = source.stat()
        self.facts = {"input": [source.name, status.st_size, status.st_mtime_ns], **_model_facts(model)}
        self.finished_rows: dict[str, int] = {}  # rows of tiles per pass
        if not resume:
            check_not_interrupted(target)
        elif self.path.exists():
            self._read()

    def write(self) -> None:
        """Writes the record."""
        content = {"facts": self.facts, "finished_rows": self.finished_rows}
        write_file(self.path, json.dumps(content).encode())

    def _read(self) -> None:
        try:
            content = json.loads(self.path.read_bytes())
            facts = dict(content["facts"])
            self.finished_rows = {name: int(rows) for name, rows in content["finished_rows"].items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"`{self.path}` must be the record of a run, but is not. Remove it.") from error
        differing = [name for name, value in self.facts.items() if facts.get(name) != value]
        if differing:
            raise ValueError(
                f"`{self.target}` must be resumed with the input, model and options it was started with, but these "
                f"differ: {', '.join(differing)}. Use the same, or remove `{self.path}` to start again."
            )


def _model_facts(model: SVQVAE) -> dict[str, Any]:
    config = {key: value for key, value in model.config.items() if not key.startswith("_")}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name, weight in sorted(model.state_dict().items()):
        digest.update(name.encode() + weight.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    options = {"tile_size": model.tile_size, "overlap": model.overlap, "dtype": str(model.dtype)}
    return {"model": digest.hexdigest(), **options, "device": model.device.type}

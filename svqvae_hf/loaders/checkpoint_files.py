"""Original checkpoint files: how they are found, local or on the Hub, and read, and what they hold."""

import argparse
import hashlib
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from svqvae_hf.hub.repositories import download_file, hub_repo
from svqvae_hf.loaders.checkpoint_formats import CheckpointFormat
from svqvae_hf.untrusted.pickles import load_pickle

# The classes that a pickle may hold beside weights and plain values. A Namespace only stores attributes. The names of
# Lightning's callbacks stand for empty classes defined here, so that nothing of Lightning is imported or run.
SAFE_GLOBALS = (
    argparse.Namespace,
    type("ModelCheckpoint", (), {"__module__": "pytorch_lightning.callbacks.model_checkpoint"}),
    type("EarlyStopping", (), {"__module__": "pytorch_lightning.callbacks.early_stopping"}),
)


ModelT = TypeVar("ModelT", bound=nn.Module)


@dataclass(frozen=True)
class Checkpoint:
    """Config and weights from an original checkpoint, checked and ready for a model.

    Args:
        source (`str`): File or Hub file, as passed by the caller.
        path (`Path`): The local file, downloaded if it is on the Hub.
        use_ema (`bool`): Whether the weights are the averaged ones.
        format ([`~svqvae_hf.loaders.checkpoint_formats.CheckpointFormat`]): Format of the file.
        config (`dict[str, Any]`): Arguments of the model, or of its config.
        state_dict (`dict[str, torch.Tensor]`): Weights under this library's names, in float32.
    """

    source: str
    path: Path
    use_ema: bool
    format: CheckpointFormat
    config: dict[str, Any]
    state_dict: dict[str, torch.Tensor]

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the file, in hexadecimal."""
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def model(self, model_class: type[ModelT], dtype: torch.dtype | None = None) -> ModelT:
        """Builds a model of diffusers, in evaluation mode."""
        model = model_class(**self.config)
        model.load_state_dict(self.state_dict)
        if dtype is not None:
            model = model.to(dtype)
        return model.eval()


def locate_checkpoint(source: str | Path) -> Path:
    """Returns the path of a checkpoint, downloading it if it is on the Hub.

    Args:
        source (`str` or `Path`): Local file, or `org/repo:file` on the Hub.

    Raises:
        OSError: If there is no such file, or it cannot be downloaded.
    """
    path = Path(source)
    if path.is_file():
        return path
    if path.is_dir():
        raise IsADirectoryError(
            f"`{source}` must be a checkpoint file, but is a folder. Name the file in it, or load a folder with "
            "config.json by `SVQVAE.from_pretrained`."
        )
    repo_id = hub_repo(source)
    if repo_id is None:
        raise FileNotFoundError(f"There is no file `{source}`. Pass an existing one, or `org/repo:file` on the Hub.")
    file = str(source).removeprefix(f"{repo_id}:")
    return download_file(repo_id, file, source)


def load_checkpoint_file(path: Path, source: str | Path) -> dict[str | None, Any]:
    """Loads a pickled dict, or `{None: weights}` for a safetensors file.

    Args:
        path (`Path`): The file. Its suffix tells safetensors from pickles.
        source (`str` or `Path`): Name of the file in errors.

    Raises:
        OSError: If the file cannot be opened.
        ValueError: If it is broken, or a pickle that holds more than weights and plain values.
    """
    if path.suffix.lower() == ".safetensors":
        return {None: _load_safetensors(path, source)}
    content = _load_pickle(path, source)
    if not isinstance(content, dict):
        return {}  # no format fits it, so the caller reports it
    return content


def top_level_weights(content: Mapping[str | None, Any]) -> Any:
    """Weights of a file that names no container for them: all of a safetensors file, or the pickled dict itself."""
    return content.get(None, content)


def _load_safetensors(path: Path, source: str | Path) -> dict[str, torch.Tensor]:
    """Weights of a safetensors file. Raises ValueError if it is damaged."""
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(
            f"`{source}` must be a whole safetensors file, as its name says, but is not: {error}. Download it."
        ) from error


def _load_pickle(path: Path, source: str | Path) -> Any:
    """Content of a pickle. Raises ValueError if it is damaged, or holds more than weights and plain values."""
    try:
        return load_pickle(path, SAFE_GLOBALS)
    except OSError:
        raise
    except Exception as error:  # a broken pickle makes the reader raise almost anything
        called_code = _called_code(error)
        if called_code is not None:
            raise ValueError(
                f"`{source}` must hold weights only, but is a pickle that calls for `{called_code}`, which could run "
                "any code or take any memory. Ask for a safetensors file, or save the weights alone where it was "
                'made: `torch.save({"state_dict": ...}, file)`.'
            ) from None  # torch's message advises to load the file with `weights_only=False`
        raise ValueError(
            f"`{source}` must be a whole PyTorch checkpoint that holds weights only, but cannot be read as one. It "
            "may be empty, cut short, compressed, of another format, or a pickle with code in it. Download it again, "
            "or ask for a safetensors file."
        ) from error


def _called_code(error: Exception) -> str | None:
    """Name of the function or class that a pickle calls for, by the error of reading it; None for other errors."""
    if not isinstance(error, pickle.UnpicklingError):
        return None
    match = re.search(r"GLOBAL (\S+)", str(error))
    if match is None:
        return None
    return match[1]

"""Folders of converted models: complete and checked, or absent."""

import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch
from diffusers import ModelMixin
from safetensors import SafetensorError

from svqvae_hf.hub.repositories import check_repo_id

VARIANTS = {"fp16": torch.float16, "bf16": torch.bfloat16}

ModelT = TypeVar("ModelT", bound=ModelMixin)


def check_arguments(variant: str | None, push_to_hub: str | None, private: bool | None, create_pr: bool) -> None:
    """Raises if arguments of a conversion are wrong."""
    if variant is not None and variant not in VARIANTS:
        raise ValueError(f"`variant` must be one of {', '.join(VARIANTS)}, got {variant!r}.")
    if push_to_hub is None and (private is not None or create_pr):
        raise ValueError("`private` and `create_pr` need `push_to_hub`, got None. Pass `org/name`.")
    if push_to_hub is not None:
        check_repo_id(push_to_hub)


@contextmanager
def new_repository(out: Path, card: str) -> Iterator[Path]:
    """Opens a temporary folder for a repository, adds its card, and renames it to `out` if nothing failed.

    Args:
        out (`Path`): Folder to create.
        card (`str`): Text of `README.md`.

    Raises:
        OSError: If a file cannot be written.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as beside:
            folder = Path(beside, out.name)
            yield folder
            (folder / "README.md").write_text(card, encoding="utf-8")
            mode = stat.S_IMODE((folder / "README.md").stat().st_mode)
            for path in folder.rglob("*"):
                if path.is_file():
                    path.chmod(mode)  # safetensors makes files that only their owner can read
            folder.replace(out)
    except (SafetensorError, OSError) as error:
        raise OSError(f"`{out}` cannot be written: {error}") from error


def halve(model: ModelT, variant: str) -> ModelT:
    """Casts a model in place; its codebook stays in float32 by itself."""
    model.to(VARIANTS[variant])
    overflowed = sorted(key for key, tensor in model.state_dict().items() if not tensor.isfinite().all())
    if overflowed:
        raise ValueError(
            f"Weights must lie in the range of {variant}, but {', '.join(overflowed)} do not. Choose bf16."
        )
    return model

"""Repositories of converted models: complete and checked, or absent."""

import json
import stat
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin
from safetensors import SafetensorError

from svqvae_hf.hub.repositories import check_repo_id, hub_repo, prepare_repo, push_output
from svqvae_hf.loaders.checkpoints import Checkpoint
from svqvae_hf.loaders.llamagen_checkpoints import LlamaGenCheckpoint

VARIANTS = {"fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class ConversionReport:
    """Result of a conversion. `str(report)` formats it for a terminal.

    Args:
        source (`str`): Source, as passed by the caller.
        sha256 (`str`): SHA-256 of the source file, in hexadecimal.
        format (`str`): Name of the format of the source.
        tokenizer (`str`, *optional*): Source of the tokenizer, if a generator was converted.
        config (`dict[str, Any]`): Config of the converted model.
        tensors (`int`): Number of tensors, all bit-equal after loading again.
        out (`Path`): Folder of the repository.
        files (`tuple[str, ...]`): Paths of the files in it.
        url (`str`, *optional*): URL of the commit or pull request, if the result was pushed.
    """

    source: str
    sha256: str
    format: str
    tokenizer: str | None
    config: dict[str, Any]
    tensors: int
    out: Path
    files: tuple[str, ...]
    url: str | None

    def __str__(self) -> str:
        tokenizer = "" if self.tokenizer is None else f", {self.tokenizer} (tokenizer)"
        lines = [
            f"read     {self.source} ({self.format}, sha256 {self.sha256}){tokenizer}",
            f"config   {', '.join(f'{key}={value}' for key, value in self.config.items())}",
            f"checked  {self.tensors} tensors and the config, equal after loading again",
            f"written  {self.out}: {', '.join(self.files)}",
        ]
        return "\n".join(lines if self.url is None else [*lines, f"pushed   {self.url}"])


def check_arguments(variant: str | None, push_to_hub: str | None, private: bool | None, create_pr: bool) -> None:
    """Raises if arguments of a conversion are wrong."""
    if variant is not None and variant not in VARIANTS:
        raise ValueError(f"`variant` must be one of {', '.join(VARIANTS)}, got {variant!r}.")
    if push_to_hub is None and (private is not None or create_pr):
        raise ValueError("`private` and `create_pr` need `push_to_hub`, got None. Pass `org/name`.")
    if push_to_hub is not None:
        check_repo_id(push_to_hub)


def provenance(checkpoint: Checkpoint | LlamaGenCheckpoint, layout: str) -> dict[str, str]:
    """Rows of a card about the source. A local one is named without its folders, because cards are public."""
    file = checkpoint.source if hub_repo(checkpoint.source) else checkpoint.path.name
    return {
        "layout": layout,
        "source": f"`{file}`{', `ema`' if checkpoint.use_ema else ''}",
        "sha256 of the source": f"`{checkpoint.sha256}`",
    }


def write_repository(
    converted: ModelMixin | DiffusionPipeline,
    checkpoint: Checkpoint | LlamaGenCheckpoint,
    out: Path,
    card: str,
    *,
    format: str,
    tokenizer: str | None,
    variant: str | None,
    license: str | None,
    push_to_hub: str | None,
    private: bool | None,
    create_pr: bool,
) -> ConversionReport:
    """Writes a repository to a temporary folder, checks it, renames it to `out` and uploads it.

    Args:
        converted (`ModelMixin` or `DiffusionPipeline`): Model or pipeline.
        checkpoint ([`Checkpoint`] or [`LlamaGenCheckpoint`]): Source.
        out (`Path`): Folder to create.
        card (`str`): Text of `README.md`.
        format (`str`): Name of the format of the source.
        tokenizer (`str`, *optional*): Source of the tokenizer.
        variant (`str`, *optional*): Also write half-precision weights.
        license (`str`, *optional*): Licence of the weights.
        push_to_hub (`str`, *optional*): Repository to upload to, created before anything is written.
        private (`bool`, *optional*): Whether a new repository is private.
        create_pr (`bool`): Open a pull request instead of committing.

    Raises:
        OSError: If a file cannot be written, the result differs from the source, or the upload fails.
        ValueError: If weights are out of the range of `variant`.
    """
    if push_to_hub is not None:
        prepare_repo(push_to_hub, private=private, license=license)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as beside:
            folder = Path(beside, out.name)
            converted.save_pretrained(folder)
            half = None if variant is None else _save_half(type(converted), folder, variant)
            tensors = _check(converted, folder)
            if half is not None:
                _check(half, folder, variant)
            (folder / "README.md").write_text(card, encoding="utf-8")
            mode = stat.S_IMODE((folder / "README.md").stat().st_mode)
            files = sorted(path for path in folder.rglob("*") if path.is_file())
            for path in files:
                path.chmod(mode)  # safetensors makes files that only their owner can read
            folder.replace(out)
    except (SafetensorError, OSError) as error:
        raise OSError(f"`{out}` cannot be written: {error}") from error
    message = f"Upload converted {type(converted).__name__}"
    return ConversionReport(
        source=checkpoint.source,
        sha256=checkpoint.sha256,
        format=format,
        tokenizer=tokenizer,
        config=checkpoint.config,
        tensors=tensors,
        out=out,
        files=tuple(str(path.relative_to(folder)) for path in files),
        url=push_output(out, push_to_hub, message, create_pr=create_pr) if push_to_hub else None,
    )


def _models(converted: ModelMixin | DiffusionPipeline) -> dict[str, torch.nn.Module]:
    """The model, or the models of a pipeline by name."""
    if isinstance(converted, torch.nn.Module):
        return {"": converted}
    return {name: part for name, part in converted.components.items() if isinstance(part, torch.nn.Module)}


def _save_half(
    kind: type[ModelMixin | DiffusionPipeline], folder: Path, variant: str
) -> ModelMixin | DiffusionPipeline:
    """Adds half-precision weights to a folder. The codebook stays in float32 by itself."""
    half = kind.from_pretrained(folder)
    for name, model in _models(half).items():
        # LlamaGen runs its text encoder in bfloat16, in which it is saved. T5 overflows in float16.
        model.to(torch.bfloat16 if name == "text_encoder" else VARIANTS[variant])
        overflowed = sorted(key for key, tensor in model.state_dict().items() if not tensor.isfinite().all())
        if overflowed:
            raise ValueError(
                f"Weights must lie in the range of {variant}, but {', '.join(overflowed)} do not. Choose bf16."
            )
    half.save_pretrained(folder, variant=variant)
    return half


def _check(expected: ModelMixin | DiffusionPipeline, folder: Path, variant: str | None = None) -> int:
    """Raises unless a folder loads with the same config and bit-equal tensors, and returns the number of tensors."""
    dtypes = {name: model.dtype for name, model in _models(expected).items()}
    written = type(expected).from_pretrained(folder, variant=variant, dtype=dtypes.get("", dtypes))
    state, copy = _state(expected), _state(written)
    differing = sorted(key for key, value in state.items() if not _equal(value, copy.get(key)))
    if differing:
        raise OSError(
            f"What is written must equal the source, but differs in {', '.join(differing)}. Check the disk and "
            "convert again."
        )
    return sum(isinstance(value, torch.Tensor) for value in state.values())


def _state(converted: ModelMixin | DiffusionPipeline) -> dict[str, Any]:
    """All that outputs depend on, by name: weights, buffers and configs."""
    state: dict[str, Any] = {}
    for name, model in {"": converted, **_models(converted)}.items():
        config = model.config if isinstance(model.config, dict) else model.config.to_dict()
        values = {key: value for key, value in config.items() if not key.startswith("_") and key != "architectures"}
        if isinstance(model, torch.nn.Module):
            values |= dict(model.state_dict()) | dict(model.named_buffers())
        state |= {f"{name}.{key}".removeprefix("."): value for key, value in values.items()}
    return state


def _equal(value: Any, copy: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return value.dtype == copy.dtype and torch.equal(value, copy)
    return json.dumps(value) == json.dumps(copy)  # tuples become lists

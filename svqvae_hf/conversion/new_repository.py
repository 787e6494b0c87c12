"""Repositories of converted models: complete and checked, or absent."""

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin

from svqvae_files.outputs import new_folder
from svqvae_hf.hub.code import write_code
from svqvae_hf.hub.repositories import hub_repo
from svqvae_hf.loaders.checkpoint_files import Checkpoint
from svqvae_hf.pipelines.repository_index import write_blocks

VARIANTS = {"fp16": torch.float16, "bf16": torch.bfloat16}


def write_repository(
    converted: Any,
    checkpoint: Checkpoint,
    out: Path,
    *,
    variant: str | None,
    standalone: bool,
    repo_id: str | None,
    **card: Any,
) -> str:
    """Writes a repository to a temporary folder, checks it, and renames it to `out`.

    Args:
        converted ([`SVQVAE`] or pipeline): The converted model.
        checkpoint ([`Checkpoint`]): Source.
        out (`Path`): Folder to create, from [`~svqvae_files.outputs.check_new_folder`].
        variant (`str`, *optional*): `fp16` or `bf16`, to write the weights in half precision as well.
        standalone (`bool`): Whether to write the code of the models.
        repo_id (`str`, *optional*): `org/name` that the repository will have on the Hub.
        **card: Arguments of `converted.make_card`, such as `license`; `provenance` has further rows about the source.

    Returns:
        `str`: Source, config and files, for a terminal.

    Raises:
        OSError: If a file cannot be written, or the result differs from the source.
        ValueError: If weights are out of the range of `variant`.
    """
    source = checkpoint.source
    rows = {  # cards are public, so a local file is named without its folders
        "layout": checkpoint.format.title,
        "source": f"`{source if hub_repo(source) else checkpoint.path.name}`{', `ema`' if checkpoint.use_ema else ''}",
        "sha256 of the source": f"`{checkpoint.sha256}`",
        **card.get("provenance", {}),
    }
    card |= {"base_model": hub_repo(source), "provenance": rows, "standalone": standalone}
    text = converted.make_card(repo_id or out.name, **card)
    with new_folder(out) as folder:
        tensors = save_and_check(converted, folder, variant)
        if standalone:
            if isinstance(converted, DiffusionPipeline):
                write_blocks(converted.blocks(), folder, repo_id or str(out))
            else:
                write_code(folder)
        (folder / "README.md").write_text(text, encoding="utf-8")
    files = sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())
    lines = [
        f"read     {source} ({checkpoint.format.name}, sha256 {checkpoint.sha256})",
        f"config   {', '.join(f'{key}={value}' for key, value in checkpoint.config.items())}",
        f"checked  {tensors} tensors and the config, equal after loading again",
        f"written  {out}: {', '.join(files)}",
    ]
    return "\n".join(lines)


def save_and_check(converted: ModelMixin | DiffusionPipeline, folder: Path, variant: str | None) -> int:
    """Saves a model or a pipeline, also in half precision if asked for, and checks that it loads unchanged.

    Returns:
        `int`: Number of tensors.

    Raises:
        OSError: If tensors or configs differ after loading again.
        ValueError: If weights are out of the range of `variant`.
    """
    converted.save_pretrained(folder)
    if variant is not None:
        half = deepcopy(converted)  # one that is loaded from `folder` would name it in its config
        for name, model in _models(half).items():
            # LlamaGen runs its text encoder in bfloat16, in which it is saved. T5 overflows in float16.
            model.to(torch.bfloat16 if name == "text_encoder" else VARIANTS[variant])
            overflowed = sorted(key for key, tensor in model.state_dict().items() if not tensor.isfinite().all())
            if overflowed:
                raise ValueError(f"Weights must fit {variant}, but {', '.join(overflowed)} do not. Choose bf16.")
        half.save_pretrained(folder, variant=variant)
    dtypes = {name: model.dtype for name, model in _models(converted).items()}
    state = _state(converted)
    copy = _state(type(converted).from_pretrained(folder, dtype=dtypes.get("", dtypes)))  # after all is written
    differing = sorted(key for key, value in state.items() if not _equal(value, copy.get(key)))
    if differing:
        raise OSError(f"What is written must equal the source, but differs in {', '.join(differing)}. Check the disk.")
    return sum(isinstance(value, torch.Tensor) for value in state.values())


def _models(converted: ModelMixin | DiffusionPipeline) -> dict[str, torch.nn.Module]:
    """The model, or the models of a pipeline by name. The codebook stays in float32 without help."""
    if isinstance(converted, torch.nn.Module):
        return {"": converted}
    return {name: part for name, part in converted.components.items() if isinstance(part, torch.nn.Module)}


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

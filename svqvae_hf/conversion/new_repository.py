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
    card["provenance"] = describe_source(checkpoint) | card.get("provenance", {})
    card["base_model"] = hub_repo(checkpoint.source)
    card_text = converted.make_card(repo_id or out.name, standalone=standalone, **card)
    with new_folder(out) as folder:
        num_tensors = save_and_check(converted, folder, variant)
        is_pipeline = isinstance(converted, DiffusionPipeline)
        if standalone and is_pipeline:
            write_blocks(converted.blocks(), folder, repo_id or str(out))
        elif standalone:
            write_code(folder)
        (folder / "README.md").write_text(card_text, encoding="utf-8")
    return _summary(checkpoint, out, num_tensors)


def _summary(checkpoint: Checkpoint, out: Path, num_tensors: int) -> str:
    """Source, config and files of a repository, for a terminal."""
    config_entries = [f"{key}={value}" for key, value in checkpoint.config.items()]
    files = [str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()]
    lines = [
        f"read     {checkpoint.source} ({checkpoint.format.name}, sha256 {checkpoint.sha256})",
        f"config   {', '.join(config_entries)}",
        f"checked  {num_tensors} tensors and the config, equal after loading again",
        f"written  {out}: {', '.join(sorted(files))}",
    ]
    return "\n".join(lines)


def describe_source(checkpoint: Checkpoint) -> dict[str, str]:
    """Rows about the source for a card. Cards are public, so a local file is named without its folders."""
    is_on_hub = hub_repo(checkpoint.source) is not None
    public_source = checkpoint.source if is_on_hub else checkpoint.path.name
    source = f"`{public_source}`"
    if checkpoint.use_ema:
        source += ", `ema`"
    return {
        "layout": checkpoint.format.title,
        "source": source,
        "sha256 of the source": f"`{checkpoint.sha256}`",
    }


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
        half = _in_half_precision(converted, variant)
        half.save_pretrained(folder, variant=variant)
    loaded = type(converted).from_pretrained(folder, dtype=_dtype(converted))
    state_of_source = _state(converted)
    state_of_loaded = _state(loaded)
    differing_names = []
    num_tensors = 0
    for name, value in state_of_source.items():
        if not _are_equal(value, state_of_loaded.get(name)):
            differing_names.append(name)
        if isinstance(value, torch.Tensor):
            num_tensors += 1
    if differing_names:
        listed = ", ".join(sorted(differing_names))
        raise OSError(f"What is written must equal the source, but differs in {listed}. Check the disk.")
    return num_tensors


def _dtype(converted: ModelMixin | DiffusionPipeline) -> Any:
    """`dtype` argument of `from_pretrained`: one for a model, and one per component, by name, for a pipeline."""
    if isinstance(converted, torch.nn.Module):
        return converted.dtype
    return {name: model.dtype for name, model in _models(converted).items()}


def _in_half_precision(converted: ModelMixin | DiffusionPipeline, variant: str) -> ModelMixin | DiffusionPipeline:
    """A copy with weights in half precision, except for the codebook, which a model always keeps in float32.

    Raises:
        ValueError: Weights are out of the range of `variant`.
    """
    # A copy, and not the model loaded once more, whose config would hold the name of the folder.
    half = deepcopy(converted)
    for name, model in _models(half).items():
        # LlamaGen runs its text encoder in bfloat16, in which it is saved. T5 overflows in float16.
        dtype = torch.bfloat16 if name == "text_encoder" else VARIANTS[variant]
        model.to(dtype)
        overflowed_names = []
        for weight_name, tensor in model.state_dict().items():
            if not tensor.isfinite().all():
                overflowed_names.append(weight_name)
        if overflowed_names:
            listed = ", ".join(sorted(overflowed_names))
            raise ValueError(f"Weights must fit {variant}, but {listed} do not. Choose bf16.")
    return half


def _models(converted: ModelMixin | DiffusionPipeline) -> dict[str, torch.nn.Module]:
    """The model under an empty name, or the models of a pipeline by their names."""
    if isinstance(converted, torch.nn.Module):
        return {"": converted}
    models = {}
    for name, component in converted.components.items():
        if isinstance(component, torch.nn.Module):
            models[name] = component
    return models


def _state(converted: ModelMixin | DiffusionPipeline) -> dict[str, Any]:
    """All that outputs depend on, by name: weights, buffers and configs. In a pipeline, names start with the part."""
    # A pipeline is a part, because it has a config, and so is each of its models. A model is the only part: `_models`
    # returns it by the same name.
    parts: dict[str, Any] = {"": converted} | _models(converted)
    state: dict[str, Any] = {}
    for part_name, part in parts.items():
        prefix = f"{part_name}." if part_name else ""
        config = part.config if isinstance(part.config, dict) else part.config.to_dict()
        for key, value in config.items():
            if not key.startswith("_") and key != "architectures":
                state[prefix + key] = value
        if isinstance(part, torch.nn.Module):
            for name, tensor in part.state_dict().items():
                state[prefix + name] = tensor
            # Outputs also depend on buffers that are not persistent, which `state_dict` leaves out.
            for name, buffer in part.named_buffers():
                state[prefix + name] = buffer
    return state


def _are_equal(value: Any, loaded: Any) -> bool:
    """Whether a tensor or a config value is the same after loading again."""
    if isinstance(value, torch.Tensor):
        return value.dtype == loaded.dtype and torch.equal(value, loaded)
    return json.dumps(value) == json.dumps(loaded)  # tuples become lists

"""Repositories of converted models: complete and checked, or absent."""

import json
import stat
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin
from safetensors import SafetensorError

from svqvae_hf.files.outputs import check_new_folder
from svqvae_hf.hub.repositories import check_repo_id, hub_repo, prepare_repo, push_output
from svqvae_hf.hub.standalone import write_code
from svqvae_hf.loaders.checkpoint_files import Checkpoint

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


@dataclass
class NewRepository:
    """A repository to create, local and, if asked for, on the Hub.

    Args:
        out (`str` or `Path`): Folder to create. It may exist if it is empty.
        variant (`str`, *optional*): `fp16` or `bf16`, to write the weights in half precision as well.
        license (`str`, *optional*): Licence of the weights, by the Hub's identifier.
        push_to_hub (`str`, *optional*): Hub repository `org/name` to upload the result to.
        private (`bool`, *optional*): Whether a new repository is private.
        create_pr (`bool`): Open a pull request instead of committing.
        standalone (`bool`): Also write the code of the models.

    Raises:
        ValueError: If an argument is wrong, or the folder has files.
    """

    out: str | Path
    variant: str | None
    license: str | None
    push_to_hub: str | None
    private: bool | None
    create_pr: bool
    standalone: bool

    def __post_init__(self) -> None:
        if self.variant is not None and self.variant not in VARIANTS:
            raise ValueError(f"`variant` must be one of {', '.join(VARIANTS)}, got {self.variant!r}.")
        if self.push_to_hub is None and (self.private is not None or self.create_pr):
            raise ValueError("`private` and `create_pr` need `push_to_hub`, got None. Pass `org/name`.")
        if self.push_to_hub is not None:
            check_repo_id(self.push_to_hub)
        self.folder = check_new_folder(Path(self.out))

    def write(
        self,
        converted: Any,
        checkpoint: Checkpoint,
        tokenizer: str | Path | None = None,
        provenance: Mapping[str, str] | None = None,
        **card: Any,
    ) -> ConversionReport:
        """Writes the repository to a temporary folder, checks it, renames it to `out` and uploads it.

        Args:
            converted ([`SVQVAE`] or pipeline): The converted model.
            checkpoint ([`Checkpoint`]): Source.
            tokenizer (`str` or `Path`, *optional*): Source of the tokenizer of a pipeline.
            provenance (`Mapping[str, str]`, *optional*): Further rows of the card about the source.
            **card: Further arguments of `converted.make_card`.

        Raises:
            OSError: If a file cannot be written, the result differs from the source, or the upload fails.
            ValueError: If weights are out of the range of `variant`.
        """
        out, source = self.folder, checkpoint.source
        # Cards are public, so a local file is named without its folders.
        file = source if hub_repo(source) else checkpoint.path.name
        name = self.push_to_hub or out.name
        rows = {
            "layout": checkpoint.format.title,
            "source": f"`{file}`{', `ema`' if checkpoint.use_ema else ''}",
            "sha256 of the source": f"`{checkpoint.sha256}`",
            **(provenance or {}),
        }
        text = converted.make_card(
            name,
            license=self.license,
            base_model=hub_repo(source),
            provenance=rows,
            standalone=self.standalone,
            **card,
        )
        if self.push_to_hub is not None:
            prepare_repo(self.push_to_hub, private=self.private, license=self.license)
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as beside:
                folder = Path(beside, out.name)
                tensors = save_and_check(converted, folder, self.variant)
                if self.standalone:
                    write_code(folder, self.push_to_hub or str(out))
                (folder / "README.md").write_text(text, encoding="utf-8")
                mode = stat.S_IMODE((folder / "README.md").stat().st_mode)
                files = sorted(path for path in folder.rglob("*") if path.is_file())
                for path in files:
                    path.chmod(mode)  # safetensors makes files that only their owner can read
                folder.replace(out)
        except (SafetensorError, OSError) as error:
            raise OSError(f"`{out}` cannot be written: {error}") from error
        message, url = f"Upload converted {type(converted).__name__}", None
        if self.push_to_hub is not None:
            url = push_output(out, self.push_to_hub, message, create_pr=self.create_pr)
        return ConversionReport(
            source=source,
            sha256=checkpoint.sha256,
            format=checkpoint.format.name,
            tokenizer=None if tokenizer is None else str(tokenizer),
            config=checkpoint.config,
            tensors=tensors,
            out=out,
            files=tuple(str(path.relative_to(folder)) for path in files),
            url=url,
        )


def save_and_check(converted: ModelMixin | DiffusionPipeline, folder: Path, variant: str | None) -> int:
    """Saves a model or a pipeline, also in half precision if asked for, and checks that it loads as it was.

    Returns:
        `int`: Number of tensors.

    Raises:
        OSError: If tensors or configs differ after loading again.
        ValueError: If weights are out of the range of `variant`.
    """
    converted.save_pretrained(folder)
    saved: dict[str | None, ModelMixin | DiffusionPipeline] = {None: converted}
    if variant is not None:
        half = type(converted).from_pretrained(folder)
        for name, model in _models(half).items():
            # LlamaGen runs its text encoder in bfloat16, in which it is saved. T5 overflows in float16.
            model.to(torch.bfloat16 if name == "text_encoder" else VARIANTS[variant])
            overflowed = sorted(key for key, tensor in model.state_dict().items() if not tensor.isfinite().all())
            if overflowed:
                raise ValueError(
                    f"Weights must lie in the range of {variant}, but {', '.join(overflowed)} do not. Choose bf16."
                )
        half.save_pretrained(folder, variant=variant)
        saved[variant] = half
    for suffix, expected in saved.items():  # after all is written
        dtypes = {name: model.dtype for name, model in _models(expected).items()}
        copy = _state(type(converted).from_pretrained(folder, variant=suffix, dtype=dtypes.get("", dtypes)))
        differing = sorted(key for key, value in _state(expected).items() if not _equal(value, copy.get(key)))
        if differing:
            raise OSError(
                f"What is written must equal the source, but differs in {', '.join(differing)}. Check the disk and "
                "convert again."
            )
    return sum(isinstance(value, torch.Tensor) for value in _state(converted).values())


def _models(converted: ModelMixin | DiffusionPipeline) -> dict[str, torch.nn.Module]:
    """The model, or the models of a pipeline by name. The codebook stays in float32 by itself."""
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

"""Converts an original next-scale transformer and its tokenizer to a Hub repository that holds a pipeline."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from svqvae_hf.atomic_io import check_new_folder
from svqvae_hf.conversion.new_repository import check_arguments, halve, new_repository
from svqvae_hf.hub.model_cards import pipeline_card
from svqvae_hf.hub.repositories import hub_repo, prepare_repo, push_output
from svqvae_hf.loaders.checkpoints import Checkpoint
from svqvae_hf.loaders.next_scale_checkpoints import read_next_scale_checkpoint
from svqvae_hf.models.modeling_next_scale import NextScaleTransformer
from svqvae_hf.models.modeling_svqvae import SVQVAE
from svqvae_hf.pipelines.pipeline_next_scale import DEFAULT_STEPS, SVQVAENextScalePipeline
from svqvae_hf.pipelines.schedules import make_schedule

CHECK_SIDE = 4  # side in ids of the image that a written pipeline is checked on


@dataclass(frozen=True)
class PipelineReport:
    """Result of [`convert_next_scale`]. `str(report)` formats it for a terminal.

    Args:
        source (`str`): Source, as passed by the caller.
        sha256 (`str`): SHA-256 of the source file, in hexadecimal.
        tokenizer (`str`): Source of the tokenizer.
        config (`dict[str, Any]`): Config of the transformer.
        tensors (`int`): Number of tensors of both models. All were bit-equal when the result was loaded again.
        out (`Path`): Folder of the repository.
        files (`tuple[str, ...]`): Names of the files in it.
        url (`str`, *optional*): URL of the commit or pull request, if the result was pushed.
    """

    source: str
    sha256: str
    tokenizer: str
    config: dict[str, Any]
    tensors: int
    out: Path
    files: tuple[str, ...]
    url: str | None

    def __str__(self) -> str:
        config = ", ".join(f"{key}={value}" for key, value in self.config.items())
        lines = [
            f"read     {self.source} (transformer, sha256 {self.sha256}), {self.tokenizer} (tokenizer)",
            f"config   {config}",
            f"checked  {self.tensors} tensors and the ids of an image, equal after loading again",
            f"written  {self.out}: {', '.join(self.files)}",
        ]
        return "\n".join(lines if self.url is None else [*lines, f"pushed   {self.url}"])


def convert_next_scale(
    source: str | Path,
    out: str | Path,
    tokenizer: str | Path,
    *,
    image_size: int | None = None,
    variant: str | None = None,
    license: str | None = None,
    push_to_hub: str | None = None,
    private: bool | None = None,
    create_pr: bool = False,
) -> PipelineReport:
    """Converts a transformer of FlexVAR to a Hub repository that holds a [`SVQVAENextScalePipeline`].

    The pipeline is written under a temporary name, loaded again and compared.

    Args:
        source (`str` or `Path`): Checkpoint of the transformer: local file, or `org/repo:file` on the Hub.
        out (`str` or `Path`): Folder to create.
        tokenizer (`str` or `Path`): Tokenizer that it was trained with: checkpoint file, `org/repo:file`, model folder
            or Hub id.
        image_size (`int`, *optional*): Side in pixels of the training images, by default `sample_size` of the
            tokenizer.
        variant (`str`, *optional*): Also write half-precision weights, `fp16` or `bf16`.
        license (`str`, *optional*): Licence of the weights, by the Hub's identifier; by default `unknown`.
        push_to_hub (`str`, *optional*): Hub repository `org/name` to upload the result to. It is created as soon as
            the source is read.
        private (`bool`, *optional*): Whether a new repository is private.
        create_pr (`bool`, defaults to `False`): Open a pull request instead of committing.

    Returns:
        [`PipelineReport`]: Sources, config and files.

    Raises:
        OSError: If a source cannot be read, `out` cannot be written, or the upload fails.
        ValueError: If the source is not a checkpoint of such a transformer, the tokenizer has another codebook size,
            or an argument is wrong.
    """
    check_arguments(variant, push_to_hub, private, create_pr)
    out = check_new_folder(Path(out))
    checkpoint = read_next_scale_checkpoint(source, NextScaleTransformer)
    vqvae = load_tokenizer(tokenizer)
    pixels = vqvae.config["sample_size"] if image_size is None else image_size
    if pixels < 1 or pixels % vqvae.f:
        raise ValueError(f"`image_size` must be a positive multiple of f = {vqvae.f} of the tokenizer, got {pixels}.")
    side = pixels // vqvae.f
    schedule = [list(size) for size in make_schedule((side, side), min(DEFAULT_STEPS, side))]
    pipeline = SVQVAENextScalePipeline(vqvae, checkpoint.model(), schedule=schedule)
    if push_to_hub is not None:
        prepare_repo(push_to_hub, private=private, license=license)
    with new_repository(out, _card(pipeline, checkpoint, tokenizer, push_to_hub or out.name, license)) as folder:
        _save(pipeline, folder)
        if variant is not None:
            for model in (vqvae, pipeline.transformer):
                halve(model, variant)
            _save(pipeline, folder, variant)
    return PipelineReport(
        source=checkpoint.source,
        sha256=checkpoint.sha256,
        tokenizer=str(tokenizer),
        config=checkpoint.config,
        tensors=len(checkpoint.state_dict) + len(vqvae.state_dict()),
        out=out,
        files=tuple(sorted(str(file.relative_to(out)) for file in out.rglob("*") if file.is_file())),
        url=push_output(out, push_to_hub, "Upload converted pipeline", create_pr=create_pr) if push_to_hub else None,
    )


def load_tokenizer(source: str | Path) -> SVQVAE:
    """Loads a tokenizer from an original checkpoint, a folder or the Hub, in float32 and evaluation mode."""
    if Path(source).is_file() or hub_repo(source) is not None:
        return SVQVAE.from_single_file(source)
    vqvae = SVQVAE.from_pretrained(source).eval()
    vqvae.register_to_config(_name_or_path=public_name(source))
    return vqvae


def public_name(source: str | Path) -> str:
    """Name of a source, without the path of a local one."""
    return Path(source).name if Path(source).exists() else str(source)


def _card(
    pipeline: SVQVAENextScalePipeline,
    checkpoint: Checkpoint,
    tokenizer: str | Path,
    repo_id: str,
    license: str | None,
) -> str:
    summary, call = pipeline.describe()
    base_model = hub_repo(checkpoint.source)
    file = checkpoint.source if base_model else checkpoint.path.name  # a public card must not show a path
    return pipeline_card(
        SVQVAENextScalePipeline,
        repo_id=repo_id,
        summary=summary,
        call=call,
        tags=["svqvae", "next-scale", "class-conditional"],
        license=license,
        base_model=base_model,
        provenance={
            "layout": checkpoint.format.title,
            "source": f"`{file}`",
            "sha256 of the source": f"`{checkpoint.sha256}`",
            "tokenizer": f"`{public_name(tokenizer)}`",
        },
    )


def _save(pipeline: SVQVAENextScalePipeline, folder: Path, variant: str | None = None) -> None:
    """Writes a pipeline, loads it again and compares both."""
    pipeline.save_pretrained(folder, variant=variant)
    copy = SVQVAENextScalePipeline.from_pretrained(folder, variant=variant, dtype=pipeline.transformer.dtype)
    differing = [
        f"{name}.{key}"
        for name in ("vqvae", "transformer")
        for key, tensor in getattr(pipeline, name).state_dict().items()
        if not torch.equal(tensor, getattr(copy, name).state_dict()[key])
    ]
    ids: list[torch.Tensor] = []
    for model in (pipeline, copy):
        model.set_progress_bar_config(disable=True)
        side = CHECK_SIDE * model.vqvae.f
        ids += model(0, side, side, num_inference_steps=2, temperature=0, output_type="latent", return_dict=False)
    if differing or not torch.equal(*ids):
        raise OSError(
            f"The written pipeline must equal the source, but differs in {', '.join(differing) or 'its ids'}. Check "
            "the disk and convert again."
        )

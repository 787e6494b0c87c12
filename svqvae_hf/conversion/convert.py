"""Converts an original checkpoint to a Hub repository: card, config and safetensors."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from svqvae_hf.atomic_io import check_new_folder
from svqvae_hf.conversion.new_repository import VARIANTS, check_arguments, halve, new_repository
from svqvae_hf.hub.model_cards import model_card
from svqvae_hf.hub.repositories import hub_repo, prepare_repo, push_output
from svqvae_hf.loaders.checkpoints import Checkpoint, read_checkpoint
from svqvae_hf.models.modeling_svqvae import SVQVAE

CHECK_LATENTS = 8  # side in latents of the random image that a written model is checked on


@dataclass(frozen=True)
class ConversionReport:
    """Result of [`convert`]. `str(report)` formats it for a terminal.

    Args:
        source (`str`): Source, as passed by the caller.
        sha256 (`str`): SHA-256 of the source file, in hexadecimal.
        format (`str`): Name of the [`~svqvae_hf.loaders.checkpoint_formats.CheckpointFormat`].
        config (`dict[str, Any]`): Config of the model.
        tensors (`int`): Number of tensors. All were bit-equal when the result was loaded again.
        out (`Path`): Folder of the repository.
        files (`tuple[str, ...]`): Names of the files in it.
        url (`str`, *optional*): URL of the commit or pull request, if the result was pushed.
    """

    source: str
    sha256: str
    format: str
    config: dict[str, Any]
    tensors: int
    out: Path
    files: tuple[str, ...]
    url: str | None

    def __str__(self) -> str:
        config = ", ".join(f"{key}={value}" for key, value in self.config.items())
        lines = [
            f"read     {self.source} ({self.format}, sha256 {self.sha256})",
            f"config   {config}",
            f"checked  {self.tensors} tensors and the reconstruction of a random image, bit-equal after loading again",
            f"written  {self.out}: {', '.join(self.files)}",
        ]
        return "\n".join(lines if self.url is None else [*lines, f"pushed   {self.url}"])


def convert(
    source: str | Path,
    out: str | Path,
    *,
    use_ema: bool = False,
    variant: str | None = None,
    license: str | None = None,
    push_to_hub: str | None = None,
    private: bool | None = None,
    create_pr: bool = False,
    **config: Any,
) -> ConversionReport:
    """Converts an original checkpoint to a Hub repository: card, config and safetensors.

    The repository is written to a temporary folder beside `out` and loaded again. It is renamed to `out`
    once all tensors and the reconstruction of a random image equal the source. A process that is killed before that
    leaves the temporary folder, `.{out}-*`.

    Args:
        source (`str` or `Path`): Local file, or `org/repo:file` on the Hub.
        out (`str` or `Path`): Folder to create. It may exist if it is empty.
        use_ema (`bool`, defaults to `False`): Use the averaged weights, which LlamaGen's files may have.
        variant (`str`, *optional*): `fp16` or `bf16`, to write the weights in half precision as well. The codebook
            stays in float32, so that ids keep their meaning.
        license (`str`, *optional*): Licence of the weights, by the Hub's identifier; by default `unknown`, because no
            checkpoint states it.
        push_to_hub (`str`, *optional*): Hub repository `org/name` to upload the result to. It is created as soon as
            the source is read, so that a missing login is found early.
        private (`bool`, *optional*): Whether a new repository is private.
        create_pr (`bool`, defaults to `False`): Open a pull request instead of committing.
        **config: Config values that replace the values read from the file, such as `network_range`.

    Returns:
        [`ConversionReport`]: Source, config and files.

    Raises:
        OSError: If the source cannot be read, `out` cannot be written, or the upload fails.
        ValueError: If the source is not a whole checkpoint of a known format, or an argument is wrong.
    """
    check_arguments(variant, push_to_hub, private, create_pr)
    out = check_new_folder(Path(out))
    checkpoint = read_checkpoint(source, SVQVAE, use_ema=use_ema, **config)
    if push_to_hub is not None:
        prepare_repo(push_to_hub, private=private, license=license)
    _write(checkpoint, out, push_to_hub or out.name, license, variant)
    return ConversionReport(
        source=checkpoint.source,
        sha256=checkpoint.sha256,
        format=checkpoint.format.name,
        config=checkpoint.config,
        tensors=len(checkpoint.state_dict),
        out=out,
        files=tuple(sorted(file.name for file in out.iterdir())),
        url=push_output(out, push_to_hub, "Upload converted SVQVAE", create_pr=create_pr) if push_to_hub else None,
    )


def _write(checkpoint: Checkpoint, out: Path, repo_id: str, license: str | None, variant: str | None) -> None:
    """Writes and checks a repository in a temporary folder, then renames it to `out`."""
    model = checkpoint.model()
    base_model = hub_repo(checkpoint.source)
    file = checkpoint.source if base_model else checkpoint.path.name  # a public card must not show a path
    card = model_card(
        model.config,
        repo_id=repo_id,
        license=license,
        base_model=base_model,
        provenance={
            "layout": checkpoint.format.title,
            "source": f"`{file}`{', `ema`' if checkpoint.use_ema else ''}",
            "sha256 of the source": f"`{checkpoint.sha256}`",
        },
        variants={variant: VARIANTS[variant]} if variant else None,
    )
    with new_repository(out, card) as folder:
        _save(model, folder)
        if variant is not None:
            _save(halve(model, variant), folder, variant)


def _save(model: SVQVAE, folder: Path, variant: str | None = None) -> None:
    """Writes a model, loads it again and compares both."""
    model.save_pretrained(folder, variant=variant)
    copy = SVQVAE.from_pretrained(folder, variant=variant, torch_dtype=model.dtype)
    copied = copy.state_dict()
    differing = sorted(
        key
        for key, tensor in model.state_dict().items()
        if tensor.dtype != copied[key].dtype or not torch.equal(tensor, copied[key])
    )
    side = CHECK_LATENTS * model.f
    sample = torch.rand((1, model.config["in_channels"], side, side), generator=torch.Generator().manual_seed(0))
    low, high = model.config["pixel_range"]
    sample = (low + (high - low) * sample).to(model.dtype)
    with torch.no_grad():
        same = torch.equal(model(sample).sample, copy(sample).sample)
    if differing or not same:
        raise OSError(
            "The written model must equal the source, but differs in "
            f"{', '.join(differing) or 'its reconstruction'}. Check the disk and convert again."
        )

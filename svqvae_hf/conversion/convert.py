"""Converts an original checkpoint to a Hub repository: card, config and safetensors."""

from pathlib import Path
from typing import Any

from svqvae_hf.conversion.new_repository import VARIANTS, ConversionReport, NewRepository
from svqvae_hf.loaders.checkpoints import read_checkpoint
from svqvae_hf.models.modeling_svqvae import SVQVAE


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
    standalone: bool = False,
    **config: Any,
) -> ConversionReport:
    """Converts an original checkpoint to a Hub repository: card, config and safetensors.

    The repository is written to a temporary folder beside `out` and loaded again. It is renamed to `out` once its
    tensors and its config equal the source. A process that is killed before that leaves the temporary folder,
    `.{out}-*`.

    Args:
        source (`str` or `Path`): Local file, or `org/repo:file` on the Hub.
        out (`str` or `Path`): Folder to create. It may exist if it is empty.
        use_ema (`bool`, defaults to `False`): Use the EMA weights, which LlamaGen's files may have.
        variant (`str`, *optional*): `fp16` or `bf16`, to write the weights in half precision as well. The codebook
            stays in float32, so that ids keep their meaning.
        license (`str`, *optional*): Licence of the weights, by the Hub's identifier; by default `unknown`, because no
            checkpoint states it.
        push_to_hub (`str`, *optional*): Hub repository `org/name` to upload the result to. It is created as soon as
            the source is read, so that a missing login is found early.
        private (`bool`, *optional*): Whether a new repository is private.
        create_pr (`bool`, defaults to `False`): Open a pull request instead of committing.
        standalone (`bool`, defaults to `False`): Also write the code of the models, see [`CardMixin.push_to_hub`].
        **config: Config values that replace the values read from the file, such as `network_range`.

    Returns:
        [`ConversionReport`]: Source, config and files.

    Raises:
        OSError: If the source cannot be read, `out` cannot be written, or the upload fails.
        ValueError: If the source is not a whole checkpoint of a known format, or an argument is wrong.
    """
    repository = NewRepository(out, variant, license, push_to_hub, private, create_pr, standalone)
    checkpoint = read_checkpoint(source, SVQVAE, use_ema=use_ema, **config)
    variants = {variant: VARIANTS[variant]} if variant else None
    return repository.write(checkpoint.model(SVQVAE), checkpoint, variants=variants)

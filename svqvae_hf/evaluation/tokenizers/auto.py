"""Loads any tokenizer. The class that its config names chooses the adapter."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, VQModel

from svqvae_hf.evaluation.tokenizers.diffusers_models import AutoencoderKLTokenizer, SVQVAETokenizer, VQModelTokenizer
from svqvae_hf.evaluation.tokenizers.protocol import Tokenizer
from svqvae_hf.hub.repositories import REPO_ID, from_hub
from svqvae_hf.models.modeling_svqvae import SVQVAE
from svqvae_hf.tokens.context_model import find_context_model

CLASSES: dict[str, Any] = {"SVQVAE": SVQVAE, "VQModel": VQModel, "AutoencoderKL": AutoencoderKL}


def load_tokenizers(
    source: str,
    device: str | torch.device = "cpu",
    scales: Sequence[float] = (1.0,),
    scale_from: str = "image",
    tile_size: int | None = None,
    overlap: int | None = None,
) -> list[Tokenizer]:
    """Loads a tokenizer in float32 for [`evaluate`], an [`SVQVAE`] once per scale.

    Args:
        source (`str`): Folder, `org/repo` or `org/repo/subfolder` on the Hub. Its `config.json` must name an
            [`SVQVAE`], or diffusers' `VQModel` or `AutoencoderKL`.
        device (`str` or `torch.device`, defaults to `"cpu"`): Device to load it to.
        scales (`Sequence[float]`, defaults to `(1.0,)`): Scales of an [`SVQVAE`].
        scale_from (`str`, defaults to `"image"`): What an [`SVQVAE`] resizes to a scale.
        tile_size (`int`, *optional*): Tiles of an [`SVQVAE`], as in
            [`~svqvae_hf.tokens.image_tokens.choose_tiles`].
        overlap (`int`, *optional*): Their overlap.

    Raises:
        OSError: If it cannot be loaded.
        ValueError: If its config names another class, or weights are missing.
    """
    model_class = CLASSES[class_name(source)]
    folder, place = _split_source(source)
    options = {"use_safetensors": True, "output_loading_info": True, "dtype": torch.float32}
    model, info = from_hub(model_class.from_pretrained, folder, **place, **options)
    lacking = sorted(str(key) for kind in ("missing_keys", "mismatched_keys") for key in info[kind])
    if lacking:
        raise ValueError(
            f"`{source}` must have all weights of {model_class.__name__}, but {len(lacking)} are missing or have "
            f"another shape, among them {lacking[0]}."
        )
    model = model.to(device).eval()
    if model_class is VQModel:
        return [VQModelTokenizer(source, model)]
    if model_class is AutoencoderKL:
        return [AutoencoderKLTokenizer(source, model)]
    context_model = find_context_model(folder, model.codebook_fingerprint(), **place)
    return [
        SVQVAETokenizer(
            source if scale == 1 else f"{source}, scale {scale:g}",
            *(model, scale, scale_from, tile_size, overlap, context_model),
        )
        for scale in scales
    ]


def class_name(source: str) -> str:
    """Class that the config of a folder or Hub id names.

    Raises:
        OSError: If there is no config.
        ValueError: If it names none of `CLASSES`.
    """
    folder, options = _split_source(source)
    if Path(folder).is_dir() and not Path(folder, "config.json").is_file():
        raise ValueError(f"`{source}` must be the folder of a model, but has no config.json.")
    config = from_hub(SVQVAE.load_config, folder, **options)
    found = config.get("_class_name", config.get("model_type")) if isinstance(config, dict) else None
    if found not in [*CLASSES]:
        raise ValueError(
            f"the config.json of `{source}` must name one of {', '.join(CLASSES)}, got {found or 'no class'!s:.80}. "
            "Convert an original checkpoint with `svqvae convert`, or write an adapter."
        )
    return found


def _split_source(source: str) -> tuple[str, dict[str, Any]]:
    """Folder or Hub id, and the subfolder there as an argument of `from_pretrained`."""
    match = re.fullmatch(rf"({REPO_ID})/(.+)", source)
    return (match[1], {"subfolder": match[2]}) if match and not Path(source).exists() else (source, {})

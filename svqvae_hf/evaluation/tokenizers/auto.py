"""Loads any tokenizer. The class that its config names chooses the adapter."""

import json
import re
from collections.abc import Callable, Sequence
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderTiny, VQModel
from huggingface_hub import hf_hub_download
from transformers import ChameleonConfig, ChameleonVQVAE, Emu3Config, Emu3VQVAE, JanusConfig, JanusVQVAE

from svqvae_hf.evaluation.tokenizers.diffusers_models import (
    AutoencoderDCTokenizer,
    AutoencoderKLTokenizer,
    AutoencoderTinyTokenizer,
    SmallestScaleTokenizer,
    SVQVAETokenizer,
    VQModelTokenizer,
)
from svqvae_hf.evaluation.tokenizers.protocol import Tokenizer
from svqvae_hf.evaluation.tokenizers.transformers_models import ChameleonTokenizer, Emu3Tokenizer, JanusTokenizer
from svqvae_hf.hub.repositories import REPO_ID, from_hub
from svqvae_hf.models.modeling_svqvae import SVQVAE
from svqvae_hf.tokens.context_model import find_context_model

Adapter = Callable[[str, Any], Tokenizer]

ADAPTERS: dict[str, tuple[Any, Adapter]] = {  # by `_class_name` of diffusers or `model_type` of transformers
    "SVQVAE": (SVQVAE, SVQVAETokenizer),
    "VQModel": (VQModel, VQModelTokenizer),
    "AutoencoderKL": (AutoencoderKL, AutoencoderKLTokenizer),
    "AutoencoderTiny": (AutoencoderTiny, AutoencoderTinyTokenizer),
    "AutoencoderDC": (AutoencoderDC, AutoencoderDCTokenizer),
    "janus_vqgan": (JanusVQVAE, JanusTokenizer),
    "emu3_vqgan": (Emu3VQVAE, Emu3Tokenizer),
    "chameleon_vqgan": (ChameleonVQVAE, ChameleonTokenizer),
}
WHOLE_MODELS = {"janus": JanusConfig, "emu3": Emu3Config, "chameleon": ChameleonConfig}  # whose part is a tokenizer
WITHIN_WHOLE = {r"^(model\.)?vqmodel\.": ""}  # names of its weights there


def load_tokenizers(
    source: str,
    device: str | torch.device = "cpu",
    scales: Sequence[float] = (1.0,),
    scale_from: str = "image",
    min_psnr: Sequence[float] = (),
) -> list[Tokenizer]:
    """Loads a tokenizer in float32 for [`compare_tokenizers`], an [`SVQVAE`] once per scale and per target.

    Args:
        source (`str`): Folder, `org/repo` or `org/repo/subfolder` on the Hub. Its `config.json` must name an
            [`SVQVAE`], one of diffusers' `VQModel`, `AutoencoderKL`, `AutoencoderTiny` and `AutoencoderDC`, or one of
            transformers' Janus, Emu3 and Chameleon, as a whole model or its tokenizer alone.
        device (`str` or `torch.device`, defaults to `"cpu"`): Device to load it to.
        scales (`Sequence[float]`, defaults to `(1.0,)`): Scales of an [`SVQVAE`].
        scale_from (`str`, defaults to `"image"`): What an [`SVQVAE`] resizes to a scale.
        min_psnr (`Sequence[float]`): Targets in dB. For each, an [`SVQVAE`] codes an image at the smallest of the
            scales that reaches it, or else at the largest.

    Raises:
        OSError: If it cannot be loaded.
        ValueError: If its config names another class, or weights are missing.
    """
    name = class_name(source)
    folder, options = _split_source(source)
    if name in WHOLE_MODELS:
        config = from_hub(WHOLE_MODELS[name].from_pretrained, folder, **options).vq_config
        name = config.model_type
        options |= {"config": config, "key_mapping": WITHIN_WHOLE}
    model_class, adapter = ADAPTERS[name]
    options |= {"use_safetensors": True, "output_loading_info": True, "dtype": torch.float32}
    model, info = from_hub(model_class.from_pretrained, folder, **options)
    lacking = sorted(str(key) for kind in ("missing_keys", "mismatched_keys") for key in info[kind])
    if lacking:
        raise ValueError(
            f"`{source}` must have all weights of {model_class.__name__}, but {len(lacking)} are missing or have "
            f"another shape, among them {lacking[0]}."
        )
    model = model.to(device).eval()
    if model_class is not SVQVAE:
        return [adapter(source, model)]
    context_model = find_context_model(folder, model.codebook_fingerprint(), options.get("subfolder", ""))
    titles = [source if scale == 1 else f"{source}, scale {scale:g}" for scale in scales]
    return [
        *(SVQVAETokenizer(*each, scale_from, context_model) for each in zip(titles, repeat(model), scales)),
        *(
            SmallestScaleTokenizer(
                f"{source}, at least {target:g} dB", model, scales, target, scale_from, context_model
            )
            for target in min_psnr
        ),
    ]


def class_name(source: str) -> str:
    """Class that the config of a folder or Hub id names: its `_class_name` or `model_type`.

    Raises:
        OSError: If there is no config.
        ValueError: If it names no class that has an adapter.
    """
    folder, options = _split_source(source)
    if Path(folder).is_dir():
        path = Path(folder) / "config.json"
        if not path.is_file():
            raise ValueError(f"`{source}` must be the folder of a model, but has no config.json.")
    else:
        path = Path(from_hub(hf_hub_download, folder, filename="config.json", **options))
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"the config.json of `{source}` must be JSON, but is not: {error}") from error
    names = [config.get("_class_name"), config.get("model_type")] if isinstance(config, dict) else []
    known = [*ADAPTERS, *WHOLE_MODELS]
    found = next((name for name in names if name in known), None)
    if found is None:
        named = ", ".join(str(name) for name in names if name) or "no class"
        raise ValueError(
            f"the config.json of `{source}` must name one of {', '.join(known)}, got {named:.80}. Convert an original "
            "checkpoint with `svqvae convert`, or write an adapter."
        )
    return found


def _split_source(source: str) -> tuple[str, dict[str, Any]]:
    """Folder or Hub id, and the subfolder there as an argument of `from_pretrained`."""
    match = re.fullmatch(rf"({REPO_ID})/(.+)", source)
    return (match[1], {"subfolder": match[2]}) if match and not Path(source).exists() else (source, {})

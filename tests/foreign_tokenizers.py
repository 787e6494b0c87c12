"""Small random tokenizers of diffusers, and what each must return for an image, computed by hand."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from diffusers import AutoencoderKL, VQModel

TWO_LEVELS = {"block_out_channels": (8, 16), "norm_num_groups": 4}
TWO_LEVELS |= {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
VQ = TWO_LEVELS | {"num_vq_embeddings": 32}
SPATIAL = {"block_out_channels": (32, 32), "norm_num_groups": 32, "latent_channels": 4, "norm_type": "spatial"}


class ByHand(NamedTuple):
    """Reconstruction of an image, its bits, its tokens, and its ids if it has any."""

    sample: torch.Tensor
    bits: float
    tokens: int
    ids: torch.Tensor | None


class Case(NamedTuple):
    """A class of another library."""

    make: Callable[[], Any]
    by_hand: Callable[[Any, torch.Tensor], ByHand]
    f: int


def vq_by_hand(model: VQModel, sample: torch.Tensor) -> ByHand:
    latents = model.encode(sample).latents
    distances = torch.cdist(latents.flatten(2)[0].T, model.quantize.embedding.weight)
    ids = distances.argmin(1)
    return ByHand(model.decode(latents).sample, 5 * len(ids), len(ids), ids)


def amused_by_hand(model: VQModel, sample: torch.Tensor) -> ByHand:
    found = vq_by_hand(model, (sample + 1) / 2)
    return found._replace(sample=2 * found.sample - 1)


def kl_by_hand(model: AutoencoderKL, sample: torch.Tensor) -> ByHand:
    mean = model.quant_conv(model.encoder(sample)).chunk(2, 1)[0]
    return ByHand(model.decode(mean.half().float()).sample, 16 * mean.numel(), mean[0, 0].numel(), None)


CASES = {
    "VQModel": Case(lambda: VQModel(**VQ), vq_by_hand, 2),
    "VQModel-spatial": Case(lambda: VQModel(**(VQ | SPATIAL)), vq_by_hand, 2),
    "VQModel-lookup": Case(lambda: VQModel(**VQ, lookup_from_codebook=True), amused_by_hand, 2),
    "AutoencoderKL": Case(lambda: AutoencoderKL(**TWO_LEVELS), kl_by_hand, 2),
}


def make_tokenizer(name: str) -> Any:
    """Model of a class, with weights that use several codes."""
    torch.manual_seed(0)
    model = CASES[name].make().eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data = torch.randn_like(parameter) / math.sqrt(parameter[0].numel())
    return model

"""Small random tokenizers of diffusers and transformers, and what each must return for an image, computed by hand."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderTiny, VQModel
from janus import make_janus
from transformers import ChameleonVQVAE, ChameleonVQVAEConfig, Emu3VQVAE, Emu3VQVAEConfig

CODES = 32
TWO_LEVELS = {
    "block_out_channels": (8, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 4,
}
SPATIAL = TWO_LEVELS | {"block_out_channels": (32, 32), "norm_num_groups": 32}
VQGAN = {"base_channels": 32, "channel_multiplier": [1, 1], "num_res_blocks": 1, "latent_channels": 4}


class ByHand(NamedTuple):
    """Reconstruction of an image, its bits, its tokens, and its ids if it has any."""

    sample: torch.Tensor | None
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


def tiny_by_hand(model: AutoencoderTiny, sample: torch.Tensor) -> ByHand:
    latents = model.encode(sample).latents
    return ByHand(model(sample).sample, 8 * latents.numel(), latents[0, 0].numel(), None)


def dc_by_hand(model: AutoencoderDC, sample: torch.Tensor) -> ByHand:
    latents = model.encoder(sample).half()
    return ByHand(model.decoder(latents.float()), 16 * latents.numel(), latents[0, 0].numel(), None)


def janus_by_hand(model: Any, sample: torch.Tensor) -> ByHand:
    hidden = model.quant_conv(model.encoder(sample))
    codes = model.quantize.embedding.weight
    ids = torch.cdist(hidden.flatten(2)[0].T, codes).argmin(1)
    entries = F.normalize(codes[ids], dim=1).T.view(1, -1, *hidden.shape[-2:])
    return ByHand(model.decoder(model.post_quant_conv(entries)), 6 * len(ids), len(ids), ids)


def emu3_by_hand(model: Emu3VQVAE, sample: torch.Tensor) -> ByHand:
    (ids,) = model.encode(sample[:, None].repeat(1, 4, 1, 1, 1), [sample.shape[-2:]], return_dict=True).image_tokens
    frames = model.decode(ids[None])
    return ByHand(frames[:, 0], 5 * ids.numel(), ids.numel(), ids)


def chameleon_by_hand(model: ChameleonVQVAE, sample: torch.Tensor) -> ByHand:
    hidden = model.quant_conv(model.encoder(sample))
    ids = torch.cdist(hidden.flatten(2)[0].T, model.quantize.embedding.weight).argmin(1)
    return ByHand(None, 5 * len(ids), len(ids), ids)


def make_dc() -> AutoencoderDC:
    sides = {"block_types": ("ResBlock", "EfficientViTBlock"), "block_out_channels": (8, 8)}
    sides |= {"layers_per_block": (1, 1), "qkv_multiscales": ((), (5,))}
    both = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in sides.items()}
    return AutoencoderDC(latent_channels=4, attention_head_dim=2, **both)


def make_tiny_autoencoder() -> AutoencoderTiny:
    widths = {"encoder_block_out_channels": (8, 8, 8), "decoder_block_out_channels": (8, 8, 8)}
    return AutoencoderTiny(**widths, num_encoder_blocks=(1, 1, 1), num_decoder_blocks=(1, 1, 1))


def make_chameleon() -> ChameleonVQVAE:
    return ChameleonVQVAE(ChameleonVQVAEConfig(**VQGAN, embed_dim=4, num_embeddings=CODES, resolution=32))


CASES = {
    "VQModel": Case(lambda: VQModel(**TWO_LEVELS, num_vq_embeddings=CODES), vq_by_hand, 2),
    "VQModel-spatial": Case(
        lambda: VQModel(**SPATIAL, num_vq_embeddings=CODES, latent_channels=4, norm_type="spatial"), vq_by_hand, 2
    ),
    "VQModel-lookup": Case(
        lambda: VQModel(**TWO_LEVELS, num_vq_embeddings=CODES, lookup_from_codebook=True), amused_by_hand, 2
    ),
    "AutoencoderKL": Case(lambda: AutoencoderKL(**TWO_LEVELS), kl_by_hand, 2),
    "AutoencoderTiny": Case(make_tiny_autoencoder, tiny_by_hand, 4),
    "AutoencoderDC": Case(make_dc, dc_by_hand, 2),
    "JanusVQVAE": Case(lambda: make_janus(6), janus_by_hand, 4),
    "Emu3VQVAE": Case(
        lambda: Emu3VQVAE(
            Emu3VQVAEConfig(**VQGAN, codebook_size=CODES, embed_dim=4, attn_resolutions=[], hidden_size=32)
        ),
        emu3_by_hand,
        2,
    ),
    "ChameleonVQVAE": Case(make_chameleon, chameleon_by_hand, 2),
}


def make_tokenizer(name: str) -> Any:
    """Model of a class, with weights that use several codes."""
    torch.manual_seed(0)
    model = CASES[name].make().eval()
    if name != "JanusVQVAE":
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.data = torch.randn_like(parameter) / math.sqrt(parameter[0].numel())
    return model

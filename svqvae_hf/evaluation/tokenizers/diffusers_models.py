"""Adapters of [`SVQVAE`] and of models of diffusers."""

import torch
from diffusers import AutoencoderKL, VQModel

from svqvae_hf.models.context_model import ContextModel
from svqvae_hf.models.image_processing_svqvae import map_range
from svqvae_hf.models.modeling_svqvae import SVQVAE
from svqvae_hf.tokens.image_tokens import image_tokens
from svqvae_hf.tokens.token_files import token_file_content


class SVQVAETokenizer:
    """[`SVQVAE`] at one scale, as a whole image.

    Args:
        title (`str`): Name in the tables.
        model ([`SVQVAE`]): Model in evaluation mode.
        scale (`float`, defaults to 1.0): Output side over input side. The reconstruction is resized to the image.
        scale_from (`str`, defaults to `"image"`): What is resized to the scale, see [`SVQVAE.forward`].
        context_model ([`ContextModel`], *optional*): Context model that compresses token files.
    """

    def __init__(
        self,
        title: str,
        model: SVQVAE,
        scale: float = 1.0,
        scale_from: str = "image",
        context_model: ContextModel | None = None,
    ):
        self.context_model = context_model
        self.title, self.model, self.scale, self.scale_from = title, model, scale, scale_from
        self.f = model.f
        self.codebook_size = model.config["codebook_size"]
        self.low, high = model.config["pixel_range"]
        self.half_range = (high - self.low) / 2

    def encode(self, sample: torch.Tensor) -> torch.Tensor:
        """Ids `(1, h, w)`."""
        return self.model.encode_tokens((sample + 1) * self.half_range + self.low, [self.scale], self.scale_from)[0]

    def stored_bits(self, codes: torch.Tensor, height: int, width: int) -> int | None:
        """Bits of the compressed token file of the latest image, whose sides are in pixels."""
        if self.context_model is None:
            return None
        tokens = image_tokens(self.model, [codes[0].cpu()], height, width, [self.scale], self.scale_from)
        return 8 * len(token_file_content(tokens, self.context_model))

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Image `(1, 3, h * f, w * f)`."""
        return (self.model.decode_tokens(codes) - self.low) / self.half_range - 1


class VQModelTokenizer:
    """`VQModel` of diffusers. Those that look up codes are aMUSEd's, whose pixels lie in [0, 1]; others in [-1, 1]."""

    def __init__(self, title: str, model: VQModel):
        self.title, self.model = title, model
        self.f = 2 ** (len(model.config.block_out_channels) - 1)
        self.codebook_size = model.config.num_vq_embeddings
        self.pixel_range = (0, 1) if model.config.lookup_from_codebook else (-1, 1)

    def encode(self, sample: torch.Tensor) -> torch.Tensor:
        """Ids `(1, h, w)`."""
        latents = self.model.encode(map_range(sample, (-1, 1), self.pixel_range)).latents
        return self.model.quantize(latents)[2][2].view(1, *latents.shape[-2:])

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Image from the entries of the codebook."""
        shape = (*codes.shape, self.model.config.vq_embed_dim or self.model.config.latent_channels)
        quantized = self.model.quantize.get_codebook_entry(codes.flatten(), shape)
        spatial = quantized if self.model.config.norm_type == "spatial" else None
        decoded = self.model.decoder(self.model.post_quant_conv(quantized), spatial)
        return map_range(decoded, self.pixel_range, (-1, 1))


class AutoencoderKLTokenizer:
    """`AutoencoderKL` of diffusers. Latents are the mean of their distribution, stored in float16."""

    codebook_size = None

    def __init__(self, title: str, model: AutoencoderKL):
        self.title, self.model = title, model
        self.f = 2 ** (len(model.config.block_out_channels) - 1)

    def encode(self, sample: torch.Tensor) -> torch.Tensor:
        """Latents `(1, latent_channels, h, w)`."""
        return self.model.encode(sample).latent_dist.mode().half()

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Image from the latents."""
        return self.model.decode(codes.float()).sample

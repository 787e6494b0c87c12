"""Adapters of [`SVQVAE`] and of models of diffusers."""

from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL, VQModel

from svqvae_hf.evaluation.measuring import to_image, to_tensor
from svqvae_hf.models.modeling_svqvae import SVQVAE
from svqvae_hf.models.resizing import map_range
from svqvae_hf.tokens.context_model import ContextModel
from svqvae_hf.tokens.image_tokens import choose_tiles, decode_image, encode_image
from svqvae_hf.tokens.token_files import ImageTokens, token_file_content


@dataclass
class SVQVAETokenizer:
    """[`SVQVAE`] at one scale, as the commands run it: as a whole image, or by tiles where that takes too much memory.

    Args:
        title (`str`): Name in the tables.
        model ([`SVQVAE`]): Model in evaluation mode.
        scale (`float`, defaults to 1.0): Output side over input side.
        scale_from (`str`, defaults to `"image"`): What is resized to the scale, see [`SVQVAE.encode_scales`].
        tile_size (`int`, *optional*): As in [`~svqvae_hf.tokens.image_tokens.choose_tiles`].
        overlap (`int`, *optional*): As in [`~svqvae_hf.tokens.image_tokens.choose_tiles`].
        context_model ([`ContextModel`], *optional*): Context model of the tokenizer, to count compressed bits.
    """

    f = 1  # the model pads images itself

    title: str
    model: SVQVAE
    scale: float = 1.0
    scale_from: str = "image"
    tile_size: int | None = None
    overlap: int | None = None
    context_model: ContextModel | None = None

    def __post_init__(self) -> None:
        self.codebook_size = self.model.config["codebook_size"]

    def encode(self, sample: torch.Tensor) -> ImageTokens:
        """Content of a token file."""
        height, width = sample.shape[-2:]
        tiles = choose_tiles(self.model, height, width, [self.scale], self.tile_size, self.overlap)
        return encode_image(self.model, to_image(sample), self.scale, self.scale_from, tiles)

    def stored_bits(self, codes: ImageTokens) -> int:
        """Bits of the token file, compressed if there is a context model."""
        return 8 * len(token_file_content(codes, self.context_model))

    def decode(self, codes: ImageTokens) -> torch.Tensor:
        """Image of the size of the scale."""
        (image,) = decode_image(self.model, codes, tiles=codes.tiles)
        return to_tensor(image) / 127.5 - 1


class VQModelTokenizer:
    """`VQModel` of diffusers. Pixels lie in [0, 1] if it looks up codes, as in aMUSEd, and otherwise in [-1, 1]."""

    def __init__(self, title: str, model: VQModel):
        self.title = title
        self.model = model
        self.f = 2 ** (len(model.config.block_out_channels) - 1)
        self.codebook_size = model.config.num_vq_embeddings
        self.pixel_range = (0, 1) if model.config.lookup_from_codebook else (-1, 1)

    def encode(self, sample: torch.Tensor) -> torch.Tensor:
        """Ids `(1, h, w)`."""
        pixels = map_range(sample, source=(-1, 1), target=self.pixel_range)
        latents = self.model.encode(pixels).latents  # (1, latent_channels, h, w)
        _, _, (_, _, flat_ids) = self.model.quantize(latents)  # (h * w,)
        height, width = latents.shape[-2:]
        return flat_ids.view(1, height, width)

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Image `(1, 3, height, width)` from ids `(1, h, w)`."""
        config = self.model.config
        code_channels = config.vq_embed_dim or config.latent_channels
        batch, height, width = codes.shape
        shape = (batch, height, width, code_channels)  # `get_codebook_entry` moves the channels to the second place
        quantized = self.model.quantize.get_codebook_entry(codes.flatten(), shape)  # (batch, code_channels, h, w)
        latents = self.model.post_quant_conv(quantized)
        if config.norm_type == "spatial":  # the norms of such a decoder also read the quantized latents
            decoded = self.model.decoder(latents, quantized)
        else:
            decoded = self.model.decoder(latents)
        return map_range(decoded, source=self.pixel_range, target=(-1, 1))


class AutoencoderKLTokenizer:
    """`AutoencoderKL` of diffusers. Latents are the mean of their distribution, stored in float16."""

    codebook_size = None

    def __init__(self, title: str, model: AutoencoderKL):
        self.title = title
        self.model = model
        self.f = 2 ** (len(model.config.block_out_channels) - 1)

    def encode(self, sample: torch.Tensor) -> torch.Tensor:
        """Latents `(1, latent_channels, h, w)`."""
        return self.model.encode(sample).latent_dist.mode().half()

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Image from the latents."""
        return self.model.decode(codes.float()).sample

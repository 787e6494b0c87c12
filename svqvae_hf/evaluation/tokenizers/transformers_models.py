"""Adapters of the tokenizers of transformers: Chameleon, Janus and Emu3."""

import torch
from transformers import ChameleonVQVAE, Emu3VQVAE, JanusVQVAE


class ChameleonTokenizer:
    """`ChameleonVQVAE` of transformers, which has no decoder, so that its images cannot be compared."""

    def __init__(self, title: str, model: ChameleonVQVAE | JanusVQVAE):
        self.title, self.model = title, model
        self.f = 2 ** (len(model.config.channel_multiplier) - 1)
        self.codebook_size = model.config.num_embeddings

    def encode(self, sample: torch.Tensor) -> torch.Tensor:
        """Ids `(1, h, w)`."""
        ids = self.model.encode(sample, return_dict=True).image_tokens
        return ids.view(1, sample.shape[-2] // self.f, sample.shape[-1] // self.f)

    def decode(self, codes: torch.Tensor) -> torch.Tensor | None:
        """None."""
        return None


class JanusTokenizer(ChameleonTokenizer):
    """`JanusVQVAE` of transformers: the encoder of Chameleon, and a decoder."""

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Image from ids of any grid. The model itself takes only the square grid of its config."""
        self.model.quantize.quant_state_dims = list(codes.shape[1:])
        return self.model.decode(codes.flatten(1))


class Emu3Tokenizer:
    """`Emu3VQVAE` of transformers. An image is a video of one frame."""

    def __init__(self, title: str, model: Emu3VQVAE):
        self.title, self.model = title, model
        self.f = model.spatial_scale_factor
        self.codebook_size = model.config.codebook_size

    def encode(self, sample: torch.Tensor) -> torch.Tensor:
        """Ids `(1, h, w)`."""
        sizes = torch.tensor([sample.shape[-2:]])
        return self.model.encode(sample, sizes, return_dict=True).image_tokens[0][None]

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Image from the ids."""
        return self.model.decode(codes)

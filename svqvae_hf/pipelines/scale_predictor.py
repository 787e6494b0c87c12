"""Prediction of the logits of an image, scale by scale."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import DynamicCache

from svqvae_hf.pipelines.reserved_cache import reserve
from svqvae_hf.pipelines.schedules import Size


class ScalePredictor:
    """Next-scale transformer with its cache, and the codes of the scale that it reads next.

    Args:
        transformer ([`NextScaleTransformer`]): Transformer.
        vqvae ([`SVQVAE`]): Tokenizer, for its codes.
        labels (`torch.Tensor` of shape `(images,)`): Classes.
        sizes (list of `(height, width)`): Schedule.
        text (`torch.Tensor` of shape `(images, length)`, *optional*): Tokens of captions.
        pad_token (`int`, defaults to 0): Token of an empty caption.
        guided (`bool`): Whether to predict without the class or the caption as well.
    """

    def __init__(
        self,
        transformer: Any,
        vqvae: Any,
        labels: torch.Tensor,
        sizes: Sequence[Size],
        text: torch.Tensor | None = None,
        pad_token: int = 0,
        *,
        guided: bool,
    ):
        self.transformer = transformer
        quantize = vqvae.quantize
        stored_on = quantize.embedding().device  # the CPU while the tokenizer is offloaded
        codebook = quantize.get_codebook_entry(torch.arange(quantize.size, device=stored_on))
        self.codebook = codebook.to(labels.device)
        no_class = torch.full_like(labels, self.transformer.config["num_classes"])
        self.labels = torch.cat([labels, no_class]) if guided else labels
        self.text = text
        if guided and text is not None:
            self.text = torch.cat([text, torch.full_like(text, pad_token)])
        self.cache = DynamicCache()
        self.later_tokens = sum(height * width for height, width in sizes[1:])
        self.codes: list[torch.Tensor] = []

    def next_logits(self, size: Size) -> torch.Tensor:
        """Logits of the next scale, `(images, tokens, codebook_size)`; if guided, then those without a condition."""
        return self.transformer(self.labels, self.codes, [size], self.cache, self.text).logits

    def add(self, ids: torch.Tensor) -> None:
        """Takes the ids `(images, h, w)` of the scale."""
        if not self.codes:
            reserve(self.cache, self.later_tokens)
        codes = self.codebook[ids].permute(0, 3, 1, 2)
        self.codes = [codes.repeat(len(self.labels) // len(ids), 1, 1, 1)]

"""Prediction of the logits of an image, scale by scale."""

from typing import Any

import torch
from transformers import DynamicCache


class ScalePredictor:
    """Next-scale transformer with its cache, and the codes of the scale that it reads next.

    Args:
        transformer ([`NextScaleTransformer`]): Transformer.
        vqvae ([`SVQVAE`]): Tokenizer, for its codes.
        labels (`torch.Tensor` of shape `(images,)`): Classes.
        text (`torch.Tensor` of shape `(images, length)`, *optional*): Tokens of captions.
        pad_token (`int`, defaults to 0): Token of an empty caption.
        guided (`bool`): Whether to predict without the class or the caption as well.
    """

    def __init__(
        self,
        transformer: Any,
        vqvae: Any,
        labels: torch.Tensor,
        text: torch.Tensor | None = None,
        pad_token: int = 0,
        *,
        guided: bool,
    ):
        self.transformer = transformer
        quantize = vqvae.quantize
        stored_on = quantize.embedding.table().device  # the CPU while the tokenizer is offloaded
        codebook = quantize.get_codebook_entry(torch.arange(quantize.size, device=stored_on))
        self.codebook = codebook.to(labels.device)
        no_class = torch.full_like(labels, self.transformer.config["num_classes"])
        self.labels = torch.cat([labels, no_class]) if guided else labels
        self.text = text
        if guided and text is not None:
            self.text = torch.cat([text, torch.full_like(text, pad_token)])
        self.cache = DynamicCache()
        self.codes: list[torch.Tensor] = []

    def next_logits(self, size: tuple[int, int]) -> torch.Tensor:
        """Logits of the next scale, `(images, tokens, codebook_size)`; if guided, then those without a condition."""
        return self.transformer(self.labels, self.codes, [size], self.cache, self.text).logits

    def add(self, ids: torch.Tensor) -> None:
        """Takes the ids `(images, h, w)` of the scale."""
        codes = self.codebook[ids].permute(0, 3, 1, 2)
        self.codes = [codes.repeat(len(self.labels) // len(ids), 1, 1, 1)]

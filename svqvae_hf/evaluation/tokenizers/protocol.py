"""The protocol of a tokenizer: what an adapter must have to be measured beside the others."""

import math
from typing import Any, Protocol, TypeAlias

import torch

Codes: TypeAlias = torch.Tensor | bytes


class Tokenizer(Protocol):
    """Codes images and decodes them from the codes alone, so that the bits of the codes are the bits of the image.

    Any class with these members can be measured; it need not inherit from this one. A class whose codes are ids may
    also have `stored_bits(codes, height, width)`: bits of the compressed file of an image with these sides in pixels.
    """

    @property
    def title(self) -> str:
        """Name in the tables, different for each tokenizer."""

    @property
    def f(self) -> int:
        """Pixels per side of a token. [`compare_tokenizers`] pads images to multiples of it."""

    @property
    def codebook_size(self) -> int | None:
        """Number of different ids; `None` if the codes are not ids."""

    def encode(self, sample: torch.Tensor) -> Codes:
        """Codes one image.

        Args:
            sample (`torch.Tensor` of shape `(1, 3, height, width)`): Image in [-1, 1], float32, on the device of the
                evaluation. Sides are multiples of `f`.

        Returns:
            `torch.Tensor` or `bytes`: Ids of any shape in `[0, codebook_size)`, int64; or latents `(1, channels, h,
            w)` in the type in which they are stored; or the content of a file.
        """

    def decode(self, codes: Any) -> torch.Tensor:
        """Decodes the result of `encode`.

        Returns:
            `torch.Tensor` of shape `(1, 3, height, width)`: Image in [-1, 1]. Values outside are clamped, and another
            size is resized to the size of the sample.
        """


def count_bits(codes: Codes, codebook_size: int | None) -> float:
    """Bits of codes by count: `log2(codebook_size)` per id, all bits of a latent's type, or 8 per byte.

    Args:
        codes (`torch.Tensor` or `bytes`): Result of [`Tokenizer.encode`].
        codebook_size (`int`, *optional*): Of the tokenizer.
    """
    if isinstance(codes, bytes):
        return 8 * len(codes)
    return codes.numel() * (math.log2(codebook_size) if codebook_size else 8 * codes.element_size())


def count_tokens(codes: Codes, codebook_size: int | None) -> int | None:
    """Number of ids, or of positions `h * w` of latents; `None` for a file."""
    if isinstance(codes, bytes):
        return None
    return codes.numel() if codebook_size else codes.shape[-2] * codes.shape[-1]

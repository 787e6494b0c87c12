"""The protocol of a tokenizer: what an adapter must have to be measured beside the others."""

import math
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import torch

from svqvae_hf.tokens.token_files import ImageTokens

Codes: TypeAlias = torch.Tensor | ImageTokens | bytes


class Tokenizer(Protocol):
    """Encodes images, and decodes them from nothing but their codes, so an image costs the bits of its codes.

    Any class with these members can be measured; it need not inherit from this one. A class whose codes are stored in
    fewer or more bits than their count may also have `stored_bits(codes)`.
    """

    @property
    def title(self) -> str:
        """Name in the tables, different for each tokenizer."""

    @property
    def f(self) -> int:
        """Pixels per side of a token. [`evaluate`] pads images to multiples of it."""

    @property
    def codebook_size(self) -> int | None:
        """Number of different ids; `None` if the codes are not ids."""

    def encode(self, sample: torch.Tensor) -> Codes:
        """Codes one image.

        Args:
            sample (`torch.Tensor` of shape `(1, 3, height, width)`): Image in [-1, 1], float32, on the device of the
                evaluation. Sides are multiples of `f`.

        Returns:
            `torch.Tensor`, [`ImageTokens`] or `bytes`: Ids of any shape in `[0, codebook_size)`, int64; or latents
            `(1, channels, h, w)` in the type in which they are stored; or the content of a file.
        """

    def decode(self, codes: Any) -> torch.Tensor:
        """Decodes the result of `encode`.

        Returns:
            `torch.Tensor` of shape `(1, 3, height, width)`: Image in [-1, 1]. Values outside are clamped, and another
            size is resized to the size of the sample.
        """


@dataclass(frozen=True, eq=False)
class CodeCount:
    """How many codes an image has.

    Args:
        tokens (`int`, *optional*): Number of ids, or of positions `h * w` of latents; `None` for a file.
        bits (`float`): Bits by count: `log2(codebook_size)` per id, all bits of the type of a latent, or 8 per byte.
        ids (`torch.Tensor`, *optional*): The ids; `None` if the codes are not ids.
    """

    tokens: int | None
    bits: float
    ids: torch.Tensor | None


def count(codes: Codes, codebook_size: int | None) -> CodeCount:
    """Counts codes.

    Args:
        codes (`torch.Tensor`, [`ImageTokens`] or `bytes`): Result of [`Tokenizer.encode`].
        codebook_size (`int`, *optional*): Codebook size of the tokenizer; `None` if the codes are not ids.
    """
    if isinstance(codes, bytes):
        return CodeCount(tokens=None, bits=8 * len(codes), ids=None)
    if isinstance(codes, ImageTokens):
        (ids_of_only_scale,) = codes.ids
        return _count_ids(ids_of_only_scale, codes.codebook_size)
    if codebook_size is not None:
        return _count_ids(codes, codebook_size)
    return _count_latents(codes)


def _count_ids(ids: torch.Tensor, codebook_size: int) -> CodeCount:
    """Counts ids of any shape."""
    num_ids = ids.numel()
    bits_per_id = math.log2(codebook_size)
    return CodeCount(tokens=num_ids, bits=num_ids * bits_per_id, ids=ids)


def _count_latents(latents: torch.Tensor) -> CodeCount:
    """Counts latents `(1, channels, h, w)`, in the type in which they are stored."""
    height, width = latents.shape[-2:]
    bits_per_number = 8 * latents.element_size()  # the element size is in bytes
    return CodeCount(tokens=height * width, bits=latents.numel() * bits_per_number, ids=None)


def stored_bits(tokenizer: Tokenizer, codes: Codes) -> float:
    """Bits of the stored codes of an image: as the tokenizer says, otherwise by count.

    Args:
        tokenizer ([`Tokenizer`]): Tokenizer.
        codes (`torch.Tensor`, [`ImageTokens`] or `bytes`): Result of its `encode`.
    """
    if hasattr(tokenizer, "stored_bits"):
        return tokenizer.stored_bits(codes)
    return count(codes, tokenizer.codebook_size).bits

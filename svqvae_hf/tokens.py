import hashlib
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open

FORMAT = "svqvae-tokens"
FORMAT_VERSION = "1"
UINT16_CODES = 2**16  # a codebook of at most so many rows has ids that fit 16 bits


@dataclass(frozen=True, eq=False)
class ImageTokens:
    """The ids of one image at one or several scales, with all that decoding needs: the content of a token file.

    Args:
        ids (`list[torch.Tensor]`, each of shape `(h, w)`, int64): One grid of ids per scale.
        height (`int`): Height of the image in pixels.
        width (`int`): Width of the image in pixels.
        scales (`tuple[float, ...]`): Output side over input side, one per grid, in the order of `ids`.
        f (`int`): Pixels per latent side of the model that made the ids.
        tile_size (`int`, *optional*): Side in pixels of the tiles the image was read by; `None` if it was read whole.
        overlap (`int`, *optional*): Pixels that a tile reads beyond each side of its core; `None` without tiles.
        codebook_size (`int`): Rows of the codebook.
        codebook_fingerprint (`str`): [`codebook_fingerprint`] of the codebook that the ids are rows of.

    Raises:
        ValueError: A value is out of its range, or the ids do not fit the image, the scales or the codebook.
    """

    ids: list[torch.Tensor]
    height: int
    width: int
    scales: tuple[float, ...]
    f: int
    tile_size: int | None
    overlap: int | None
    codebook_size: int
    codebook_fingerprint: str

    def __post_init__(self) -> None:
        for name in ("height", "width", "f", "codebook_size"):
            _check_integer(name, getattr(self, name), minimum=1)
        if self.tile_size is not None:
            _check_integer("tile_size", self.tile_size, minimum=1)
            _check_integer("overlap", self.overlap, minimum=0)
        if len(self.codebook_fingerprint) != 64:
            raise ValueError(f"`codebook_fingerprint` must be a sha256 in hex, but is {self.codebook_fingerprint!r}.")
        if not self.ids or len(self.ids) != len(self.scales):
            raise ValueError(
                f"there must be one grid of ids per scale, but there are {len(self.ids)} for {len(self.scales)} scales."
            )
        for ids, scale in zip(self.ids, self.scales, strict=True):
            self._check_ids(ids, scale)

    def _check_ids(self, ids: torch.Tensor, scale: float) -> None:
        if not 0 < scale < math.inf:
            raise ValueError(f"a scale must be finite and above 0, but is {scale}.")
        latent = math.ceil(self.height / self.f), math.ceil(self.width / self.f)
        expected = tuple(max(1, round(scale * side)) for side in latent)
        if tuple(ids.shape) != expected:
            raise ValueError(
                f"the ids of scale {scale:g} must have shape {expected} for an image of {self.height} x {self.width} "
                f"with f = {self.f}, but have {tuple(ids.shape)}."
            )
        if ids.min() < 0 or ids.max() >= self.codebook_size:
            raise ValueError(
                f"ids must lie in [0, {self.codebook_size - 1}], but those of scale {scale:g} lie in "
                f"[{ids.min().item()}, {ids.max().item()}]."
            )

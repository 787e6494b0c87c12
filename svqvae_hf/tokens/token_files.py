import dataclasses
import json
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open

from svqvae_hf.atomic_io import write_file

METADATA_KEY = (
    "svqvae_tokens"  # all metadata is one JSON document under this key, so that equal tokens are equal files
)
FORMAT_VERSION = 1
UINT16_CODES = 2**16  # the largest codebook whose ids fit 16 bits
INTEGER_LIMIT = 2**31  # ids fit 32 bits
ID_DTYPES = (torch.uint16, torch.int32)
FINGERPRINT = re.compile("[0-9a-f]{64}")


class TokenOrigin(Protocol):
    """What says which model ids are of."""

    @property
    def f(self) -> int:
        """Pixels per latent side."""

    @property
    def codebook_size(self) -> int:
        """Rows of the codebook."""

    @property
    def codebook_fingerprint(self) -> str:
        """[`SVQVAE.codebook_fingerprint`] of the codebook."""


@dataclass(frozen=True, eq=False)
class ImageTokens:
    """The ids of one image at one or several scales, with all that decoding needs: the content of a token file.

    Args:
        ids (`list[torch.Tensor]`, each of shape `(h, w)`, int64): One grid of ids per scale.
        height (`int`): Height of the image in pixels.
        width (`int`): Width of the image in pixels.
        scales (`tuple[float, ...]`): Output side over input side, one per grid, in the order of `ids`.
        f (`int`): Pixels per latent side of the model that gave the ids.
        tile_size (`int`, *optional*): Side in pixels of the tiles that the image was encoded by; `None` without tiles.
        overlap (`int`, *optional*): Halo of those tiles in pixels; `None` without tiles.
        codebook_size (`int`): Rows of the codebook.
        codebook_fingerprint (`str`): [`SVQVAE.codebook_fingerprint`] of the codebook.

    Raises:
        ValueError: A value is out of its range, or the ids do not fit the image, the scale or the codebook.
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
            self._check_integer(name, minimum=1)
        if self.tile_size is not None or self.overlap is not None:
            self._check_integer("tile_size", minimum=1)
            self._check_integer("overlap", minimum=0)
        if not FINGERPRINT.fullmatch(str(self.codebook_fingerprint)):
            raise ValueError(
                f"`codebook_fingerprint` must be 64 hexadecimal digits, but is {_short(self.codebook_fingerprint)}."
            )
        if not self.ids or len(self.ids) != len(self.scales):
            raise ValueError(f"each scale must have one grid of ids, but {len(self.scales)} have {len(self.ids)}.")
        for ids, scale in zip(self.ids, self.scales, strict=True):
            self._check_ids(ids, scale)

    def bits_per_pixel(self, index: int) -> float:
        """Bits that the ids of one scale take, all ids being equally likely, per pixel of the original image."""
        return self.ids[index].numel() * math.log2(self.codebook_size) / (self.height * self.width)

    def _check_integer(self, name: str, minimum: int) -> None:
        value = getattr(self, name)
        if type(value) is not int or not minimum <= value < INTEGER_LIMIT:
            raise ValueError(
                f"`{name}` must be an integer of at least {minimum} and under 2**31, but is {_short(value)}."
            )

    def _check_ids(self, ids: torch.Tensor, scale: float) -> None:
        if not isinstance(scale, int | float) or not 0 < scale < math.inf:
            raise ValueError(f"a scale must be a finite number above 0, but is {_short(scale)}.")
        expected = grid_shape(self.height, self.width, self.f, scale)
        if tuple(ids.shape) != expected:
            raise ValueError(
                f"the ids of scale {scale:g} must have shape {expected}, for an image of {self.height} x {self.width} "
                f"pixels and f = {self.f}, but have {tuple(ids.shape)}."
            )
        values = ids.numpy()  # PyTorch has no minimum of uint16
        lowest, highest = int(values.min()), int(values.max())
        if lowest < 0 or highest >= self.codebook_size:
            raise ValueError(
                f"ids must be in [0, {self.codebook_size - 1}], but those of scale {scale:g} are in "
                f"[{lowest}, {highest}]."
            )


def grid_shape(height: int, width: int, f: int, scale: float) -> tuple[int, int]:
    """Rows and columns of the ids of an image at a scale.

    Args:
        height (`int`): Height of the image in pixels.
        width (`int`): Width of the image in pixels.
        f (`int`): Pixels per latent side of the model.
        scale (`float`): Output side over input side, more than 0.
    """
    rows, columns = (max(1, round(scale * math.ceil(side / f))) for side in (height, width))
    return rows, columns


def save_tokens(path: str | os.PathLike, tokens: ImageTokens) -> None:
    """Writes a token file: a safetensors file with `ids_0`, `ids_1`, ..., one for each scale.

    Ids are stored in 16 bits where the codebook has at most 65,536 rows, else in 32. Equal tokens give equal bytes.

    Args:
        path (`str` or `os.PathLike`): File to write, in a folder that exists. It is whole or not there at all.
        tokens (`ImageTokens`): What to store.

    Raises:
        OSError: The file cannot be written.
    """
    dtype = ID_DTYPES[tokens.codebook_size > UINT16_CODES]
    grids = {f"ids_{i}": ids.to("cpu", dtype).contiguous() for i, ids in enumerate(tokens.ids)}
    write_file(path, safetensors.torch.save(grids, _metadata(tokens)))


def token_file_header(tokens: ImageTokens) -> bytes:
    """What [`save_tokens`] writes before the ids of one scale, for those who write them themselves, row by row.

    Args:
        tokens (`ImageTokens`): What to store, of one scale; of its ids only the shape counts.
    """
    wide = tokens.codebook_size > UINT16_CODES
    (ids,) = tokens.ids
    grid = {
        "dtype": "I32" if wide else "U16",
        "shape": list(ids.shape),
        "data_offsets": [0, ids.numel() * (2 + 2 * wide)],
    }
    header = {"__metadata__": _metadata(tokens), "ids_0": grid}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    padded = encoded.ljust(-(-len(encoded) // 8) * 8)
    return len(padded).to_bytes(8, "little") + padded


def load_tokens(path: str | os.PathLike, mapped: bool = False) -> ImageTokens:
    """Reads a token file and checks all of it.

    Args:
        path (`str` or `os.PathLike`): File that [`save_tokens`] wrote.
        mapped (`bool`, defaults to `False`): Whether the ids stay in the file, in its type, uint16 or int32, and are
            read where they are used.

    Returns:
        `ImageTokens`: Its content, the ids in int64 on the CPU.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is not a token file, is cut short, or holds values that do not fit each other.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no token file `{path}`.")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            grids = {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"`{path}` must be a safetensors file, but is another kind or cut short: {error}.") from error
    try:
        return _tokens_from(metadata, grids, mapped)
    except (ValueError, OverflowError, RecursionError) as error:  # the latter two from values made to harm
        raise ValueError(f"`{path}` is not a token file that can be decoded: {error}") from error


def is_token_file(path: str | os.PathLike) -> bool:
    """Whether `path` is a safetensors file that says that it holds tokens; [`load_tokens`] checks the rest."""
    try:
        with safe_open(path, framework="pt") as file:
            return METADATA_KEY in (file.metadata() or {})
    except (SafetensorError, OSError):
        return False


def check_codebook(tokens: TokenOrigin, fingerprint: str) -> None:
    """Refuses ids that are rows of another codebook.

    Args:
        tokens ([`TokenOrigin`]): The ids, or the settings of a token set.
        fingerprint (`str`): [`SVQVAE.codebook_fingerprint`] of the model that is to decode them.

    Raises:
        ValueError: The fingerprints differ.
    """
    if tokens.codebook_fingerprint != fingerprint:
        raise ValueError(
            f"the ids must be of the model's codebook, with fingerprint {fingerprint}, but are of one with "
            f"{tokens.codebook_fingerprint}. Decode them with the model that encoded them."
        )


def _short(value: object) -> str:
    """A value from a file for a message, whatever its length."""
    return f"{value!r:.80}"


def _metadata(tokens: ImageTokens) -> dict[str, str]:
    record = {name: getattr(tokens, name) for name in _record_names()} | {"format_version": FORMAT_VERSION}
    return {METADATA_KEY: json.dumps(record)}


def _record_names() -> list[str]:
    return [field.name for field in dataclasses.fields(ImageTokens) if field.name != "ids"]


def _tokens_from(metadata: dict[str, str], grids: dict[str, torch.Tensor], mapped: bool) -> ImageTokens:
    if METADATA_KEY not in metadata:
        raise ValueError(f"its metadata must have the key {METADATA_KEY!r}, but has {_short(sorted(metadata))}.")
    record = json.loads(metadata[METADATA_KEY])  # its error is a ValueError
    if not isinstance(record, dict) or record.get("format_version") != FORMAT_VERSION:
        raise ValueError(f"its metadata must be of format version {FORMAT_VERSION}, but are {_short(record)}.")
    missing = sorted(set(_record_names()) - set(record))
    if missing:
        raise ValueError(f"its metadata must also have {missing}.")
    if not isinstance(record["scales"], list):
        raise ValueError(f"its scales must be a list, but are {_short(record['scales'])}.")
    names = [f"ids_{i}" for i in range(len(record["scales"]))]
    if sorted(grids) != sorted(names) or any(grid.dtype not in ID_DTYPES for grid in grids.values()):
        found = {name: str(grid.dtype) for name, grid in sorted(grids.items())}
        raise ValueError(
            f"it must have the tensors {_short(names)} of type uint16 or int32, one per scale, but has "
            f"{_short(found)}."
        )
    values = {name: record[name] for name in _record_names()} | {"scales": tuple(record["scales"])}
    return ImageTokens(ids=[grids[name] if mapped else grids[name].long() for name in names], **values)

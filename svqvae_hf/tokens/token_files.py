"""Token files: the ids of one image at one or several scales, with everything that decoding needs."""

import json
import math
import os
import zlib
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open

from svqvae_files.inputs import readable
from svqvae_files.outputs import write_file
from svqvae_hf.models.checks import check_integers
from svqvae_hf.tokens.compressed_tokens import MAGIC, CompressedTokens, compress, decompress, read_compressed
from svqvae_hf.tokens.context_model import ContextModel
from svqvae_hf.tokens.encoding import Encoding

METADATA_KEY = "svqvae_tokens"  # all metadata is one JSON document, because the order of several keys would vary
CHECKSUM = "crc32"  # key of the checksum in the JSON document
UINT16_CODES = 2**16  # size of the largest codebook whose ids fit in 16 bits
ID_DTYPES = (torch.uint16, torch.int32)


@dataclass(frozen=True, eq=False)
class ImageTokens(Encoding):
    """Ids of one image at one or several scales, with everything that decoding needs: the content of a token file.

    Args:
        ids (`list[torch.Tensor]`, each of shape `(h, w)`, int64): One grid of ids per scale.
        height (`int`): Height of the image in pixels.
        width (`int`): Width of the image in pixels.
        **encoding: How the image was encoded; see [`~svqvae_hf.tokens.encoding.Encoding`].

    Raises:
        ValueError: A value is out of range, or the ids do not match the image, the scale or the codebook.
    """

    ids: list[torch.Tensor]
    height: int
    width: int

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integers({"height": self.height, "width": self.width})
        if not isinstance(self.ids, list | tuple):
            raise ValueError(
                f"`ids` must be a list of one grid per scale, got a value of type {type(self.ids).__name__}."
            )
        num_grids = len(self.ids)
        num_scales = len(self.scales)
        if num_grids == 0 or num_grids != num_scales:
            raise ValueError(
                f"`ids` must be a list of one grid per scale, got a list of {num_grids} for {num_scales} scales."
            )
        for ids_of_scale, scale in zip(self.ids, self.scales, strict=True):
            self._check_grid(ids_of_scale, scale)

    def _check_grid(self, ids: torch.Tensor, scale: float) -> None:
        """Raises unless the ids of a scale match the image and the codebook."""
        expected = self.grid(scale, self.height, self.width)
        if tuple(ids.shape) != expected:
            raise ValueError(
                f"the ids of scale {scale:g} must have shape {expected} for an image of {self.height} x "
                f"{self.width} pixels and f = {self.f}, got {tuple(ids.shape)}."
            )
        id_array = ids.cpu().numpy()  # because PyTorch has no minimum for uint16
        is_integer = id_array.dtype.kind in ("i", "u")
        smallest_id = id_array.min()
        largest_id = id_array.max()
        if not is_integer or smallest_id < 0 or largest_id >= self.codebook_size:
            raise ValueError(
                f"scale {scale:g} needs integer ids in [0, {self.codebook_size}), got {id_array.dtype} in "
                f"[{smallest_id}, {largest_id}]."
            )

    def bits_per_pixel(self, index: int) -> float:
        """Bits of the ids of one scale per pixel of the original image, if all ids are equally likely."""
        bits_per_id = math.log2(self.codebook_size)
        num_pixels = self.height * self.width
        return self.ids[index].numel() * bits_per_id / num_pixels


def check_tokens(tokens: Any) -> None:
    """Raises TypeError for ids alone, which do not tell the size of their image."""
    if not isinstance(tokens, ImageTokens):
        raise TypeError(
            f"`tokens` must be ImageTokens, got {type(tokens).__name__}. Make them with `encode_image`, or from ids "
            "with `image_tokens`. `SVQVAE.decode_tokens` decodes ids alone."
        )


def save_tokens(path: str | os.PathLike, tokens: ImageTokens, context_model: ContextModel | None = None) -> None:
    """Writes a token file, see [`token_file_content`].

    Args:
        path (`str` or `os.PathLike`): File to write, in an existing folder. The file is complete or absent.
        tokens (`ImageTokens`): Content of the file.
        context_model ([`ContextModel`], *optional*): Context model of the tokenizer, to compress the ids.

    Raises:
        OSError: The file cannot be written.
        TypeError: `tokens` are ids alone.
        ValueError: Ids and context model are of different codebooks, or the path is not UTF-8. Such a path is only
            allowed with a context model, because safetensors could not open the file.
    """
    if context_model is None:
        _check_is_utf8(os.fspath(path))
    write_file(path, token_file_content(tokens, context_model))


def _check_is_utf8(path: str) -> None:
    """Raises ValueError if a path has bytes that are not UTF-8."""
    try:
        path.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"`{readable(path)}` must be a path in UTF-8, because safetensors opens no others. Rename it, or compress "
            "the ids."
        ) from error


def token_file_content(tokens: ImageTokens, context_model: ContextModel | None = None) -> bytes:
    """Content of a token file. Equal tokens make equal files.

    Without a context model it is a safetensors file with the tensors `ids_0`, `ids_1`, ..., one per scale, in 16 bits
    if the codebook has at most 65,536 rows, otherwise in 32 bits, and a checksum of all. With a context model it is a
    compressed file, whose format `compressed_tokens.py` describes.

    Args:
        tokens (`ImageTokens`): Content of the file.
        context_model ([`ContextModel`], *optional*): Context model of the tokenizer, to compress the ids.
    """
    check_tokens(tokens)
    if context_model is not None:
        id_arrays = [ids.cpu().numpy() for ids in tokens.ids]
        return compress(tokens.to_record(), id_arrays, context_model)
    dtype = torch.uint16 if tokens.codebook_size <= UINT16_CODES else torch.int32
    tensors = {}
    for index, ids in enumerate(tokens.ids):
        tensors[f"ids_{index}"] = ids.to("cpu", dtype).contiguous()
    record = tokens.to_record()
    record[CHECKSUM] = _checksum(record, list(tensors.values()))
    metadata = {METADATA_KEY: json.dumps(record)}
    return safetensors.torch.save(tensors, metadata)


def load_tokens(path: str | os.PathLike, context_model: ContextModel | None = None) -> ImageTokens:
    """Reads a token file and checks every value.

    Args:
        path (`str` or `os.PathLike`): File that [`save_tokens`] wrote.
        context_model ([`ContextModel`], *optional*): Context model that a compressed file was written with.

    Returns:
        `ImageTokens`: Content of the file, with ids in int64.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: It is not a token file, is cut short, or has values that do not match; or it is compressed, and
            `context_model` is another one or `None`.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"the token file `{path}` does not exist.")
    try:
        if is_compressed(path):
            compressed = read_compressed(Path(path).read_bytes())
            return decompressed_tokens(compressed, context_model)
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            metadata = file.metadata() or {}
        return _tokens_from(metadata, tensors)
    except (SafetensorError, ValueError, RecursionError) as error:  # deeply nested JSON raises RecursionError
        raise _undecodable(path, error) from error


def load_compressed(path: str | os.PathLike) -> CompressedTokens:
    """Reads a compressed token file without decoding its ids, see [`load_tokens`]."""
    try:
        return read_compressed(Path(path).read_bytes())
    except ValueError as error:
        raise _undecodable(path, error) from error


def decompressed_tokens(compressed: CompressedTokens, context_model: ContextModel | None) -> ImageTokens:
    """Decodes the ids of a compressed token file, see [`load_tokens`].

    Raises:
        ValueError: There is no context model, or another one coded the ids. The message calls the file "it", because
            [`load_tokens`] puts the file's name before.
    """
    if context_model is None:
        raise ValueError(
            "it is compressed, so `context_model` must be its context model, got None. Load one with "
            "`ContextModel.from_pretrained`, or decode the file with `svqvae decode`."
        )
    grids = decompress(compressed, context_model)
    return ImageTokens(
        ids=[torch.from_numpy(grid) for grid in grids],
        codebook_size=len(context_model.order),
        codebook_fingerprint=context_model.codebook_fingerprint,
        **compressed.record,
    )


def load_scales(path: str | os.PathLike) -> tuple[float, ...]:
    """Reads the scales of a token file, see [`load_tokens`]."""
    if is_compressed(path):
        return load_compressed(path).record["scales"]
    return load_tokens(path).scales


def is_compressed(path: str | os.PathLike) -> bool:
    """Whether a file starts like a compressed token file."""
    with Path(path).open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def is_token_file(path: str | os.PathLike) -> bool:
    """Whether a file has the metadata key of a token file; [`load_tokens`] checks the rest."""
    if not Path(path).is_file():  # such as a pipe, which may have no end
        return False
    with suppress(SafetensorError, OSError), safe_open(path, framework="pt") as file:
        return METADATA_KEY in (file.metadata() or {})
    return False  # not a safetensors file, or not readable


def _undecodable(path: str | os.PathLike, error: Exception) -> ValueError:
    """Error about a file that is damaged, or no token file."""
    return ValueError(f"`{path}` must be a token file that can be decoded, but is not: {error}")


def _tokens_from(metadata: dict[str, str], tensors: dict[str, torch.Tensor]) -> ImageTokens:
    """Tokens from the metadata and the tensors of a safetensors file. Raises ValueError if they do not fit."""
    if METADATA_KEY not in metadata:
        raise ValueError(f"its metadata must have the key {METADATA_KEY!r}, got {sorted(metadata)!r:.80}.")
    names = [f"ids_{index}" for index in range(len(tensors))]
    _check_tensors(tensors, names)
    stored_grids = [tensors[name] for name in names]
    grids = [grid.long() for grid in stored_grids]
    record = json.loads(metadata[METADATA_KEY])
    tokens = ImageTokens.from_record(record, ids=grids)  # raises if the record is not a JSON object
    checksum = record.pop(CHECKSUM, None)  # files of version 0.1 have no checksum
    if checksum is not None and checksum != _checksum(record, stored_grids):
        raise ValueError("its checksum differs, so it is damaged.")
    return tokens


def _check_tensors(tensors: dict[str, torch.Tensor], names: list[str]) -> None:
    """Raises ValueError unless tensors have these names and a type that ids are stored in."""
    has_wrong_names = sorted(tensors) != sorted(names)
    has_wrong_dtypes = any(tensor.dtype not in ID_DTYPES for tensor in tensors.values())
    if has_wrong_names or has_wrong_dtypes:
        dtypes = {name: str(tensors[name].dtype) for name in sorted(tensors)}
        raise ValueError(f"its tensors must be ids_0, ids_1 and so on of type uint16 or int32, got {dtypes!r:.80}.")


def _checksum(record: dict[str, Any], grids: list[torch.Tensor]) -> int:
    """CRC-32 of the metadata and of the ids as they are stored, little-endian."""
    checksum = zlib.crc32(json.dumps(record).encode())
    for grid in grids:
        number_format = "<u2" if grid.dtype == torch.uint16 else "<i4"
        checksum = zlib.crc32(grid.numpy().astype(number_format).tobytes(), checksum)
    return checksum

"""Compressed token files: the ids of one image, coded by a [`ContextModel`], from the coarsest scale to the finest.

    magic, version, f, source of the scales, number of scales     4 + 4 x 1 bytes; all numbers are little-endian
    height, width, tile size, overlap                             4 x 4 bytes; a tile size of 0 means no tiles
    start of the fingerprint of the context model                 8 bytes
    per scale, in the order of the tokens: scale, bytes of chunk  8 + 4 bytes
    CRC-32 of all above                                           4 bytes
    per scale, from the fewest ids: chunk, CRC-32 of the chunk    ... + 4 bytes

A chunk is the output of constriction's range coder. Scales after the first are coded given the scale before.
"""

import math
import struct
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from svqvae_hf.models.checks import INTEGER_LIMIT, SCALE_SOURCES
from svqvae_hf.models.resizing import grid_shape
from svqvae_hf.tokens.context_model import ContextModel

MAGIC, VERSION = b"SVQZ", 1
HEADER = struct.Struct("<4s4B4I8s")
SCALE = struct.Struct("<dI")
CRC = struct.Struct("<I")
LEAST_BITS = 1 / 256  # of an id: each of its two frequencies is at most 65,409 of 65,536


class CompressedTokens(NamedTuple):
    """Parts of a compressed token file.

    Args:
        record (`dict[str, Any]`): Values of [`ImageTokens`], except for the ids and the codebook.
        fingerprint (`str`): First 16 digits of the fingerprint of the context model.
        chunks (`list[bytes]`): Coded ids, one per scale of the record.
    """

    record: dict[str, Any]
    fingerprint: str
    chunks: list[bytes]


def compress(record: Mapping[str, Any], grids: Sequence[np.ndarray], model: ContextModel) -> bytes:
    """Codes the ids of an image as the content of a compressed token file.

    Args:
        record (`Mapping[str, Any]`): Values of [`ImageTokens`].
        grids (`Sequence[np.ndarray]`): One grid of ids per scale.
        model ([`ContextModel`]): Context model of the same codebook.

    Raises:
        ValueError: The ids belong to another codebook.
    """
    if record["codebook_fingerprint"] != model.codebook_fingerprint:
        raise ValueError(
            f"the ids must be of the context model's codebook, with fingerprint {model.codebook_fingerprint}, got "
            f"{record['codebook_fingerprint']}. Use the context model of the tokenizer that encoded them."
        )
    chunks: dict[int, bytes] = {}
    coarse = None
    for index in coding_order([grid.shape for grid in grids]):
        chunks[index], coarse = model.compress(grids[index], coarse), grids[index]
    header = HEADER.pack(
        *(MAGIC, VERSION, record["f"], SCALE_SOURCES.index(record["scale_from"]), len(grids)),
        *(record[name] or 0 for name in ("height", "width", "tile_size", "overlap")),
        bytes.fromhex(model.fingerprint)[:8],
    )
    header += b"".join(SCALE.pack(scale, len(chunks[index])) for index, scale in enumerate(record["scales"]))
    return b"".join(part + CRC.pack(zlib.crc32(part)) for part in (header, *chunks.values()))


def read_compressed(content: bytes) -> CompressedTokens:
    """Reads the content of a compressed token file, and checks every byte. The ids remain coded.

    Args:
        content (`bytes`): The file.

    Raises:
        ValueError: The content is damaged or cut.
    """
    end = HEADER.size
    magic, version, f, source, count, *numbers, fingerprint = HEADER.unpack(_take(content, 0, end))
    if magic != MAGIC or version != VERSION:
        raise ValueError(f"it must start with {MAGIC!r} and version {VERSION}, got {magic!r} and {version}.")
    end += count * SCALE.size
    entries = _take(content, HEADER.size, end)
    end = _check(content, 0, end)
    height, width, tile_size, overlap = numbers
    scales, sizes = zip(*SCALE.iter_unpack(entries), strict=True) if count else ((), ())
    if not (f and count and source < len(SCALE_SOURCES) and all(0 < scale < INTEGER_LIMIT for scale in scales)):
        raise ValueError(f"its header must have f, scales and their source in range, got {f}, {scales} and {source}.")
    shapes = [grid_shape(height, width, f, scale) for scale in scales]
    chunks: dict[int, bytes] = {}
    for index in coding_order(shapes):
        if math.prod(shapes[index]) * LEAST_BITS > 8 * (sizes[index] + CRC.size):
            raise ValueError(f"its {sizes[index]} bytes cannot hold {math.prod(shapes[index])} ids.")
        chunks[index] = _take(content, end, end + sizes[index])
        end = _check(content, end, end + sizes[index])
    if end < len(content):
        raise ValueError(f"it must end after {end} bytes, but has {len(content)}.")
    record = {
        **{"height": height, "width": width, "f": f, "scale_from": SCALE_SOURCES[source]},
        **{"tile_size": tile_size or None, "overlap": overlap if tile_size else None},
        "scales": scales,
    }
    return CompressedTokens(record, fingerprint.hex(), [chunks[index] for index in range(count)])


def decompress(compressed: CompressedTokens, model: ContextModel) -> list[np.ndarray]:
    """Decodes the ids of an image, one grid per scale.

    Raises:
        ValueError: Another context model coded them.
    """
    if not model.fingerprint.startswith(compressed.fingerprint):
        raise ValueError(
            f"its context model must be {compressed.fingerprint}, got {model.fingerprint[:16]}. Decode it with the "
            "model that encoded it."
        )
    record = compressed.record
    shapes = [grid_shape(record["height"], record["width"], record["f"], scale) for scale in record["scales"]]
    grids: dict[int, np.ndarray] = {}
    coarse = None
    for index in coding_order(shapes):
        coarse = grids[index] = model.decompress(compressed.chunks[index], shapes[index], coarse)
    return [grids[index] for index in range(len(shapes))]


def coding_order(shapes: Sequence[Sequence[int]]) -> list[int]:
    """Indices of the scales, from the fewest ids to the most."""
    return sorted(range(len(shapes)), key=lambda index: math.prod(shapes[index]))


def _take(content: bytes, start: int, end: int) -> bytes:
    if len(content) < end:
        raise ValueError(f"it is cut short at {len(content)} bytes.")
    return content[start:end]


def _check(content: bytes, start: int, end: int) -> int:
    """Checks the CRC that follows a part, and returns the end of both."""
    if _take(content, end, end + CRC.size) != CRC.pack(zlib.crc32(content[start:end])):
        raise ValueError("its checksum differs, so it is damaged.")
    return end + CRC.size

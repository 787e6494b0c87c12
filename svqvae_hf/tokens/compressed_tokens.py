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

from svqvae_hf.models.checks import INTEGER_LIMIT, SCALE_SOURCES, check_scales_differ
from svqvae_hf.models.resizing import grid_shape
from svqvae_hf.tokens.context_model import ContextModel

MAGIC = b"SVQZ"
VERSION = 1
FINGERPRINT_BYTES = 8
HEADER = struct.Struct(f"<4s4B4I{FINGERPRINT_BYTES}s")
SCALE = struct.Struct("<dI")
CRC = struct.Struct("<I")
# No id takes fewer bits. Its group and its member each have a frequency of at most 65,409 of 65,536: 0.0028 bits.
LEAST_BITS_PER_ID = 1 / 256


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
    order = coding_order([grid.shape for grid in grids])
    chunks: dict[int, bytes] = {}  # by the index of the scale
    coarser_grid = None
    for index in order:
        chunks[index] = model.compress(grids[index], coarser_grid)
        coarser_grid = grids[index]
    # The header has the sizes in the order of the record's scales. The chunks follow in the order of coding.
    chunk_sizes = [len(chunks[index]) for index in range(len(grids))]
    content = _with_checksum(_pack_header(record, chunk_sizes, model.fingerprint))
    for index in order:
        content += _with_checksum(chunks[index])
    return content


def read_compressed(content: bytes) -> CompressedTokens:
    """Reads the content of a compressed token file, and checks every byte. The ids remain coded.

    Args:
        content (`bytes`): The file.

    Raises:
        ValueError: The content is damaged or cut. The message calls the file "it", because callers put the file's name
            before: "`a.svqz` must be a token file that can be decoded, but is not: it must end after 90 bytes, ...".
    """
    header = _unpack_header(content)
    chunks = _read_chunks(content, header)
    return CompressedTokens(header.record, header.fingerprint, chunks)


def _check_number_of_ids(num_ids: int, chunk_size: int) -> None:
    """Raises ValueError if a chunk of this many bytes cannot hold this many ids.

    The number of ids follows from the sides of the image in the header. A small hostile file with huge sides would
    take all memory when it is decoded.
    """
    least_bits = num_ids * LEAST_BITS_PER_ID
    most_bits = 8 * (chunk_size + CRC.size)  # a little generous, as it includes the checksum
    if least_bits > most_bits:
        raise ValueError(f"its {chunk_size} bytes cannot hold {num_ids} ids.")


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
    shapes = _shapes(compressed.record)
    grids: dict[int, np.ndarray] = {}  # by the index of the scale
    coarser_grid = None
    for index in coding_order(shapes):
        grids[index] = model.decompress(compressed.chunks[index], shapes[index], coarser_grid)
        coarser_grid = grids[index]
    return [grids[index] for index in range(len(shapes))]


def coding_order(shapes: Sequence[Sequence[int]]) -> list[int]:
    """Indices of the scales, from the fewest ids to the most."""
    return sorted(range(len(shapes)), key=lambda index: math.prod(shapes[index]))


class _Header(NamedTuple):
    """The header of a file."""

    record: dict[str, Any]
    fingerprint: str
    chunk_sizes: list[int]  # in bytes, one per scale
    end: int  # position after the checksum of the header, where the first chunk starts


def _pack_header(record: Mapping[str, Any], chunk_sizes: Sequence[int], fingerprint: str) -> bytes:
    """Header of a file without its checksum, in the order that the top of this file describes.

    Args:
        record (`Mapping[str, Any]`): Values of [`ImageTokens`].
        chunk_sizes (`Sequence[int]`): Bytes of the coded ids of each scale.
        fingerprint (`str`): Fingerprint of the context model, in hexadecimal.
    """
    scales = record["scales"]
    source_index = SCALE_SOURCES.index(record["scale_from"])
    tile_size = record["tile_size"] or 0
    overlap = record["overlap"] or 0
    start_of_fingerprint = bytes.fromhex(fingerprint)[:FINGERPRINT_BYTES]
    header = HEADER.pack(
        MAGIC,
        VERSION,
        record["f"],
        source_index,
        len(scales),
        record["height"],
        record["width"],
        tile_size,
        overlap,
        start_of_fingerprint,
    )
    for scale, chunk_size in zip(scales, chunk_sizes, strict=True):
        header += SCALE.pack(scale, chunk_size)
    return header


def _unpack_header(content: bytes) -> _Header:
    """Reads the header of a file. Raises ValueError if it is damaged or a value is out of range."""
    values = HEADER.unpack(_take(content, 0, HEADER.size))
    # In the order of `_pack_header`.
    magic, version, downsampling, source_index, num_scales, height, width, tile_size, overlap, fingerprint = values
    if magic != MAGIC or version != VERSION:
        raise ValueError(f"it must start with {MAGIC!r} and version {VERSION}, got {magic!r} and {version}.")
    end = HEADER.size + num_scales * SCALE.size
    header = _take_checked(content, 0, end)
    scales = []
    chunk_sizes = []
    for scale, chunk_size in SCALE.iter_unpack(header[HEADER.size :]):
        scales.append(scale)
        chunk_sizes.append(chunk_size)
    _check_ranges(downsampling, scales, source_index)
    check_scales_differ(scales)
    has_tiles = tile_size > 0
    record = {
        "height": height,
        "width": width,
        "f": downsampling,
        "scale_from": SCALE_SOURCES[source_index],
        "tile_size": tile_size if has_tiles else None,
        "overlap": overlap if has_tiles else None,
        "scales": tuple(scales),
    }
    return _Header(record, fingerprint.hex(), chunk_sizes, end + CRC.size)


def _read_chunks(content: bytes, header: _Header) -> list[bytes]:
    """Coded ids of each scale, in the order of the scales in the header.

    In the file, the chunks stand in the order of coding: the scale with the fewest ids comes first. A checksum follows
    each chunk.
    """
    shapes = _shapes(header.record)
    chunks = [b""] * len(shapes)
    start = header.end
    for scale_index in coding_order(shapes):
        chunk_size = header.chunk_sizes[scale_index]
        num_ids = math.prod(shapes[scale_index])
        _check_number_of_ids(num_ids, chunk_size)
        end = start + chunk_size
        chunks[scale_index] = _take_checked(content, start, end)
        end_of_checksum = end + CRC.size
        start = end_of_checksum  # of the next chunk
    end_of_last_chunk = start
    if len(content) > end_of_last_chunk:
        raise ValueError(f"it must end after {end_of_last_chunk} bytes, but has {len(content)}.")
    return chunks


def _check_ranges(downsampling: int, scales: Sequence[float], source_index: int) -> None:
    """Raises ValueError if values of a header are out of range, or there is no scale."""
    are_scales_in_range = len(scales) > 0 and all(0 < scale < INTEGER_LIMIT for scale in scales)
    is_source_in_range = source_index < len(SCALE_SOURCES)
    if downsampling == 0 or not is_source_in_range or not are_scales_in_range:
        raise ValueError(
            f"its header must have f, scales and their source in range, got {downsampling}, {tuple(scales)} and "
            f"{source_index}."
        )


def _shapes(record: Mapping[str, Any]) -> list[tuple[int, int]]:
    """Shapes of the grids of all scales."""
    shapes = []
    for scale in record["scales"]:
        shapes.append(grid_shape(record["height"], record["width"], record["f"], scale))
    return shapes


def _with_checksum(part: bytes) -> bytes:
    """A part of the content, and its checksum after it."""
    return part + CRC.pack(zlib.crc32(part))


def _take(content: bytes, start: int, end: int) -> bytes:
    """A part of the content. Raises if the content ends before the part does."""
    if len(content) < end:
        raise ValueError(f"it is cut short at {len(content)} bytes.")
    return content[start:end]


def _take_checked(content: bytes, start: int, end: int) -> bytes:
    """A part of the content. Raises unless the checksum that follows the part fits."""
    part = _take(content, start, end)
    checksum = _take(content, end, end + CRC.size)
    if checksum != CRC.pack(zlib.crc32(part)):
        raise ValueError("its checksum differs, so it is damaged.")
    return part

"""Zarr arrays of strangers: no chunk takes more memory than the array says."""

import asyncio
import math
import zlib
from dataclasses import dataclass, replace
from typing import Any

import numcodecs
import numpy as np
import zarr
from numcodecs.abc import Codec
from zarr.abc.codec import BytesBytesCodec
from zarr.codecs import BytesCodec, Crc32cCodec, ShardingCodec, TransposeCodec

COMPRESSORS = ("blosc", "gzip", "lz4", "zlib", "zstd")
ZLIB_FORMATS = {"gzip": 31, "zlib": 15}  # `wbits` of each
CHECKSUM = 4  # bytes of a CRC-32C


def bound(array: Any) -> zarr.Array:
    """The array, to read from. A chunk that decompresses to more bytes than it is declared to have is refused.

    Chunks of gzip and zlib are decompressed once. Those of the other compressors are decompressed twice: first into as
    many bytes as are declared, which is how these compressors refuse more.

    Args:
        array (`zarr.Array`): Array of uint8 in a folder, in version 2 or 3, its chunks compressed once at most, by one
            of `COMPRESSORS`; in version 2 perhaps shuffled; in version 3 perhaps transposed, with checksums and in
            shards.

    Raises:
        ValueError: If its chunks are encoded in another way. What is wrong with a chunk is raised when it is read.
    """
    metadata = array.metadata
    if metadata.zarr_format == 2:
        for codec in metadata.filters or ():
            if codec.codec_id != "shuffle":
                raise _refusal(codec.codec_id)
        if metadata.compressor is not None:
            name = _check_name(metadata.compressor.codec_id)
            metadata = replace(metadata, compressor=_Compressor(name, math.prod(array.chunks)))
    else:
        metadata = replace(metadata, codecs=_bound(metadata.codecs))
    return zarr.Array(zarr.AsyncArray(metadata=metadata, store_path=array.store_path))


def _bound(codecs: Any) -> list[Any]:
    """Codecs of version 3, one of them at most a compressor, that keep to the declared size."""
    bounded: list[Any] = []
    for codec in codecs:
        if isinstance(codec, ShardingCodec):
            inner, index = _bound(codec.codecs), _bound(codec.index_codecs)
            bounded.append(replace(codec, codecs=inner, index_codecs=index))
        elif isinstance(codec, BytesCodec | Crc32cCodec | TransposeCodec):
            bounded.append(codec)
        else:
            name = codec.to_dict()["name"].removeprefix("numcodecs.")
            if any(isinstance(other, _BytesCompressor | ShardingCodec) for other in bounded):
                raise _refusal(name)
            checksums = sum(isinstance(other, Crc32cCodec) for other in bounded)
            bounded.append(_BytesCompressor(_check_name(name), checksums * CHECKSUM))
    return bounded


def _check_name(name: str) -> str:
    if name not in COMPRESSORS:
        raise _refusal(name)
    return name


def _refusal(name: str) -> ValueError:
    return ValueError(
        f"chunks must be compressed once at most, by {', '.join(COMPRESSORS)}, and otherwise encoded by shuffle "
        "(version 2), transpose, crc32c or sharding_indexed (version 3) alone, but these are encoded by "
        f"`{name}`. Store the array anew."
    )


def _decompress(name: str, content: Any, size: int) -> Any:
    if name in ZLIB_FORMATS:
        stream = zlib.decompressobj(ZLIB_FORMATS[name])
        result = stream.decompress(content, size + 1)
        if len(result) > size or stream.unused_data or not stream.eof:
            raise ValueError(f"a chunk must be one whole stream of {name} of {size} bytes at most, but is not.")
        return result
    codec = numcodecs.get_codec({"id": name})
    codec.decode(content, out=np.empty(size, np.uint8))  # refuses more; of less it says nothing
    return codec.decode(content)


class _Compressor(Codec):
    """One of `COMPRESSORS` in version 2, to read by."""

    codec_id = "bounded"

    def __init__(self, name: str, size: int):
        self.name = name
        self.size = size

    def encode(self, buf: Any) -> Any:
        raise NotImplementedError

    def decode(self, buf: Any, out: Any = None) -> Any:
        return _decompress(self.name, buf, self.size)


@dataclass(frozen=True)
class _BytesCompressor(BytesBytesCodec):
    """One of `COMPRESSORS` in version 3, to read by."""

    name: str
    checksums: int  # bytes of those that the compressed content holds
    is_fixed_size = False

    def compute_encoded_size(self, input_byte_length: int, chunk_spec: Any) -> int:
        raise NotImplementedError

    async def _decode_single(self, chunk_bytes: Any, chunk_spec: Any) -> Any:
        size = math.prod(chunk_spec.shape) + self.checksums
        content = await asyncio.to_thread(_decompress, self.name, chunk_bytes.to_bytes(), size)
        return chunk_spec.prototype.buffer.from_bytes(bytes(content))

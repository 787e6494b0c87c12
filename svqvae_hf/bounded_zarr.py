"""Zarr arrays of strangers: no chunk takes more memory than the array says."""

import asyncio
import math
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numcodecs
import numpy as np
import zarr
from numcodecs.abc import Codec
from zarr.abc.codec import BytesBytesCodec
from zarr.codecs import BytesCodec, Crc32cCodec, ShardingCodec, TransposeCodec

COMPRESSORS = ("blosc", "gzip", "lz4", "zlib", "zstd")


def open_bounded(path: Path) -> zarr.Array:
    """Opens an array for reading, each chunk decompressed once and only if that gives no more than its declared bytes.

    Args:
        path (`Path`): Folder of an array of uint8 in version 2 or 3, its chunks compressed by one of `COMPRESSORS` or
            not; in version 2 perhaps shuffled, in version 3 perhaps in shards.

    Raises:
        ValueError: If its chunks are encoded in another way. What is wrong with a chunk is raised when it is read.
    """
    array: Any = zarr.open_array(path, mode="r")
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
            bounded.append(_BytesCompressor(_check_name(name)))
    return bounded


def _check_name(name: str) -> str:
    if name not in COMPRESSORS:
        raise _refusal(name)
    return name


def _refusal(name: str) -> ValueError:
    return ValueError(
        f"chunks must be compressed once at most, by {', '.join(COMPRESSORS)}, but these are encoded by `{name}`. "
        "Store the array anew."
    )


def _decompress(name: str, content: Any, size: int) -> Any:
    if name == "zlib":
        result = zlib.decompressobj().decompress(content, size + 1)
        if len(result) > size:
            raise ValueError(f"a chunk must have {size} bytes, but has more.")
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
    is_fixed_size = False

    def compute_encoded_size(self, input_byte_length: int, chunk_spec: Any) -> int:
        raise NotImplementedError

    async def _decode_single(self, chunk_bytes: Any, chunk_spec: Any) -> Any:
        size = math.prod(chunk_spec.shape)
        content = await asyncio.to_thread(_decompress, self.name, chunk_bytes.to_bytes(), size)
        return chunk_spec.prototype.buffer.from_bytes(bytes(content))

"""The header of a safetensors file: names, types, shapes and places of its tensors."""

import os
import struct
from typing import Any, BinaryIO

from svqvae_files.json_files import parse_json_object

LENGTH_BYTES = 8
MAX_HEADER_BYTES = 100_000_000  # as the library allows


def read_header(file: BinaryIO, name: str | os.PathLike) -> dict[str, Any]:
    """Reads the header of an open file, which then stands at the first byte of the tensors.

    Args:
        file (`BinaryIO`): The file, at its start.
        name (`str` or `os.PathLike`): Its path, for the error.

    Returns:
        `dict[str, Any]`: `dtype`, `shape` and `data_offsets` of each tensor by its name, without the metadata.

    Raises:
        ValueError: The file is not of this format, or is cut.
    """
    size = os.fstat(file.fileno()).st_size
    length_field = file.read(LENGTH_BYTES)
    if len(length_field) < LENGTH_BYTES:
        raise ValueError(f"`{name}` must be a safetensors file, but has only {size} bytes.")
    (length,) = struct.unpack("<Q", length_field)
    if length > min(MAX_HEADER_BYTES, size - LENGTH_BYTES):
        raise ValueError(f"`{name}` must be a safetensors file, but its header is damaged or cut.")
    tensors = parse_json_object(file.read(length), name)
    tensors.pop("__metadata__", None)
    last_byte = 0
    for tensor in tensors.values():
        if not _is_entry(tensor):
            raise ValueError(f"`{name}` must be a safetensors file, but its header is damaged.")
        last_byte = max(last_byte, tensor["data_offsets"][1])
    if LENGTH_BYTES + length + last_byte != size:
        raise ValueError(f"`{name}` must be a safetensors file, but is cut or has further bytes.")
    return tensors


def _is_entry(tensor: Any) -> bool:
    """Whether an entry of a header has a type, a shape and the places of a first and a last byte."""
    if not isinstance(tensor, dict) or not {"dtype", "shape", "data_offsets"} <= tensor.keys():
        return False
    offsets = tensor["data_offsets"]
    if not isinstance(offsets, list) or len(offsets) != 2:
        return False
    if not all(isinstance(offset, int) for offset in offsets):
        return False
    start, end = offsets
    return 0 <= start <= end

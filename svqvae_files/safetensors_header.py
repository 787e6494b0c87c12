"""The header of a safetensors file: names, types, shapes and places of its tensors."""

import os
import struct
from typing import Any, BinaryIO

from svqvae_files.json_files import parse_json_object

LENGTH_BYTES = 8
MAX_HEADER_BYTES = 100_000_000  # as the library allows
ENTRY_KEYS = ("dtype", "shape", "data_offsets")


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
    entries = parse_json_object(file.read(length), name)
    entries.pop("__metadata__", None)
    num_data_bytes = 0
    for entry in entries.values():
        if not _is_entry(entry):
            raise ValueError(f"`{name}` must be a safetensors file, but its header is damaged.")
        end_of_tensor = entry["data_offsets"][1]  # counted from the end of the header
        num_data_bytes = max(num_data_bytes, end_of_tensor)
    if LENGTH_BYTES + length + num_data_bytes != size:
        raise ValueError(f"`{name}` must be a safetensors file, but is cut or has further bytes.")
    return entries


def _is_entry(value: Any) -> bool:
    """Whether a value of a header is an entry of a tensor: its type, its shape, and where its bytes start and end."""
    if not isinstance(value, dict):
        return False
    has_all_keys = all(key in value for key in ENTRY_KEYS)
    if not has_all_keys:
        return False
    offsets = value["data_offsets"]
    if not isinstance(offsets, list) or len(offsets) != 2:
        return False
    if not all(isinstance(offset, int) for offset in offsets):
        return False
    start, end = offsets
    return 0 <= start <= end

"""Images of a set: their keys, sources and other values, and how one is read."""

import io
import os
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import BadZipFile

import fsspec
from PIL import Image

from svqvae_files.errors import explained
from svqvae_files.inputs import is_url
from svqvae_hf.models.image_files import load_image, to_rgb
from svqvae_hf.untrusted.tars import MAX_MEMBER_BYTES

LABEL_COLUMNS = ("label", "caption", "text", "cls", "txt", "json")  # kept wherever a set has them

# A mapping has `"bytes"`, or a `"path"`, or neither, and perhaps a `"fault"`: the reason why it cannot be read.
ImageSource = Image.Image | str | Path | Mapping[str, Any] | None


class ImageRow(NamedTuple):
    """An image of a set.

    Args:
        key (`str`): Path of the file in the set, or part and row if the image has no file.
        source (`ImageSource`): Where [`read_image`] finds the image.
        values (`dict[str, Any]`): Values of other columns by name.
    """

    key: str
    source: ImageSource
    values: dict[str, Any]


def check_columns(columns: Sequence[str], names: Sequence[str]) -> None:
    """Raises unless all columns that are asked for are among `names`."""
    missing = sorted(set(columns) - set(names))
    if missing:
        raise ValueError(f"columns must be among {', '.join(names)}, got {', '.join(missing)}.")


def unreadable(key: str, fault: str, columns: Sequence[str] = ()) -> ImageRow:
    """Row of an image that cannot be read, so that it is named, counted and skipped like a broken file.

    Args:
        key (`str`): Key of the image, or name of the truncated file.
        fault (`str`): Reason, which [`read_image`] raises.
        columns (`Sequence[str]`): Other columns, which are empty.
    """
    return ImageRow(key, {"path": key, "bytes": None, "fault": fault}, dict.fromkeys(columns))


def read_image(source: ImageSource | ImageRow) -> Image.Image:
    """Reads an image as 8-bit RGB.

    Args:
        source (`PIL.Image.Image`, path, `Mapping` or [`ImageRow`]): An image, a file, an undecoded row of `datasets`,
            which has `"bytes"`, or a `"path"` for `fsspec`, or neither; or a row of an image set.

    Raises:
        OSError: The file cannot be opened.
        ValueError: The file is not an image or broken (see [`load_image`]), the row is empty, a row on the Hub names a
            file outside its set.
    """
    if isinstance(source, ImageRow):
        source = source.source
    if isinstance(source, Image.Image):
        return to_rgb(source)
    if isinstance(source, str | Path):
        return load_image(source)
    fields = {} if source is None else source
    if fields.get("fault"):
        raise ValueError(fields["fault"])
    if fields.get("bytes") is not None:
        content = fields["bytes"]
    elif fields.get("path") is not None:
        content = read_bytes(fields["path"])
    else:
        raise ValueError("the row must hold an image, with `bytes` or a `path`, but has neither.")
    return load_image(io.BytesIO(content))


def read_bytes(path: str) -> bytes:
    """Reads a file of this machine, or at a URL."""
    if os.path.exists(path) and not os.path.isfile(path):  # a pipe or a device may have no end
        raise ValueError("it must be a file, but is something else.")
    try:
        content = _read_start(path)
    except (BadZipFile, zlib.error) as error:
        raise ValueError(f"its archive is damaged: {error}.") from error
    if len(content) > MAX_MEMBER_BYTES:
        raise ValueError(f"it must have at most {MAX_MEMBER_BYTES:,} bytes, but has more.")
    return content


def _read_start(path: str) -> bytes:
    """Reads a file up to one byte more than an image may have, which shows that it has more."""
    num_bytes = MAX_MEMBER_BYTES + 1
    is_in_local_archive = "::/" in path
    if not is_url(path):
        with open(path, "rb") as file:
            return file.read(num_bytes)
    if is_in_local_archive:
        with fsspec.open(path, "rb") as file:
            return file.read(num_bytes)
    with explained(path, "read"), fsspec.open(path, "rb") as file:
        return file.read(num_bytes)


def fault_of(error: Exception) -> str:
    """Reason of an error of [`read_image`], in one line without a path of this machine."""
    message = getattr(error, "strerror", None) or str(error)  # `strerror` lacks the path
    return " ".join(message.split())


def image_name(source: ImageSource | ImageRow, index: int) -> str:
    """Key of a row, name of an image's file, or its index in the set if it has neither."""
    if isinstance(source, ImageRow):
        return source.key
    path: Any = source
    if isinstance(source, Mapping):
        path = source.get("path")
    if path and isinstance(path, str | Path):
        return Path(path).name
    return f"image {index}"

"""Images of a set: their keys, sources and other values, and how one is read."""

import io
import os
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import BadZipFile

import fsspec
from PIL import Image

from svqvae_files.inputs import is_url
from svqvae_hf.data.opened_files import opened_file
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
        shard (`str`): Name of the tar, Parquet or Arrow file that holds the image; empty for an image file.
    """

    key: str
    source: ImageSource
    values: dict[str, Any]
    shard: str = ""


def all_columns(rows: Iterable[Iterable[str]]) -> list[str]:
    """Names of the columns that rows have, each once, in the order in which the rows name them."""
    names: list[str] = []
    for row in rows:
        for name in row:
            if name not in names:
                names.append(name)
    return names


def check_columns(columns: Sequence[str], names: Sequence[str]) -> None:
    """Raises unless all columns that are asked for are among `names`."""
    missing = sorted(set(columns) - set(names))
    if missing:
        raise ValueError(f"The set has no column {', '.join(missing)}, but only {', '.join(names)}. Choose one.")


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
    content = image_bytes(source)
    return load_image(io.BytesIO(content))


def image_bytes(row: Mapping[str, Any] | None) -> bytes:
    """Bytes of the image file that an undecoded row of `datasets` holds or names."""
    if row is None:  # an empty cell of a table
        row = {}
    if row.get("fault"):  # such as the path of a file outside the set, in a row on the Hub
        raise ValueError(row["fault"])
    if row.get("bytes") is not None:
        return row["bytes"]
    if row.get("path") is not None:
        return read_bytes(row["path"])
    raise ValueError("the row must hold an image, with `bytes` or a `path`, but has neither.")


def read_bytes(path: str) -> bytes:
    """Reads an image file.

    Args:
        path (`str`): Path on this machine, or URL for `fsspec`. A file in a zip archive has a URL such as
            `zip://cats/1.png::/data/photos.zip`.

    Raises:
        OSError: The file cannot be opened.
        ValueError: It is not a regular file, is too large, or lies in a damaged archive.
    """
    if os.path.exists(path) and not os.path.isfile(path):  # a pipe or a device may have no end
        raise ValueError("it must be a file, but is something else.")
    try:
        # One byte more than an image may have shows that the file is too large.
        content = _read_at_most(path, MAX_MEMBER_BYTES + 1)
    except (BadZipFile, zlib.error) as error:
        raise ValueError(f"its archive is damaged: {error}.") from error
    if len(content) > MAX_MEMBER_BYTES:
        raise ValueError(f"it must have at most {MAX_MEMBER_BYTES:,} bytes, but has more.")
    return content


def _read_at_most(path: str, num_bytes: int) -> bytes:
    """Reads a file, or its first bytes if it has more."""
    is_in_local_archive = is_url(path) and "::/" in path  # such as `zip://cats/1.png::/data/photos.zip`
    if is_in_local_archive:
        # `opened_file` is not called, because its errors name the whole URL, with the path of the archive on this
        # machine.
        with fsspec.open(path, "rb") as file:
            return file.read(num_bytes)
    with opened_file(path) as file:
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

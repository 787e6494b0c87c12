"""Parts of an image set, which are read independently of each other, some of them with random access."""

import itertools
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import datasets
import numpy as np
import pyarrow as pa

from svqvae_files.inputs import readable
from svqvae_hf.data.image_rows import ImageRow
from svqvae_hf.data.metadata import ImageTable

# Prefixes that paths have and keys lack: `hf://datasets/org/set@main/` of a file on the Hub, `zip://` of one in an
# archive.
HUB_OR_ARCHIVE_PREFIX = r"^(\w+://datasets/[^@]*@[^/]*/|zip://)"


class ImagePart(Protocol):
    """A part of an image set, which can be read independently of the others."""

    @property
    def name(self) -> str:
        """Says which images the part holds."""

    def read(self) -> Iterator[ImageRow]:
        """Yields the images, always in the same order."""


class IndexedRows(ABC):
    """A part with random access: `rows[index]` is an image, not read yet."""

    name = "all images"

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> ImageRow: ...

    def read(self) -> Iterator[ImageRow]:
        """Yields the images."""
        for index in range(len(self)):
            yield self[index]


class FileRows(IndexedRows):
    """Image files. Their labels are the names of their folders, if there are several.

    Args:
        root (`str`): Folder above all files.
        keys (`Sequence[str]`): Paths of the files, relative to `root`.
        folders (`Sequence[str]`): Label of each file.

    Attributes:
        features (`datasets.Features`): The column `label`, if there are several folders.
    """

    def __init__(self, root: str, keys: Sequence[str], folders: Sequence[str]):
        self.root = root
        encoded_keys = [os.fsencode(key) for key in keys]
        self.keys = pa.array(encoded_keys, pa.binary())  # small, because it is copied to workers
        self.features = datasets.Features()
        self.labels: np.ndarray | None = None
        folder_names = [readable(folder) for folder in folders]
        class_names = sorted(set(folder_names))
        all_lie_in_root = class_names == ["."]
        if not all_lie_in_root:
            label_type = datasets.ClassLabel(names=class_names)
            self.labels = np.array(label_type.str2int(folder_names), np.int32)
            self.features["label"] = label_type

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> ImageRow:
        key = os.fsdecode(self.keys[index].as_py())
        values = {}
        if self.labels is not None:
            values["label"] = int(self.labels[index])
        return file_row(self.root, key, values)


class CaptionedRows(IndexedRows):
    """Image files with values from metadata files.

    Args:
        root (`str`): Folder above all files.
        table ([`~svqvae_hf.data.metadata.ImageTable`]): The files, and their values.
        columns (`Sequence[str]`): Columns to keep.
    """

    def __init__(self, root: str, table: ImageTable, columns: Sequence[str]):
        self.root = root
        self.keys = table.keys
        self.values = table.values.select(columns)

    def paths(self) -> list[str]:
        """Path of the file of each row."""
        return [os.path.join(self.root, key) for key in self.keys]

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> ImageRow:
        values = {}
        for name in self.values.column_names:
            values[name] = self.values[name][index].as_py()
        return file_row(self.root, self.keys[index], values)


def file_row(root: str, key: str, values: dict[str, Any]) -> ImageRow:
    """Row of an image file."""
    return ImageRow(readable(key), {"path": os.path.join(root, key), "bytes": None}, values)


class FirstRows:
    """The first images of a set, as one part.

    Args:
        images (`Iterable[ImageRow]`): The set.
        count (`int`): Number of images.
    """

    def __init__(self, images: Iterable[ImageRow], count: int):
        self.images = images
        self.count = count
        self.name = f"images 0 to {count - 1}"

    def read(self) -> Iterator[ImageRow]:
        """Yields the images."""
        return itertools.islice(self.images, self.count)


class RowRange(IndexedRows):
    """Consecutive images of a part with random access.

    Args:
        rows ([`IndexedRows`]): The part.
        start (`int`): First image.
        stop (`int`): Image after the last.
    """

    def __init__(self, rows: IndexedRows, start: int, stop: int):
        self.rows = rows
        self.range = range(start, stop)
        self.name = f"images {start} to {stop - 1}"

    def __len__(self) -> int:
        return len(self.range)

    def __getitem__(self, index: int) -> ImageRow:
        return self.rows[self.range[index]]


def shard_name(path: str, root: str) -> str:
    """Name of a tar, Parquet or Arrow file: its path below the folder of the set, or its file name.

    Args:
        path (`str`): Absolute path or URL.
        root (`str`): Folder of the set.
    """
    start = f"{root}/"
    if path.startswith(start):
        return readable(path.removeprefix(start))
    return readable(os.path.basename(path))


def row_key(source: Any, root: str, default: str) -> str:
    """Key of an image in a row of a table.

    Args:
        source: The image: a mapping with a `"path"`, or anything else.
        root (`str`): Folder of the set.
        default (`str`): Key of an image without a path.
    """
    if not isinstance(source, Mapping) or not source["path"]:
        return default
    # An image in an archive has a path such as `zip://cats/1.png::/data/photos.zip`. Its key is `cats/1.png`.
    path, _, _path_of_archive = source["path"].partition("::")
    key = re.sub(HUB_OR_ARCHIVE_PREFIX, "", path)
    if os.path.isabs(key):
        return os.path.relpath(key, root)
    return key

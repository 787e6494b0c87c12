"""Parts of an image set, which are read independently of each other, some of them with random access."""

import itertools
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

import datasets
import numpy as np
import pyarrow as pa

from svqvae_files.inputs import readable
from svqvae_hf.data.image_rows import ImageRow, fault_of, unreadable
from svqvae_hf.untrusted.set_rows import confine_row

NOT_PART_OF_A_KEY = r"^(\w+://datasets/[^@]*@[^/]*/|zip://)"  # repository and revision on the Hub, or an archive


class ImagePart(Protocol):
    """A part of an image set, which can be read independently of the others. Its name says which images it holds."""

    name: str

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
        return (self[index] for index in range(len(self)))


class FileRows(IndexedRows):
    """Image files. Their labels are the names of their folders, if there are several.

    Args:
        root (`str`): Folder above all files.
        keys (`Sequence[str]`): Paths of the files, relative to `root`.
    """

    def __init__(self, root: str, keys: Sequence[str]):
        self.root = root
        self.names = pa.array(map(os.fsencode, keys), pa.binary(), size=len(keys))
        names = sorted({readable(os.path.dirname(key)) or "." for key in keys})
        self.features = datasets.Features()
        if names != ["."]:
            index = {name: number for number, name in enumerate(names)}
            self.labels = np.array([index[readable(os.path.dirname(key)) or "."] for key in keys], np.int32)
            self.features["label"] = datasets.ClassLabel(names=names)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> ImageRow:
        name = os.fsdecode(self.names[index].as_py())
        values = {"label": int(self.labels[index])} if self.features else {}
        return ImageRow(readable(name), {"path": os.path.join(self.root, name), "bytes": None}, values)

    def stamps(self) -> list[tuple[str, int, int]]:
        """Name, bytes and time of change in ns of each file that is still there."""
        stamps = []
        for name in map(os.fsdecode, self.names.to_pylist()):
            with suppress(OSError):
                fact = os.stat(os.path.join(self.root, name))
                stamps.append((name, fact.st_size, fact.st_mtime_ns))
        return stamps


class FirstRows:
    """The first images of a set, as one part."""

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


@dataclass
class StreamPart:
    """A shard of a set of `datasets` that is streamed.

    Args:
        rows (`datasets.IterableDataset`): The set, with its images undecoded.
        image_column (`str`): Column of the images.
        root (`str`): Folder or name of the set.
        repository (`str`, *optional*): Repository of the set if it is on the Hub, which its rows may name files of.
        is_remote (`bool`): Whether the file is at a URL or on the Hub, so that reading it can fail for a while.
        name (`str`): Name of the shard's file.
        number (`int`): Number of the shard.
    """

    rows: datasets.IterableDataset
    image_column: str
    root: str
    repository: str | None
    is_remote: bool
    name: str
    number: int

    def read(self) -> Iterator[ImageRow]:
        """Yields the images. The rest of a broken file is one unreadable row."""
        try:
            shard = self.rows.shard(self.rows.num_shards, self.number)
            for index, batch in enumerate(shard.iter(1)):  # its `__iter__` would share rows among a loader's workers
                row = {name: values[0] for name, values in batch.items()}
                source = confine_row(row.pop(self.image_column), self.repository)
                path = source["path"] if isinstance(source, Mapping) else None
                key = re.sub(NOT_PART_OF_A_KEY, "", path.partition("::")[0]) if path else f"{self.number}-{index}"
                yield ImageRow(os.path.relpath(key, self.root) if os.path.isabs(key) else key, source, row)
        except (ValueError, OSError, pa.ArrowException) as error:
            if isinstance(error, OSError) and (self.is_remote or error.errno):  # of the network or the disk
                raise
            reason = fault_of(error).removesuffix(".")
            kept = [name for name in self.rows.features if name != self.image_column]
            yield unreadable(self.name, f"the rest of the file cannot be read: {reason}.", kept)

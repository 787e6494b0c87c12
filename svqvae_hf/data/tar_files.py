"""Image sets in tar files, in WebDataset's form: consecutive members of one name, told apart by their suffixes."""

import os
import re
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import islice
from lzma import LZMAError
from typing import Any

import datasets
import fsspec

from svqvae_files.errors import explained
from svqvae_files.inputs import readable
from svqvae_hf.data.image_rows import LABEL_COLUMNS, ImageRow, check_columns, fault_of, unreadable
from svqvae_hf.models.image_files import IMAGE_SUFFIXES
from svqvae_hf.untrusted.tars import StrictTarInfo, check_end, read_member

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")
TAR_ERRORS = (tarfile.TarError, EOFError, zlib.error, LZMAError, OSError)
MEMBER_NAME = re.compile(r"((?:.*/|)[^./][^./]*)\.([^/]*)")  # a sample's name ends at the first dot
PEEKED_SAMPLES = 100  # that say which columns a set has

Sample = tuple[str, dict[str, bytes | None]]  # its name, and its members by suffix; None: refused as too large


class TarPart:
    """A tar file of an image set. Samples that cannot be read, and the rest of a damaged file, are unreadable rows.

    Args:
        path (`str`): Local path, or a path for `fsspec`.
        features (`datasets.Features`): Columns to keep, by the suffixes of their members.
        image_key (`str`, *optional*): Suffix of the images without a dot; by default any suffix of images.
    """

    def __init__(self, path: str, features: datasets.Features, image_key: str | None):
        self.path = path
        self.name = readable(os.path.basename(path))
        self.features = features
        self.image_key = image_key

    def read(self) -> Iterator[ImageRow]:
        """Yields the images."""
        try:
            for name, members in _samples(self.path):
                yield self._row(name, members)
        except TAR_ERRORS as error:
            if isinstance(error, OSError) and ("://" in self.path or error.errno):  # of the network or the disk
                raise
            reason = f"the tar file ends early: {fault_of(error).removesuffix('.')}."
            yield unreadable(self.name, reason, [*self.features])

    def _row(self, name: str, members: dict[str, bytes | None]) -> ImageRow:
        keys = image_keys(members, self.image_key)
        if len(keys) != 1 or any(f"{column}*" in members for column in self.features):
            listed = ", ".join(member.rstrip("*") for member in members)
            fault = f"the sample must hold one image, its files side by side, one of each kind, got {listed}."
            return unreadable(name, fault, [*self.features])
        key, content = f"{name}.{keys[0]}", members[keys[0]]
        try:
            values = {column: _value(members.get(column), type) for column, type in self.features.items()}
        except ValueError as error:
            return unreadable(key, f"a label beside it cannot be read: {error}", [*self.features])
        if content is None:
            return unreadable(key, "the image is too large for a member of a tar file.", [*self.features])
        return ImageRow(key, {"path": key, "bytes": content}, values)


def open_tars(paths: Sequence[str], image_key: str | None, columns: Sequence[str]) -> list[TarPart]:
    """Finds the columns of tar files, from the first samples of the first file that has any.

    Args:
        paths (`Sequence[str]`): Local paths, or paths for `fsspec`.
        image_key (`str`, *optional*): Suffix of the images; required if samples have several images.
        columns (`Sequence[str]`): Suffixes of further members to keep, besides [`LABEL_COLUMNS`].

    Raises:
        OSError: The first file cannot be fetched.
        ValueError: No file has a sample, or the samples have no image or several, or no such column.
    """
    samples, fault = _first_samples(paths)
    if not samples:
        raise ValueError(f"tar files must hold images, but `{paths[0]}` has none: {fault or 'it is empty'}.")
    suffixes = list(dict.fromkeys(suffix.rstrip("*") for _, members in samples for suffix in members))
    found = [image_keys(members, image_key) for _, members in samples]
    if not any(found):
        wrong = "" if image_key is None else f", got `{image_key}`"
        raise ValueError(f"--image-column must be one of {', '.join(suffixes)}{wrong}.")
    several = next((keys for keys in found if len({key.rstrip("*") for key in keys}) > 1), None)
    if several:
        raise ValueError(f"the samples have several images: {', '.join(several)}. Choose one with --image-column.")
    check_columns(columns, suffixes)
    kept = [suffix for suffix in suffixes if suffix in (*LABEL_COLUMNS, *columns)]
    features = datasets.Features({suffix: _type(suffix, samples) for suffix in kept})
    return [TarPart(path, features, image_key) for path in paths]


def image_keys(members: dict[str, bytes | None], image_key: str | None) -> list[str]:
    """Suffixes of the images of a sample."""
    names = {key: key.rstrip("*") for key in members}
    return [
        key
        for key, name in names.items()
        if (f".{name}" in IMAGE_SUFFIXES if image_key is None else name == image_key)
    ]


def _first_samples(paths: Sequence[str]) -> tuple[list[Sample], str]:
    fault = ""
    for path in paths:
        samples: list[Sample] = []
        try:
            for sample in islice(_samples(path), PEEKED_SAMPLES):
                samples.append(sample)  # kept, even if the file ends early
        except TAR_ERRORS as error:
            if isinstance(error, OSError) and ("://" in path or error.errno):
                raise
            fault = fault or fault_of(error)
        if samples:
            return samples, ""
    return [], fault


def _samples(path: str) -> Iterator[Sample]:
    name: str | None = None
    members: dict[str, bytes | None] = {}
    with ExitStack() as stack:
        if "://" in path:
            stack.enter_context(explained(path, "read"))
            file = stack.enter_context(fsspec.open(path, "rb"))
            tar = stack.enter_context(tarfile.open(fileobj=file, mode="r|*", tarinfo=StrictTarInfo))
        else:
            tar = stack.enter_context(tarfile.open(path, tarinfo=StrictTarInfo))
        while (member := tar.next()) is not None:
            tar.members = []  # type: ignore[attr-defined] # otherwise it keeps all
            match = MEMBER_NAME.fullmatch(readable(member.name))
            if match is None or not member.isfile():
                continue
            if match[1] != name:
                if name is not None:
                    yield name, members
                name, members = match[1], {}
            suffix = match[2].lower()
            copies = "*" * sum(key.rstrip("*") == suffix for key in members)  # of files of the same name
            members[suffix + copies] = read_member(tar, member)
        if name is not None:
            yield name, members
        check_end(tar)


def _type(suffix: str, samples: Sequence[Sample]) -> datasets.Value:
    """Type of a column: text, but integers for classes."""
    values = [members[suffix] or b"" for _, members in samples if suffix in members]
    return datasets.Value("int64" if suffix == "cls" and all(map(_is_integer, values)) else "string")


def _is_integer(value: bytes) -> bool:
    return re.fullmatch(rb"\s*-?\d{1,18}\s*", value) is not None


def _value(content: bytes | None, type: datasets.Value) -> Any:
    if content is None:
        return None
    if type.dtype == "string":
        return content.decode()
    if not _is_integer(content):
        raise ValueError(f"it must be an integer, but is {content[:40]!r}.")
    return int(content)

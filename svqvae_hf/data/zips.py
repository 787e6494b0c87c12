"""Image sets in zip files, each of which is a part."""

import os
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import fsspec

from svqvae_files.errors import explained
from svqvae_files.inputs import is_url, readable
from svqvae_hf.data.image_rows import ImageRow, fault_of, unreadable
from svqvae_hf.data.set_files import METADATA_FILES
from svqvae_hf.models.image_files import IMAGE_SUFFIXES
from svqvae_hf.untrusted.tars import MAX_MEMBER_BYTES


@dataclass
class ZipPart:
    """A zip file of an image set. Its images have no labels.

    Args:
        path (`str`): Local path, or a URL for `fsspec`.
    """

    path: str

    @property
    def name(self) -> str:
        """Name of the file."""
        return readable(os.path.basename(self.path))

    def read(self) -> Iterator[ImageRow]:
        """Yields the images in the order of their paths. A damaged file is one unreadable row.

        Raises:
            OSError: The file cannot be reached.
            ValueError: It has metadata, which are not read.
        """
        try:
            with _opened(self.path) as archive:
                for name in self._image_names(archive):
                    yield self._read_member(archive, name)
        except zipfile.BadZipFile as error:
            yield unreadable(self.name, f"its archive is damaged: {error}.")

    def _image_names(self, archive: zipfile.ZipFile) -> list[str]:
        names = []
        for name in sorted(archive.namelist()):
            base_name = os.path.basename(name)
            if base_name in METADATA_FILES:
                raise ValueError(f"`{self.path}` holds `{name}`, which is not read in zip files. Unpack the file.")
            is_hidden = name.startswith((".", "__MACOSX/")) or "/." in name
            if base_name.lower().endswith(IMAGE_SUFFIXES) and not is_hidden:
                names.append(name)
        return names

    def _read_member(self, archive: zipfile.ZipFile, name: str) -> ImageRow:
        size = archive.getinfo(name).file_size
        if size > MAX_MEMBER_BYTES:
            return unreadable(name, f"it must have at most {MAX_MEMBER_BYTES:,} bytes, but has more.")
        try:
            content = archive.read(name)
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
            # A member with a password raises `RuntimeError`, and one of an unknown compression `NotImplementedError`.
            return unreadable(name, f"its archive is damaged: {fault_of(error)}.")
        return ImageRow(name, {"path": name, "bytes": content}, {})


def open_zips(paths: Sequence[str]) -> list[ZipPart]:
    """Opens zip files.

    Args:
        paths (`Sequence[str]`): Local paths, or URLs for `fsspec`.

    Raises:
        OSError: The first file cannot be reached.
        ValueError: The first file is no zip file.
    """
    try:
        with _opened(paths[0]):
            pass
    except zipfile.BadZipFile as error:
        raise ValueError(f"`{paths[0]}` must be a zip file, but is damaged: {error}.") from error
    return [ZipPart(path) for path in paths]


@contextmanager
def _opened(path: str) -> Iterator[zipfile.ZipFile]:
    if not is_url(path):
        with zipfile.ZipFile(path) as archive:
            yield archive
        return
    with explained(path, "read"), fsspec.open(path, "rb") as file, zipfile.ZipFile(file) as archive:
        yield archive

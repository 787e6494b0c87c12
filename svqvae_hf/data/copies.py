"""Copies of image sets in the cache of `datasets`, for random access."""

import os
from collections.abc import Iterator, Sequence
from typing import Any

import datasets

from svqvae_files.identity import value_digest
from svqvae_files.inputs import is_url
from svqvae_hf.data.image_parts import ImagePart, IndexedRows
from svqvae_hf.data.image_rows import ImageRow, ImageSource, read_bytes

KEY, IMAGE = "__key__", "__image__"  # columns


class CopiedRows(IndexedRows):
    """Images of a copied set.

    Args:
        rows (`datasets.Dataset`): Keys, undecoded images and other columns.
    """

    def __init__(self, rows: datasets.Dataset):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> ImageRow:
        row = self.rows[index]
        image = row.pop(IMAGE)
        return ImageRow(row.pop(KEY), image, row)


def copy_images(parts: Sequence[ImagePart], features: datasets.Features, fingerprint: str, root: str) -> CopiedRows:
    """Copies a set, unless the cache has a copy of this very folder with its fingerprint.

    Args:
        parts (`Sequence[ImagePart]`): Parts of the set.
        features (`datasets.Features`): Types of the columns beside the images.
        fingerprint (`str`): Fingerprint of the set.
        root (`str`): Folder or URL of the set. The fingerprint does not depend on it, but the copy does: files of two
            folders may have equal names, sizes and times without being copies of each other.
    """
    text = datasets.Value("string")
    image = {"path": text, "bytes": datasets.Value("binary"), "fault": text}
    columns = datasets.Features({KEY: text, IMAGE: image, **features})
    place = root if is_url(root) else os.path.realpath(root)
    copy_fingerprint = value_digest([fingerprint, place, str(columns)])[:16]
    arguments_of_rows = {"parts": tuple(parts)}
    rows = datasets.Dataset.from_generator(_rows, columns, gen_kwargs=arguments_of_rows, fingerprint=copy_fingerprint)
    return CopiedRows(rows)


def _rows(parts: Sequence[ImagePart]) -> Iterator[dict[str, Any]]:
    """Yields the rows of the copy."""
    for part in parts:
        for row in part.read():
            yield {KEY: row.key, IMAGE: _stored(row.source), **row.values}


def _stored(source: ImageSource) -> dict[str, Any]:
    """An image as it is stored in the copy: the bytes of an image at a URL, or the absolute path of a file."""
    image: dict[str, Any] = {"path": None, "bytes": None, "fault": None}
    if isinstance(source, dict):
        image.update(source)
    has_content = image["bytes"] is not None or image["fault"] is not None
    if has_content or image["path"] is None:
        return image
    if is_url(image["path"]):
        image["bytes"] = read_bytes(image["path"])
    else:
        image["path"] = os.path.abspath(image["path"])
    return image

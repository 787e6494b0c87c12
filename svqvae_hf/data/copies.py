"""Copies of image sets in the cache of `datasets`, for random access."""

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
        return ImageRow(row.pop(KEY), row.pop(IMAGE), row)


def copy_images(parts: Sequence[ImagePart], features: datasets.Features, fingerprint: str) -> CopiedRows:
    """Copies a set, unless the cache has a copy with its fingerprint.

    Args:
        parts (`Sequence[ImagePart]`): Parts of the set.
        features (`datasets.Features`): Types of the columns beside the images.
        fingerprint (`str`): Fingerprint of the set.
    """
    text = datasets.Value("string")
    image = {"path": text, "bytes": datasets.Value("binary"), "fault": text}
    columns = datasets.Features({KEY: text, IMAGE: image, **features})
    copy_fingerprint = value_digest([fingerprint, str(columns)])[:16]
    arguments_of_rows = {"parts": tuple(parts)}
    rows = datasets.Dataset.from_generator(_rows, columns, gen_kwargs=arguments_of_rows, fingerprint=copy_fingerprint)
    return CopiedRows(rows)


def _rows(parts: Sequence[ImagePart]) -> Iterator[dict[str, Any]]:
    """Yields the rows of the copy."""
    for part in parts:
        for row in part.read():
            yield {KEY: row.key, IMAGE: _embedded(row.source), **row.values}


def _embedded(source: ImageSource) -> dict[str, Any]:
    """An image as it is stored in the copy, with the bytes of an image at a URL."""
    image: dict[str, Any] = {"path": None, "bytes": None, "fault": None}
    if isinstance(source, dict):
        image.update(source)
    has_content = image["bytes"] is not None or image["fault"] is not None
    is_at_url = image["path"] is not None and is_url(image["path"])
    if is_at_url and not has_content:
        image["bytes"] = read_bytes(image["path"])
    return image

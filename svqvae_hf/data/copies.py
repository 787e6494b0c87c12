"""Copies of image sets in the cache of `datasets`, for random access."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, cast

import datasets

from svqvae_hf.data.image_parts import ImagePart, IndexedRows
from svqvae_hf.data.image_rows import ImageRow, read_bytes

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
        fingerprint (`str`): Fingerprint of the files.
    """
    text = datasets.Value("string")
    image = {"path": text, "bytes": datasets.Value("binary"), "fault": text}
    features = datasets.Features({KEY: text, IMAGE: image, **features})
    name = hashlib.sha256(f"{fingerprint} {features}".encode()).hexdigest()[:16]
    sources = {"parts": tuple(parts)}
    return CopiedRows(datasets.Dataset.from_generator(_rows, features, gen_kwargs=sources, fingerprint=name))


def _rows(parts: Sequence[ImagePart]) -> Iterator[dict[str, Any]]:
    """Rows to copy, with images at URLs embedded."""
    for key, source, values in chain.from_iterable(part.read() for part in parts):
        image = {"path": None, "bytes": None, "fault": None} | dict(cast(Mapping[str, Any], source or {}))
        if image["bytes"] is None and image["fault"] is None and "://" in (image["path"] or ""):
            image["bytes"] = read_bytes(image["path"])
        yield {KEY: key, IMAGE: image, **values}

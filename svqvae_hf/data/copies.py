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
PATH_IN_SET = "path_in_set"  # of an image file in the folder of the set, which may be moved or copied


class CopiedRows(IndexedRows):
    """Images of a copied set.

    Args:
        rows (`datasets.Dataset`): Keys, undecoded images and other columns.
        root (`str`): Folder of the set.
    """

    def __init__(self, rows: datasets.Dataset, root: str):
        self.rows = rows
        self.root = root

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> ImageRow:
        row = self.rows[index]
        image = row.pop(IMAGE)
        path_in_set = image.pop(PATH_IN_SET)
        if path_in_set is not None:
            image["path"] = os.path.join(self.root, path_in_set)
        return ImageRow(row.pop(KEY), image, row)


def copy_images(parts: Sequence[ImagePart], features: datasets.Features, fingerprint: str, root: str) -> CopiedRows:
    """Copies a set, unless the cache has a copy with its fingerprint.

    Args:
        parts (`Sequence[ImagePart]`): Parts of the set.
        features (`datasets.Features`): Types of the columns beside the images.
        fingerprint (`str`): Fingerprint of the set.
        root (`str`): Folder of the set. The fingerprint does not depend on it.
    """
    text = datasets.Value("string")
    image = {"path": text, "bytes": datasets.Value("binary"), "fault": text, PATH_IN_SET: text}
    columns = datasets.Features({KEY: text, IMAGE: image, **features})
    copy_fingerprint = value_digest([fingerprint, str(columns)])[:16]
    arguments_of_rows = {"parts": tuple(parts), "root": root}
    rows = datasets.Dataset.from_generator(_rows, columns, gen_kwargs=arguments_of_rows, fingerprint=copy_fingerprint)
    return CopiedRows(rows, root)


def _rows(parts: Sequence[ImagePart], root: str) -> Iterator[dict[str, Any]]:
    """Yields the rows of the copy."""
    for part in parts:
        for row in part.read():
            yield {KEY: row.key, IMAGE: _stored(row.source, root), **row.values}


def _stored(source: ImageSource, root: str) -> dict[str, Any]:
    """An image as it is stored in the copy: with the bytes of an image at a URL, without the folder of the set."""
    image: dict[str, Any] = {"path": None, "bytes": None, "fault": None, PATH_IN_SET: None}
    if isinstance(source, dict):
        image.update(source)
    has_content = image["bytes"] is not None or image["fault"] is not None
    if has_content or image["path"] is None:
        return image
    if is_url(image["path"]):
        image["bytes"] = read_bytes(image["path"])
    elif image["path"].startswith(f"{root}/"):
        image[PATH_IN_SET] = image["path"].removeprefix(f"{root}/")
        image["path"] = None
    return image

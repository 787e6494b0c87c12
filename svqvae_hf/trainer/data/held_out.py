"""Images of a validation must not be trained on."""

import filecmp
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import datasets
import numpy as np
import pyarrow.compute as pc

from svqvae_files.inputs import is_url, readable
from svqvae_hf.data.image_parts import CaptionedRows
from svqvae_hf.data.image_sets import ImageSet
from svqvae_hf.token_sets.manifest import TokenSet
from svqvae_hf.token_sets.settings import TokenSettings


def check_held_out(held_out: ImageSet, trained: ImageSet | None) -> None:
    """Raises if a file of one set is one of the other: it has the same URL, or the same bytes on this machine.

    Args:
        held_out ([`ImageSet`]): Images of the validation, of any kind.
        trained ([`ImageSet`], *optional*): Images that are trained on; with `None`, nothing is compared.

    Raises:
        ValueError: The sets share a file.
    """
    if trained is None:
        return
    trained_paths = _paths_of_files(trained)
    trained_urls = {path for path in trained_paths if is_url(path)}
    trained_files_by_size = _files_by_size(trained_paths)
    for path in _paths_of_files(held_out):
        if path in trained_urls:
            raise _shared_file_error(held_out, path, trained, path)
        if not os.path.isfile(path):
            continue
        size = os.path.getsize(path)
        trained_files_of_size = trained_files_by_size.get(size, [])
        for trained_path in trained_files_of_size:
            has_same_bytes = filecmp.cmp(path, trained_path, shallow=False)
            if has_same_bytes:
                raise _shared_file_error(held_out, path, trained, trained_path)


def _paths_of_files(images: ImageSet) -> list[str]:
    """Paths or URLs of the files of a set, without image files that have no row in its metadata files."""
    rows = images.rows
    if isinstance(rows, CaptionedRows):
        return rows.paths()
    return images.files.paths()


def _files_by_size(paths: Sequence[str]) -> dict[int, list[str]]:
    """Paths of the files on this machine, by their size in bytes."""
    files = defaultdict(list)
    for path in paths:
        if os.path.isfile(path):
            size = os.path.getsize(path)
            files[size].append(path)
    return files


def _shared_file_error(held_out: ImageSet, path: str, trained: ImageSet, trained_path: str) -> ValueError:
    """Error that names a file of the validation and the equal file of the training."""
    return ValueError(
        f"`--validation_data_dir` must hold images that are not trained on, but `{_key(held_out, path)}` is "
        f"`{_key(trained, trained_path)}` of the training images. Remove it from one of them."
    )


def _key(images: ImageSet, path: str) -> str:
    """Path of a file, relative to the folder of its set."""
    return readable(path.removeprefix(images.files.root).lstrip("/"))


# Token sets


def check_held_out_tokens(held_out: TokenSet, trained: TokenSet, option: str) -> None:
    """Raises if two token sets hold the same image.

    Sets of the same image files share an image if they share its key, however it was cropped. Sets of other files may
    use the same names for other images, so their ids at the largest scale must be equal, too.

    Args:
        held_out ([`~svqvae_hf.token_sets.manifest.TokenSet`]): Images of the validation.
        trained ([`~svqvae_hf.token_sets.manifest.TokenSet`]): Images that are trained on.
        option (`str`): Option that names the images of the validation, for the error.

    Raises:
        ValueError: An image is in both.
    """
    shared_key = _find_shared_key(held_out, trained)
    if shared_key is not None:
        raise ValueError(
            f"`{option}` must hold images that are not trained on, but `{shared_key}` of `{held_out.name}` is also in "
            f"`{trained.name}`. Tokenize other images."
        )


def _find_shared_key(held_out: TokenSet, trained: TokenSet) -> str | None:
    """Key of an image that both sets hold, or `None`."""
    trained_rows = trained.load()
    held_out_rows = held_out.load()
    rows_with_shared_keys = _rows_with_keys_of(held_out_rows, trained_rows)
    if len(rows_with_shared_keys) == 0:
        return None
    if _are_of_same_files(held_out, trained):  # then a key names the same file in both sets
        return rows_with_shared_keys[0]["key"]
    # In sets of other files, a key that both have may name different images. Equal images have equal ids, too.
    held_out_images = set(_images(held_out_rows, held_out.settings))
    for image in _images(rows_with_shared_keys, trained.settings):
        if image in held_out_images:
            return image.key
    return None


def _rows_with_keys_of(held_out_rows: datasets.Dataset, trained_rows: datasets.Dataset) -> datasets.Dataset:
    """Rows of the training whose key is also a key of the validation."""
    held_out_keys = pc.unique(held_out_rows.data.column("key"))
    is_shared = pc.is_in(trained_rows.data.column("key"), value_set=held_out_keys)  # (rows,)
    row_numbers = np.flatnonzero(is_shared.to_numpy())
    return trained_rows.select(row_numbers)


def _are_of_same_files(first: TokenSet, second: TokenSet) -> bool:
    """Whether two token sets are known to be made from the same image files."""
    image_files = first.options.get("image_files")
    return image_files is not None and image_files == second.options.get("image_files")


class _TokenImage(NamedTuple):
    """An image of a token set.

    Args:
        key (`str`): Its key.
        ids (`tuple[int, ...]` or `bytes`): Its ids at the largest scale, or its compressed ids.
    """

    key: str
    ids: tuple[int, ...] | bytes


def _images(rows: datasets.Dataset, settings: TokenSettings) -> Iterator[_TokenImage]:
    """Yields the image of each row."""
    column = settings.id_columns[0]  # the only one, if the ids are compressed
    if settings.context_model is None:
        column = settings.id_columns[int(np.argmax(settings.scales))]
    for row in rows.select_columns(["key", column]):
        ids = row[column]
        yield _TokenImage(row["key"], ids if isinstance(ids, bytes) else tuple(ids))

"""Opens image sets to read once: image files, or a streamed set of `datasets`."""

import hashlib
import io
import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import datasets
import fsspec
from PIL import Image

from svqvae_hf.models.image_processing_svqvae import IMAGE_SUFFIXES, load_image, to_rgb
from svqvae_hf.paths import find_files
from svqvae_hf.untrusted.set_rows import check_confined, confine_row

ImageSource = Image.Image | str | Path | Mapping[str, Any] | None  # a mapping is a row of a set, `None` an empty one
Rows = TypeVar("Rows", datasets.Dataset, datasets.IterableDataset)
SET_NAME = r"[\w.-]+(/[\w.-]+)?"  # on the Hub, also sets without an owner
METADATA_FILES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")  # `datasets` reads columns of a folder here
NOT_PART_OF_A_KEY = r"^(\w+://datasets/[^@]*@[^/]*/|zip://)"  # repository and revision on the Hub, or an archive


class ImageRow(NamedTuple):
    """An image of a set.

    Args:
        key (`str`): Path of the file in the set, or part and row if the image has no file.
        source (`ImageSource`): Argument of [`read_image`].
        values (`dict[str, Any]`): Values of other columns by name.
    """

    key: str
    source: ImageSource
    values: dict[str, Any]


@dataclass(frozen=True)
class ImageRows:
    """An image set with a key per image, in parts that can be read independently.

    Args:
        parts (`list[Iterable[ImageRow]]`): Parts of the set in its order, each to be read once. A part is a file of
            `datasets`; image files together are one part.
        features (`datasets.Features`): Types of the columns in `ImageRow.values`.
        fingerprint (`str`): SHA-256 in hexadecimal of the names, sizes and times of the files, or of their revision on
            the Hub.
        length (`int`, *optional*): Number of images; `None` if it is unknown before all are read.
    """

    parts: list[Iterable[ImageRow]]
    features: datasets.Features
    fingerprint: str
    length: int | None


def open_images(
    data: Sequence[str],
    *,
    config: str | None = None,
    split: str | None = None,
    image_column: str = "image",
    max_images: int | None = None,
) -> Iterable[ImageSource]:
    """Finds the images of a set without reading them.

    Args:
        data (`Sequence[str]`): Image files, folders of images and glob patterns. Or one set of `datasets`, which is
            streamed: its name on the Hub, or a folder without images directly in it.
        config (`str`, *optional*): Configuration of the set; required if it has several.
        split (`str`, *optional*): Split of the set; required if it has several.
        image_column (`str`, defaults to `"image"`): Column of the set that holds the images.
        max_images (`int`, *optional*): Number of images after which to stop; all by default.

    Returns:
        `Iterable`: Arguments of [`read_image`], one per image: a list of paths, or rows of the set.

    Raises:
        OSError: The set cannot be found or reached.
        ValueError: There is no image, no such split or column, or `max_images` is out of range.
    """
    _check_max_images(max_images)
    if len(data) > 1 or not _is_set(data[0]):
        return find_files(data, IMAGE_SUFFIXES)[:max_images]
    rows, repository, _ = _open_set(data[0], config, split, image_column)
    sources = (row[image_column] for row in rows.select_columns(image_column))
    return (confine_row(source, repository) for source in itertools.islice(sources, max_images))


def open_rows(
    data: Sequence[str],
    *,
    config: str | None = None,
    split: str | None = None,
    image_column: str = "image",
    columns: Sequence[str] = (),
    optional_columns: Sequence[str] = (),
    max_images: int | None = None,
) -> ImageRows:
    """Finds the images of a set and other columns without reading them.

    Args:
        data (`Sequence[str]`): Image files or a set, as for [`open_images`].
        config (`str`, *optional*): Configuration of the set; required if it has several.
        split (`str`, *optional*): Split of the set; required if it has several.
        image_column (`str`, defaults to `"image"`): Column of the set that holds the images.
        columns (`Sequence[str]`): Other columns of the set to keep.
        optional_columns (`Sequence[str]`): Other columns to keep if the set has them.
        max_images (`int`, *optional*): Number of images after which to stop; all by default.

    Raises:
        OSError: The set cannot be found or reached.
        ValueError: There is no image, no such split or column, or `max_images` is out of range.
    """
    _check_max_images(max_images)
    if len(data) > 1 or not _is_set(data[0]):
        if columns:
            raise ValueError(f"image files have no columns, got {', '.join(columns)} to keep. Leave them out.")
        return _file_rows(find_files(data, IMAGE_SUFFIXES)[:max_images])
    rows, repository, origin = _open_set(data[0], config, split, image_column)
    missing = sorted(set(columns) - set(rows.features))
    if missing:
        raise ValueError(f"columns must be among {', '.join(rows.features)}, got {', '.join(missing)}.")
    chosen = [name for name in rows.features if name in (*columns, *optional_columns) and name != image_column]
    features = datasets.Features({name: rows.features[name] for name in chosen})
    rows = rows.select_columns([image_column, *chosen])
    rows = rows if max_images is None else rows.take(max_images)
    count = 1 if max_images is not None else rows.num_shards
    splits = rows.info.splits or {}
    known = splits[rows.split].num_examples if rows.split in splits else None
    return ImageRows(
        parts=[_set_rows(rows, image_column, data[0], repository, part, count) for part in range(count)],
        features=features,
        fingerprint=_digest([origin, image_column, max_images]),
        length=min(known, max_images or known) if known else max_images,
    )


def disable_decoding(rows: Rows, image_column: str) -> Rows:
    """Leaves the images of a set encoded, for [`read_image`], so that a broken image raises where it is read.

    Args:
        rows (`datasets.Dataset` or `datasets.IterableDataset`): The set.
        image_column (`str`): Column of the images.
    """
    if isinstance(rows, datasets.IterableDataset):
        rows = rows.decode(False)  # otherwise a broken image of a folder on the Hub ends the stream
    return rows.cast_column(image_column, datasets.Image(decode=False))


def read_image(source: ImageSource) -> Image.Image:
    """Reads an image as 8-bit RGB.

    Args:
        source (`PIL.Image.Image`, path or `Mapping`): An image, a file, or an undecoded row of `datasets`, which has
            `"bytes"`, or a `"path"` for `fsspec`, or neither.

    Raises:
        OSError: The file cannot be opened.
        ValueError: The file is not an image or broken (see [`load_image`]), the row is empty, or a row on the Hub
            names a file outside its set.
    """
    if isinstance(source, Image.Image):
        return to_rgb(source)
    if source is None or (isinstance(source, Mapping) and source["bytes"] is None and source["path"] is None):
        raise ValueError("the row must hold an image, but is empty.")
    if not isinstance(source, Mapping):
        return load_image(source)
    check_confined(source)
    content = source["bytes"]
    if content is None:
        with fsspec.open(source["path"], "rb") as file:
            content = file.read()
    return load_image(io.BytesIO(content))


def image_name(source: ImageSource, index: int) -> str:
    """Name of the image's file, or its index in the set if it has no file."""
    path = source.get("path") if isinstance(source, Mapping) else source
    return Path(path).name if path and isinstance(path, str | Path) else f"image {index}"


def is_hub_set(name: str) -> bool:
    """Whether `name` is the name of a set on the Hub, and not a local path."""
    return not Path(name).exists() and re.fullmatch(SET_NAME, name) is not None


def _is_set(name: str) -> bool:
    path = Path(name)
    if path.is_dir():
        files = list(path.iterdir())
        has_images = any(file.suffix.lower() in IMAGE_SUFFIXES for file in files)
        return not has_images or any(file.name in METADATA_FILES for file in files)
    return is_hub_set(name)


def _check_max_images(max_images: int | None) -> None:
    if max_images is not None and max_images < 1:
        raise ValueError(f"`max_images` must be at least 1, got {max_images}.")


def _open_set(
    name: str, config: str | None, split: str | None, image_column: str
) -> tuple[datasets.IterableDataset, str | None, list[Any]]:
    """Opens a split of a set: its stream, its repository if it is on the Hub, and a record of its files."""
    if split is None:
        try:
            names = datasets.get_dataset_split_names(name, config)
        except datasets.data_files.EmptyDatasetError as error:
            raise FileNotFoundError(
                f"a set must hold images, but `{name}` has none. Pass a folder of images, or the name of a set."
            ) from error
        if len(names) > 1:
            raise ValueError(f"the set `{name}` has the splits {', '.join(names)}. Choose one with --split.")
        split = names[0]
    builder = datasets.load_dataset_builder(name, config)
    rows = builder.as_streaming_dataset(split)
    if image_column not in (rows.column_names or ()):
        raise ValueError(
            f"--image-column must be one of {', '.join(rows.column_names or ['none'])}, got `{image_column}`."
        )
    files = builder.config.data_files[split]
    return disable_decoding(rows, image_column), builder.repo_id, [split, list(files), files.origin_metadata]


def _file_rows(paths: Sequence[Path]) -> ImageRows:
    absolute = [os.path.abspath(path) for path in paths]
    root = os.path.commonpath([os.path.dirname(path) for path in absolute])
    keys = [os.path.relpath(path, root) for path in absolute]
    times = [(key, os.stat(path).st_size, os.stat(path).st_mtime_ns) for key, path in zip(keys, absolute, strict=True)]
    rows = (ImageRow(key, {"path": path, "bytes": None}, {}) for key, path in zip(keys, absolute, strict=True))
    return ImageRows(parts=[rows], features=datasets.Features(), fingerprint=_digest(times), length=len(keys))


def _set_rows(
    rows: datasets.IterableDataset,
    image_column: str,
    root: str,
    repository: str | None,
    part: int,
    num_parts: int,
) -> Iterator[ImageRow]:
    for index, row in enumerate(rows.shard(num_parts, part)):
        source = confine_row(row.pop(image_column), repository)
        path = source["path"] if isinstance(source, Mapping) else None
        key = re.sub(NOT_PART_OF_A_KEY, "", path.partition("::")[0]) if path else f"{part}-{index}"
        yield ImageRow(os.path.relpath(key, root) if os.path.isabs(key) else key, source, row)


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()

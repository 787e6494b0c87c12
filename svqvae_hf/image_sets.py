"""Images to go through once: files, or a streamed set of `datasets`."""

import io
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import fsspec
from PIL import Image

from svqvae_hf.files import find_files
from svqvae_hf.image_processing_svqvae import IMAGE_SUFFIXES, load_image, to_rgb

ImageSource = Image.Image | str | Path | Mapping[str, Any] | None  # the last: an empty row of a set
SET_NAME = r"[\w.-]+(/[\w.-]+)?"  # of a set on the Hub


def open_images(
    data: Sequence[str],
    *,
    config: str | None = None,
    split: str | None = None,
    image_column: str = "image",
    max_images: int | None = None,
) -> Iterable[ImageSource]:
    """Finds the images of a set; none is read or copied yet.

    Args:
        data (`Sequence[str]`): Image files, folders that hold some, and globs; or one set of `datasets`: its name on
            the Hub, or a folder without images right in it. A set is streamed.
        config (`str`, *optional*): Configuration of the set, needed if it has several.
        split (`str`, *optional*): Split of the set, needed if it has several.
        image_column (`str`, defaults to `"image"`): Column of the set that holds the images.
        max_images (`int`, *optional*): Number of images after which to stop; all if not given.

    Returns:
        `Iterable`: For [`read_image`], one per image: a list of paths, or rows of the set.

    Raises:
        OSError: The set cannot be found or reached.
        ValueError: There is no image, or the split, the column or the number is not there.
    """
    if max_images is not None and max_images < 1:
        raise ValueError(f"`max_images` must be at least 1, but is {max_images}.")
    if len(data) > 1 or not _is_set(data[0]):
        return find_files(data, IMAGE_SUFFIXES)[:max_images]
    if split is None:
        names = datasets.get_dataset_split_names(data[0], config)
        if len(names) > 1:
            raise ValueError(f"the set `{data[0]}` has the splits {', '.join(names)}. Choose one by --split.")
        split = names[0]
    rows = datasets.load_dataset(data[0], config, split=split, streaming=True)
    if image_column not in (rows.column_names or ()):
        raise ValueError(
            f"--image-column must be one of {', '.join(rows.column_names or ['none'])}, but is `{image_column}`."
        )
    rows = rows.select_columns(image_column).cast_column(image_column, datasets.Image(decode=False))
    return (row[image_column] for row in itertools.islice(rows, max_images))


def read_image(source: ImageSource) -> Image.Image:
    """Reads an image as 8-bit RGB.

    Args:
        source (`PIL.Image.Image`, path or `Mapping`): An image, a file, or an undecoded row of `datasets`, which has
            `"bytes"` or else a `"path"` that `fsspec` opens, or is empty.

    Raises:
        OSError: It cannot be opened.
        ValueError: It is not an image, is broken, as [`load_image`] tells, or is an empty row.
    """
    if isinstance(source, Image.Image):
        return to_rgb(source)
    if source is None or (isinstance(source, Mapping) and source["bytes"] is None and source["path"] is None):
        raise ValueError("the row must hold an image, but is empty.")
    if not isinstance(source, Mapping):
        return load_image(source)
    content = source["bytes"]
    if content is None:
        with fsspec.open(source["path"], "rb") as file:
            content = file.read()
    return load_image(io.BytesIO(content))


def image_name(source: ImageSource, index: int) -> str:
    """The file's name, or the image's place in the set, from 0, if it has none."""
    path = source.get("path") if isinstance(source, Mapping) else source
    return Path(path).name if path and isinstance(path, str | Path) else f"image {index}"


def is_hub_set(name: str) -> bool:
    """Whether this is the name of a set on the Hub, and of no file or folder here."""
    return not Path(name).exists() and re.fullmatch(SET_NAME, name) is not None


def _is_set(name: str) -> bool:
    path = Path(name)
    if path.is_dir():
        return not any(each.suffix.lower() in IMAGE_SUFFIXES for each in path.iterdir())
    return is_hub_set(name)

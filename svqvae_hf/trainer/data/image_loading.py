"""Image sets of `datasets`, and folders of images, as sets of undecoded images to train on."""

import glob
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

import datasets

from svqvae_hf.data.image_sets import disable_decoding
from svqvae_hf.models.image_processing_svqvae import IMAGE_SUFFIXES

FORMATS = ("webdataset", "parquet")  # names of loaders, not of image sets: they need files

ImageSet: TypeAlias = datasets.Dataset | datasets.IterableDataset


def load_images(
    dataset_name: str | None,
    dataset_config_name: str | None,
    data_files: Sequence[str],
    train_data_dir: str | None,
    image_column: str,
    split: str,
    streaming: bool,
    label_column: str | None = None,
) -> ImageSet:
    """Loads an image set as one column of undecoded images and, if asked for, one column of labels.

    Args:
        dataset_name (`str`, *optional*): Hub id, local data set, or format of `data_files`, such as `webdataset` or
            `parquet`.
        dataset_config_name (`str`, *optional*): Configuration of the set.
        data_files (`Sequence[str]`): Files of the set, or globs of them; all if empty.
        train_data_dir (`str`, *optional*): Folder of images, instead of the four arguments above and `split`. It is
            searched recursively, except for hidden files.
        image_column (`str`): Column of the images; `"image"` in a folder.
        split (`str`): Split of the image set.
        streaming (`bool`): Return a stream, which is read from the files without a copy on disk.
        label_column (`str`, *optional*): Column of the labels or captions. In a folder, `"label"` is the name of the
            folder that holds an image.

    Raises:
        ValueError: If there is no such set, folder, file or column, or no image in it, or both columns are the same.
    """
    if train_data_dir is not None:
        images = _load_folder(train_data_dir)
        images = images.to_iterable_dataset() if streaming else images
    else:
        images = _load_set(dataset_name, dataset_config_name, list(data_files), split, streaming)
    if image_column not in (images.column_names or []):
        raise ValueError(f"`--image_column` must be one of {images.column_names}, but is {image_column!r}.")
    feature = images.features[image_column]
    if not (
        isinstance(feature, datasets.Image)
        or (isinstance(feature, datasets.Value) and feature.dtype in ("binary", "large_binary"))
        or (isinstance(feature, dict) and "bytes" in feature)
    ):
        raise ValueError(f"`--image_column` must hold images, but {image_column!r} holds {feature}.")
    if label_column is not None and label_column not in images.column_names:
        raise ValueError(f"`--label_column` must be one of {images.column_names}, but is {label_column!r}.")
    if label_column == image_column:
        raise ValueError(f"`--label_column` must differ from `--image_column`, but both are {image_column!r}.")
    columns = [image_column] if label_column is None else [image_column, label_column]
    return disable_decoding(images.select_columns(columns), image_column)


def _load_folder(folder: str) -> datasets.Dataset:
    if not Path(folder).is_dir():
        raise ValueError(f"{folder!r} must be a folder of images, but is not a folder.")
    names = glob.glob("**", root_dir=folder, recursive=True)
    paths = [str(Path(folder, name).absolute()) for name in sorted(names) if name.lower().endswith(IMAGE_SUFFIXES)]
    if not paths:
        raise ValueError(f"The folder {folder!r} must hold images ({', '.join(IMAGE_SUFFIXES)}), but has none.")
    labels = [Path(path).parent.relative_to(Path(folder).absolute()).as_posix() for path in paths]
    features = {"image": datasets.Image(decode=False), "label": datasets.ClassLabel(names=sorted(set(labels)))}
    return datasets.Dataset.from_dict({"image": paths, "label": labels}, features=datasets.Features(features))


def _load_set(
    name: str | None, config_name: str | None, data_files: list[str], split: str, streaming: bool
) -> ImageSet:
    if name in FORMATS and not data_files:
        raise ValueError(f"`--dataset_name {name}` needs `--data_files`: its files, or globs of them.")
    files = {split: data_files} if data_files else None
    try:
        images = datasets.load_dataset(name, config_name, data_files=files, split=split, streaming=streaming)
    except IndexError as error:  # webdataset and Parquet raise it for a glob without a match
        raise ValueError(f"`--data_files` must name files that exist, but {data_files} match none.") from error
    except Exception as error:  # datasets, its readers of files and the network raise errors of many types
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"The image set {name!r} cannot be loaded: {reason}") from error
    if not streaming and len(images) == 0:
        raise ValueError(f"The image set {name!r} must hold images, but its split {split!r} has none.")
    return images

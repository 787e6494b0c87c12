"""Opens image sets of any kind, for training, evaluating and tokenizing."""

import glob
import hashlib
import itertools
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import datasets
import fsspec

from svqvae_hf.data.image_parts import DatasetRows, FileRows, FirstRows, ImagePart, IndexedRows, RowRange, StreamPart
from svqvae_hf.data.image_rows import LABEL_COLUMNS, ImageRow, check_columns
from svqvae_hf.data.tar_files import TAR_SUFFIXES, TarPart, open_tars
from svqvae_hf.files.errors import explained
from svqvae_hf.files.inputs import expand_braces, walk_files
from svqvae_hf.models.image_files import IMAGE_SUFFIXES

SET_NAME = r"[\w.-]+(/[\w.-]+)?"  # on the Hub, also sets without an owner
METADATA_FILES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")  # `datasets` reads columns of a folder here
SPLITS = ("train", "training", "validation", "valid", "val", "dev", "test", "testing", "eval", "evaluation")
SHARDS = {  # suffixes of files that hold many images, by the loader of `datasets` for them
    "webdataset": TAR_SUFFIXES,
    "parquet": (".parquet",),
    "arrow": (".arrow",),
    "imagefolder": (".zip",),
}
VERSIONS = ("ETag", "etag", "md5Hash", "blob_id", "mtime", "LastModified", "created")  # names in file systems


@dataclass(frozen=True)
class ImageSet:
    """An image set with a key per image. Iteration yields each [`ImageRow`] once.

    Args:
        parts (`Sequence[ImagePart]`): Parts of the set in its order: its shards, or one with random access.
        features (`datasets.Features`): Types of the columns in `ImageRow.values`.
        origin (`Callable`): Returns the names, sizes and times of the files, or their revision on the Hub.
        length (`int`, *optional*): Number of images; `None` if it is unknown before all are read.
    """

    parts: Sequence[ImagePart]
    features: datasets.Features
    origin: Callable[[], Any]
    length: int | None = None

    def __iter__(self) -> Iterator[ImageRow]:
        return itertools.chain.from_iterable(part.read() for part in self.parts)

    def __length_hint__(self) -> int:
        return self.length or 0

    @property
    def rows(self) -> IndexedRows | None:
        """All images, if there is random access to them."""
        part = self.parts[0]
        return part if isinstance(part, IndexedRows) else None

    @property
    def fingerprint(self) -> str:
        """SHA-256 in hexadecimal of where the set comes from."""
        return hashlib.sha256(json.dumps(self.origin()).encode()).hexdigest()

    def first(self, count: int) -> "ImageSet":
        """Returns the set of the first images, as one part."""
        if count < 1:
            raise ValueError(f"`max_images` must be at least 1, got {count}.")
        length = count if self.length is None else min(count, self.length)
        part = FirstRows(self, count) if self.rows is None else RowRange(self.rows, 0, length)
        return ImageSet([part], self.features, lambda: [self.origin(), count], length)

    @property
    def max_parts(self) -> int:
        """Largest number of parts for [`ImageSet.part`]: one per image with random access, otherwise one per file."""
        return len(self.parts) if self.rows is None else len(self.rows)

    def part(self, number: int, num_parts: int) -> list[ImagePart]:
        """Cuts the set in parts of about equal numbers of images or files, and returns one.

        Args:
            number (`int`): Number of the part, from 0.
            num_parts (`int`): Number of parts, at most `max_parts`.
        """
        start, stop = (end * self.max_parts // num_parts for end in (number, number + 1))
        return list(self.parts[start:stop]) if self.rows is None else [RowRange(self.rows, start, stop)]


class Selection(NamedTuple):
    """Selection from a set: configuration, split, column of the images, other columns to keep, random access."""

    config: str | None
    split: str | None
    image_column: str | None
    columns: Sequence[str]
    copy: bool


def open_images(
    data: Sequence[str],
    *,
    config: str | None = None,
    split: str | None = None,
    image_column: str | None = None,
    columns: Sequence[str] = (),
    max_images: int | None = None,
    data_files: Sequence[str] = (),
    copy: bool = False,
    results: str | os.PathLike | None = None,
) -> ImageSet:
    """Finds the images of a set without reading them.

    Args:
        data (`Sequence[str]`): Image files, or shards: tar files in WebDataset's form, Parquet, Arrow, zip. Each is a
            file, a folder, which is searched with its subfolders except for hidden files, or a pattern, such as
            `photos/*.jpg` or `shard-{00..07}.tar`. Each may be a URL for `fsspec`, such as `s3://bucket/*.tar`. Or
            the name of a set on the Hub, which is streamed.
        config (`str`, *optional*): Configuration of the set; required if it has several.
        split (`str`, *optional*): Split of the set; required if it has several. Subfolders named as splits are splits.
        image_column (`str`, *optional*): Column of the images, or their suffix in tar files. By default it is found by
            its type, and of several the one named `image`.
        columns (`Sequence[str]`): Other columns to keep, in addition to those of [`LABEL_COLUMNS`] that the set has.
            Image files in several folders have the column `label`, the name of the folder.
        max_images (`int`, *optional*): Number of images after which to stop; all by default.
        data_files (`Sequence[str]`): Files of the set on the Hub, or patterns of them; all by default.
        copy (`bool`, defaults to `False`): Copy shards to the cache of `datasets`, for random access.
        results (`str` or `os.PathLike`, *optional*): Folder or URL of the results, which must not lie in the set.

    Raises:
        OSError: The set cannot be found or reached.
        ValueError: There is no image, no such split or column, a folder holds `results`, or `max_images` is out of
            range.
    """
    if isinstance(data, str) or not data:
        raise ValueError(f"`data` must be a list of files, folders, URLs or names of sets on the Hub, got {data!r}.")
    if results is not None:
        _check_outside(os.fspath(results), data)
    selection = Selection(config, split, image_column, columns, copy)
    if any("://" in name for name in data):
        found = [_find_urls(name) for pattern in data for name in expand_braces(pattern)]
        urls = list(dict.fromkeys(url for _, files in found for url in files))
        images = _open_found(found[0][0] if len(found) == 1 else None, urls, selection)
    elif len(data) == 1 and (data_files or is_hub_set(data[0])):
        images = _open_builder(data[0], selection, data_files)
    elif len(data) == 1 and Path(data[0]).is_dir():
        images = _open_folder(data[0], selection)
    else:
        images = _open_found(None, _find_files(data), selection)
    return images if max_images is None else images.first(max_images)


def is_hub_set(name: str) -> bool:
    """Whether `name` is the name of a set on the Hub, and not a local path."""
    return not Path(name).exists() and re.fullmatch(SET_NAME, name) is not None


def _open_folder(folder: str, selection: Selection) -> ImageSet:
    if any(name in os.listdir(folder) for name in METADATA_FILES):
        return _open_builder(folder, selection)
    files = [file for file in walk_files(folder) if _kind(file)]
    if not files:
        raise FileNotFoundError(
            f"a set must hold images, but `{folder}` has none. Pass a folder of images or of shards, or the name of a "
            "set on the Hub."
        )
    if _kind_of_all(files) != "image":
        return _open_builder(folder, selection)
    split, keys = _files_of_split(folder, files, selection.split)
    return _image_files(os.path.abspath(os.path.join(folder, split)), keys, selection)


def _check_outside(results: str, data: Sequence[str]) -> None:
    """Raises if results would lie in a folder of the set, because the next run would read them as images."""

    def place(name: str) -> str:
        return f"{name if '://' in name else os.path.realpath(name)}/"

    for name in data:
        if place(results).startswith(place(name.rstrip("/"))):
            raise ValueError(f"`{results}` must not be in `{name}`, which is searched for images. Choose another.")


def _files_of_split(
    name: str, keys: Sequence[str], split: str | None, are_shards: bool = False
) -> tuple[str, list[str]]:
    """Chooses a split of a folder, if all its subfolders are named as splits, or all its shards.

    Returns:
        `tuple[str, list[str]]`: The subfolder of the split, or `""`, and the paths of the files below it.
    """
    tops = {key.partition("/")[0] for key in keys}
    if tops <= set(SPLITS):
        split = _choose_split(name, sorted(tops), split)
        return split, [key[len(split) + 1 :] for key in keys if key.startswith(f"{split}/")]
    first_words = [re.split("[^a-z]", os.path.basename(key), maxsplit=1)[0] for key in keys]
    if are_shards and set(first_words) <= set(SPLITS):
        split = _choose_split(name, sorted(set(first_words)), split)
        return "", [key for key, word in zip(keys, first_words, strict=True) if word == split]
    _choose_split(name, ["train"], split)
    return "", list(keys)


def _open_found(folder: str | None, files: Sequence[str], selection: Selection) -> ImageSet:
    """Opens files on disk or at URLs. `folder` is the URL of the folder that was named, if it was only one."""
    kind, is_remote = _kind_of_all(files), "://" in files[0]
    if folder is None:
        scheme = f"{files[0].partition('://')[0]}://" if is_remote else ""
        root = os.path.commonpath([os.path.dirname(file.removeprefix(scheme)) for file in files])
        folder, keys = f"{scheme}{root}", [os.path.relpath(file.removeprefix(scheme), root) for file in files]
        _choose_split(folder, ["train"], selection.split)
    else:
        keys = [file[len(folder) + 1 :] for file in files]
        split, keys = _files_of_split(folder, keys, selection.split, are_shards=kind != "image")
        folder = f"{folder}/{split}".rstrip("/")
        files = [f"{folder}/{key}" for key in keys]
    if kind == "image":
        if not is_remote:
            return _image_files(folder, keys, selection)
        stamps = _url_stamps(files)  # now, because it names an absent file
        return _image_files(folder, keys, selection, lambda: stamps)
    if kind == "webdataset" and is_remote:
        return _open_tars(files, [_url_stamps(files)], selection)
    return _open_builder(kind, selection._replace(split=None), files)


def _find_urls(name: str) -> tuple[str | None, list[str]]:
    """Returns the URL of a folder, or `None` for a glob or a file, and the URLs of the files found."""
    folder = None
    with explained(name, "read"):
        try:
            files, path = fsspec.core.url_to_fs(name)
        except ImportError as error:
            raise ValueError(f"`{name}` cannot be reached: {str(error).removesuffix('.')}.") from error
        if glob.has_magic(path):
            found = sorted(files.glob(path))
        elif _kind(path) is None and files.isdir(path):
            path = path.rstrip("/")
            folder = files.unstrip_protocol(path)
            found = [file for file in sorted(files.find(path)) if _kind(file) and "/." not in file[len(path) :]]
        else:
            found = [path]
        urls = [files.unstrip_protocol(file) for file in found]
    if not urls:
        raise ValueError(f"no file or folder matches `{name}`.")
    return folder, urls


def _url_stamps(urls: Sequence[str]) -> list[tuple[str, int, str]]:
    """Name, bytes and version of each file. Folders are listed, which takes fewer requests than asking for each file.

    Raises:
        FileNotFoundError: A file is absent.
    """
    found = {}
    for folder in dict.fromkeys(os.path.dirname(url) for url in urls):
        with explained(folder, "read"):
            files, path = fsspec.core.url_to_fs(folder)
            entries = files.ls(path, detail=True)
        for entry in entries:
            version = next((str(entry[name]) for name in VERSIONS if entry.get(name)), "")
            found[files.unstrip_protocol(entry["name"])] = (entry["size"], version)
    absent = [url for url in urls if url not in found]
    if absent:
        raise FileNotFoundError(f"there is no file `{absent[0]}`.")
    return [(url, *found[url]) for url in urls]


def _image_files(
    root: str, keys: Sequence[str], selection: Selection, stamps: Callable[[], Any] | None = None
) -> ImageSet:
    if selection.config or selection.image_column not in (None, "image"):
        raise ValueError(f"--config and --image-column are for sets with columns, but `{root}` holds image files.")
    rows = FileRows(root, keys)
    check_columns(selection.columns, ["image", *rows.features])
    return ImageSet([rows], rows.features, stamps or rows.stamps, len(rows))


def _open_builder(name: str, selection: Selection, data_files: Sequence[str] = ()) -> ImageSet:
    """Opens a set of `datasets` by its name on the Hub or its folder, or files by the name of their loader."""
    files = {selection.split or "train": list(data_files)} if data_files else None
    with _explained(name):
        builder = datasets.load_dataset_builder(name, selection.config, data_files=files)
        if builder.config.data_files is None:
            raise OSError("the Hub cannot be reached, and the cache has the rows of the set, but not their files")
    split = _choose_split(name, [*builder.config.data_files], selection.split)
    paths = builder.config.data_files[split]
    if builder.name.startswith("webdataset"):  # its own reader takes only samples of equal suffixes
        return _open_tars(list(paths), [split, list(paths), paths.origin_metadata], selection)
    with _explained(name):
        if selection.copy:
            builder.download_and_prepare()
        rows = builder.as_dataset(split) if selection.copy else builder.as_streaming_dataset(split)
    rows, image_column, kept = _select(rows, selection)
    origin = [split, list(paths), paths.origin_metadata, image_column]
    is_remote = any("://" in path for path in data_files)
    repository = builder.repo_id or ("" if is_remote else None)  # no file outside it may be named
    if selection.copy:
        copied = DatasetRows(rows, image_column, repository=repository)
        return ImageSet([copied], kept, lambda: origin, len(rows))
    names = [os.path.basename(path) for path in paths] if rows.num_shards == len(paths) else [name] * rows.num_shards
    parts = [
        StreamPart(rows, image_column, os.path.abspath(name), repository, file, number)
        for number, file in enumerate(names)
    ]
    splits = rows.info.splits or {}
    length = splits[split].num_examples if split in splits else None
    return ImageSet(parts, kept, lambda: origin, length or None)


def _open_tars(paths: Sequence[str], origin: list[Any], selection: Selection) -> ImageSet:
    parts = open_tars(paths, selection.image_column, selection.columns)
    origin, features = [*origin, selection.image_column], parts[0].features
    if not selection.copy:
        return ImageSet(parts, features, lambda: origin)
    source = {"path": datasets.Value("string"), "bytes": datasets.Value("binary"), "fault": datasets.Value("string")}
    stored = datasets.Features({"key": datasets.Value("string"), "image": source, **features})
    sources = {"parts": tuple(parts), "origin": tuple(origin)}
    with _explained(paths[0]):
        rows = datasets.Dataset.from_generator(_stored_rows, features=stored, gen_kwargs=sources)
    return ImageSet([DatasetRows(rows, "image", "key")], features, lambda: origin, len(rows))


def _stored_rows(parts: Sequence[TarPart], origin: Any) -> Iterator[dict[str, Any]]:
    """Rows to copy. `datasets` copies again if `origin` has changed."""
    for key, source, values in itertools.chain.from_iterable(part.read() for part in parts):
        yield {"key": key, "image": {"fault": None, **cast(Mapping[str, Any], source)}, **values}


def _select(rows: Any, selection: Selection) -> tuple[Any, str, datasets.Features]:
    """Selects columns, and leaves images encoded, so that a broken one raises where it is read."""
    features = rows.features or {}
    check_columns(selection.columns, [*features])
    found = [name for name, feature in features.items() if _holds_images(feature)]
    image_column = selection.image_column or ("image" if "image" in found else "".join(found[:1]))
    if image_column not in found or (selection.image_column is None and len(found) > 1 and image_column != "image"):
        got = f", got `{image_column}`" if selection.image_column else ""
        raise ValueError(f"--image-column must be one of {', '.join(found) or 'the columns of images'}{got}.")
    kept = [name for name in features if name in (*LABEL_COLUMNS, *selection.columns) and name != image_column]
    if isinstance(rows, datasets.IterableDataset):
        rows = rows.decode(False)  # otherwise a broken image of a folder on the Hub ends the stream
    rows = rows.cast_column(image_column, datasets.Image(decode=False))
    rows = rows.select_columns([image_column, *kept])
    return rows, image_column, datasets.Features({name: features[name] for name in kept})


def _holds_images(feature: Any) -> bool:
    return (
        isinstance(feature, datasets.Image)
        or (isinstance(feature, datasets.Value) and feature.dtype in ("binary", "large_binary"))
        or (isinstance(feature, dict) and {"bytes", "path"} <= set(feature))
    )


def _choose_split(name: str, splits: Sequence[str], split: str | None) -> str:
    splits = [str(each) for each in splits]
    if split is None and len(splits) > 1:
        raise ValueError(f"the set `{name}` has the splits {', '.join(splits)}. Choose one with --split.")
    if split is not None and split not in splits:
        raise ValueError(f"--split must be one of {', '.join(splits)} in the set `{name}`, got `{split}`.")
    return split or splits[0]


def _find_files(patterns: Sequence[str]) -> list[str]:
    """Absolute paths of the files of folders and patterns, each once."""
    found: list[str] = []
    for pattern in patterns:
        names = [pattern] if os.path.exists(pattern) else expand_braces(pattern)
        for name in names:
            if os.path.isdir(name):
                files = [os.path.join(name, file) for file in walk_files(name) if _kind(file)]
            elif os.path.exists(name):
                files = [name]
            else:
                files = [file for file in sorted(glob.glob(name, recursive=True)) if os.path.isfile(file)]
            if not files:
                raise ValueError(
                    f"the folder `{name}` has no images."
                    if os.path.isdir(name)
                    else f"no file or folder matches `{name}`, and it is not the name of a set on the Hub."
                )
            found += map(os.path.abspath, files)
    return list(dict.fromkeys(found))


def _kind(file: str) -> str | None:
    """Kind of a file by its suffix: an image, the name of a loader of shards, or none."""
    name = file.lower()
    if name.endswith(IMAGE_SUFFIXES):
        return "image"
    return next((kind for kind, suffixes in SHARDS.items() if name.endswith(suffixes)), None)


def _kind_of_all(files: Sequence[str]) -> str:
    """The kind of files that are named. One with an unknown suffix is an image."""
    kinds = {_kind(file) or "image" for file in files}
    if len(kinds) > 1:
        suffixes = {"image": "images"} | {kind: f"{endings[0]} files" for kind, endings in SHARDS.items()}
        raise ValueError(
            f"files of a set must be of one kind, but are {' and '.join(sorted(suffixes[kind] for kind in kinds))}. "
            "Choose some by a pattern such as `photos/*.jpg`."
        )
    return kinds.pop()


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """Turns the many types of errors of `datasets`, its file readers and the network into one line."""
    try:
        yield
    except Exception as error:
        cause = error.__cause__ if isinstance(error, datasets.exceptions.DatasetGenerationError) else None
        reason = " ".join(str(cause or error).split()).removesuffix(".") or type(error).__name__
        kind = OSError if isinstance(error, OSError) else ValueError
        raise kind(f"the image set `{name}` cannot be opened: {reason}.") from error

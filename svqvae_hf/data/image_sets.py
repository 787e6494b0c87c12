"""Opens image sets of any kind, for training, evaluating and tokenizing."""

import glob
import hashlib
import itertools
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import fsspec

from svqvae_files.errors import explained
from svqvae_files.inputs import expand_braces, walk_files
from svqvae_hf.data.copies import copy_images
from svqvae_hf.data.image_parts import FileRows, FirstRows, ImagePart, IndexedRows, RowRange, StreamPart
from svqvae_hf.data.image_rows import LABEL_COLUMNS, ImageRow, check_columns
from svqvae_hf.data.tar_files import TAR_SUFFIXES, open_tars
from svqvae_hf.models.image_files import IMAGE_SUFFIXES

SET_NAME = r"\w[\w.-]*(/[\w.-]+)?"  # on the Hub, also sets without an owner
METADATA_FILES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")  # `datasets` reads columns of a folder here
SPLITS = dict.fromkeys(("train", "training"), "train")  # by words in names, as `datasets` reads them
SPLITS |= dict.fromkeys(("validation", "valid", "val", "dev"), "validation")
SPLITS |= dict.fromkeys(("test", "testing", "eval", "evaluation"), "test")
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
    """Selection from a set: configuration, split, column of the images, other columns to keep."""

    config: str | None
    split: str | None
    image_column: str | None
    columns: Sequence[str]


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
    selection = Selection(config, split, image_column, columns)
    if len(data) == 1 and (data_files or is_hub_set(data[0])):
        images = _open_builder(data[0], selection, data_files)
    else:
        images = _open_files(data, selection)
    if copy and images.rows is None:
        with explained_set(data[0]):
            rows = copy_images(images.parts, images.features, images.fingerprint)
        images = ImageSet([rows], images.features, images.origin, len(rows))
    return images if max_images is None else images.first(max_images)


def is_hub_set(name: str) -> bool:
    """Whether `name` is the name of a set on the Hub, and not a local path."""
    return not Path(name).exists() and re.fullmatch(SET_NAME, name) is not None


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
    words = [re.split("[^a-z]+", os.path.basename(key)) for key in keys]
    splits = [next((SPLITS[word] for word in each if word in SPLITS), "train") for each in words]
    if are_shards and set(splits) != {"train"}:
        split = _choose_split(name, sorted(set(splits)), split)
        return "", [key for key, own in zip(keys, splits, strict=True) if own == split]
    _choose_split(name, ["train"], split)
    return "", list(keys)


def _open_files(data: Sequence[str], selection: Selection) -> ImageSet:
    """Opens files, folders and patterns, on disk or at URLs."""
    names = [name for each in data for name in ([each] if os.path.exists(each) else expand_braces(each))]
    found = [_find(name) for name in names]
    stamps = {file: stamp for _, files in found for file, stamp in files.items()}
    files, folder = [*stamps], found[0][0] if len(found) == 1 else None
    kind, is_remote = _kind_of_all(files), "://" in files[0]
    if folder is not None and not is_remote:
        if kind not in ("image", "imagefolder"):
            readme = Path(folder, "README.md")  # whose configurations may leave files out
            described = readme.is_file() and "configs:" in readme.read_text("utf-8", "replace")
            return _open_builder(folder, selection, found=() if described else files)
        metadata = [name for name in walk_files(folder) if os.path.basename(name) in METADATA_FILES]
        _refuse_metadata(folder, metadata if kind == "imagefolder" else ())  # of zip files
        if metadata and kind == "image":
            # With patterns, because `datasets` would take a word in the name of an image for a split
            split, _ = _files_of_split(folder, _keys(folder, files), selection.split)
            if split and {*metadata} & {*METADATA_FILES}:
                raise ValueError(f"metadata of `{folder}` must lie in the folders of its splits, not above them.")
            return _open_builder(folder, selection, [f"{split}/**" if split else "**"])
    if folder is None:
        for each, inside in found:
            if each is not None:
                _files_of_split(each, _keys(each, inside), None)  # raises if the folder has several splits
                _refuse_metadata(each, () if is_remote or kind != "image" else walk_files(each))
        scheme = f"{files[0].partition('://')[0]}://" if is_remote else ""
        root = os.path.commonpath([os.path.dirname(file.removeprefix(scheme)) for file in files])
        folder, keys = f"{scheme}{root}", [os.path.relpath(file.removeprefix(scheme), root) for file in files]
        _choose_split(folder, ["train"], selection.split)
    else:
        keys = _keys(folder, files)
        split, keys = _files_of_split(folder, keys, selection.split, are_shards=kind != "image")
        folder = f"{folder}/{split}".rstrip("/")
        files = [f"{folder}/{key}" for key in keys]
    origin = [[file, *stamps[file]] for file in files]
    if kind == "image":
        if selection.config or selection.image_column not in (None, "image"):
            raise ValueError(f"--config and --image-column are for sets with columns, but `{folder}` holds images.")
        rows = FileRows(folder, keys)
        check_columns(selection.columns, ["image", *rows.features])
        return ImageSet([rows], rows.features, (lambda: origin) if is_remote else rows.stamps, len(rows))
    if kind == "webdataset" and is_remote:
        return _open_tars(files, [origin], selection)
    return _open_builder(kind, selection._replace(split=None), files, title=files[0])


def _refuse_metadata(folder: str, files: Iterable[str]) -> None:
    """Raises if captions or labels of a folder would be ignored."""
    if {*map(os.path.basename, files)} & {*METADATA_FILES}:
        raise ValueError(f"`{folder}` has a metadata file, for images of one local folder. Pass a pattern without it.")


def _keys(folder: str, files: Iterable[str]) -> list[str]:
    """Paths below a folder."""
    return [file[len(folder) + 1 :] for file in files]


def _find(name: str) -> tuple[str | None, dict[str, tuple[Any, ...]]]:
    """Returns the path of a folder, or `None` for a pattern or a file, and the files found, with stamps if remote."""
    if "://" in name:
        return _find_urls(name)
    folder = os.path.abspath(name) if os.path.isdir(name) else None
    if folder is not None:
        known = (file for file in walk_files(folder) if _kind(file))
        found = [f"{folder}/{file}" for file in known if os.path.basename(file) not in METADATA_FILES]
    elif os.path.exists(name):
        found = [name]
    else:
        found = [file for file in sorted(glob.glob(name, recursive=True)) if os.path.isfile(file)]
    if not found:
        asked = "a set must hold images, but the folder has none" if folder else "no file or folder matches"
        raise FileNotFoundError(f"{asked}: `{name}`. Pass images, shards or a folder of them, or a set on the Hub.")
    return folder, dict.fromkeys(map(os.path.abspath, found), ())


def _find_urls(name: str) -> tuple[str | None, dict[str, tuple[Any, ...]]]:
    """Returns the URL of a folder, or `None` for a pattern or a file, and the files found, with size and version."""
    folder = None
    with explained(name, "read"):
        try:
            files, path = fsspec.core.url_to_fs(name)
        except ImportError as error:
            raise ValueError(f"`{name}` cannot be reached: {str(error).removesuffix('.')}.") from error
        if glob.has_magic(path):
            found = {file: info for file, info in files.glob(path, detail=True).items() if info["type"] != "directory"}
        elif _kind(path) is None and files.isdir(path):
            path = path.rstrip("/")
            folder = files.unstrip_protocol(path)
            found = files.find(path, detail=True)
            if any(_kind(file) == "image" for file in found):
                _refuse_metadata(folder, found)
            found = {file: info for file, info in found.items() if _kind(file) and "/." not in file[len(path) :]}
        elif path.startswith("http"):  # whose servers rarely list folders
            found = {path: files.info(path)}
        else:  # one request for all files of a folder
            listed = files.ls(os.path.dirname(path), detail=True)
            found = {info["name"]: info for info in listed if info["name"] == path}
    if not found:
        raise FileNotFoundError(f"no file or folder matches `{name}`.")
    stamps = {files.unstrip_protocol(file): (info["size"], _version(info)) for file, info in sorted(found.items())}
    return folder, stamps


def _version(info: Mapping[str, Any]) -> str:
    """Version of a file in the words of its file system, if it has one."""
    return next((str(info[name]) for name in VERSIONS if info.get(name)), "")


def _open_builder(
    name: str, selection: Selection, data_files: Sequence[str] = (), title: str = "", found: Iterable[str] = ()
) -> ImageSet:
    """Opens a set of `datasets` by its name on the Hub or its folder, or files by the name of their loader.

    Errors name the set by `title`, by default `name`. All files of `found` must be used.
    """
    title = title or name
    files = {selection.split or "train": list(data_files)} if data_files else None
    options = {"drop_labels": True} if name == "imagefolder" else {}  # the folder of the archive, not of the image
    with explained_set(title):
        builder = datasets.load_dataset_builder(name, selection.config, data_files=files, **options)
        if builder.config.data_files is None:
            raise OSError("the Hub cannot be reached, and the cache has the rows of the set, but not their files")
    used = {os.path.realpath(path) for paths in builder.config.data_files.values() for path in paths}
    if left := sorted({*map(os.path.realpath, found)} - used):
        raise ValueError(f"`datasets` would leave out `{left[0]}` by its name. Rename it, or pass files by a pattern.")
    split = _choose_split(title, [*builder.config.data_files], selection.split)
    paths = builder.config.data_files[split]
    if builder.name.startswith("webdataset"):  # its own reader takes only samples of equal suffixes
        return _open_tars(list(paths), [split, list(paths), paths.origin_metadata], selection)
    with explained_set(title):
        rows = builder.as_streaming_dataset(split)
    rows, image_column, kept = _select(rows, selection)
    origin = [split, list(paths), paths.origin_metadata, image_column]
    is_remote, repository = any("://" in path for path in paths), builder.repo_id
    if is_remote and repository is None and name != "imagefolder":
        repository = ""  # no file outside the set may be named
    names = [os.path.basename(path) for path in paths] if rows.num_shards == len(paths) else [name] * rows.num_shards
    place = rows, image_column, os.path.abspath(name), repository, is_remote
    parts = [StreamPart(*place, file, number) for number, file in enumerate(names)]
    splits = rows.info.splits or {}
    length = splits[split].num_examples if split in splits else None
    return ImageSet(parts, kept, lambda: origin, length or None)


def _open_tars(paths: Sequence[str], origin: list[Any], selection: Selection) -> ImageSet:
    parts = open_tars(paths, selection.image_column, selection.columns)
    origin, features = [*origin, selection.image_column], parts[0].features
    return ImageSet(parts, features, lambda: origin)


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
    rows = rows.decode(False)  # otherwise a broken image of a folder on the Hub ends the stream
    rows = rows.cast_column(image_column, datasets.Image(decode=False))
    rows = rows.select_columns([image_column, *kept])
    return rows, image_column, datasets.Features({name: features[name] for name in kept})


def _holds_images(feature: Any) -> bool:
    if isinstance(feature, dict):
        return {"bytes", "path"} <= set(feature)
    return isinstance(feature, datasets.Image) or getattr(feature, "dtype", "") in ("binary", "large_binary")


def _choose_split(name: str, splits: Sequence[str], split: str | None) -> str:
    splits = [str(each) for each in splits]
    if split is None and len(splits) > 1:
        raise ValueError(f"the set `{name}` has the splits {', '.join(splits)}. Choose one with --split.")
    if split is not None and split not in splits:
        raise ValueError(f"--split must be one of {', '.join(splits)} in the set `{name}`, got `{split}`.")
    return split or splits[0]


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
def explained_set(name: str, kind: str = "image") -> Iterator[None]:
    """Turns the many types of errors of `datasets`, its file readers and the network into one line."""
    try:
        yield
    except Exception as error:
        cause = error.__cause__ if isinstance(error, datasets.exceptions.DatasetGenerationError) else None
        reason = " ".join(str(cause or error).split()).removesuffix(".") or type(error).__name__
        error_type = OSError if isinstance(error, OSError) else ValueError
        raise error_type(f"the {kind} set `{name}` cannot be opened: {reason}.") from error

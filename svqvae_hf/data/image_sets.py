"""Opens image sets of any kind, for training, evaluating and tokenizing.

There are two roads. Files, folders, patterns and URLs are listed by [`find_files`], and opened by their kind.
Repositories, on the Hub or downloaded from it, are listed and opened by `datasets`.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import datasets

from svqvae_files.identity import set_digest
from svqvae_files.inputs import is_url
from svqvae_hf.data.copies import copy_images
from svqvae_hf.data.image_parts import CaptionedRows, FileRows, FirstRows, ImagePart, IndexedRows, RowRange
from svqvae_hf.data.image_rows import ImageRow
from svqvae_hf.data.metadata import read_metadata
from svqvae_hf.data.repositories import RepositoryFiles, has_configs, is_hub_set, open_stream
from svqvae_hf.data.selection import IMAGE_COLUMN, Selection
from svqvae_hf.data.set_errors import explained_set
from svqvae_hf.data.set_files import InputFiles, SetFiles, find_files
from svqvae_hf.data.splits import choose_split
from svqvae_hf.data.tables import named_paths, open_tables
from svqvae_hf.data.tar_files import open_tars


@dataclass(frozen=True)
class ImageSet:
    """An image set with a key per image. Iteration yields each [`ImageRow`] once.

    Args:
        parts (`Sequence[ImagePart]`): Parts of the set in its order: its shards, or one with random access.
        features (`datasets.Features`): Types of the columns in `ImageRow.values`.
        files ([`InputFiles`]): Files of the set.
        image_column (`str`, *optional*): Column of the images, if the set has several.
        length (`int`, *optional*): Number of images, or the most that a cut stream can have; `None` if it is unknown
            before all are read.
        first_images (`int`, *optional*): Number of images to which the set was cut.
    """

    parts: Sequence[ImagePart]
    features: datasets.Features
    files: InputFiles
    image_column: str | None = None
    length: int | None = None
    first_images: int | None = None

    def __iter__(self) -> Iterator[ImageRow]:
        for part in self.parts:
            yield from part.read()

    def __length_hint__(self) -> int:
        return self.length or 0

    @property
    def rows(self) -> IndexedRows | None:
        """All images, if there is random access to them; `None` for a stream."""
        part = self.parts[0]
        if isinstance(part, IndexedRows):
            return part
        return None

    @property
    def has_folder_labels(self) -> bool:
        """Whether the labels are the names of subfolders."""
        return isinstance(self.files, SetFiles) and self.files.kind == "image" and not self.files.metadata

    @property
    def files_digest(self) -> str:
        """Digest of all files, whichever of their images and columns are read."""
        return set_digest(self.files.inputs())

    @property
    def fingerprint(self) -> str:
        """Digest of all that the rows depend on.

        These are the files, the columns with their types and classes, and the number of images to which [`first`] cut
        the set.
        """
        description = [f"images: {self.image_column}", f"first: {self.first_images}"]
        class_names = []
        for column, feature in self.features.items():
            description.append(f"{column}: {feature}")
            if isinstance(feature, datasets.ClassLabel):
                class_names += feature.names
        return set_digest(self.files.inputs(), description, class_names)

    def first(self, count: int) -> "ImageSet":
        """Returns the set of the first images, as one part."""
        if count < 1:
            raise ValueError(f"`max_images` must be at least 1, got {count}.")
        if self.length is None:
            length = count  # the most that the stream can have
        else:
            length = min(count, self.length)
        part: ImagePart
        if self.rows is None:
            part = FirstRows(self, count)
        else:
            part = RowRange(self.rows, 0, length)
        return ImageSet([part], self.features, self.files, self.image_column, length, first_images=count)

    @property
    def max_parts(self) -> int:
        """Largest number of parts for [`ImageSet.part`]: one per image with random access, otherwise one per file."""
        if self.rows is None:
            return len(self.parts)
        return len(self.rows)

    def part(self, number: int, num_parts: int) -> list[ImagePart]:
        """Cuts the set in parts of about equal numbers of images or files, and returns one.

        Args:
            number (`int`): Number of the part, from 0.
            num_parts (`int`): Number of parts, at most `max_parts`.
        """
        start = number * self.max_parts // num_parts
        stop = (number + 1) * self.max_parts // num_parts
        if self.rows is None:
            return list(self.parts[start:stop])
        return [RowRange(self.rows, start, stop)]


def open_images(
    data: Sequence[str],
    *,
    config: str | None = None,
    split: str | None = None,
    image_column: str | None = None,
    columns: Sequence[str] = (),
    keep_labels: bool = True,
    max_images: int | None = None,
    copy: bool = False,
    results: str | os.PathLike | None = None,
) -> ImageSet:
    """Finds the images of a set without reading them.

    Args:
        data (`Sequence[str]`): Image files, or shards: tar files in WebDataset's form, Parquet, Arrow. Each is a
            file, a folder, which is searched with its subfolders except for hidden files, or a pattern, such as
            `photos/*.jpg` or `shard-{00..07}.tar`. Each may be a URL for `fsspec`, such as `s3://bucket/*.tar`. Or
            the name of a set on the Hub, which is streamed.
        config (`str`, *optional*): Configuration of the set; required if it has several.
        split (`str`, *optional*): Split of the set; required if it has several. Subfolders named as splits are splits.
        image_column (`str`, *optional*): Column of the images, or their suffix in tar files. By default it is found by
            its type, and of several the one named `image`.
        columns (`Sequence[str]`): Other columns to keep, in addition to the [`LABEL_COLUMNS`] that the set has.
            Image files in several folders have the column `label`, the name of the folder.
        keep_labels (`bool`, defaults to `True`): Whether to keep the columns of [`LABEL_COLUMNS`]. If so, a label in
            tar files whose kind the first samples lack is an error.
        max_images (`int`, *optional*): Number of images after which to stop; all by default.
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
    selection = Selection(config, split, image_column, columns, keep_labels)
    is_repository = len(data) == 1 and (is_hub_set(data[0]) or has_configs(data[0]))
    if is_repository:
        images = _open_repository(data[0], selection)
    else:
        images = _open_files(data, selection)
    has_random_access = images.rows is not None
    if copy and not has_random_access:
        images = _copy(images, name=data[0])
    if max_images is not None:
        images = images.first(max_images)
    return images


def _check_outside(results: str, names: Sequence[str]) -> None:
    """Raises if results would lie in a folder of the set, because the next run would read them as images."""
    results_folder = _with_slash(results)
    for name in names:
        set_folder = _with_slash(name.rstrip("/"))
        if results_folder.startswith(set_folder):
            raise ValueError(f"`{results}` must not be in `{name}`, which is searched for images. Choose another.")


def _with_slash(name: str) -> str:
    """Absolute path or URL of a folder, with a slash at its end."""
    if is_url(name):
        return f"{name}/"
    return f"{os.path.realpath(name)}/"


def _copy(images: ImageSet, name: str) -> ImageSet:
    """Copies a stream, for random access. `name` names the set in errors."""
    with explained_set(name):
        rows = copy_images(images.parts, images.features, images.fingerprint, images.files.root)
    return ImageSet([rows], images.features, images.files, images.image_column, len(rows))


# Files


def _open_files(names: Sequence[str], selection: Selection) -> ImageSet:
    """Opens files, folders and patterns, on disk or at URLs, by the kind of the files."""
    if selection.config:
        raise ValueError(f"--config is for sets that have configurations, but `{names[0]}` has none.")
    files = find_files(names, selection.split)
    if files.kind == "tar":
        return _open_tars(files, selection)
    if files.kind in ("parquet", "arrow"):
        return _open_tables(files, selection)
    selection.check_image_column(files.name)
    if files.kind == "image" and files.metadata:
        return _open_captioned_images(files, selection)
    return _open_images(files, selection)


def _open_images(files: SetFiles, selection: Selection) -> ImageSet:
    """Opens image files, whose labels are the names of their folders."""
    rows = FileRows(files.root, files.keys(), files.folders)
    selection.check_columns([IMAGE_COLUMN, *rows.features])
    return ImageSet([rows], rows.features, files, length=len(rows))


def _open_captioned_images(files: SetFiles, selection: Selection) -> ImageSet:
    """Opens image files whose captions and labels lie in metadata files."""
    metadata_paths = [file.path for file in files.metadata]
    table = read_metadata(metadata_paths, files.root)
    selection.check_columns([IMAGE_COLUMN, *table.features])
    features = datasets.Features()
    for column, feature in table.features.items():
        if selection.keeps(column):
            features[column] = feature
    rows = CaptionedRows(files.root, table, list(features))
    files.add_named(rows.paths())
    return ImageSet([rows], features, files, length=len(rows))


def _open_tables(files: SetFiles, selection: Selection) -> ImageSet:
    """Opens Parquet or Arrow files."""
    parts, features = open_tables(files.paths(), files.root, selection)
    image_column = parts[0].image_column
    files.add_named(named_paths(files.paths(), image_column))
    return ImageSet(parts, features, files, image_column)


def _open_tars(files: InputFiles, selection: Selection) -> ImageSet:
    """Opens tar files with our own reader, because the one of `datasets` takes only samples of equal suffixes."""
    parts = open_tars(files.paths(), files.root, selection)
    return ImageSet(parts, parts[0].features, files, selection.image_column)


# Repositories


def _open_repository(name: str, selection: Selection) -> ImageSet:
    """Opens a set on the Hub, or a folder with the files of one."""
    with explained_set(name):
        builder = _load_builder(name, selection.config)
        _check_has_files(builder)
    splits = [str(split) for split in builder.config.data_files]
    split = choose_split(name, splits, selection.split)
    root = os.path.abspath(name)  # of a local folder; for a set on the Hub any path would do, as its files have URLs
    files = RepositoryFiles(builder, split, root)
    files.check_order()
    if files.are_tars:
        return _open_tars(files, selection)
    return _open_stream(files, name, selection)


def _check_has_files(builder: datasets.DatasetBuilder) -> None:
    """Raises OSError if `datasets` could not reach the Hub.

    It then returns a builder of the rows in its cache, which knows no names of files.
    """
    if builder.config.data_files is None:
        raise OSError("the Hub cannot be reached, and the cache has the rows of the set, but not their files")


def _open_stream(files: RepositoryFiles, name: str, selection: Selection) -> ImageSet:
    """Opens files that `datasets` streams."""
    stream = open_stream(files, name, selection)
    if files.are_local_tables:
        # Rows of a table may name files of images, which then belong to the set. On the Hub they need not be listed,
        # because the revision of the repository covers them.
        paths_of_images = named_paths(files.paths(), stream.image_column)
        files = replace(files, named=paths_of_images)
    return ImageSet(stream.parts, stream.features, files, stream.image_column, stream.length)


def _load_builder(name: str, config: str | None) -> datasets.DatasetBuilder:
    """Builder of a configuration of a set. Raises ValueError if it has no such one, or several and none is named."""
    try:
        return datasets.load_dataset_builder(name, config)
    except ValueError as error:
        configs = datasets.get_dataset_config_names(name)
        listed = ", ".join(configs)
        if config is None and len(configs) > 1:
            raise ValueError(f"it has the configurations {listed}, choose one with --config") from error
        if config is not None and config not in configs:
            raise ValueError(f"--config must be one of {listed}, got `{config}`") from error
        raise

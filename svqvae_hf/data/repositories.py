"""Image sets in repositories, on the Hub or downloaded from it, which `datasets` lists and opens."""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets
import pyarrow as pa

from svqvae_files.errors import is_unreachable
from svqvae_files.file_names import ARCHIVE_SUFFIXES, REPO_ID
from svqvae_files.identity import InputIdentity
from svqvae_files.inputs import is_url
from svqvae_hf.data.image_parts import row_key
from svqvae_hf.data.image_rows import ImageRow, fault_of, unreadable
from svqvae_hf.data.selection import Selection
from svqvae_hf.data.set_errors import explained_set
from svqvae_hf.data.set_files import METADATA_FILES, SetFile, file_identity, kind_of
from svqvae_hf.data.tables import check_classes, is_table, read_features, select_columns
from svqvae_hf.untrusted.set_rows import confine_row


def is_hub_set(name: str) -> bool:
    """Whether `name` is `org/name`, the name of a set on the Hub, and not a local path."""
    return not Path(name).exists() and re.fullmatch(REPO_ID, name) is not None


def has_configs(folder: str) -> bool:
    """Whether a local folder is a downloaded repository, whose README says which files belong to which split."""
    readme = Path(folder, "README.md")
    if not readme.is_file():
        return False
    return re.search("^configs:", readme.read_text("utf-8", "replace"), re.MULTILINE) is not None


@dataclass
class StreamPart:
    """A shard of a set of `datasets` that is streamed. The rest of a damaged file is one unreadable row.

    Args:
        rows (`datasets.IterableDataset`): The set, with its images undecoded.
        image_column (`str`): Column of the images.
        root (`str`): Folder or name of the set.
        repository (`str`, *optional*): Repository of the set if it is on the Hub, which its rows may name files of.
        name (`str`): Name of the shard's file, or of the set if the file is unknown.
        shard_index (`int`): Index of the shard among the shards of `rows`.
        path_to_check (`str`, *optional*): Path or URL of the shard's file if it is a Parquet or Arrow file with
            labels. Its classes are compared with the classes of the set before it is read.
    """

    rows: datasets.IterableDataset
    image_column: str
    root: str
    repository: str | None
    name: str
    shard_index: int
    path_to_check: str | None

    def read(self) -> Iterator[ImageRow]:
        """Yields the images.

        Raises:
            OSError: The file cannot be reached.
            ValueError: It has other classes than the set, or types that cannot be converted to those of the set.
        """
        if self.path_to_check is not None:
            self._check_classes(self.path_to_check)
        try:
            yield from self._image_rows()
        except TypeError as error:  # of a conversion that does not exist, such as of lists to texts
            raise ValueError(f"`{self.name}` must have the types of the columns of its set: {error}.") from error
        except (ValueError, OSError, pa.ArrowException) as error:
            if is_unreachable(error, is_remote=self.repository is not None):
                raise
            # The content of the file is damaged. One row stands for what cannot be read, so that it is counted.
            reason = fault_of(error).removesuffix(".")
            other_columns = [name for name in self.rows.features if name != self.image_column]
            yield unreadable(self.name, f"the rest of the file cannot be read: {reason}.", other_columns)

    def _image_rows(self) -> Iterator[ImageRow]:
        """Yields the images. The errors are those of `datasets`."""
        shard = self.rows.shard(self.rows.num_shards, self.shard_index)
        # In a worker of a loader, iteration over `shard` would yield only the share of this worker. Iteration over
        # batches yields all rows.
        for index, batch in enumerate(shard.iter(batch_size=1)):
            row = {name: values[0] for name, values in batch.items()}
            image = row.pop(self.image_column)
            source = confine_row(image, self.repository)  # unreadable if it names a file outside the repository
            key = row_key(source, self.root, default=f"{self.shard_index}-{index}")
            yield ImageRow(key, source, values=row, shard=self.name)

    def _check_classes(self, path: str) -> None:
        """Raises ValueError if a file has other classes, whose numbers `datasets` would take for classes of the set.

        A damaged file passes. It is reported when its rows are read.
        """
        try:
            check_classes(path, self.rows.features)
        except (OSError, pa.ArrowException) as error:
            if is_unreachable(error, is_remote=self.repository is not None):
                raise


@dataclass(frozen=True)
class RepositoryFiles:
    """Files of one split of a repository.

    Args:
        builder (`datasets.DatasetBuilder`): Builder of the set.
        split (`str`): The split.
        root (`str`): Absolute path of a local folder.
        named (`Sequence[str]`): Paths of images that rows of Parquet or Arrow files name.
    """

    builder: datasets.DatasetBuilder
    split: str
    root: str
    named: Sequence[str] = ()

    def paths(self) -> list[str]:
        """Paths or URLs of the files."""
        return [str(path) for path in self.builder.config.data_files[self.split]]

    def inputs(self) -> list[InputIdentity]:
        """Identity of each file, and of each image that rows name.

        `datasets` tells the revision of the repository, but no version of a single file. So the revision is the
        version of each file at a URL.
        """
        files = self.builder.config.data_files[self.split]
        revision = str(files.origin_metadata)  # such as "[('org/set', '52a10e7...'), ...]"
        identities = []
        for path in [*self.paths(), *self.named]:
            if is_url(path):
                identities.append(InputIdentity(path, size=0, version=revision))
            else:
                identities.append(file_identity(self.root, SetFile(path)))
        return identities

    @property
    def are_tars(self) -> bool:
        """Whether the files are tar files in WebDataset's form."""
        return self.builder.name.startswith("webdataset")

    @property
    def are_images(self) -> bool:
        """Whether the files are images, and metadata files or archives of images."""
        return self.builder.name.startswith("imagefolder")

    @property
    def are_local_tables(self) -> bool:
        """Whether all files are Parquet or Arrow files on this machine."""
        paths = self.paths()
        if any(is_url(path) for path in paths):
            return False
        return all(is_table(path) for path in paths)

    @property
    def has_types(self) -> bool:
        """Whether the README says the types of the columns, to which `datasets` converts all files."""
        return self.builder.info.features is not None

    def check_order(self) -> None:
        """Raises ValueError if the order of the images would differ from process to process."""
        num_metadata_files = 0
        for path in self.paths():
            if os.path.basename(path) in METADATA_FILES:
                num_metadata_files += 1
        if num_metadata_files > 1:
            raise ValueError(
                f"a split of a repository must have one metadata file, but `{self.split}` has {num_metadata_files}, "
                "which `datasets` reads in a random order. Download the set, and pass the folder with its images."
            )


@dataclass(frozen=True)
class OpenedStream:
    """A split that `datasets` streams.

    Args:
        parts (`list[StreamPart]`): Its shards.
        image_column (`str`): Column of the images.
        features (`datasets.Features`): Other columns that are kept.
        length (`int`, *optional*): Number of images, if the card of the set says it.
    """

    parts: list[StreamPart]
    image_column: str
    features: datasets.Features
    length: int | None


def open_stream(files: RepositoryFiles, name: str, selection: Selection) -> OpenedStream:
    """Opens a split that `datasets` streams.

    Args:
        files ([`RepositoryFiles`]): Files of the split.
        name (`str`): Folder of the set, or its name on the Hub.
        selection ([`Selection`]): The column of the images, by default found by its type, and columns to keep.
    """
    rows = _stream_rows(files, name, selection)
    features_of_set = rows.features
    if features_of_set is None:  # `datasets` knows no column, so that `select_columns` raises
        features_of_set = datasets.Features()
    image_column, column_names = select_columns(features_of_set, selection)
    features = datasets.Features({column: features_of_set[column] for column in column_names})
    length = _known_length(rows, files.split)
    undecoded_rows = rows.decode(False)  # otherwise a broken image of a folder on the Hub ends the stream
    undecoded_rows = undecoded_rows.cast_column(image_column, datasets.Image(decode=False))
    selected_rows = undecoded_rows.select_columns([image_column, *column_names])
    has_labels = len(column_names) > 0
    parts = _parts_of_stream(selected_rows, image_column, files, name, has_labels)
    return OpenedStream(parts, image_column, features, length)


def _stream_rows(files: RepositoryFiles, name: str, selection: Selection) -> datasets.IterableDataset:
    """Rows of a split with all of their columns, after `files.builder` was told their classes and types."""
    if files.are_images:
        _choose_classes(files)
    if files.are_local_tables and not files.has_types:
        # Otherwise `datasets` takes the types of the first file, in which a column may be empty.
        files.builder.info.features = read_features(files.paths(), selection)
    with explained_set(name):
        return files.builder.as_streaming_dataset(files.split)


def _choose_classes(files: RepositoryFiles) -> None:
    """Tells `datasets` whether the names of folders are labels, unless the README of the repository says it.

    By itself, `datasets` would also take the folders `train` and `test` of two splits for two classes.
    """
    config = files.builder.config
    is_said_by_readme = config.drop_labels is not None  # a README may have the line `drop_labels: true`
    if is_said_by_readme:
        return
    splits_with_labels = _splits_with_labels(config.data_files)
    if files.split in splits_with_labels:
        config.drop_labels = False
        # The splits with labels stay together, so that all get one list of classes.
        _remove_other_splits(config, splits_with_labels)
    else:
        config.drop_labels = True
        _remove_other_splits(config, [files.split])


def _remove_other_splits(config: datasets.BuilderConfig, splits: Sequence[str]) -> None:
    """Removes all splits but some from the config of a builder.

    `datasets` takes the list of classes, and the columns of metadata files, from all splits in `config.data_files`.
    """
    data_files = datasets.data_files.DataFilesDict()
    for split in splits:
        data_files[split] = config.data_files[split]
    config.data_files = data_files


def _splits_with_labels(paths_of_splits: Mapping[str, Sequence[str]]) -> list[str]:
    """Splits whose images lie in folders of classes.

    A split with several folders has labels: `train/cat` and `train/dog` are the classes `cat` and `dog`. A split with
    a single folder, such as `test/cat`, has labels only if another split shows that this folder is a class.
    """
    folders_by_split = {}
    class_names: set[str] = set()
    for split, paths in paths_of_splits.items():
        folders = _names_of_folders(paths)
        folders_by_split[split] = folders
        if len(folders) > 1:
            class_names |= folders
    splits = []
    for split, folders in folders_by_split.items():
        has_folders = len(folders) > 0
        if has_folders and folders.issubset(class_names):
            splits.append(split)
    return splits


def _names_of_folders(paths: Sequence[str]) -> set[str]:
    """Names of the folders of images, which may be labels.

    Empty if the folders are not equally deep, or if there are metadata files, which hold the labels, or archives.
    """
    names = set()
    depths = set()
    for path in paths:
        if os.path.basename(path) in METADATA_FILES or path.lower().endswith(ARCHIVE_SUFFIXES):
            return set()
        if kind_of(path) == "image":
            folder = os.path.dirname(path)
            names.add(os.path.basename(folder))
            depths.add(folder.count("/"))
    if len(depths) > 1:
        return set()
    return names


def _parts_of_stream(
    rows: datasets.IterableDataset, image_column: str, files: RepositoryFiles, set_name: str, has_labels: bool
) -> list[StreamPart]:
    """A part for each shard of a stream.

    If there are as many shards as files, each shard is a file, and its part has the name of the file. Otherwise the
    file of a shard is unknown, and all parts have the name of the set.
    """
    file_paths = files.paths()
    is_each_shard_a_file = rows.num_shards == len(file_paths)
    parts = []
    for shard_index in range(rows.num_shards):
        part = StreamPart(
            rows=rows,
            image_column=image_column,
            root=files.root,
            repository=files.builder.repo_id,
            name=set_name,
            shard_index=shard_index,
            path_to_check=None,
        )
        if is_each_shard_a_file:
            file_path = file_paths[shard_index]
            part.name = os.path.basename(file_path)
            if has_labels and is_table(file_path):
                part.path_to_check = file_path
        parts.append(part)
    return parts


def _known_length(rows: datasets.IterableDataset, split: str) -> int | None:
    """Number of rows of a split, if the card of the set says it."""
    splits = rows.info.splits
    if not splits or split not in splits:
        return None
    return splits[split].num_examples or None  # 0 if it is not known

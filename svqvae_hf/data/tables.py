"""Image sets in tables: Parquet and Arrow files, each of which is a part."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import datasets
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from svqvae_files.errors import is_unreachable
from svqvae_files.inputs import is_url
from svqvae_hf.data.image_parts import row_key, shard_name
from svqvae_hf.data.image_rows import ImageRow, fault_of, unreadable
from svqvae_hf.data.metadata import EMPTY
from svqvae_hf.data.opened_files import opened_file
from svqvae_hf.data.selection import Selection
from svqvae_hf.data.set_errors import explained_set
from svqvae_hf.untrusted.set_rows import confine_row

ARROW_MAGIC = b"ARROW1"  # of the format for files
PARQUET_SUFFIXES = (".parquet", ".geoparquet", ".gpq")  # `datasets` reads all of them as Parquet
ARROW_SUFFIX = ".arrow"
TEXTS = (datasets.Value("string"), datasets.Value("large_string"))  # hold the same values; Polars writes the second
ROWS_AT_A_TIME = 16  # that are in memory together, with their images


@dataclass
class TablePart:
    """A Parquet or Arrow file of an image set. The rest of a damaged file is one unreadable row.

    Args:
        path (`str`): Local path, or a URL for `fsspec`.
        root (`str`): Folder of the set.
        number (`int`): Number of the file, for the keys of images without a path.
        image_column (`str`): Column of the images.
        features (`datasets.Features`): Columns to keep, with their types in the set.
    """

    path: str
    root: str
    number: int
    image_column: str
    features: datasets.Features

    @property
    def name(self) -> str:
        """Name of the file."""
        return shard_name(self.path, self.root)

    def read(self) -> Iterator[ImageRow]:
        """Yields the images. If the file is damaged, the last row is an unreadable one, which tells why.

        Raises:
            OSError: The file cannot be reached.
            ValueError: It has other columns than the set.
        """
        columns = [self.image_column, *self.features]
        try:
            with opened_file(self.path) as file:
                self.check_schema(_read_schema(self.path, file))
                for index, row in enumerate(_rows(self.path, file, columns)):
                    yield self._image_row(index, row)
        except (OSError, pa.ArrowException) as error:
            if is_unreachable(error, is_remote=is_url(self.path)):
                raise
            # The content of the file is damaged. One row stands for what cannot be read, so that it is counted.
            reason = fault_of(error).removesuffix(".")
            yield unreadable(self.name, f"the rest of the file cannot be read: {reason}.", list(self.features))

    def check_schema(self, schema: pa.Schema) -> None:
        """Raises ValueError if a file lacks a column of its set, or has other classes or types in one."""
        features_of_file = datasets.Features.from_arrow_schema(schema)
        _check_names(self.path, [self.image_column, *self.features], features_of_file)
        for name, feature in self.features.items():
            _check_type(self.path, name, feature_of_file=features_of_file[name], feature_of_set=feature)

    def _image_row(self, index: int, row: dict[str, Any]) -> ImageRow:
        """Row of an image, from the row of the file with this index."""
        repository = "" if is_url(self.path) else None  # rows at a URL may name no file of this machine
        image = row.pop(self.image_column)
        source = confine_row(_source(image), repository)  # unreadable if it names a file that it must not read
        key = row_key(source, self.root, default=f"{self.number}-{index}")
        return ImageRow(key, source, values=row, shard=self.name)


def open_tables(paths: Sequence[str], root: str, selection: Selection) -> tuple[list[TablePart], datasets.Features]:
    """Finds the columns of Parquet or Arrow files.

    Args:
        paths (`Sequence[str]`): Local paths, or URLs for `fsspec`. Local files are compared with each other here, and
            files at URLs with the first one when they are read.
        root (`str`): Folder of the set.
        selection ([`Selection`]): The column of the images, by default found by its type, and columns to keep.

    Returns:
        `tuple[list[TablePart], datasets.Features]`: A part per file, and the columns that are kept.

    Raises:
        OSError: The first file cannot be reached.
        ValueError: It is damaged or has no such column, or local files differ in their columns.
    """
    features = read_features(paths, selection)
    image_column, column_names = select_columns(features, selection)
    selected_features = datasets.Features({name: features[name] for name in column_names})
    parts = []
    for number, path in enumerate(paths):
        parts.append(TablePart(path, root, number, image_column, selected_features))
    return parts, selected_features


def read_features(paths: Sequence[str], selection: Selection) -> datasets.Features:
    """Columns of the first one of some Parquet or Arrow files, with their types.

    A column that is empty in the first file has its type from the first local file in which it is not.

    Args:
        paths (`Sequence[str]`): Local paths, or URLs for `fsspec`.
        selection ([`Selection`]): The column of the images, and columns to keep, in which local files are compared.

    Raises:
        OSError: The first file cannot be reached.
        ValueError: It is damaged or has no such column, or local files differ in their columns.
    """
    with explained_set(paths[0]):
        features = _features_of_file(paths[0])
    image_column, column_names = select_columns(features, selection)
    for path in paths[1:]:
        if is_url(path):
            continue
        try:
            features_of_file = _features_of_file(path)
        except (OSError, pa.ArrowException):  # a broken file, which is reported when it is read
            continue
        _check_names(path, [image_column, *column_names], features_of_file)
        for name in column_names:
            if features[name] == EMPTY:  # in all files before this one
                features[name] = features_of_file[name]
            else:
                _check_type(path, name, feature_of_file=features_of_file[name], feature_of_set=features[name])
    return features


def _features_of_file(path: str) -> datasets.Features:
    """Columns of a file and their types, as `datasets` names them."""
    with opened_file(path) as file:
        return datasets.Features.from_arrow_schema(_read_schema(path, file))


def _check_names(path: str, names: Sequence[str], features_of_file: datasets.Features) -> None:
    """Raises ValueError if a file lacks a column of its set."""
    for name in names:
        if name not in features_of_file:
            raise ValueError(f"all files of a set must have the column `{name}`, but `{path}` has none.")


def _check_type(path: str, column: str, feature_of_file: Any, feature_of_set: Any) -> None:
    """Raises ValueError if a column of a file has another type than in its set, unless it is empty in the file.

    Args:
        path (`str`): The file, for the error.
        column (`str`): Name of the column, for the error.
        feature_of_file: Type of the column in the file, in the classes of `datasets`, such as `Value("string")`.
        feature_of_set: Type of the column in the set.
    """
    both_are_texts = feature_of_file in TEXTS and feature_of_set in TEXTS
    if both_are_texts or feature_of_file in (feature_of_set, EMPTY):
        return
    if isinstance(feature_of_set, datasets.ClassLabel) or isinstance(feature_of_file, datasets.ClassLabel):
        raise _error_of_classes(path, column, feature_of_file, feature_of_set)
    raise ValueError(
        f"all files of a set must have columns of one type, but `{column}` of `{path}` is {feature_of_file!s:.200}, "
        f"and {feature_of_set!s:.200} in the set. Convert it."
    )


def check_classes(path: str, features: datasets.Features) -> None:
    """Raises ValueError if a Parquet or Arrow file has other classes than its set.

    A column of numbers without names passes, because the card of a repository may name its classes.

    Args:
        path (`str`): Local path, or a URL for `fsspec`.
        features (`datasets.Features`): Columns of the set.
    """
    features_of_file = _features_of_file(path)
    for name, feature in features.items():
        feature_of_file = features_of_file.get(name)
        if isinstance(feature_of_file, datasets.ClassLabel) and feature_of_file != feature:
            raise _error_of_classes(path, name, feature_of_file, feature)


def _error_of_classes(path: str, column: str, feature_of_file: Any, feature_of_set: Any) -> ValueError:
    """Error for a file in which a column of classes is not what it is in the set."""
    return ValueError(
        f"all files of a set must have the same classes in the same order, but `{column}` of `{path}` is "
        f"{feature_of_file!s:.200}, and {feature_of_set!s:.200} in the set."
    )


def select_columns(features: datasets.Features, selection: Selection) -> tuple[str, list[str]]:
    """Selects the column of images, and the other columns to keep.

    Args:
        features (`datasets.Features`): Columns of a set.
        selection ([`Selection`]): The column of the images, by default the one named `image` or the only one; and
            columns to keep.

    Raises:
        ValueError: There is no such column, or several columns hold images and none is named.
    """
    selection.check_columns(list(features))
    image_column = _choose_image_column(features, selection.image_column)
    column_names = []
    for name in features:
        if name != image_column and selection.keeps(name):
            column_names.append(name)
    return image_column, column_names


def _choose_image_column(features: datasets.Features, asked: str | None) -> str:
    """The column that is asked for; otherwise the column `image`, or the only one that holds images."""
    image_columns = [name for name, feature in features.items() if _holds_images(feature)]
    if image_columns:
        choices = ", ".join(image_columns)
    else:
        choices = "the columns of images"
    if asked is not None:
        if asked not in image_columns:
            raise ValueError(f"--image-column must be one of {choices}, got `{asked}`.")
        return asked
    if "image" in image_columns:
        return "image"
    if len(image_columns) == 1:
        return image_columns[0]
    raise ValueError(f"--image-column must be one of {choices}.")


def _holds_images(feature: Any) -> bool:
    """Whether a column has a type that images are stored in."""
    if isinstance(feature, dict):
        return "bytes" in feature and "path" in feature
    if isinstance(feature, datasets.Image):
        return True
    return getattr(feature, "dtype", "") in ("binary", "large_binary")


def _source(value: Any) -> Mapping[str, Any] | None:
    """An image as [`read_image`] takes it, from any type of column that holds images."""
    if isinstance(value, bytes):
        return {"bytes": value, "path": None}
    if isinstance(value, str):
        return {"bytes": None, "path": value}
    return value


def is_table(path: str) -> bool:
    """Whether a file is Parquet or Arrow, by its name."""
    return _is_parquet(path) or path.lower().endswith(ARROW_SUFFIX)


def _is_parquet(path: str) -> bool:
    """Whether a file is Parquet, by its name."""
    return path.lower().endswith(PARQUET_SUFFIXES)


def _read_schema(path: str, file: BinaryIO) -> pa.Schema:
    """Columns of a file and their types."""
    if _is_parquet(path):
        return pq.read_schema(file)
    return _open_arrow(file).schema


def _rows(path: str, file: BinaryIO, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yields the rows of a file, with some of its columns."""
    for batch in _batches(path, file, columns):
        for start in range(0, len(batch), ROWS_AT_A_TIME):
            yield from batch.slice(start, ROWS_AT_A_TIME).to_pylist()


def _batches(path: str, file: BinaryIO, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """Yields the rows of a file in batches, as they are stored."""
    file.seek(0)
    if _is_parquet(path):
        parquet = pq.ParquetFile(file, page_checksum_verification=True)
        yield from parquet.iter_batches(ROWS_AT_A_TIME, columns=columns)
        return
    reader = _open_arrow(file)
    if isinstance(reader, pa.RecordBatchFileReader):
        for number in range(reader.num_record_batches):
            yield reader.get_batch(number).select(columns)
        return
    for batch in reader:
        yield batch.select(columns)


def _open_arrow(file: BinaryIO) -> pa.RecordBatchStreamReader | pa.RecordBatchFileReader:
    """Opens an Arrow file, of the format for streams, which `datasets` writes, or of the one for files."""
    magic = file.read(len(ARROW_MAGIC))
    file.seek(0)
    if magic == ARROW_MAGIC:
        return pa.ipc.open_file(file)
    return pa.ipc.open_stream(file)


# Images that rows name by their paths


def named_paths(paths: Sequence[str], image_column: str) -> list[str]:
    """Paths of the images on this machine that rows of Parquet or Arrow files name in place of holding their bytes.

    Args:
        paths (`Sequence[str]`): Local paths of the files, or URLs, whose rows may name no file of this machine.
        image_column (`str`): Column of the images.

    Returns:
        `list[str]`: Absolute paths, in the order of the rows. A damaged file is left out, because it is reported when
        its rows are read.
    """
    image_paths = []
    for path in paths:
        if is_url(path):
            continue
        try:
            image_paths += _named_in_file(path, image_column)
        except (OSError, pa.ArrowException):
            continue
    return image_paths


def _named_in_file(path: str, image_column: str) -> list[str]:
    """Absolute paths of the images that rows of a file name in place of holding their bytes."""
    image_paths = []
    # In a mapped file, only the blocks with paths are read, and not the bytes of images.
    with pa.memory_map(path) as file:
        for images in _images_that_may_be_named(path, file, image_column):
            has_bytes = pc.is_valid(pc.struct_field(images, "bytes"))
            image_names = pc.struct_field(images, "path").filter(pc.invert(has_bytes))
            for name in image_names.drop_null().to_pylist():
                if not is_url(name):
                    image_paths.append(os.path.abspath(name))
    return image_paths


def _images_that_may_be_named(path: str, file: pa.MemoryMappedFile, image_column: str) -> Iterator[pa.StructArray]:
    """Yields the images of a file in batches, without batches of a Parquet file in which all images have bytes."""
    schema = _read_schema(path, file)
    if not pa.types.is_struct(schema.field(image_column).type):  # the column holds bytes alone
        return
    if not _is_parquet(path):
        for batch in _batches(path, file, [image_column]):
            yield batch[image_column]
        return
    parquet = pq.ParquetFile(file)
    row_groups = _row_groups_without_bytes(parquet.metadata, f"{image_column}.bytes")
    for batch in parquet.iter_batches(ROWS_AT_A_TIME, row_groups, columns=[image_column]):
        yield batch[image_column]


def _row_groups_without_bytes(metadata: pq.FileMetaData, bytes_column: str) -> list[int]:
    """Numbers of the row groups of a Parquet file in which bytes are missing, or may be for lack of statistics."""
    numbers = []
    for number in range(metadata.num_row_groups):
        row_group = metadata.row_group(number)
        for index in range(row_group.num_columns):
            column = row_group.column(index)
            if column.path_in_schema != bytes_column:
                continue
            statistics = column.statistics
            if statistics is None or statistics.null_count != 0:  # `None` if it is unknown
                numbers.append(number)
    return numbers

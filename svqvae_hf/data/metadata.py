"""Captions and labels of image files, in files named `metadata` beside them."""

import csv
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from svqvae_files.errors import explained
from svqvae_files.json_files import parse_json_object
from svqvae_hf.data.image_rows import all_columns

FILE_NAME = "file_name"  # column of the images, relative to the folder of the metadata file
EMPTY = datasets.Value("null")  # type of a column whose cells are all empty
INTEGER = re.compile(r"0|-?[1-9]\d{0,17}")


@dataclass(frozen=True)
class ImageTable:
    """Image files with values of columns.

    Args:
        keys (`list[str]`): Paths of the files, relative to the folder of the set.
        values (`pa.Table`): Columns beside the name of the file, one row per file.
        features (`datasets.Features`): Types of the columns.
    """

    keys: list[str]
    values: pa.Table
    features: datasets.Features


def read_metadata(files: Sequence[str], root: str) -> ImageTable:
    """Reads all metadata files of a folder, in the order of the files and of their rows.

    Args:
        files (`Sequence[str]`): Paths of CSV, JSON Lines or Parquet files.
        root (`str`): Folder of the set.

    Raises:
        OSError: A file cannot be read.
        ValueError: A file is damaged, names no images, or has other types of columns than the first; or a folder has
            several.
    """
    _check_one_per_folder(files)
    keys: list[str] = []  # paths of the images, relative to `root`
    tables = []  # their values in the other columns
    features = datasets.Features()  # types of these columns
    for file in sorted(files):
        table = _read_table(file)
        keys += _keys_of_images(table, file, root)
        table = table.drop_columns([FILE_NAME])
        types_in_file = _types_of_filled_columns(table.schema)
        _check_same_types(types_in_file, features, file)
        features.update(types_in_file)
        tables.append(table)
    values = pa.concat_tables(tables, promote_options="default")
    for column in values.column_names:
        if column not in features:  # it is not filled in any file
            features[column] = EMPTY
    return ImageTable(keys, values, features)


def _check_one_per_folder(files: Sequence[str]) -> None:
    """Raises ValueError if a folder has several metadata files, which would name its images several times."""
    file_of_folder: dict[str, str] = {}
    for file in files:
        folder, name = os.path.split(file)
        if folder in file_of_folder:
            raise ValueError(
                f"`{folder}` must have one metadata file, but has {file_of_folder[folder]} and {name}. Move one away."
            )
        file_of_folder[folder] = name


def _types_of_filled_columns(schema: pa.Schema) -> datasets.Features:
    """Types of the columns of a file, without columns whose cells are all empty. Other files may tell their types."""
    filled_columns = datasets.Features()
    for column, feature in datasets.Features.from_arrow_schema(schema).items():
        if feature != EMPTY:
            filled_columns[column] = feature
    return filled_columns


def _check_same_types(features_of_file: datasets.Features, earlier_features: datasets.Features, file: str) -> None:
    """Raises ValueError if a column has another type in a file than in earlier files."""
    for column, feature in features_of_file.items():
        if column in earlier_features and earlier_features[column] != feature:
            raise ValueError(
                f"metadata files of a set must have columns of one type, but `{column}` of `{file}` is {feature}, "
                f"and {earlier_features[column]} before."
            )


def _read_table(file: str) -> pa.Table:
    """Reads a metadata file. Raises ValueError if it is damaged or has no column of file names."""
    _, suffix = os.path.splitext(file)
    with explained(file, "read"):
        try:
            if suffix == ".csv":
                table = _read_csv(file)
            elif suffix == ".jsonl":
                table = _read_json_lines(file)
            else:
                table = pq.read_table(file)
        except (pa.ArrowException, csv.Error, UnicodeError, OverflowError) as error:  # such as a number of 30 digits
            raise ValueError(f"`{file}` must hold a table, but is damaged: {error}.") from error
    if FILE_NAME not in table.column_names:
        raise ValueError(f"`{file}` must have a column `{FILE_NAME}`, but has {', '.join(table.column_names)}.")
    return table


def _read_csv(file: str) -> pa.Table:
    """Reads texts as they stand, such as `NA` and `007`. A column is of integers if all of its cells are."""
    with open(file, newline="", encoding="utf-8-sig") as lines:
        reader = csv.DictReader(lines, strict=True)  # otherwise a quote that is never closed takes the rows after it
        columns: dict[str, list[Any]] = {}
        for column in reader.fieldnames or ():
            columns[column] = []
        for row in reader:
            has_more_cells = None in row  # the key under which `csv` returns cells without a column
            if has_more_cells:
                raise ValueError(f"line {reader.line_num} of `{file}` must have {len(columns)} cells, but has more.")
            for column, cells in columns.items():
                cells.append(row[column])
    for column, cells in columns.items():
        if column != FILE_NAME and _are_integers(cells):
            columns[column] = [int(cell) for cell in cells]
    return pa.table(columns)


def _are_integers(cells: Sequence[str | None]) -> bool:
    """Whether a column has cells, and all of them are integers. A cell that its line lacks is `None`."""
    for cell in cells:
        if cell is None or not INTEGER.fullmatch(cell):
            return False
    return len(cells) > 0


def _read_json_lines(file: str) -> pa.Table:
    """Reads a row per line. A row need not have all columns."""
    rows: list[Mapping[str, Any]] = []
    with open(file, encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                rows.append(parse_json_object(line, f"{file}, line {number}"))
    columns = {}
    for name in all_columns(rows):
        columns[name] = [row.get(name) for row in rows]
    return pa.table(columns)


def _keys_of_images(table: pa.Table, file: str, root: str) -> list[str]:
    """Paths of the images that a metadata file names, relative to the folder of the set."""
    folder = os.path.relpath(os.path.dirname(file), root)
    keys = []
    for row, name in enumerate(table[FILE_NAME].to_pylist()):
        if not isinstance(name, str) or not name:
            raise ValueError(f"`{FILE_NAME}` in `{file}` must be a text in each row, got {name!r:.40} in row {row}.")
        path = os.path.join(folder, name)
        keys.append(os.path.normpath(path))
    return keys

"""Writes the Parquet files of a part of a token set."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from svqvae_files.folders import Folder
from svqvae_files.identity import output_identity
from svqvae_hf.token_sets.crops import CROPS
from svqvae_hf.token_sets.manifest import DATA, TokenFile
from svqvae_hf.token_sets.settings import TokenSettings
from svqvae_hf.tokens.token_files import METADATA_KEY

PARTS_PER_FOLDER = 1000
SHARD_BYTES = 256_000_000  # of a Parquet file, before compression
ROW_GROUP_BYTES = 2**21
ROW_BYTES = 64  # of a row, besides its ids and texts: an estimate


def shard_name(part: int, number: int) -> str:
    """Name of a Parquet file. `datasets` takes the split from its first word. A folder has at most 10,000 files."""
    return f"{DATA}/{part // PARTS_PER_FOLDER:04}-{number // 10:04}/train-{part:07}-{number:05}.parquet"


def row_features(settings: TokenSettings, image_features: datasets.Features) -> datasets.Features:
    """Columns of a token set.

    Args:
        settings ([`TokenSettings`]): Settings of the set.
        image_features (`datasets.Features`): Columns of the image set that are kept.

    Raises:
        ValueError: A kept column has the name of another column.
    """
    id_feature: Any
    if settings.context_model is None:
        id_feature = datasets.List(datasets.Value(settings.id_dtype))
    else:
        id_feature = datasets.Value("binary")  # compressed
    features = datasets.Features(dict.fromkeys(settings.id_columns, id_feature))
    features["height"] = datasets.Value("int32")
    features["width"] = datasets.Value("int32")
    features["key"] = datasets.Value("string")
    if len(CROPS[settings.crops]) > 1:
        features["crop"] = datasets.Value("string")
    for name, feature in image_features.items():
        if name in features:
            raise ValueError(f"image sets must not have columns of token sets, but have {name}.")
        features[name] = feature
    return features


@dataclass
class RowGroup:
    """Consecutive rows that are written together.

    Args:
        rows (`list[dict[str, Any]]`): The rows.
        size (`int`): About how many bytes they take.
        num_ids (`int`): Number of their ids.
    """

    rows: list[dict[str, Any]]
    size: int = 0
    num_ids: int = 0


@dataclass(frozen=True)
class WrittenFile:
    """A Parquet file that was written.

    Args:
        file ([`TokenFile`]): Its name, rows, size and checksum.
        num_ids (`int`): Number of its ids.
    """

    file: TokenFile
    num_ids: int


def write_shards(
    folder: Folder, part: int, rows: Iterable[dict[str, Any]], settings: TokenSettings, features: datasets.Features
) -> Iterator[WrittenFile]:
    """Writes rows to Parquet files. Where they end depends on the sizes of the images alone.

    Args:
        folder ([`Folder`]): Folder of the token set.
        part (`int`): Number of the part.
        rows (`Iterable[dict[str, Any]]`): Rows of the part, with their ids as arrays.
        settings ([`TokenSettings`]): Settings of the set, which each file repeats.
        features (`datasets.Features`): Columns, from [`row_features`].

    Yields:
        [`WrittenFile`]: Each file, once it is written.
    """
    metadata = dict(features.arrow_schema.metadata)
    metadata[METADATA_KEY.encode()] = settings.to_json().encode()
    schema = features.arrow_schema.with_metadata(metadata)
    groups = _group_rows(rows, settings)
    for file_number, groups_of_file in enumerate(_groups_of_files(groups)):
        name = shard_name(part, file_number)
        with folder.new_file(name) as path:
            num_rows, num_ids = _write_file(path, schema, groups_of_file)
            identity = output_identity(path)
        file = TokenFile(name, num_rows, identity.size, identity.checksum)
        yield WrittenFile(file, num_ids)


def _groups_of_files(groups: Iterator[RowGroup]) -> Iterator[Iterator[RowGroup]]:
    """Yields an iterator over the groups of each file. It must be consumed before the next one is taken."""
    for first_group in groups:
        yield _groups_of_file(first_group, groups)


def _groups_of_file(first_group: RowGroup, later_groups: Iterator[RowGroup]) -> Iterator[RowGroup]:
    """Yields the groups of a file: the first one, and later ones until the file is full."""
    size = 0  # bytes before compression
    for group in itertools.chain([first_group], later_groups):
        yield group
        size += group.size
        if size >= SHARD_BYTES:
            return


def _write_file(path: Path, schema: pa.Schema, groups: Iterable[RowGroup]) -> tuple[int, int]:
    """Writes groups of rows to a file. Returns the numbers of its rows and ids."""
    num_rows = 0
    num_ids = 0
    with pq.ParquetWriter(path, schema, write_page_checksum=True) as writer:
        for group in groups:
            writer.write_table(pa.Table.from_pylist(group.rows, schema))
            num_rows += len(group.rows)
            num_ids += group.num_ids
    return num_rows, num_ids


def _group_rows(rows: Iterable[dict[str, Any]], settings: TokenSettings) -> Iterator[RowGroup]:
    """Yields rows in groups of about `ROW_GROUP_BYTES`."""
    group = RowGroup([])
    for row in rows:
        group.rows.append(row)
        group.size += _estimate_size(row, settings.id_columns)
        group.num_ids += settings.count_ids(row)
        if group.size >= ROW_GROUP_BYTES:
            yield group
            group = RowGroup([])
    if group.rows:
        yield group


def _estimate_size(row: dict[str, Any], id_columns: Sequence[str]) -> int:
    """About how many bytes a row takes: its ids, its texts, and a fixed number for the values in other columns."""
    size = ROW_BYTES
    for column, value in row.items():
        if column in id_columns:
            size += memoryview(value).nbytes  # of an array, or of bytes if the ids are compressed
        elif isinstance(value, str | bytes):
            size += len(value)  # counts a character of a text as one byte, which is close enough
    return size

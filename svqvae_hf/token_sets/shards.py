"""Parquet files of a token set."""

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow.dataset import ParquetFragmentScanOptions

from svqvae_files.folders import Folder
from svqvae_hf.data.set_errors import explained_set
from svqvae_hf.token_sets.crops import CROPS
from svqvae_hf.token_sets.settings import TokenSettings
from svqvae_hf.tokens.token_files import METADATA_KEY

DATA = "data"
CHECKED = ParquetFragmentScanOptions(page_checksum_verification=True)
PARTS_PER_FOLDER = 1000
SHARD_BYTES = 256_000_000  # of a Parquet file, before compression
ROW_GROUP_BYTES = 2**21
ROW_BYTES = 64  # of a row, besides its ids and texts


def shard_name(part: int, number: int) -> str:
    """Name of a Parquet file. `datasets` takes the split from its first word. A folder has at most 10,000 files."""
    return f"{DATA}/{part // PARTS_PER_FOLDER:04}-{number // 10:04}/train-{part:07}-{number:05}.parquet"


def load_rows(data: str, streaming: bool = False) -> Any:
    """Loads the rows of a token set by `datasets`.

    Args:
        data (`str`): Folder of the set, its URL for `fsspec`, or its name on the Hub.
        streaming (`bool`, defaults to `False`): Read rows in their order, without a copy in the cache of `datasets`.
    """
    with explained_set(data, "token"):
        if "://" not in data:
            return datasets.load_dataset(data, split="train", streaming=streaming, fragment_scan_options=CHECKED)
        names = sorted(name for name in Folder(data).all_files(DATA) if name.endswith(".parquet"))
        files = [f"{data.rstrip('/')}/{name}" for name in names]
        options = {"data_files": files, "streaming": streaming, "fragment_scan_options": CHECKED}
        return datasets.load_dataset("parquet", split="train", **options)


def row_features(settings: TokenSettings, kept: datasets.Features) -> datasets.Features:
    """Columns of a token set.

    Args:
        settings ([`TokenSettings`]): Settings of the set.
        kept (`datasets.Features`): Columns of the image set that are kept.

    Raises:
        ValueError: A kept column has the name of another column.
    """
    ids = datasets.List(datasets.Value(settings.id_dtype))
    columns = dict.fromkeys(settings.id_columns, ids if settings.context_model is None else datasets.Value("binary"))
    columns |= {"height": datasets.Value("int32"), "width": datasets.Value("int32"), "key": datasets.Value("string")}
    if len(CROPS[settings.crops]) > 1:
        columns |= {"crop": datasets.Value("string")}
    taken = sorted(set(columns) & set(kept))
    if taken:
        raise ValueError(f"image sets must not have columns of token sets, but have {', '.join(taken)}.")
    return datasets.Features({**columns, **kept})


def write_shards(
    folder: Folder, part: int, rows: Iterable[dict[str, Any]], settings: TokenSettings, features: datasets.Features
) -> Iterator[dict[str, Any]]:
    """Writes rows to Parquet files. Where they end depends on the sizes of the images alone.

    Args:
        folder ([`Folder`]): Folder of the token set.
        part (`int`): Number of the part.
        rows (`Iterable[dict[str, Any]]`): Rows of the part, with their ids as arrays.
        settings ([`TokenSettings`]): Settings of the set, which each file repeats.
        features (`datasets.Features`): Columns, from [`row_features`].

    Yields:
        `dict[str, Any]`: `name`, `rows` and `ids` of each file, once it is written.
    """
    schema = features.arrow_schema
    schema = schema.with_metadata({**schema.metadata, METADATA_KEY.encode(): settings.to_json().encode()})
    for number, shard in itertools.groupby(rows, key=_counter(SHARD_BYTES, settings)):
        name = shard_name(part, number)
        counts = {"rows": 0, "ids": 0}
        with folder.new_file(name) as path, pq.ParquetWriter(path, schema, write_page_checksum=True) as writer:
            for _, group in itertools.groupby(shard, key=_counter(ROW_GROUP_BYTES, settings)):
                group_rows = list(group)
                writer.write_table(pa.Table.from_pylist(group_rows, schema))
                counts["rows"] += len(group_rows)
                counts["ids"] += sum(map(settings.count_ids, group_rows))
        yield {"name": name, **counts}


def _counter(limit: float, settings: TokenSettings) -> Callable[[dict[str, Any]], int]:
    """Returns a function that numbers rows by groups of about `limit` bytes."""
    number, size = 0, 0.0

    def count(row: dict[str, Any]) -> int:
        nonlocal number, size
        if size >= limit:
            number, size = number + 1, 0
        size += ROW_BYTES + sum(memoryview(row[name]).nbytes for name in settings.id_columns)
        size += sum(len(value) for value in row.values() if isinstance(value, str | bytes))
        return number

    return count

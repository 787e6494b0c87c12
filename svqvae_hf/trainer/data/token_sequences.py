"""Batches of the token sequences of a token set, whose Parquet files are read as a stream."""

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from threading import Lock
from typing import Any, NamedTuple

import datasets
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from svqvae_hf.files.folders import Folder, explained
from svqvae_hf.pipelines.sequences import SequenceLayout
from svqvae_hf.token_sets.settings import read_settings
from svqvae_hf.token_sets.shards import DATA
from svqvae_hf.trainer.data.readers import ORDER, row_order

BLOCK_ROWS = 2**18  # rows of a process that are in random order at a time: 128 MiB of 16 x 16 ids
FOOTERS_AT_ONCE = 16  # of Parquet files, because those at a URL take a while to answer
ROW = "row"  # column with the number of a row in its set
LIST_SUFFIX = ".list.element"  # of the path of a column of lists in a Parquet file


class RowGroup(NamedTuple):
    """Successive rows of a Parquet file, the smallest part that is read at once."""

    file: int
    number: int
    first_row: int
    rows: int


class RowSlice(NamedTuple):
    """Some rows of a row group."""

    group: int
    start: int
    stop: int


class Block(NamedTuple):
    """Rows of a process in an epoch that are in memory, and in random order, at a time."""

    first: int
    end: int
    slices: Sequence[RowSlice]


class TokenBatch(NamedTuple):
    """Token sequences with their captions.

    Args:
        sequences (`torch.Tensor` of shape `(batch, length)`): Tokens, int64.
        rows (`np.ndarray` of shape `(batch,)`): Numbers of their rows in the set.
        captions (`list[list[str]]`, *optional*): Captions of each row, at least one; None without a column of them.
    """

    sequences: torch.Tensor
    rows: np.ndarray
    captions: list[list[str]] | None


class TokenSource:
    """A token set whose rows are of one size, as token sequences. Nothing is copied to disk.

    Args:
        data (`str`): Folder of the set, its URL for `fsspec`, or its Hub id.
        label_column (`str`, *optional*): Column of the labels; without it, images have no class.
        caption_column (`str`, *optional*): Column of the captions, a text or a list of texts per row. With it, the
            layout has one class, "with its caption".

    Raises:
        OSError: If there is no such set, or it cannot be reached.
        ValueError: If its rows have several sizes or each a scale of its own, its labels are not classes, or its
            captions are not texts or are missing.
    """

    def __init__(self, data: str, label_column: str | None, caption_column: str | None = None):
        self.settings = read_settings(data)
        if self.settings.chooses_scale:
            raise ValueError(
                "All rows of the token set must have the same scales, but each has one of its own. Make it again with "
                "`svqvae tokenize` without --min-psnr and --max-bits."
            )
        self.reading = Lock()  # threads share the open files
        self.files = _find_files(os.fspath(data))
        with ThreadPoolExecutor(FOOTERS_AT_ONCE) as pool:
            self.metadata = list(pool.map(_read_metadata, self.files))
        self.features = datasets.Features.from_arrow_schema(self.metadata[0].schema.to_arrow_schema())
        sizes = [
            (file, index, metadata.row_group(index).num_rows)
            for file, metadata in enumerate(self.metadata)
            for index in range(metadata.num_row_groups)
        ]
        ends = np.cumsum([0, *(rows for *_, rows in sizes)])
        self.groups = [
            RowGroup(file, index, int(first), rows)
            for (file, index, rows), first in zip(sizes, ends[:-1], strict=True)
        ]
        self.num_rows = int(ends[-1])
        order = np.argsort(self.settings.scales)  # sequences go from coarse to fine, columns need not
        self.id_columns = [f"ids_{index}" for index in order]
        self.label_column, self.caption_column = label_column, caption_column
        self.caption_columns = [] if caption_column is None else [caption_column]
        feature = self.features.get(label_column)
        self.class_names = feature.names if isinstance(feature, datasets.ClassLabel) else None
        num_classes = 0 if label_column is None else self._num_classes(label_column)
        if caption_column is not None:
            self._check_captions(caption_column)
            num_classes = 1
        self.layout = SequenceLayout(
            codebook_size=self.settings.codebook_size,
            f=self.settings.f,
            height=self._only("height"),
            width=self._only("width"),
            scales=tuple(self.settings.scales[index] for index in order),
            num_classes=num_classes,
            scale_from=self.settings.scale_from,
        )

    @property
    def columns(self) -> list[str]:
        """Columns that sequences are made of."""
        return [*self.id_columns, *self.caption_columns, *([] if self.label_column is None else [self.label_column])]

    def read(self, group: RowGroup, columns: list[str] | None = None) -> pa.Table:
        """Reads some columns of a row group, by default the sequences' own, and adds the numbers of the rows."""
        path = self.files[group.file]
        with self.reading, explained(path, "read"):
            table = _open_parquet(path).read_row_group(group.number, self.columns if columns is None else columns)
        return table.append_column(ROW, pa.array(np.arange(group.first_row, group.first_row + group.rows)))

    def batch(self, table: pa.Table) -> TokenBatch:
        """Sequences of the rows of a table."""
        ids = [
            torch.from_numpy(np.stack(table[column].to_numpy()).astype(np.int64)).unflatten(1, grid)
            for column, grid in zip(self.id_columns, self.layout.grids, strict=True)
        ]
        rows = table[ROW].to_numpy()
        if self.caption_column is not None:
            return TokenBatch(self.layout.encode(ids, 0 * rows), rows, self.captions(table))
        labels = None if self.label_column is None else torch.from_numpy(table[self.label_column].to_numpy().copy())
        return TokenBatch(self.layout.encode(ids, labels), rows, None)

    def captions(self, table: pa.Table) -> list[list[str]]:
        """Captions of the rows of a table, at least one per row."""
        return [[each] if isinstance(each, str) else each for each in table[self.caption_column].to_pylist()]

    def first_captions(self, count: int) -> list[str]:
        """First caption of each of the first rows, up to `count`."""
        table = self.read(self.groups[0], self.caption_columns).slice(0, count)
        return [captions[0] for captions in self.captions(table)]

    def _only(self, column: str) -> int:
        least, most, _ = self._statistics(column)
        if least != most:
            raise ValueError(
                f"All rows of the token set must be of one size, but it has {column}s from {least} to {most}. "
                "Tokenize crops: `svqvae tokenize --crops centre --resolution 256`."
            )
        return int(least)

    def _num_classes(self, column: str) -> int:
        feature = self.features.get(column)
        has_names = isinstance(feature, datasets.ClassLabel)
        if has_names or (isinstance(feature, datasets.Value) and "int" in feature.dtype):
            least, most, empty = self._statistics(column)
            if empty:
                raise ValueError(
                    f"`--label_column` must hold a label in each row, but {column!r} has empty rows. Remove them."
                )
            if least >= 0:
                return feature.num_classes if has_names else int(most) + 1
        raise ValueError(
            f"`--label_column` must hold classes, or integers of at least 0, but {column!r} holds {feature}. The "
            f"columns are {', '.join(self.features)}."
        )

    def _check_captions(self, column: str) -> None:
        feature = self.features.get(column)
        inner = getattr(feature, "feature", feature)
        if not isinstance(inner, datasets.Value) or inner.dtype not in ("string", "large_string"):
            raise ValueError(
                f"`--caption_column` must hold texts or lists of texts, but {column!r} holds {feature}. The columns "
                f"are {', '.join(self.features)}."
            )
        least, _, missing = self._statistics(column)
        if missing or least == "":
            raise ValueError(
                f"`--caption_column` must hold a caption in each row, but {column!r} has empty rows. Remove them."
            )

    def _statistics(self, column: str) -> tuple[Any, Any, int]:
        """Minimum, maximum and number of missing values of a column, from the footers of the files."""
        least, most, empty = [], [], 0
        for metadata in self.metadata:
            paths = [metadata.schema.column(number).path for number in range(metadata.num_columns)]
            index = [path.removesuffix(LIST_SUFFIX) for path in paths].index(column)
            for group in range(metadata.num_row_groups):
                found = metadata.row_group(group).column(index).statistics
                if found is None or not found.has_null_count:
                    raise ValueError(
                        f"the Parquet files of the token set must have statistics of {column!r}, but lack them. Write "
                        "them again, with statistics."
                    )
                empty += found.null_count
                if found.has_min_max:
                    least.append(found.min)
                    most.append(found.max)
        return min(least, default=0), max(most, default=0), empty


class SequenceLoader:
    """Batches of one process, which reads no more than its share of each epoch.

    In each epoch the row groups come in a new random order, and are cut into equal shares, one per process. Each row
    is in one share. A share is cut into blocks of row groups, and the rows of a block are in random order. A share of
    up to `BLOCK_ROWS` rows is one block. The next block is read ahead. A batch may span two epochs, so no row is
    dropped.

    Args:
        source ([`TokenSource`]): The sequences.
        batch_size (`int`): Sequences per batch of one process.
        num_batches (`int`): Batches in all, including those before the loaded state.
        seed (`int`): Seed of the order.
        process_index (`int`): Index of this process.
        num_processes (`int`): Number of processes.

    Raises:
        ValueError: If there are fewer rows than processes.
    """

    def __init__(
        self, source: TokenSource, batch_size: int, num_batches: int, seed: int, process_index: int, num_processes: int
    ):
        if source.num_rows < num_processes:
            raise ValueError(
                f"The token set must have a row for each of the {num_processes} processes, but has {source.num_rows}. "
                "Start fewer processes."
            )
        self.source = source
        self.batch_size = batch_size
        self.num_batches = num_batches
        self.seed = seed
        self.share = range(
            process_index * source.num_rows // num_processes, (process_index + 1) * source.num_rows // num_processes
        )
        self.batch = 0
        self.thread = ThreadPoolExecutor(1)
        self._blocks_of = lru_cache(maxsize=2)(self._make_blocks)
        self._block_of = lru_cache(maxsize=2)(self._begin_block)

    def __iter__(self) -> Iterator[TokenBatch]:
        """Yields the remaining batches."""
        while self.batch < self.num_batches:
            first = self.batch * self.batch_size
            self.batch += 1
            yield self.source.batch(self._rows(first, first + self.batch_size))

    @property
    def contents(self) -> str:
        """Size of the token set, for the log."""
        return f"{self.source.num_rows:,} token sequences"

    def state_dict(self) -> dict[str, Any]:
        """Number of batches yielded, and number of rows."""
        return {"batch": self.batch, "num_rows": self.source.num_rows}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Sets the batch at which iteration continues.

        Raises:
            ValueError: If the saved state is of a set with another number of rows.
        """
        num_rows = self.source.num_rows
        if state["num_rows"] != num_rows:
            raise ValueError(
                f"The token set must have {state['num_rows']} rows as when the state was saved, but has {num_rows}."
            )
        self.batch = state["batch"]

    def _rows(self, start: int, stop: int) -> pa.Table:
        """Rows at some positions of the share of this process, epoch after epoch."""
        pieces = []
        while start < stop:
            epoch, position = divmod(start, len(self.share))
            blocks = self._blocks_of(epoch)
            number = next(index for index, block in enumerate(blocks) if position < block.end)
            first, end, _ = blocks[number]
            table = self._block_of(epoch, number).result()
            if start + end - position < self.num_batches * self.batch_size:  # more blocks will be needed
                self._block_of(*((epoch, number + 1) if number + 1 < len(blocks) else (epoch + 1, 0)))
            piece = table.slice(position - first, min(stop - start, end - position))
            pieces.append(piece)
            start += piece.num_rows
        return pa.concat_tables(pieces)

    def _make_blocks(self, epoch: int) -> list[Block]:
        """Blocks of the share of this process in an epoch."""
        blocks: list[Block] = []
        slices: list[RowSlice] = []
        first = end = passed = 0
        for group in row_order(len(self.source.groups), self.seed, epoch).tolist():
            rows = self.source.groups[group].rows
            start, stop = (min(max(side - passed, 0), rows) for side in (self.share.start, self.share.stop))
            passed += rows
            if start == stop:
                continue
            if slices and end + stop - start - first > BLOCK_ROWS:
                blocks.append(Block(first, end, slices))
                slices, first = [], end
            slices.append(RowSlice(group, start, stop))
            end += stop - start
        return [*blocks, Block(first, end, slices)]

    def _begin_block(self, epoch: int, number: int) -> Future[pa.Table]:
        return self.thread.submit(self._read_block, epoch, self._blocks_of(epoch)[number].slices)

    def _read_block(self, epoch: int, slices: Sequence[RowSlice]) -> pa.Table:
        """Rows of some slices of row groups in random order."""
        table = pa.concat_tables(
            [self.source.read(self.source.groups[group]).slice(start, stop - start) for group, start, stop in slices]
        )
        order = np.random.default_rng((ORDER, self.seed, epoch, slices[0].group)).permutation(table.num_rows)
        return table.combine_chunks().take(order)


def _find_files(data: str) -> list[str]:
    """Parquet files of a token set in its order."""
    if "://" not in data:
        return datasets.load_dataset_builder(data).config.data_files["train"]
    names = sorted(Folder(data).all_files(DATA))
    return [f"{data.rstrip('/')}/{name}" for name in names if name.endswith(".parquet")]


def _read_metadata(path: str) -> pq.FileMetaData:
    with explained(path, "read"):
        return _open_parquet(path).metadata


@lru_cache(maxsize=8)
def _open_parquet(path: str) -> pq.ParquetFile:
    return pq.ParquetFile(fsspec.open(path).open())

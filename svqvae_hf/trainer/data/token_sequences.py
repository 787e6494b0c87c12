"""Batches of the ids of a token set, with their classes or captions."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from svqvae_hf.models.resizing import grid_shape
from svqvae_hf.token_sets.settings import read_settings
from svqvae_hf.token_sets.shards import load_rows
from svqvae_hf.trainer.data.sample_order import OrderedLoader, Share, row_at, spread


class TokenBatch(NamedTuple):
    """Ids of some images.

    Args:
        ids (`list` of `torch.Tensor` of shape `(batch, h, w)`): Ids, from the coarsest scale to the finest, int64.
        labels (`torch.Tensor` of shape `(batch,)`): Classes, or 0 for the class of all captions; int64.
        captions (`list[list[str]]`, *optional*): Captions of each row, at least one; None without a column of them.
    """

    ids: list[torch.Tensor]
    labels: torch.Tensor
    captions: list[list[str]] | None

    def draw_captions(self, draws: torch.Tensor) -> list[str]:
        """One caption of each row, the one at the row's number in [0, 1) of `draws`."""
        rows = zip(draws.tolist(), self.captions or [], strict=True)
        return [captions[int(draw * len(captions))] for draw, captions in rows]


class TokenSource:
    """A token set whose rows are of one size. `datasets` keeps a copy of it in its cache.

    Args:
        data (`str`): Folder of the set, its URL for `fsspec`, or its Hub id.
        label_column (`str`, *optional*): Column of the labels; without it, images have no class.
        caption_column (`str`, *optional*): Column of the captions, a text or a list of texts per row. With it, there
            is one class, "with its caption".

    Attributes:
        grids (`list` of `(rows, columns)`): Shapes of the ids, from the coarsest scale to the finest.
        num_classes (`int`): Number of classes. The label `num_classes` means no class.

    Raises:
        OSError: If there is no such set, or it cannot be reached.
        ValueError: If its rows have several sizes or each a scale of its own, its labels are not classes, or its
            captions are not texts or are missing.
    """

    def __init__(self, data: str, label_column: str | None, caption_column: str | None = None):
        self.settings = read_settings(data)
        if self.settings.context_model is not None:
            raise ValueError(
                "The rows of the token set must not be compressed, because training reads them many times. Make it "
                "again with `svqvae tokenize` without --compress."
            )
        self.rows = load_rows(data)
        order = np.argsort(self.settings.scales)  # columns need not go from coarse to fine
        self.id_columns = [f"ids_{index}" for index in order]
        self.label_column, self.caption_column = label_column, caption_column
        feature = self.rows.features.get(label_column)
        self.class_names = feature.names if isinstance(feature, datasets.ClassLabel) else None
        self.num_classes = 0 if label_column is None else self._num_classes(label_column)
        if caption_column is not None:
            check_captions(self.rows, caption_column)
            self.num_classes = 1
        columns = [*self.id_columns, *(each for each in (label_column, caption_column) if each is not None)]
        self.tables = self.rows.select_columns(columns).with_format("arrow")
        height, width = self._only("height"), self._only("width")
        scales = [self.settings.scales[index] for index in order]
        self.grids = [grid_shape(height, width, self.settings.f, scale) for scale in scales]

    def batch(self, rows: Sequence[int]) -> TokenBatch:
        """Ids of some rows."""
        table = self.tables[list(rows)]
        ids = [
            torch.from_numpy(np.stack(table[column].to_numpy()).astype(np.int64)).unflatten(1, grid)
            for column, grid in zip(self.id_columns, self.grids, strict=True)
        ]
        captions, labels = None, torch.full((len(rows),), self.num_classes)
        if self.caption_column is not None:
            captions, labels = self._captions(table), torch.zeros_like(labels)
        elif self.label_column is not None:
            labels = torch.from_numpy(table[self.label_column].to_numpy().astype(np.int64))
        return TokenBatch(ids, labels, captions)

    def captions(self, count: int | None = None) -> list[list[str]]:
        """Captions of each of the first rows, up to `count`, by default of all."""
        return self._captions(self.tables.select_columns([self.caption_column])[:count])

    def shared_key(self, other: "TokenSource") -> str | None:
        """Key of an image that both sets hold with the same ids at the largest scale, or None."""
        keys, other_keys = (each.rows.data.column("key") for each in (self, other))
        rows = np.flatnonzero(pc.is_in(keys, value_set=pc.unique(other_keys)).to_numpy())
        if not len(rows):
            return None
        column = self.id_columns[-1]
        known = {(row["key"], tuple(row[column])) for row in other.rows.select_columns(["key", column])}
        for row in self.rows.select_columns(["key", column]).select(rows):
            if (row["key"], tuple(row[column])) in known:
                return row["key"]
        return None

    def _captions(self, table: pa.Table) -> list[list[str]]:
        return [[each] if isinstance(each, str) else each for each in table[self.caption_column].to_pylist()]

    def _only(self, column: str) -> int:
        least, most = pc.min_max(self.rows.data.column(column)).as_py().values()
        if least != most:
            raise ValueError(
                f"All rows of the token set must be of one size, but it has {column}s from {least} to {most}. "
                "Tokenize crops: `svqvae tokenize --crops centre --resolution 256`."
            )
        return int(least)

    def _num_classes(self, column: str) -> int:
        feature = self.rows.features.get(column)
        has_names = isinstance(feature, datasets.ClassLabel)
        if has_names or (isinstance(feature, datasets.Value) and "int" in feature.dtype):
            labels = self.rows.data.column(column)
            least, most = pc.min_max(labels).as_py().values()
            if least >= 0 and not labels.null_count:
                return feature.num_classes if has_names else most + 1
        raise ValueError(
            f"`--label_column` must hold a class, or an integer of at least 0, in each row, but {column!r} holds "
            f"{feature}, or has empty rows. The columns are {', '.join(self.rows.features)}."
        )


def check_captions(rows: datasets.Dataset, column: str) -> None:
    """Raises unless a column holds a caption, or a list of them, in each row."""
    feature = rows.features.get(column)
    inner = getattr(feature, "feature", feature)
    if not isinstance(inner, datasets.Value) or inner.dtype not in ("string", "large_string"):
        raise ValueError(
            f"`--caption_column` must hold texts or lists of texts, but {column!r} holds {feature}. The columns "
            f"are {', '.join(rows.features)}."
        )
    captions = rows.data.column(column)
    texts = captions if inner is feature else pc.list_flatten(captions)
    lengths = [pc.utf8_length(texts)] + ([] if inner is feature else [pc.list_value_length(captions)])
    if captions.null_count or texts.null_count or any(pc.min(each).as_py() == 0 for each in lengths):
        raise ValueError(f"`--caption_column` must hold captions, but {column!r} has empty rows. Remove them.")


class SequenceLoader(OrderedLoader):
    """Batches of ids. In each epoch, each row is seen once, in a new random order.

    A step may span two epochs, so no row is dropped.

    Args:
        source ([`TokenSource`]): The rows.
        share ([`Share`]): Share of this process in a step.
        num_steps (`int`): Steps in all, including those before the loaded state.
        seed (`int`): Seed of the order.
    """

    def __init__(self, source: TokenSource, share: Share, num_steps: int, seed: int):
        self.source, self.num_steps, self.seed, self.num_rows = source, num_steps, seed, len(source.rows)
        settings = {"seed": seed, "number of rows of ids": self.num_rows}
        super().__init__(share, f"{self.num_rows:,} rows of ids", settings)

    def samples(self) -> Iterator[bytes]:
        """Yields some rows as bytes."""
        yield str(self.source.rows[spread(self.num_rows)]).encode()

    def __iter__(self) -> Iterator[TokenBatch]:
        """Yields the remaining batches."""
        while self.batch < self.num_steps * self.share.batches:
            first = self.batch // self.share.batches * self.share.step_size
            rows = [row_at(first + number, self.num_rows, self.seed) for number in self.share.numbers(self.batch)]
            self.batch += 1
            yield self.source.batch(rows)

"""Batches of the ids of a token set, with their classes or captions."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from svqvae_hf.models.resizing import grid_shape
from svqvae_hf.token_sets.classes import list_classes
from svqvae_hf.token_sets.manifest import TokenSet
from svqvae_hf.trainer.data.sample_order import OrderedLoader, Share, row_at

LABEL_COLUMNS = ("label", "cls")  # usual names: of folders and data sets, and of tar files
CAPTION_COLUMNS = ("caption", "text", "txt")  # the last one in tar files


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
        drawn = []
        for draw, captions in zip(draws.tolist(), self.captions or [], strict=True):
            drawn.append(captions[int(draw * len(captions))])
        return drawn


class TokenSource:
    """A token set whose rows are of one size. `datasets` keeps a copy of it in its cache.

    Args:
        data (`str`): Folder of the set, its URL for `fsspec`, or its Hub id.
        label_column (`str`, *optional*): Column of the labels; without it, images have no class.
        caption_column (`str`, *optional*): Column of the captions, a text or a list of texts per row. With it, there
            is one class, "with its caption".

    Attributes:
        token_set ([`~svqvae_hf.token_sets.manifest.TokenSet`]): The set.
        grids (`list` of `(rows, columns)`): Shapes of the ids, from the coarsest scale to the finest.
        class_names (`list[str]`, *optional*): Names of the classes, if the labels have names.
        num_classes (`int`): Number of classes. The label `num_classes` means no class.

    Raises:
        OSError: If there is no such set, or it cannot be reached.
        ValueError: If a file of it is missing, cut or foreign, its rows have several sizes or each a scale of its own,
            its labels are not classes, or its captions are not texts or are missing.
    """

    def __init__(self, data: str, label_column: str | None, caption_column: str | None = None):
        token_set = TokenSet(data)
        self.token_set = token_set
        self.settings = token_set.settings
        self.digest = token_set.digest
        if self.settings.context_model is not None:
            raise ValueError(
                "The rows of the token set must not be compressed, because training reads them many times. Make it "
                "again with `svqvae tokenize` without --compress."
            )
        self.rows = token_set.load()
        self.label_column = label_column
        self.caption_column = caption_column
        self.class_names: list[str] | None = None
        self.num_classes = 0
        self.new_labels: np.ndarray | None = None  # by the label in the set, after `take_classes`
        if label_column is not None:
            self.class_names = self._names_of_classes(label_column)
            self.num_classes = self._count_classes(label_column)
        if caption_column is not None:
            check_captions(self.rows, caption_column)
            self.num_classes = 1  # the class "with its caption"
        # The scales (1, 0.25, 0.5) have the numbers 0, 1 and 2. From coarse to fine, their numbers are 1, 2 and 0.
        scale_numbers_from_coarse = np.argsort(self.settings.scales).tolist()
        self.id_columns = [f"ids_{scale_number}" for scale_number in scale_numbers_from_coarse]
        self.grids = self._grids_of_scales(scale_numbers_from_coarse)
        columns = list(self.id_columns)
        for column in (label_column, caption_column):
            if column is not None:
                columns.append(column)
        self.tables = self.rows.select_columns(columns).with_format("arrow")

    def _grids_of_scales(self, scale_numbers: Sequence[int]) -> list[tuple[int, int]]:
        """Shapes `(rows, columns)` of the ids of some scales. Raises ValueError if images have several sizes."""
        height = self._only_value("height")
        width = self._only_value("width")
        grids = []
        for scale_number in scale_numbers:
            scale = self.settings.scales[scale_number]
            grids.append(grid_shape(height, width, self.settings.f, scale))
        return grids

    def batch(self, rows: Sequence[int]) -> TokenBatch:
        """Ids of some rows."""
        table = self.tables[list(rows)]
        ids = []  # one tensor per scale
        for column, grid in zip(self.id_columns, self.grids, strict=True):
            flat_ids = np.stack(table[column].to_numpy()).astype(np.int64)  # (B, h * w)
            ids.append(torch.from_numpy(flat_ids).unflatten(1, grid))  # (B, h, w)
        if self.caption_column is not None:
            class_of_captions = torch.zeros(len(rows), dtype=torch.int64)
            return TokenBatch(ids, class_of_captions, self._captions(table))
        if self.label_column is None:
            no_class = torch.full((len(rows),), self.num_classes)
            return TokenBatch(ids, no_class, captions=None)
        labels = table[self.label_column].to_numpy().astype(np.int64)
        if self.new_labels is not None:
            labels = self.new_labels[labels]
        return TokenBatch(ids, torch.from_numpy(labels), captions=None)

    def take_classes(self, names: Sequence[str]) -> None:
        """Takes over the classes of another set, which may have more. Labels are renumbered by the names.

        Raises:
            ValueError: The other set lacks a class of this one.
        """
        names_of_set = self.class_names or []
        number_of_name = {name: number for number, name in enumerate(names)}
        foreign_names = [name for name in names_of_set if name not in number_of_name]
        if foreign_names:
            raise ValueError(
                "`--validation_token_set` must have only classes of the token set, but also has "
                f"{list_classes(foreign_names)}. Add images of them to the token set, or pass `--label_column none`."
            )
        self.new_labels = np.array([number_of_name[name] for name in names_of_set])
        self.class_names = list(names)
        self.num_classes = len(names)

    def captions(self, count: int | None = None) -> list[list[str]]:
        """Captions of each of the first rows, up to `count`, by default of all."""
        column = self.tables.select_columns([self.caption_column])
        return self._captions(column[:count])

    def _captions(self, table: pa.Table) -> list[list[str]]:
        """Captions of each row of a table, as lists, also where a row has only one."""
        captions = []
        for value in table[self.caption_column].to_pylist():
            captions.append([value] if isinstance(value, str) else value)
        return captions

    def _only_value(self, column: str) -> int:
        """The value that a column has in all rows. Raises ValueError if it has several."""
        values = self.rows.data.column(column)
        least = pc.min(values).as_py()
        most = pc.max(values).as_py()
        if least != most:
            raise ValueError(
                f"All rows of the token set must be of one size, but it has {column}s from {least} to {most}. "
                "Tokenize crops: `svqvae tokenize --crops centre --resolution 256`."
            )
        return int(least)

    def _names_of_classes(self, column: str) -> list[str] | None:
        """Names of the classes of a column, if its type has names."""
        feature = self.rows.features.get(column)
        if isinstance(feature, datasets.ClassLabel):
            return feature.names
        return None

    def _count_classes(self, column: str) -> int:
        """Number of classes of a column. If it has integers without names, they are the classes 0 to the largest."""
        check_column(self.rows, "--label_column", column, LABEL_COLUMNS)
        feature = self.rows.features[column]
        if not holds_classes(self.rows, column):
            raise ValueError(
                f"`--label_column` must hold a class, or an integer of at least 0, in each row, but {column!r} holds "
                f"{feature}, or has empty rows. The columns are {', '.join(self.rows.features)}."
            )
        if isinstance(feature, datasets.ClassLabel):
            return feature.num_classes
        largest_class = pc.max(self.rows.data.column(column)).as_py()
        return largest_class + 1


def check_column(rows: datasets.Dataset, option: str, column: str, usual_names: Sequence[str]) -> None:
    """Raises ValueError if there is no such column.

    Args:
        rows (`datasets.Dataset`): Rows of a token set.
        option (`str`): Option that names the column, for the error.
        column (`str`): Name of the column.
        usual_names (`Sequence[str]`): Usual names of such a column. The error proposes those that are there.
    """
    if column in rows.features:
        return
    proposals = []
    for name in usual_names:
        if name in rows.features:
            proposals.append(f"`{option} {name}`")
    advice = ""
    if proposals:
        advice = f" Pass {' or '.join(proposals)}."
    elif option == "--label_column":
        advice = " Without classes, pass `--label_column none`."
    raise ValueError(
        f"`{option}` must be a column of the token set, but there is no column {column!r}.{advice} "
        f"The columns are {', '.join(rows.features)}."
    )


def holds_classes(rows: datasets.Dataset, column: str) -> bool:
    """Whether each row has a class, or an integer of at least 0, in a column."""
    feature = rows.features.get(column)
    has_names = isinstance(feature, datasets.ClassLabel)
    has_integers = isinstance(feature, datasets.Value) and "int" in feature.dtype
    if not has_names and not has_integers:
        return False
    labels = rows.data.column(column)
    return labels.null_count == 0 and pc.min(labels).as_py() >= 0


def check_captions(rows: datasets.Dataset, column: str) -> None:
    """Raises ValueError unless a column holds a caption, or a list of them, in each row."""
    check_column(rows, "--caption_column", column, CAPTION_COLUMNS)
    feature = rows.features[column]
    holds_lists = hasattr(feature, "feature")  # types of lists have their items' type as this attribute
    text_feature = feature.feature if holds_lists else feature
    holds_texts = isinstance(text_feature, datasets.Value) and text_feature.dtype in ("string", "large_string")
    if not holds_texts:
        raise ValueError(
            f"`--caption_column` must hold texts or lists of texts, but {column!r} holds {feature}. The columns "
            f"are {', '.join(rows.features)}."
        )
    captions = rows.data.column(column)  # a text, or a list of texts, per row
    has_missing_rows = captions.null_count > 0
    has_empty_lists = False
    texts = captions
    if holds_lists:
        has_empty_lists = pc.min(pc.list_value_length(captions)).as_py() == 0
        texts = pc.list_flatten(captions)
    has_missing_texts = texts.null_count > 0
    has_empty_texts = pc.min(pc.utf8_length(texts)).as_py() == 0
    if has_missing_rows or has_empty_lists or has_missing_texts or has_empty_texts:
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
        self.source = source
        self.num_steps = num_steps
        self.seed = seed
        self.num_rows = len(source.rows)
        settings = {"seed": seed, "number of rows of ids": self.num_rows}
        super().__init__(share, f"{self.num_rows:,} rows of ids", settings)

    def identity(self) -> str:
        """Digest of the token set."""
        return self.source.digest

    def __iter__(self) -> Iterator[TokenBatch]:
        """Yields the remaining batches."""
        batches_per_step = self.share.batches
        while self.batch < self.num_steps * batches_per_step:
            rows = self._rows_of_batch(self.batch)
            self.batch += 1
            yield self.source.batch(rows)

    def _rows_of_batch(self, batch: int) -> list[int]:
        """Numbers of the rows that this process has in a batch.

        The rows of all epochs stand in one random order, and each sample takes one position in it. With 4 samples per
        step, step 0 has the positions 0 to 3, and step 1 has the positions 4 to 7.
        """
        step = batch // self.share.batches
        position_of_step = step * self.share.step_size
        rows = []
        for number_in_step in self.share.numbers(batch):
            row = row_at(position_of_step + number_in_step, self.num_rows, self.seed)
            rows.append(row)
        return rows

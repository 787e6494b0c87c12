"""Batches of the token sequences of a token set."""

import os
from collections.abc import Iterator, Mapping
from typing import Any

import datasets
import numpy as np
import torch

from svqvae_hf.pipelines.sequences import SequenceLayout
from svqvae_hf.token_sets.settings import read_settings
from svqvae_hf.trainer.data.readers import row_order


class TokenSource:
    """A token set whose rows are of one size, as token sequences.

    Args:
        data (`str`): Folder of the set, or its Hub id.
        label_column (`str`, *optional*): Column of the labels; without it, images have no class.

    Raises:
        OSError: If there is no such set.
        ValueError: If its rows have several sizes, or its labels are not classes.
    """

    def __init__(self, data: str, label_column: str | None):
        self.settings = read_settings(data)
        self.rows = datasets.load_dataset(os.fspath(data), split="train").with_format("numpy")
        height, width = (self._only(name) for name in ("height", "width"))
        order = np.argsort(self.settings.scales)  # sequences go from coarse to fine, columns need not
        self.id_columns = [f"ids_{index}" for index in order]
        self.label_column = label_column
        feature = self.rows.features.get(label_column)
        self.class_names = feature.names if isinstance(feature, datasets.ClassLabel) else None
        self.layout = SequenceLayout(
            codebook_size=self.settings.codebook_size,
            f=self.settings.f,
            height=height,
            width=width,
            scales=tuple(self.settings.scales[index] for index in order),
            num_classes=0 if label_column is None else self._num_classes(label_column),
            scale_from=self.settings.scale_from,
        )

    def sequences(self, indices: np.ndarray) -> torch.Tensor:
        """Sequences of some rows, `(rows, length)`, int64."""
        rows = self.rows[indices]
        ids = [
            torch.from_numpy(rows[column].astype(np.int64)).unflatten(1, grid)
            for column, grid in zip(self.id_columns, self.layout.grids, strict=True)
        ]
        labels = None if self.label_column is None else torch.from_numpy(rows[self.label_column])
        return self.layout.encode(ids, labels)

    def _only(self, column: str) -> int:
        values = self.rows.unique(column)
        if len(values) != 1:
            raise ValueError(
                f"All rows of the token set must be of one size, but it has {len(values)} of `{column}`. Tokenize "
                "crops: `svqvae tokenize --crops centre --resolution 256`."
            )
        return int(values[0])

    def _num_classes(self, column: str) -> int:
        feature = self.rows.features.get(column)
        has_names = isinstance(feature, datasets.ClassLabel)
        if has_names or (isinstance(feature, datasets.Value) and "int" in feature.dtype):
            labels = self.rows.unique(column)
            if None in labels:
                raise ValueError(
                    f"`--label_column` must hold a label in each row, but {column!r} has empty rows. Remove them."
                )
            if min(labels) >= 0:
                return feature.num_classes if has_names else int(max(labels)) + 1
        raise ValueError(
            f"`--label_column` must hold classes, or integers of at least 0, but {column!r} holds {feature}. The "
            f"columns are {', '.join(self.rows.features)}."
        )


class SequenceLoader:
    """Batches of one process. All processes follow one order: epochs of all rows, each in a new random order.

    A batch may span two epochs, so no row is dropped.

    Args:
        source ([`TokenSource`]): The sequences.
        batch_size (`int`): Sequences per batch of one process.
        num_batches (`int`): Batches in all, including those before the loaded state.
        seed (`int`): Seed of the order.
        process_index (`int`): Index of this process.
        num_processes (`int`): Number of processes.
    """

    def __init__(
        self, source: TokenSource, batch_size: int, num_batches: int, seed: int, process_index: int, num_processes: int
    ):
        self.source = source
        self.batch_size = batch_size
        self.num_batches = num_batches
        self.seed = seed
        self.process_index = process_index
        self.num_processes = num_processes
        self.batch = 0

    def __iter__(self) -> Iterator[torch.Tensor]:
        """Yields the remaining batches: sequences `(batch_size, length)`, int64."""
        while self.batch < self.num_batches:
            first = (self.batch * self.num_processes + self.process_index) * self.batch_size
            self.batch += 1
            yield self.source.sequences(self._order(first, first + self.batch_size))

    @property
    def contents(self) -> str:
        """Size of the token set, for the log."""
        return f"{len(self.source.rows):,} token sequences"

    def state_dict(self) -> dict[str, Any]:
        """Number of batches yielded, and number of rows."""
        return {"batch": self.batch, "num_rows": len(self.source.rows)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Sets the batch at which iteration continues.

        Raises:
            ValueError: If the saved state is of a set with another number of rows.
        """
        num_rows = len(self.source.rows)
        if state["num_rows"] != num_rows:
            raise ValueError(
                f"The token set must have {state['num_rows']} rows as when the state was saved, but has {num_rows}."
            )
        self.batch = state["batch"]

    def _order(self, start: int, stop: int) -> np.ndarray:
        """Rows at some positions of the order."""
        count = len(self.source.rows)
        epochs = range(start // count, -(-stop // count))
        order = np.concatenate([row_order(count, self.seed, epoch) for epoch in epochs])
        return order[start - epochs.start * count : stop - epochs.start * count]

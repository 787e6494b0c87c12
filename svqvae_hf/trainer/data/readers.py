"""Readers of an image set: which image of a set or a stream comes next in one process."""

import itertools
from collections import deque
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import datasets
import numpy as np

READ_AHEAD = 64  # minimum number of a stream's encoded images in memory, to replace unreadable ones
ORDER, BLOCK = 2, 3  # first words of the seeds of random orders; crops.py and crop_loader.py use 0 and 1


class Encoded(NamedTuple):
    """An image as it is stored; `content` is None if `name` is a local or remote file that holds it."""

    name: str
    content: bytes | None
    label: Any


Item = int | Encoded  # a row of a map-style set, or an image of a stream


def encoded(row: Mapping[str, Any], name: str) -> Encoded:
    """Converts a row of a set: an image, which may be empty, and perhaps a label.

    Args:
        row (`Mapping[str, Any]`): Row of a set from [`load_images`].
        name (`str`): Name of the image if it has no path.
    """
    value, *labels = row.values()
    path, content = (value["path"], value["bytes"]) if value else (None, None)
    return Encoded(path or name, b"" if path is None and content is None else content, *(labels or [None]))


@lru_cache(maxsize=2)
def row_order(num_rows: int, seed: int, epoch: int) -> np.ndarray:
    """Random order of the rows in an epoch."""
    return np.random.default_rng((ORDER, seed, epoch)).permutation(num_rows)


class RowReader:
    """Rows of a map-style set for one process: every `num_processes`-th row in the order of all epochs."""

    def __init__(
        self, num_rows: int, seed: int, process_index: int, num_processes: int, state: Mapping[str, int] | None
    ):
        self.num_rows = num_rows
        self.seed = seed
        self.num_processes = num_processes
        self.position = state["position"] if state else process_index

    def next(self) -> int:
        """Returns the next row."""
        row = self._row(self.position)
        self.position += self.num_processes
        return row

    def lookahead(self) -> Iterator[int]:
        """Yields the rows that come next, without end and without advancing."""
        return map(self._row, itertools.count(self.position, self.num_processes))

    def state(self) -> dict[str, int]:
        """State with which a new reader continues from here."""
        return {"position": self.position}

    def _row(self, position: int) -> int:
        epoch, offset = divmod(position, self.num_rows)
        return int(row_order(self.num_rows, self.seed, epoch)[offset])


class Streamed(NamedTuple):
    """An image of a stream. `start` is the reader's state at the image if a block begins with it, else None."""

    image: Encoded
    epoch: int
    start: dict[str, Any] | None


class StreamReader:
    """Images of a stream for one process, shuffled in blocks that end with the epoch.

    Each image that is taken makes the reader read one more, so that reading is spread evenly over the batches.
    """

    def __init__(
        self, images: datasets.IterableDataset, seed: int, shuffle_buffer: int, state: Mapping[str, Any] | None
    ):
        self.seed = seed
        self.shuffle_buffer = shuffle_buffer
        self.source = self._read(images, **(state["start"] if state else {"epoch": 0, "position": 0, "source": None}))
        self.ahead = deque(itertools.islice(self.source, max(shuffle_buffer, READ_AHEAD)))
        self.block: list[Encoded] = []
        self.start = self.ahead[0].start
        self.taken = 0
        for _ in range(state["taken"] if state else 0):
            self.next()

    def next(self) -> Encoded:
        """Returns the next image."""
        if not self.block:
            self._begin_block()
        self.ahead.append(next(self.source))
        self.taken += 1
        return self.block.pop()

    def lookahead(self) -> Iterator[Encoded]:
        """Yields the images in memory that come next, in an endless cycle and without advancing."""
        return itertools.cycle([*reversed(self.block), *(each.image for each in self.ahead)])

    def state(self) -> dict[str, Any]:
        """State with which a new reader continues from here."""
        return {"start": self.start, "taken": self.taken}

    def _begin_block(self) -> None:
        self.start, self.taken = self.ahead[0].start, 0
        epoch = self.ahead[0].epoch
        while len(self.block) < self.shuffle_buffer and self.ahead and self.ahead[0].epoch == epoch:
            self.block.append(self.ahead.popleft().image)
        position = self.start["position"] if self.start else 0  # blocks begin where `start` is set
        np.random.default_rng((BLOCK, self.seed, epoch, position)).shuffle(self.block)

    def _read(
        self, images: datasets.IterableDataset, epoch: int, position: int, source: dict[str, Any] | None
    ) -> Iterator[Streamed]:
        """Yields the images of all epochs from a position on."""
        while True:
            # The epoch seeds the order of shards, equal in all processes; at epoch 0 datasets would not shuffle.
            images.set_epoch(int(np.random.default_rng((ORDER, self.seed, epoch)).integers(1, 2**62)))
            images.load_state_dict(source)
            rows = iter(images)
            while True:
                start = None
                if position % self.shuffle_buffer == 0:
                    start = {"epoch": epoch, "position": position, "source": images.state_dict() if position else None}
                row = next(rows, None)
                if row is None:
                    break
                yield Streamed(encoded(row, f"image {position} of epoch {epoch}"), epoch, start)
                position += 1
            if position == 0:
                raise ValueError(
                    "Each process must get images of the stream, but one got none. Start fewer processes."
                )
            epoch, position, source = epoch + 1, 0, None

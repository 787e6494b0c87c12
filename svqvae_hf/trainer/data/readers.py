"""Order in which images of a set or a stream come next in one process."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import InitVar, dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from svqvae_hf.data.image_rows import ImagePart, ImageRow

OPEN_SHARDS = 8  # shards that are read at the same time
ROUND = 4  # images that are read of each open shard in turn
FIRST_BLOCK = 16  # images that are shuffled at first; each block is twice as large as the one before
ORDER, BLOCK = 2, 3  # first words of the seeds of random orders; crops.py and crop_loader.py use 0, 1 and 4

Item = int | ImageRow  # number of a row in a set with random access, or an image of a stream


@lru_cache(maxsize=4)
def row_order(num_rows: int, *seed: int) -> np.ndarray:
    """Random order of the rows of a set in an epoch, which is the last word of the seed."""
    return np.random.default_rng((ORDER, *seed)).permutation(num_rows)


@dataclass
class RowReader:
    """Rows of a map-style set for one process: every `num_processes`-th row in the order of all epochs."""

    num_rows: int
    seed: int
    position: int
    num_processes: int

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


class OpenShard:
    """A shard that is being read.

    Args:
        number (`int`): Number of the shard.
        part (`ImagePart`): The shard.
        taken (`int`): Images of it that were read before.
    """

    def __init__(self, number: int, part: ImagePart, taken: int = 0):
        self.number = number
        self.taken = taken
        self.rows = part.read(taken)

    def read(self) -> list[ImageRow]:
        """Reads the images of a round; fewer at the end of the shard."""
        rows = list(itertools.islice(self.rows, ROUND))
        self.taken += len(rows)
        return rows


@dataclass
class StreamReader:
    """Images of a stream for one process, shuffled in blocks that end with the epoch.

    The shards come in a random order, and some are read at the same time. With several processes, each reads its own
    shards if their number is a multiple of the number of processes. Otherwise each reads all and skips the images of
    the others. Half-way through a block, a thread begins to read the next one.

    Args:
        parts (`Sequence[ImagePart]`): Shards.
        seed (`int`): Seed of the order.
        shuffle_buffer (`int`): Images of a block. The first blocks are smaller, so that training starts at once.
        process_index (`int`): Index of this process.
        num_processes (`int`): Number of processes that share the stream.
        resumed (`Mapping`, *optional*): From [`~StreamReader.state`] of another reader.

    Raises:
        ValueError: If this process gets no image in a whole epoch.
    """

    parts: Sequence[ImagePart]
    seed: int
    shuffle_buffer: int
    process_index: int
    num_processes: int
    resumed: InitVar[Mapping[str, Any] | None]

    def __post_init__(self, resumed: Mapping[str, Any] | None) -> None:
        self.by_shard = len(self.parts) % self.num_processes == 0
        self.shards, self.block_thread = ThreadPoolExecutor(OPEN_SHARDS), ThreadPoolExecutor(1)
        self.coming: Future[tuple[dict[str, Any], list[ImageRow]]] | None = None
        self.block_start: dict[str, Any] = {}
        self.block: list[ImageRow] = []
        self.ring: list[OpenShard] = []
        self.taken, self.size = 0, min(FIRST_BLOCK, self.shuffle_buffer)
        self._begin_epoch(resumed["epoch"] if resumed else 0)
        if resumed:
            self.opened, self.position, self.size = resumed["opened"], resumed["position"], resumed["size"]
            self.ring = [OpenShard(number, self.parts[number], taken) for number, taken in resumed["ring"]]
            self._begin_block()
            self.taken = resumed["taken"]

    def next(self) -> ImageRow:
        """Returns the next image."""
        if self.taken == len(self.block):
            self._begin_block()
        self.taken += 1
        if self.coming is None and 2 * self.taken > len(self.block):
            self.coming = self.block_thread.submit(self._read_block)
        return self.block[self.taken - 1]

    def lookahead(self) -> Iterator[ImageRow]:
        """Yields the images of the block in an endless cycle, from the next one on and without advancing."""
        return itertools.cycle([*self.block[self.taken :], *self.block[: self.taken]])

    def state(self) -> dict[str, Any]:
        """State with which a new reader continues from here."""
        return {**self.block_start, "taken": self.taken}

    def _begin_block(self) -> None:
        self.block_start, self.block = self._read_block() if self.coming is None else self.coming.result()
        self.coming, self.taken = None, 0

    def _read_block(self) -> tuple[dict[str, Any], list[ImageRow]]:
        """Reads the next block. Returns where it starts, and its images in random order."""
        start: dict[str, Any] = {name: getattr(self, name) for name in ("epoch", "opened", "position", "size")}
        start["ring"] = [[shard.number, shard.taken] for shard in self.ring]
        block: list[ImageRow] = []
        while len(block) < self.size:
            rows = self._read_round()
            if rows is not None:
                block += rows
                continue
            if not block and self.epoch > start["epoch"]:
                raise ValueError(
                    "Each process must get images of the stream, but one got none. Start fewer processes."
                )
            self._begin_epoch(self.epoch + 1)
            if block:
                break
        self.size = min(2 * self.size, self.shuffle_buffer)
        np.random.default_rng((BLOCK, self.seed, start["epoch"], start["position"])).shuffle(block)
        return start, block

    def _begin_epoch(self, epoch: int) -> None:
        order = np.random.default_rng((ORDER, self.seed, epoch)).permutation(len(self.parts)).tolist()
        self.order = order[self.process_index :: self.num_processes] if self.by_shard else order
        self.epoch, self.opened, self.position = epoch, 0, 0
        self.ring = []

    def _read_round(self) -> list[ImageRow] | None:
        """Reads some images of each open shard, and returns those for this process, or None after the epoch."""
        opening = self.order[self.opened : self.opened + OPEN_SHARDS - len(self.ring)]
        self.opened += len(opening)
        self.ring += [OpenShard(number, self.parts[number]) for number in opening]
        if not self.ring:
            return None
        chunks = list(self.shards.map(OpenShard.read, self.ring))
        self.ring = [shard for shard, chunk in zip(self.ring, chunks, strict=True) if len(chunk) == ROUND]
        rows = [row for chunk in chunks for row in chunk]
        first, self.position = (self.process_index - self.position) % self.num_processes, self.position + len(rows)
        return rows if self.by_shard else rows[first :: self.num_processes]

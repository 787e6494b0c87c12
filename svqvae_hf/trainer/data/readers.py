"""Order in which images of a set or a stream come next in one process."""

import itertools
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from svqvae_hf.data.image_rows import ImagePart, ImageRow

OPEN_SHARDS = (
    8  # shards that are read at the same time, in turn; it decides the order, so it does not depend on workers
)
ROWS_AHEAD = 16  # images that are read ahead of their turn in each open shard
FIRST_BLOCK = 16  # images that are shuffled at first; each block is twice as large as the one before
SPARE = 64  # minimum number of a stream's images in memory, to replace unreadable ones
ORDER, BLOCK = 2, 3  # first words of the seeds of random orders; crops.py and crop_loader.py use 0 and 1

Item = int | ImageRow  # number of a row in a set with random access, or an image of a stream


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


class OpenShard:
    """A shard that a thread reads ahead of its turn.

    Args:
        number (`int`): Number of the shard.
        part (`ImagePart`): The shard.
        taken (`int`): Images of it that were taken before.
    """

    def __init__(self, number: int, part: ImagePart, taken: int):
        self.number = number
        self.taken = taken
        self.rows = part.read(taken)
        self.thread = ThreadPoolExecutor(1)
        self.ahead: deque[Future[ImageRow | None]] = deque()
        for _ in range(ROWS_AHEAD):
            self._read_one()

    def next(self) -> ImageRow | None:
        """Returns the next image; None at the end."""
        row = self.ahead.popleft().result()
        if row is not None:
            self.taken += 1
            self._read_one()
        return row

    def _read_one(self) -> None:
        self.ahead.append(self.thread.submit(next, self.rows, None))


class ShardReader:
    """Images of a stream for one process, epoch after epoch: one image of each open shard in turn.

    The shards come in a random order. When an open shard ends, the next one takes its place. With several processes,
    each reads its own shards if their number is a multiple of the number of processes. Otherwise each reads all and
    skips the images of the others.

    Args:
        parts (`Sequence[ImagePart]`): Shards.
        seed (`int`): Seed of the order.
        process_index (`int`): Index of this process.
        num_processes (`int`): Number of processes that share the stream.
        state (`Mapping`, *optional*): From [`state`] of another reader.

    Raises:
        ValueError: If this process gets no image in a whole epoch.
    """

    def __init__(
        self,
        parts: Sequence[ImagePart],
        seed: int,
        process_index: int,
        num_processes: int,
        state: Mapping[str, Any] | None,
    ):
        self.parts = parts
        self.seed = seed
        self.by_shard = len(parts) % num_processes == 0
        self.process_index = process_index
        self.num_processes = num_processes
        self.ring: list[OpenShard] = []
        self._begin_epoch(state["epoch"] if state else 0)
        if state:
            self.opened, self.turn, self.position = state["opened"], state["turn"], state["position"]
            self.ring = [OpenShard(number, parts[number], taken) for number, taken in state["ring"]]

    def next(self) -> ImageRow:
        """Returns the next image of this process."""
        while True:
            row = self._next_of_epoch()
            if row is None:
                if self.position == 0 or (not self.by_shard and self.position <= self.process_index):
                    raise ValueError(
                        "Each process must get images of the stream, but one got none. Start fewer processes."
                    )
                self._begin_epoch(self.epoch + 1)
                continue
            self.position += 1
            if self.by_shard or (self.position - 1) % self.num_processes == self.process_index:
                return row

    def state(self) -> dict[str, Any]:
        """State with which a new reader continues from here."""
        numbers = {name: getattr(self, name) for name in ("epoch", "opened", "turn", "position")}
        return {**numbers, "ring": [[shard.number, shard.taken] for shard in self.ring]}

    def _begin_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        order = np.random.default_rng((ORDER, self.seed, epoch)).permutation(len(self.parts))
        self.order = order[self.process_index :: self.num_processes] if self.by_shard else order
        self.opened = self.turn = self.position = 0

    def _open_next(self, place: int) -> bool:
        """Opens the next shard of the epoch, if there is one."""
        if self.opened == len(self.order):
            return False
        number = int(self.order[self.opened])
        self.ring.insert(place, OpenShard(number, self.parts[number], 0))
        self.opened += 1
        return True

    def _next_of_epoch(self) -> ImageRow | None:
        while len(self.ring) < OPEN_SHARDS and self._open_next(len(self.ring)):
            pass
        while self.ring:
            self.turn %= len(self.ring)
            row = self.ring[self.turn].next()
            if row is not None:
                self.turn += 1
                return row
            del self.ring[self.turn]
            self._open_next(self.turn)
        return None


class Streamed(NamedTuple):
    """An image of a stream, its place in it, and the state of its reader before it."""

    image: ImageRow
    epoch: int
    position: int
    before: dict[str, Any]


class StreamReader:
    """Images of a stream for one process, shuffled in blocks that end with the epoch.

    The first blocks are small, so that training starts before `shuffle_buffer` images are read. Meanwhile, each image
    that is taken makes the reader read two more, then one, so that reading is spread evenly over the batches.
    """

    def __init__(
        self,
        parts: Sequence[ImagePart],
        seed: int,
        shuffle_buffer: int,
        process_index: int,
        num_processes: int,
        state: Mapping[str, Any] | None,
    ):
        self.seed = seed
        self.shuffle_buffer = shuffle_buffer
        self.source = ShardReader(parts, seed, process_index, num_processes, state and state["start"])
        self.size = state["size"] if state else min(FIRST_BLOCK, shuffle_buffer)  # of the next block
        self.ahead: deque[Streamed] = deque()
        self.block: list[ImageRow] = []
        self.begun: dict[str, Any] | None = None
        self.taken = 0
        self.reads_per_image = 1
        for _ in range(state["taken"] if state else 0):
            self.next()

    def next(self) -> ImageRow:
        """Returns the next image."""
        if not self.block:
            self._begin_block()
        self.taken += 1
        self._read_ahead(self.reads_per_image)
        return self.block.pop()

    def lookahead(self) -> Iterator[ImageRow]:
        """Yields the images in memory that come next, in an endless cycle and without advancing."""
        return itertools.cycle([*reversed(self.block), *(each.image for each in self.ahead)])

    def state(self) -> dict[str, Any] | None:
        """State with which a new reader continues from here."""
        return self.begun and {**self.begun, "taken": self.taken}

    def _begin_block(self) -> None:
        self._read_ahead(max(self.size, SPARE))
        first = self.ahead[0]
        self.begun, self.taken = {"start": first.before, "size": self.size}, 0
        while len(self.block) < self.size and self.ahead and self.ahead[0].epoch == first.epoch:
            self.block.append(self.ahead.popleft().image)
        np.random.default_rng((BLOCK, self.seed, first.epoch, first.position)).shuffle(self.block)
        size = self.size
        self.size = min(2 * size, self.shuffle_buffer)
        self.reads_per_image = -(-self.size // size)

    def _read_ahead(self, count: int) -> None:
        """Reads up to so many images, until there are enough for the next block."""
        for _ in range(min(count, max(self.size, SPARE) - len(self.ahead))):
            before = self.source.state()
            image = self.source.next()
            self.ahead.append(Streamed(image, self.source.epoch, self.source.position, before))

"""Crops of an image set that is read as a stream."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from svqvae_hf.data.image_parts import ImagePart
from svqvae_hf.data.image_rows import ImageRow
from svqvae_hf.trainer.data.crop_batches import CropBatch, CropCutter
from svqvae_hf.trainer.data.sample_order import row_order

SHUFFLE = 3  # first word of the seeds of shuffle buffers


class Place(NamedTuple):
    """Place of a reader in its images: the epoch, the shard, the first image of the buffer, and how many it used."""

    epoch: int = 0
    shard: int = 0
    row: int = 0
    used: int = 0


@dataclass
class CropStream(IterableDataset[tuple[Place, CropBatch]]):
    """Batches of a process, each with the place of its reader after it. Each worker is one reader.

    A reader reads its share of the shards of an epoch in a random order. It fills a buffer with images, shuffles and
    empties it, so that it can continue at its place exactly. It then reads the current shard again from its beginning.

    Args:
        shards (`Sequence[ImagePart]`): Shards of the set.
        cutter ([`CropCutter`]): Cuts the batches.
        batches (`range`): Numbers of the batches.
        places (`Sequence[Place]`): Place of each reader of this process.
        buffer_size (`int`): Images that a reader shuffles at a time.
    """

    shards: Sequence[ImagePart]
    cutter: CropCutter
    batches: range
    places: Sequence[Place]
    buffer_size: int
    place: Place = field(init=False)  # of the reader of this process

    def __iter__(self) -> Iterator[tuple[Place, CropBatch]]:
        """Yields the batches of this worker. Readers take turns, also after a resume."""
        worker, share, count = get_worker_info(), self.cutter.share, len(self.places)
        first = self.batches.start + (worker.id if worker else 0)
        self.place = self.places[first % count]
        images = self._read(share.process * count + first % count, share.num_processes * count)
        for batch in range(first, self.batches.stop, count):
            crops = self.cutter.cut_batch(batch, lambda _: images)
            yield self.place, crops

    def _read(self, reader: int, num_readers: int) -> Iterator[ImageRow]:
        """Reads images from the place on, without an end, and moves it."""
        while True:
            epoch = self.place.epoch
            order = row_order(len(self.shards), self.cutter.seed, epoch)[reader::num_readers]
            unread = self._unread([self.shards[shard] for shard in order])
            while buffer := list(islice(unread, self.buffer_size)):
                start = self.place
                seed = (SHUFFLE, self.cutter.seed, reader, *start[:3])
                shuffled = np.random.default_rng(seed).permutation(len(buffer))
                for used in range(start.used, len(buffer)):
                    self.place = start._replace(used=used + 1)
                    yield buffer[shuffled[used]][1]
                self.place = Place(epoch, *buffer[-1][0])
            if self.place == Place(epoch):
                raise ValueError("Each shard of a stream must hold images, but some hold none. Remove them.")
            self.place = Place(epoch + 1)

    def _unread(self, shards: Sequence[ImagePart]) -> Iterator[tuple[tuple[int, int], ImageRow]]:
        """Images of an epoch from the start of the buffer on, each with its shard and the row after it."""
        start = self.place
        for shard in range(start.shard, len(shards)):
            images = enumerate(shards[shard].read(), start=1)
            for row, image in islice(images, start.row if shard == start.shard else 0, None):
                yield (shard, row), image

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
    """Place of a reader in its images: where its buffer starts, and how many images of the buffer it has used.

    `Place(epoch=2, shard=1, row=500, used=30)` means that in epoch 2, the buffer starts with image 500 of shard 1, and
    30 images of the shuffled buffer are used.

    Args:
        epoch (`int`): Number of the epoch.
        shard (`int`): Number of the shard among the shards that the reader reads in this epoch.
        row (`int`): Number of images of this shard that stand before the buffer.
        used (`int`): Number of images of the shuffled buffer that the reader has used.
    """

    epoch: int = 0
    shard: int = 0
    row: int = 0
    used: int = 0


@dataclass
class CropStream(IterableDataset[tuple[Place, CropBatch]]):
    """Batches of a process, each with the place of its reader after it. Each worker is one reader.

    A reader reads its share of the shards of an epoch in a random order. It fills a buffer with images, shuffles and
    empties it, so that it can continue at its place exactly. It then reads the current shard again from its beginning.

    The readers of a process take turns, also after a resume. With three readers, reader 0 cuts the batches 0, 3, 6 and
    so on, reader 1 cuts 1, 4, 7, and reader 2 cuts 2, 5, 8. PyTorch takes the first batch from worker 0. So if the run
    resumes at batch 4, worker 0 is reader 1.

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
    place: Place = field(init=False)  # of the reader of this worker, after the last image that it took

    def __iter__(self) -> Iterator[tuple[Place, CropBatch]]:
        """Yields the batches of this worker."""
        worker = get_worker_info()
        worker_number = 0 if worker is None else worker.id
        num_readers = len(self.places)  # of this process
        first_batch = self.batches.start + worker_number
        reader = first_batch % num_readers
        self.place = self.places[reader]
        unused_images = self._images_of_reader(reader)

        def images_for(step: int, crop_number: int) -> Iterator[ImageRow]:
            """Returns the images that are not used yet. Each crop takes the next one, whatever its number is."""
            return unused_images

        batches_of_reader = range(first_batch, self.batches.stop, num_readers)
        for batch in batches_of_reader:
            crops = self.cutter.cut_batch(batch, images_for)
            place_after_batch = self.place  # `unused_images` moves it with each image that a crop takes
            yield place_after_batch, crops

    def _images_of_reader(self, reader: int) -> Iterator[ImageRow]:
        """Yields images of a reader of this process from `place` on, without an end, and moves `place`."""
        share = self.cutter.share
        readers_per_process = len(self.places)
        reader_of_all_processes = share.process * readers_per_process + reader
        return self._read(reader_of_all_processes, share.num_processes * readers_per_process)

    def _read(self, reader: int, num_readers: int) -> Iterator[ImageRow]:
        """Yields images from `place` on, without an end, and moves `place`.

        Args:
            reader (`int`): Number of the reader among the readers of all processes.
            num_readers (`int`): Number of readers of all processes.
        """
        while True:
            epoch = self.place.epoch
            order = row_order(len(self.shards), self.cutter.seed, epoch)
            shards_of_reader = [self.shards[shard] for shard in order[reader::num_readers]]
            yield from self._read_epoch(shards_of_reader, reader)
            # Each image moves the place. If it still is the start of the epoch, the shards have no images.
            start_of_epoch = Place(epoch)
            if self.place == start_of_epoch:
                raise ValueError("Each shard of a stream must hold images, but some hold none. Remove them.")
            self.place = Place(epoch + 1)

    def _read_epoch(self, shards: Sequence[ImagePart], reader: int) -> Iterator[ImageRow]:
        """Yields images from `place` to the end of its epoch, and moves `place`.

        Args:
            shards (`Sequence[ImagePart]`): Shards that the reader reads in this epoch.
            reader (`int`): Number of the reader among the readers of all processes.
        """
        epoch = self.place.epoch
        unread_images = self._unread(shards, start=self.place)
        for buffer in self._buffers(unread_images):
            yield from self._shuffled(buffer, reader)
            # All images of the buffer are used. The next buffer starts after its last image.
            last_image = buffer[-1]
            self.place = Place(epoch, shard=last_image.shard, row=last_image.next_row)

    def _buffers(self, images: "Iterator[_ReadImage]") -> "Iterator[list[_ReadImage]]":
        """Yields images in lists of `buffer_size`. The last list may be shorter."""
        while True:
            buffer = list(islice(images, self.buffer_size))
            if not buffer:
                return
            yield buffer

    def _shuffled(self, buffer: "Sequence[_ReadImage]", reader: int) -> Iterator[ImageRow]:
        """Yields the images of a buffer in a random order, without those that were used before a resume.

        The seed depends on where the buffer starts, so a resumed run has the same order. If a run stops after 30
        images of a buffer, the resumed run fills the buffer with the same images, shuffles them in the same order, and
        leaves out the first 30.

        Args:
            buffer (`Sequence[_ReadImage]`): All images of the buffer, as they are stored, with those used before.
            reader (`int`): Number of the reader among the readers of all processes.
        """
        start = self.place
        seed = (SHUFFLE, self.cutter.seed, reader, start.epoch, start.shard, start.row)
        order = np.random.default_rng(seed).permutation(len(buffer))
        num_used_before_resume = start.used
        for num_used in range(num_used_before_resume, len(buffer)):
            # The place moves before the image is yielded, because it is saved together with the batch of this image.
            # The code after `yield` would run only when the next image is taken, which is too late.
            self.place = start._replace(used=num_used + 1)
            position = order[num_used]
            yield buffer[position].image

    def _unread(self, shards: Sequence[ImagePart], start: Place) -> "Iterator[_ReadImage]":
        """Yields the images of an epoch, from the start of the buffer of a place on.

        Args:
            shards (`Sequence[ImagePart]`): Shards that the reader reads in this epoch.
            start ([`Place`]): The place, whose `used` has no effect.
        """
        for shard in range(start.shard, len(shards)):
            num_read = start.row if shard == start.shard else 0
            for next_row, image in enumerate(shards[shard].read(), start=1):
                is_unread = next_row > num_read
                if is_unread:
                    yield _ReadImage(shard, next_row, image)


class _ReadImage(NamedTuple):
    """An image of a stream.

    Args:
        shard (`int`): Number of its shard among the shards that the reader reads in the epoch.
        next_row (`int`): Number of images of the shard up to and including this one.
        image (`ImageRow`): The image.
    """

    shard: int
    next_row: int
    image: ImageRow

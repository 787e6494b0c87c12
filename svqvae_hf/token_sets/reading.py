"""Reads and crops the images of a set."""

import itertools
import math
import signal
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from svqvae_hf.data.image_rows import ImageRow, fault_of, read_image
from svqvae_hf.token_sets.crops import make_crops

CROPS_PER_TASK = 16  # images whose crops a worker sends at once, because each transfer has a cost
WHOLE_PER_TASK = 4  # fewer, because whole images can be large


class CroppedImage(NamedTuple):
    """Crops of an image, or the reason why the image could not be read.

    Args:
        key (`str`): Key of the image in its set.
        values (`dict[str, Any]`): Columns of the image set that are kept.
        crops (`torch.Tensor` of shape `(crops, 3, height, width)`, uint8, *optional*): `None` if the image could
            not be read.
        fault (`str`, *optional*): Reason why the image could not be read.
        unreachable (`bool`): Whether the image could not be fetched, as opposed to decoded.
    """

    key: str
    values: dict[str, Any]
    crops: torch.Tensor | None
    fault: str | None = None
    unreachable: bool = False


def read_crops(
    images: Iterable[ImageRow], crops: str, resolution: int | None, min_side: int | None, num_workers: int
) -> Iterator[CroppedImage]:
    """Reads and crops images in their order. Worker processes, if any, read ahead.

    Args:
        images (`Iterable[ImageRow]`): Images of a set.
        crops (`str`): A key of `CROPS`.
        resolution (`int`, *optional*): Side of the crops in pixels; `None` for whole images.
        min_side (`int`, *optional*): Side in pixels below which an image counts as unreadable.
        num_workers (`int`): Worker processes; with 0, this process reads.
    """
    tasks = DataLoader(
        _CropReader(crops, resolution, min_side),
        batch_size=None,
        sampler=_batched(images, WHOLE_PER_TASK if resolution is None else CROPS_PER_TASK),
        num_workers=num_workers,
        collate_fn=_as_read,
        generator=torch.Generator(),  # otherwise the loader draws from the global one
        worker_init_fn=_ignore_signals,
    )
    for read, shapes, pixels in tasks:
        sizes = [math.prod(shape) for shape in shapes]
        crops_of_images = zip(pixels.split(sizes), shapes, strict=True)
        for image in read:
            if image.fault is None:
                flat, shape = next(crops_of_images)
                image = image._replace(crops=flat.view(shape))
            yield image


class _CropReader(Dataset):
    """Reads and crops a few images, here or in a worker process. All their pixels are one tensor."""

    def __init__(self, crops: str, resolution: int | None, min_side: int | None):
        self.crops = crops
        self.resolution = resolution
        self.min_side = min_side

    def __getitem__(self, rows: list[ImageRow]) -> tuple[list[CroppedImage], list[tuple[int, ...]], torch.Tensor]:
        images, pixels = [], []
        shapes: list[tuple[int, ...]] = []
        for key, source, values in rows:
            try:
                opened = read_image(source, self.min_side)
            except (OSError, ValueError) as error:
                is_remote = isinstance(source, Mapping) and "://" in (source["path"] or "")
                unreachable = is_remote and isinstance(error, OSError)
                images.append(CroppedImage(key, values, None, fault_of(error), unreachable))
            else:
                made = make_crops(opened, self.crops, self.resolution)
                shapes.append((len(made), 3, made[0].height, made[0].width))
                pixels += [np.asarray(crop).transpose(2, 0, 1) for crop in made]
                images.append(CroppedImage(key, values, None))
        flat = torch.empty(sum(map(math.prod, shapes)), dtype=torch.uint8)
        for crop, place in zip(pixels, flat.split([each.size for each in pixels]), strict=True):
            place.numpy().reshape(crop.shape)[:] = crop
        return images, shapes, flat


def _batched(rows: Iterable[ImageRow], size: int) -> Iterator[list[ImageRow]]:
    iterator = iter(rows)
    while batch := list(itertools.islice(iterator, size)):
        yield batch


def _as_read(read: Any) -> Any:
    return read  # by default, the loader would look into each image for arrays


def _ignore_signals(worker: int) -> None:
    """Lets a worker end with its parent, because Ctrl-C reaches every process of a terminal at once."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)

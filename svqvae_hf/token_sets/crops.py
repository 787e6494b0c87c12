"""Crops of images that become rows of a token set, and reading them."""

import itertools
import os
import signal
from collections.abc import Iterable, Iterator, Mapping
from types import FrameType
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset

from svqvae_files.inputs import is_url
from svqvae_hf.data.image_rows import ImageRow, fault_of, read_image
from svqvae_hf.data.workers import end_with_parent

FLIPPED = "-flipped"
CROP_POSITIONS = {  # (x, y): 0 is left or top, 1 is right or bottom
    "centre": (0.5, 0.5),
    "top-left": (0.0, 0.0),
    "top-right": (1.0, 0.0),
    "bottom-left": (0.0, 1.0),
    "bottom-right": (1.0, 1.0),
}
CROPS = {  # names of the crops of an image, in the order of the rows
    "whole": ("whole",),
    "whole-flip": ("whole", "whole-flipped"),
    "centre": ("centre",),
    "centre-flip": ("centre", "centre-flipped"),
    "ten-crop": (
        "centre",
        "centre-flipped",
        "top-left",
        "top-left-flipped",
        "top-right",
        "top-right-flipped",
        "bottom-left",
        "bottom-left-flipped",
        "bottom-right",
        "bottom-right-flipped",
    ),
}
IMAGES_PER_TASK = 16  # of a worker, because each transfer has a cost
WHOLE_PER_TASK = 4  # fewer, because whole images can be large
TEN_CROP_MARGIN = 1.1  # side of the square that contains ten crops, over the side of a crop (LlamaGen's `crop_range`)


def is_whole(crops: object) -> bool:
    """Whether these crops are whole images."""
    return crops in ("whole", "whole-flip")


def make_crops(image: Image.Image, crops: str, resolution: int | None) -> list[Image.Image]:
    """Makes the crops of an image.

    Args:
        image (`PIL.Image.Image`): Image of any size.
        crops (`str`): A key of `CROPS`. `"centre"` resizes the shorter side to `resolution` (bicubic) and crops the
            centre. `"ten-crop"` resizes the centre square to 1.1 times `resolution` and crops the centre and the
            corners, each also flipped.
        resolution (`int`, *optional*): Side of the crops in pixels; `None` for whole images.

    Returns:
        `list[PIL.Image.Image]`: One crop per name in `CROPS[crops]`, all of one size.
    """
    names = CROPS[crops]
    if resolution is None:
        return [_flip_if_named(image, name) for name in names]
    side = resolution
    if crops == "ten-crop":
        side = round(TEN_CROP_MARGIN * resolution)
    square = ImageOps.fit(image, (side, side), Image.Resampling.BICUBIC)
    images = []
    for name in names:
        position = CROP_POSITIONS[name.removesuffix(FLIPPED)]
        crop = _crop_at(position, square, resolution)
        images.append(_flip_if_named(crop, name))
    return images


def _flip_if_named(image: Image.Image, name: str) -> Image.Image:
    """Flips an image if the name of the crop says so, such as `centre-flipped`."""
    if name.endswith(FLIPPED):
        return ImageOps.mirror(image)
    return image


def _crop_at(position: tuple[float, float], image: Image.Image, side: int) -> Image.Image:
    """Cuts a square at a position (x, y): 0 is left or top, 1 is right or bottom."""
    x, y = position
    left = round(x * (image.width - side))
    top = round(y * (image.height - side))
    return image.crop((left, top, left + side, top + side))


class CroppedImage(NamedTuple):
    """Crops of an image, or the reason why the image could not be read.

    Args:
        key (`str`): Key of the image in its set.
        values (`dict[str, Any]`): Columns of the image set that are kept.
        crops (`np.ndarray` of shape `(crops, 3, height, width)`, uint8, *optional*): `None` if the image could
            not be read.
        fault (`str`, *optional*): Reason why the image could not be read.
        unreachable (`bool`): Whether the image could not be fetched, as opposed to decoded.
        enlarged (`bool`): Whether the image is smaller than its crops.
        shard (`str`): Name of the tar, Parquet or Arrow file that holds the image; empty for an image file.
    """

    key: str
    values: dict[str, Any]
    crops: np.ndarray | None
    fault: str | None = None
    unreachable: bool = False
    enlarged: bool = False
    shard: str = ""


def read_crops(
    images: Iterable[ImageRow], crops: str, resolution: int | None, num_workers: int
) -> Iterator[CroppedImage]:
    """Reads and crops images in their order. Worker processes, if any, read ahead.

    Args:
        images (`Iterable[ImageRow]`): Images of a set.
        crops (`str`): A key of `CROPS`.
        resolution (`int`, *optional*): Side of the crops in pixels; `None` for whole images.
        num_workers (`int`): Worker processes; with 0, this process reads.
    """
    images_per_task = WHOLE_PER_TASK if resolution is None else IMAGES_PER_TASK
    # A batch sampler usually yields lists of numbers, which the loader passes to `__getitem__` of its data set, one by
    # one. This one yields lists of image rows, which reach the workers the same way.
    tasks = DataLoader(
        _CropReader(crops, resolution),
        batch_sampler=_tasks(images, images_per_task),
        num_workers=num_workers,
        collate_fn=list,  # by default, the loader would make tensors of all arrays
        generator=torch.Generator(),  # otherwise the loader draws from the global one
        worker_init_fn=_start_worker,
    )
    for task in tasks:
        yield from task


def _tasks(images: Iterable[ImageRow], size: int) -> Iterator[list[ImageRow]]:
    """Yields the images in groups, one per task of a worker.

    Only this process iterates over the set. Otherwise each worker would read all of its files.
    """
    remaining_images = iter(images)
    task = list(itertools.islice(remaining_images, size))
    while task:
        yield task
        task = list(itertools.islice(remaining_images, size))


class _CropReader(Dataset):
    """Reads and crops an image, here or in a worker process."""

    def __init__(self, crops: str, resolution: int | None):
        self.crops = crops
        self.resolution = resolution

    def __getitem__(self, row: ImageRow) -> CroppedImage:
        try:
            image = read_image(row)
        except OSError as error:
            fault = fault_of(error)
            unreachable = _is_remote(row)
            return CroppedImage(row.key, row.values, None, fault, unreachable=unreachable, shard=row.shard)
        except ValueError as error:
            return CroppedImage(row.key, row.values, None, fault_of(error), shard=row.shard)
        arrays = [np.asarray(crop) for crop in make_crops(image, self.crops, self.resolution)]
        crops = np.stack(arrays).transpose(0, 3, 1, 2)  # (crops, 3, height, width)
        is_enlarged = self.resolution is not None and min(image.size) < self.resolution
        return CroppedImage(row.key, row.values, crops, enlarged=is_enlarged)


def _is_remote(row: ImageRow) -> bool:
    """Whether an image is at a URL."""
    if not isinstance(row.source, Mapping):
        return False
    path = row.source["path"]
    return path is not None and is_url(path)


def _start_worker(worker: int) -> None:
    """Ignores Ctrl-C, which reaches all processes of a terminal, and ends at SIGTERM or with the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _end_at_once)
    end_with_parent()


def _end_at_once(signal_number: int, frame: FrameType | None) -> None:
    """Ends a worker. The parent sends SIGTERM to workers that it could not shut down, and then waits for their end.

    `sys.exit` would raise an exception, which the loader would pass on to the parent as an error of the worker. By
    the default handler of SIGTERM, the worker would count as killed, which PyTorch reports as an error, too.
    """
    os._exit(0)

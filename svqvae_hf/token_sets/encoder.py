"""Reads, crops and encodes the images of a set, shard by shard."""

import itertools
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import datasets
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from svqvae_hf.data.image_rows import ImagePart, ImageRow, IndexedRows, fault_of, read_image
from svqvae_hf.models.image_processing_svqvae import SVQVAEImageProcessor
from svqvae_hf.models.modeling_svqvae import SVQVAE
from svqvae_hf.token_sets.crops import CROPS, make_crops
from svqvae_hf.token_sets.settings import TokenSettings
from svqvae_hf.tokens.image_tokens import check_memory

PARTS_PER_PROCESS = 4  # with at least this many parts per process, only one process reads each part


class ShardName(NamedTuple):
    """Name of a Parquet file of a token set: a part of the image set, and the number of the shard in it."""

    part: int
    number: int

    @property
    def file(self) -> str:
        """File name; `datasets` takes the split from its first word."""
        return f"train-{self.part:05}-{self.number:05}.parquet"


class CroppedImage(NamedTuple):
    """Crops of an image, or the reason why the image could not be read.

    Args:
        shard ([`ShardName`]): Shard of the image.
        key (`str`): Key of the image in its set.
        values (`dict[str, Any]`): Columns of the image set that are kept.
        crops (`torch.Tensor` of shape `(crops, 3, height, width)`, uint8, *optional*): `None` if the image could
            not be read.
        fault (`str`, *optional*): Reason why the image could not be read.
        unreachable (`bool`): Whether the image could not be fetched, as opposed to decoded.
    """

    shard: ShardName
    key: str
    values: dict[str, Any]
    crops: torch.Tensor | None
    fault: str | None = None
    unreachable: bool = False


@dataclass
class ShardContent:
    """Content of a shard.

    Args:
        rows (`list[dict[str, Any]]`): Rows of the token set.
        images (`int`): Number of images that were read for them, including the skipped ones.
        skipped (`list[dict[str, str]]`): `key` and `reason` of each image that could not be read.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    images: int = 0
    skipped: list[dict[str, str]] = field(default_factory=list)


def assigned_images(
    parts: Sequence[ImagePart], shard_size: int, finished: set[str], rank: int, world_size: int
) -> Iterator[tuple[ShardName, ImageRow]]:
    """Yields the images that a process has to encode, shard after shard.

    The borders of shards depend on the image set alone, so any number of processes writes the same shards.

    Args:
        parts (`Sequence[ImagePart]`): Parts of the image set. Of a part with random access, only the assigned images
            are looked at.
        shard_size (`int`): Images per shard.
        finished (`set[str]`): File names of the shards that are already written.
        rank (`int`): Index of the process.
        world_size (`int`): Number of processes.
    """
    by_part = len(parts) >= PARTS_PER_PROCESS * world_size

    def is_assigned(shard: ShardName) -> bool:
        return (by_part or sum(shard) % world_size == rank) and shard.file not in finished

    for number, part in enumerate(parts):
        if by_part and number % world_size != rank:
            continue  # this process does not even read the part
        if isinstance(part, IndexedRows):
            for start in range(0, len(part), shard_size):
                shard = ShardName(number, start // shard_size)
                if is_assigned(shard):
                    yield from ((shard, row) for row in part[start : start + shard_size])
        else:
            for index, row in enumerate(part.read()):
                shard = ShardName(number, index // shard_size)
                if is_assigned(shard):
                    yield shard, row


def read_crops(
    images: Iterator[tuple[ShardName, ImageRow]], settings: TokenSettings, num_workers: int, min_side: int | None
) -> Iterable[CroppedImage]:
    """Reads and crops images in their order, if no side is too small. Worker processes, if any, read ahead."""
    return DataLoader(
        _CropReader(settings, min_side),
        batch_size=None,
        sampler=images,
        num_workers=num_workers,
        generator=torch.Generator(),  # otherwise the loader draws from the global one
        worker_init_fn=_ignore_signals,
    )


class _CropReader(Dataset):
    """Reads and crops one image, here or in a worker process."""

    def __init__(self, settings: TokenSettings, min_side: int | None):
        self.settings = settings
        self.min_side = min_side

    def __getitem__(self, image: tuple[ShardName, ImageRow]) -> CroppedImage:
        shard, (key, source, values) = image
        try:
            opened = read_image(source, self.min_side)
        except (OSError, ValueError) as error:
            is_remote = isinstance(source, Mapping) and "://" in (source["path"] or "")
            return CroppedImage(shard, key, values, None, fault_of(error), is_remote and isinstance(error, OSError))
        crops = [np.asarray(crop) for crop in make_crops(opened, self.settings.crops, self.settings.resolution)]
        pixels = torch.from_numpy(np.stack(crops)).movedim(-1, 1).contiguous()
        return CroppedImage(shard, key, values, pixels)


class _Crop(NamedTuple):
    pixels: torch.Tensor  # (3, height, width)
    row: dict[str, Any]  # without ids


class ShardEncoder:
    """Encodes the crops of images to rows of a token set.

    Args:
        model ([`SVQVAE`]): Model in evaluation mode.
        settings ([`TokenSettings`]): Settings of the token set.
        features (`datasets.Features`): Columns of the image set that are kept.
        batch_size (`int`): Number of consecutive crops of equal size that are encoded together.
    """

    def __init__(self, model: SVQVAE, settings: TokenSettings, features: datasets.Features, batch_size: int):
        self.model = model
        self.settings = settings
        self.features = features
        self.batch_size = batch_size
        self.processor = SVQVAEImageProcessor(pixel_range=model.config["pixel_range"])

    def encode(self, images: Iterable[CroppedImage], on_image: Callable[[], object]) -> ShardContent:
        """Encodes the images of a shard.

        Args:
            images (`Iterable[CroppedImage]`): Images of one shard.
            on_image (`Callable`): Called after each image.

        Raises:
            OSError: An image could not be fetched.
            ValueError: A crop needs more memory than is available.
        """
        content = ShardContent()
        crops = self._crops(images, content, on_image)
        for _, equal_crops in itertools.groupby(crops, key=lambda crop: crop.pixels.shape):
            while batch := list(itertools.islice(equal_crops, self.batch_size)):
                content.rows.extend(self._encode_batch(batch))
        return content

    def _crops(
        self, images: Iterable[CroppedImage], content: ShardContent, on_image: Callable[[], object]
    ) -> Iterator[_Crop]:
        """Yields the crops of readable images, and counts the images in `content`."""
        names = CROPS[self.settings.crops]
        for image in images:
            if image.unreachable:
                raise OSError(
                    f"`{image.key}` could not be fetched: {image.fault} Run the same command again later to resume."
                )
            content.images += 1
            if image.crops is None:
                content.skipped.append({"key": image.key, "reason": str(image.fault)})
            else:
                height, width = image.crops.shape[-2:]
                values = self.features.encode_example(image.values)
                row = {"height": height, "width": width, "key": image.key, **values}
                for name, pixels in zip(names, image.crops, strict=True):
                    yield _Crop(pixels, row if len(names) == 1 else {**row, "crop": name})
            on_image()

    @torch.inference_mode()
    def _encode_batch(self, crops: Sequence[_Crop]) -> Iterator[dict[str, Any]]:
        model, scales, scale_from = self.model, self.settings.scales, self.settings.scale_from
        height, width = crops[0].pixels.shape[-2:]
        try:
            check_memory(model, len(crops) * height, width, scales, scale_from, decodes=False)
        except ValueError as error:
            raise ValueError(f"`{crops[0].row['key']}`: {error}") from error
        sample = self.processor([crop.pixels.to(model.device) for crop in crops])["pixel_values"].to(model.dtype)
        encoded = model.encode_tokens(sample, scales, scale_from)
        grids = [grid.cpu().numpy().astype(self.settings.id_dtype) for grid in encoded]
        for number, crop in enumerate(crops):
            yield {**{f"ids_{index}": grid[number].ravel() for index, grid in enumerate(grids)}, **crop.row}


def _ignore_signals(worker: int) -> None:
    """Lets a worker end with its parent, because Ctrl-C reaches every process of a terminal at once."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)

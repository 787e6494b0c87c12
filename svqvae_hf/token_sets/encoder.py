"""Encodes the crops of images to rows of a token set."""

from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import datasets
import torch

from svqvae_hf.models.loading import execution_device
from svqvae_hf.models.modeling_svqvae import SVQVAE
from svqvae_hf.models.tiling import Tiles
from svqvae_hf.token_sets.crops import CROPS, CroppedImage
from svqvae_hf.token_sets.manifest import PartRecord
from svqvae_hf.token_sets.settings import TokenSettings
from svqvae_hf.tokens.context_model import ContextModel
from svqvae_hf.tokens.image_tokens import choose_tiles, image_tokens
from svqvae_hf.tokens.token_files import token_file_content

BATCH_CROPS = 64  # crops of a batch by default, if they are small
BATCH_PIXELS = 2**20  # pixels of a batch by default, at most, unless one crop has more
WAITING_PIXELS = 2**25  # pixels of crops that wait until their batches are full, at most: 96 MiB


@dataclass
class Crop:
    """A crop that becomes a row.

    Args:
        pixels (`torch.Tensor` of shape `(3, height, width)`, uint8): The crop.
        row (`dict[str, Any]`): Its row, which lacks its ids at first.
    """

    pixels: torch.Tensor
    row: dict[str, Any]

    @property
    def num_pixels(self) -> int:
        """Pixels of the crop."""
        return self.row["height"] * self.row["width"]


class WaitingCrops:
    """Crops that wait until the batch of their shape is full."""

    def __init__(self) -> None:
        self.num_pixels = 0
        self._batches: dict[torch.Size, list[Crop]] = defaultdict(list)  # by the shape (3, height, width) of a crop

    def add(self, crop: Crop) -> int:
        """Adds a crop. Returns the number of crops of its shape."""
        batch = self._batches[crop.pixels.shape]
        batch.append(crop)
        self.num_pixels += crop.num_pixels
        return len(batch)

    def take(self, shape: torch.Size) -> list[Crop]:
        """Removes and returns all crops of a shape."""
        batch = self._batches.pop(shape)
        for crop in batch:
            self.num_pixels -= crop.num_pixels
        return batch

    def shapes(self) -> list[torch.Size]:
        """Shapes of the crops."""
        return list(self._batches)


@dataclass
class RowEncoder:
    """Encodes the crops of images to rows of a token set. Crops of one size are encoded together.

    Args:
        model ([`SVQVAE`]): Model in evaluation mode.
        settings ([`TokenSettings`]): Settings of the token set.
        features (`datasets.Features`): Columns of the image set that are kept.
        batch_size (`int`, *optional*): Crops of a batch. By default 64, or fewer if they have over a megapixel in all.
        context_model ([`ContextModel`], *optional*): Context model that compresses the rows.
    """

    model: SVQVAE
    settings: TokenSettings
    features: datasets.Features
    batch_size: int | None
    context_model: ContextModel | None = None

    def __post_init__(self) -> None:
        self.device = execution_device(self.model)  # stored, because finding it visits all modules
        self.dtype = self.model.dtype
        self.black, self.white = self.model.config["pixel_range"]
        self.tiles: dict[tuple[int, ...], Tiles | None] = {}  # of batches by their shape

    def encode(
        self, images: Iterable[CroppedImage], record: PartRecord, on_image: Callable[[], object]
    ) -> Iterator[dict[str, Any]]:
        """Yields the rows of images in their order. The batches depend on the images alone.

        Args:
            images (`Iterable[CroppedImage]`): Images of one part.
            record ([`PartRecord`]): Record of the part, in which images are counted and skipped ones are listed.
            on_image (`Callable`): Called after each image.

        Raises:
            OSError: An image could not be fetched.
            ValueError: A crop needs more memory than is available.
        """
        # A crop waits for others of its shape, and its row waits in `rows` for the rows before it. The row is one
        # dictionary, which both the crop and `rows` hold: `_add_ids_to_rows` adds its ids through the crop.
        waiting_crops = WaitingCrops()
        rows: deque[dict[str, Any]] = deque()
        for crop in self._crops(images, record, on_image):
            rows.append(crop.row)
            crops_of_shape = waiting_crops.add(crop)
            is_full = crops_of_shape >= self._crops_of_full_batch(crop)
            if is_full:
                batch = waiting_crops.take(crop.pixels.shape)
                self._add_ids_to_rows(batch)
            elif waiting_crops.num_pixels > WAITING_PIXELS:
                self._add_ids_to_all_rows(waiting_crops)
            yield from self._take_complete(rows)
        self._add_ids_to_all_rows(waiting_crops)
        yield from rows

    def _take_complete(self, rows: deque[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Removes and yields the first rows, up to the first one that has no ids yet."""
        first_column = self.settings.id_columns[0]
        while rows and first_column in rows[0]:
            yield rows.popleft()

    def _crops_of_full_batch(self, crop: Crop) -> int:
        """Number of crops like this one that are encoded together."""
        if self.batch_size is not None:
            return self.batch_size
        return min(BATCH_CROPS, BATCH_PIXELS // crop.num_pixels)

    def _crops(
        self, images: Iterable[CroppedImage], record: PartRecord, on_image: Callable[[], object]
    ) -> Iterator[Crop]:
        """Yields the crops of readable images, and counts the images."""
        names = CROPS[self.settings.crops]
        for image in images:
            if image.unreachable:
                raise OSError(f"`{image.key}` could not be fetched: {image.fault} Run the same command to resume.")
            record.images += 1
            if image.enlarged:
                record.enlarged += 1
            if image.crops is None:
                record.skipped.append(_skipped_entry(image))
                on_image()
                continue
            crops = torch.from_numpy(image.crops)  # (crops, 3, height, width)
            height, width = crops.shape[-2:]
            values = {}
            if image.values:
                values = self.features.encode_example(image.values)
            for name, pixels in zip(names, crops, strict=True):
                row = {"height": height, "width": width, "key": image.key, **values}
                if len(names) > 1:
                    row["crop"] = name
                yield Crop(pixels, row)
            on_image()

    def _add_ids_to_all_rows(self, waiting_crops: WaitingCrops) -> None:
        """Encodes all crops that wait, although their batches are not full."""
        for shape in waiting_crops.shapes():
            batch = waiting_crops.take(shape)
            self._add_ids_to_rows(batch)

    @torch.inference_mode()
    def _add_ids_to_rows(self, crops: list[Crop]) -> None:
        """Encodes crops of one size, and adds the ids to their rows."""
        settings = self.settings
        pixels = torch.stack([crop.pixels for crop in crops])  # (B, 3, height, width), uint8
        tiles = self._tiles(pixels.shape, crops[0].row["key"])
        sample = self._to_sample(pixels)
        ids_of_scales = self.model.encode_tokens(sample, settings.scales, settings.scale_from, tiles)  # (B, h, w) each
        ids_of_scales = [ids.cpu() for ids in ids_of_scales]
        for number, crop in enumerate(crops):
            ids_of_crop = [ids[number] for ids in ids_of_scales]  # (h, w) for each scale
            if self.context_model is None:
                self._store_ids(crop.row, ids_of_crop)
            else:
                self._store_compressed(crop.row, ids_of_crop, tiles)

    def _to_sample(self, pixels: torch.Tensor) -> torch.Tensor:
        """Converts pixels `(B, 3, height, width)` in uint8 to a sample in `pixel_range`, on the device of the model.

        It computes what the image processor computes, in place to save copies.
        """
        if self.device.type == "cuda":
            pixels = pixels.pin_memory()
        sample = pixels.to(self.device, non_blocking=True).float()
        sample.div_(255)  # in [0, 1]
        sample.mul_(self.white - self.black)
        sample.add_(self.black)
        return sample.to(self.dtype)

    def _store_ids(self, row: dict[str, Any], ids: list[torch.Tensor]) -> None:
        """Adds the ids `(h, w)` of each scale to a row, a column per scale."""
        for column, grid in zip(self.settings.id_columns, ids, strict=True):
            row[column] = grid.flatten().numpy().astype(self.settings.id_dtype)

    def _store_compressed(self, row: dict[str, Any], ids: list[torch.Tensor], tiles: Tiles | None) -> None:
        """Adds the ids `(h, w)` of all scales to a row, compressed, as the content of a token file."""
        settings = self.settings
        tokens = image_tokens(
            self.model, ids, row["height"], row["width"], settings.scales, settings.scale_from, tiles
        )
        row["tokens"] = token_file_content(tokens, self.context_model)

    def _tiles(self, shape: torch.Size, key: str) -> Tiles | None:
        """Tiles of a batch of this shape. Raises, naming an image, if it needs more memory than is available."""
        if shape in self.tiles:
            return self.tiles[shape]
        settings = self.settings
        count, _, height, width = shape
        try:
            tiles = choose_tiles(
                self.model, height, width, settings.scales, settings.tile_size, settings.overlap, count
            )
        except ValueError as error:
            raise ValueError(f"`{key}`: {error}") from error
        self.tiles[shape] = tiles
        return tiles


def _skipped_entry(image: CroppedImage) -> dict[str, str]:
    """Entry of `skipped.jsonl`. Several tar files may have members of one name, so it names the file, too."""
    entry = {"key": image.key}
    if image.shard:
        entry["file"] = image.shard
    entry["reason"] = str(image.fault)
    return entry

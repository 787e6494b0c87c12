"""Encodes the crops of images to rows of a token set."""

from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import datasets
import torch

from svqvae_hf.models.loading import execution_device
from svqvae_hf.models.modeling_svqvae import SVQVAE
from svqvae_hf.token_sets.crops import CROPS, CroppedImage
from svqvae_hf.token_sets.parts import PartRecord
from svqvae_hf.token_sets.settings import TokenSettings
from svqvae_hf.tokens.context_model import ContextModel
from svqvae_hf.tokens.image_tokens import choose_tiles, image_tokens
from svqvae_hf.tokens.token_files import token_file_content

BATCH_CROPS = 64  # crops of a batch by default, if they are small
BATCH_PIXELS = 2**20  # pixels of a batch by default, at most, unless one crop has more
WAITING_PIXELS = 2**25  # pixels of crops that wait until their batches are full, at most: 96 MiB

Crop = tuple[torch.Tensor, dict[str, Any]]  # (3, height, width), uint8; and its row


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
        self.device, self.dtype = execution_device(self.model), self.model.dtype  # each look-up visits all modules
        self.black, self.white = self.model.config["pixel_range"]
        self.tiles: dict[tuple[int, ...], tuple[int, int] | None] = {}  # of batches by their shape

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
        queue: deque[dict[str, Any]] = deque()  # rows in order, complete once they have ids
        waiting: dict[torch.Size, list[Crop]] = defaultdict(list)
        waiting_pixels = 0
        for pixels, row in self._crops(images, record, on_image):
            batch = waiting[pixels.shape]
            batch.append((pixels, row))
            queue.append(row)
            size = row["height"] * row["width"]
            waiting_pixels += size
            if len(batch) >= (self.batch_size or min(BATCH_CROPS, BATCH_PIXELS // size)):
                waiting_pixels -= len(batch) * size
                self._encode_batch(waiting.pop(pixels.shape))
            elif waiting_pixels > WAITING_PIXELS:
                self._encode_all(waiting)
                waiting_pixels = 0
            while queue and self.settings.id_columns[0] in queue[0]:
                yield queue.popleft()
        self._encode_all(waiting)
        yield from queue

    def _crops(
        self, images: Iterable[CroppedImage], record: PartRecord, on_image: Callable[[], object]
    ) -> Iterator[Crop]:
        """Yields the crops of readable images, and counts the images."""
        names = CROPS[self.settings.crops]
        for image in images:
            if image.unreachable:
                raise OSError(f"`{image.key}` could not be fetched: {image.fault} Run the same command to resume.")
            record.images += 1
            record.enlarged += image.enlarged
            if image.crops is None:
                record.skipped.append({"key": image.key, "reason": str(image.fault)})
            else:
                height, width = image.crops.shape[-2:]
                values = self.features.encode_example(image.values) if image.values else {}
                row = {"height": height, "width": width, "key": image.key, **values}
                for name, pixels in zip(names, torch.from_numpy(image.crops), strict=True):
                    yield pixels, row if len(names) == 1 else {**row, "crop": name}
            on_image()

    def _encode_all(self, waiting: dict[torch.Size, list[Crop]]) -> None:
        for batch in waiting.values():
            self._encode_batch(batch)
        waiting.clear()

    @torch.inference_mode()
    def _encode_batch(self, crops: list[Crop]) -> None:
        """Adds ids to the rows of crops of one size."""
        pixels = torch.stack([pixels for pixels, _ in crops])
        settings = self.settings
        tiles = self._tiles(pixels.shape, crops[0][1]["key"])
        if self.device.type == "cuda":
            pixels = pixels.pin_memory()
        unit = pixels.to(self.device, non_blocking=True).float().div_(255)
        sample = unit.mul_(self.white - self.black).add_(self.black)  # as the image processor, with fewer copies
        encoded = self.model.encode_tokens(sample.to(self.dtype), settings.scales, settings.scale_from, *(tiles or ()))
        grids = [grid.cpu() for grid in encoded]
        for number, (_, row) in enumerate(crops):
            ids = [grid[number] for grid in grids]
            if self.context_model is None:
                stored = [grid.flatten().numpy().astype(settings.id_dtype) for grid in ids]
                row |= dict(zip(settings.id_columns, stored, strict=True))
            else:
                size = row["height"], row["width"]
                tokens = image_tokens(self.model, ids, *size, settings.scales, settings.scale_from, tiles)
                row["tokens"] = token_file_content(tokens, self.context_model)

    def _tiles(self, shape: torch.Size, key: str) -> tuple[int, int] | None:
        """Tiles of a batch. Raises if it needs more memory than is available."""
        count, _, height, width = shape
        if shape not in self.tiles:
            asked = self.settings.tile_size, self.settings.overlap
            try:
                self.tiles[shape] = choose_tiles(self.model, height, width, self.settings.scales, *asked, count)
            except ValueError as error:
                raise ValueError(f"`{key}`: {error}") from error
        return self.tiles[shape]

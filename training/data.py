"""Crops of a `datasets` image set, the same ones for the same seed and step whatever happened before."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from datasets import Dataset, Image, load_dataset
from torch.utils.data import DataLoader, Sampler
from torch.utils.data import Dataset as TorchDataset

from svqvae_hf.image_processing_svqvae import SVQVAEImageProcessor, to_rgb


class Crop(NamedTuple):
    """Which crop to cut: row of the image set, side in pixels, and the seed of place and flip."""

    row: int
    side: int
    seed: int


def load_images(
    dataset_name: str | None, dataset_config_name: str | None, train_data_dir: str | None, image_column: str
) -> Dataset:
    """Loads the train split of an image set, from the Hub or from a folder of images.

    Args:
        dataset_name (`str`, *optional*): Name on the Hub, or a local data set folder.
        dataset_config_name (`str`, *optional*): Its configuration.
        train_data_dir (`str`, *optional*): Folder of images, searched through; instead of `dataset_name`.
        image_column (`str`): Column that holds the images.

    Raises:
        ValueError: If not exactly one source is given, or the column is missing.
    """
    if (dataset_name is None) == (train_data_dir is None):
        raise ValueError("Exactly one of `--dataset_name` and `--train_data_dir` must be given.")
    if dataset_name is not None:
        images = load_dataset(dataset_name, dataset_config_name, split="train")
    else:
        images = load_dataset("imagefolder", data_dir=train_data_dir, split="train", drop_labels=True)
    if image_column not in images.column_names:
        raise ValueError(f"`--image_column` must be one of {images.column_names}, but is {image_column!r}.")
    return images.select_columns(image_column).cast_column(image_column, Image())


class CropSampler(Sampler[list[Crop]]):
    """Batches of crops, one crop side a batch.

    Batch `i` depends on the seed, `i` and the process alone, so a run resumes anywhere and no two processes see the
    same crop. Sides take turns at random. `batch_size` crops of the largest side make a batch, and as many pixels of a
    smaller one. Rows come in a new order each time the set has been seen.

    Args:
        num_rows (`int`): Rows of the image set.
        sides (`list[int]`): Crop sides in pixels.
        batch_size (`int`): Crops of the largest side in a batch of one process.
        num_batches (`int`): Batches in all.
        first_batch (`int`, defaults to 0): Batch to go on from.
        process_index (`int`, defaults to 0): This process.
        num_processes (`int`, defaults to 1): Processes that share the set.
        seed (`int`, defaults to 0): Seed of the order, the sides, the places and the flips.
    """

    def __init__(
        self,
        num_rows: int,
        sides: list[int],
        batch_size: int,
        num_batches: int,
        first_batch: int = 0,
        process_index: int = 0,
        num_processes: int = 1,
        seed: int = 0,
    ):
        self.num_rows = num_rows
        self.sides = sides
        self.batch_size = batch_size
        self.num_batches = num_batches
        self.first_batch = first_batch
        self.process_index = process_index
        self.num_processes = num_processes
        self.seed = seed

    def __len__(self) -> int:
        return self.num_batches - self.first_batch

    def __iter__(self) -> Iterator[list[Crop]]:
        """Yields the batches of this process from `first_batch` on."""
        rng = np.random.default_rng(self.seed)
        order = np.empty(0, dtype=np.int64)
        for batch in range(self.num_batches):
            side = int(rng.choice(self.sides))
            size = self.batch_size * (max(self.sides) // side) ** 2
            needed = size * self.num_processes
            while len(order) < needed:
                order = np.concatenate([order, rng.permutation(self.num_rows)])
            rows, order = order[:needed], order[needed:]
            seeds = rng.integers(2**63, size=needed)
            if batch >= self.first_batch:
                mine = range(self.process_index, needed, self.num_processes)
                yield [Crop(int(rows[i]), side, int(seeds[i])) for i in mine]


class CropDataset(TorchDataset):
    """Cuts crops from an image set.

    An image smaller than the crop is enlarged until it holds it. Half of the crops are flipped.

    Args:
        images (`datasets.Dataset`): Image set with one column of images.
        pixel_range (`tuple[float, float]`): Range of the crops.
    """

    def __init__(self, images: Dataset, pixel_range: tuple[float, float]):
        self.images = images
        self.column = images.column_names[0]
        self.processor = SVQVAEImageProcessor(pixel_range=pixel_range)

    def __getitem__(self, crop: Crop) -> torch.Tensor:
        """Cuts one crop: `(3, side, side)` in `pixel_range`.

        Raises:
            ValueError: If the image cannot be read.
        """
        try:
            image = to_rgb(self.images[crop.row][self.column])
        except (OSError, SyntaxError, ValueError) as error:
            raise ValueError(f"row {crop.row} of the image set cannot be read as an image: {error}") from error
        growth = crop.side / min(image.size)
        if growth > 1:
            image = image.resize([max(crop.side, round(growth * length)) for length in image.size])
        rng = np.random.default_rng(crop.seed)
        left, top = (int(rng.integers(length - crop.side + 1)) for length in image.size)
        image = image.crop((left, top, left + crop.side, top + crop.side))
        pixels = self.processor.preprocess(image)["pixel_values"][0]
        return pixels.flip(-1) if rng.random() < 0.5 else pixels


def crop_loader(dataset: CropDataset, sampler: CropSampler, num_workers: int) -> DataLoader:
    """Loader of batches `(batch, 3, side, side)`, read ahead by `num_workers` processes.

    It has a random generator of its own, so that it leaves the global one, which a checkpoint holds, alone.
    """
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=num_workers,
        generator=torch.Generator(),
        pin_memory=torch.cuda.is_available(),
    )

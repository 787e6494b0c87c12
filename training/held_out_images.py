"""Held-out images of `--validation_data_dir`: opens the set, and reads centre crops of some images."""

from dataclasses import dataclass, field
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from denoiser import PIXEL_RANGE
from diffusion_options import DiffusionOptions
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from svqvae_hf import SVQVAEImageProcessor
from svqvae_hf.data.image_parts import IndexedRows
from svqvae_hf.data.image_rows import ImageRow, fault_of, read_image
from svqvae_hf.data.image_sets import open_images
from svqvae_hf.trainer.data.crop_batches import has_label
from svqvae_hf.trainer.data.crop_loader import prepare_worker
from svqvae_hf.trainer.data.crops import CropPolicy
from svqvae_hf.trainer.data.image_source import ImageSource
from svqvae_hf.trainer.options import about_split

logger = get_logger(__name__, log_level="INFO")


@dataclass
class HeldOut:
    """Images of `--validation_data_dir`.

    Args:
        rows ([`~svqvae_hf.data.image_parts.IndexedRows`]): The images.
        digest (`str`): Digest of the set.

    Attributes:
        logged_keys (`set[str]`): Keys of the skipped images that the log has named.
    """

    rows: IndexedRows
    digest: str
    logged_keys: set[str] = field(default_factory=set, init=False)

    def log_skipped(self, batch: "HeldOutBatch") -> None:
        """Logs the images of a batch that were skipped, each once."""
        for key, reason in batch.skipped:
            if key not in self.logged_keys:
                self.logged_keys.add(key)
                logger.warning(f"Skipped `{key}` of `--validation_data_dir`: {reason}", main_process_only=False)


def open_held_out(options: DiffusionOptions, images: ImageSource) -> HeldOut | None:
    """Opens the held-out images; None without `--validation_data_dir`.

    Raises:
        ValueError: If an image is trained on, or the set has other classes.
    """
    if options.validation_data_dir is None:
        return None
    columns = []
    if options.label_column is not None:
        columns.append(options.label_column)
    with about_split("validation_split"):  # errors name this option
        held_out = open_images(
            [options.validation_data_dir],
            split=options.validation_split,
            columns=columns,
            keep_labels=False,
            copy=True,  # on this machine, so that an image can be read by its number
            results=options.output_dir,
        )
    images.check_held_out(held_out)
    if options.label_column is not None:
        label_feature = held_out.features[options.label_column]
        if label_feature != images.label_feature:
            raise ValueError(
                f"`--validation_data_dir` must have the classes of the training images, {images.label_feature}, but "
                f"has {label_feature}."
            )
    rows = cast(IndexedRows, held_out.rows)  # not None, because the set is a copy
    return HeldOut(rows, held_out.fingerprint)


@dataclass
class HeldOutBatch:
    """Centre crops of some held-out images.

    Args:
        numbers (`list[int]`): Numbers of the images in the set.
        sample (`torch.Tensor` of shape `(B, 3, side, side)`): Crops in `PIXEL_RANGE`.
        labels (`list[int]`, *optional*): Labels of the images; `None` without `--label_column`.
        skipped (`list[tuple[str, str]]`): Keys of images that were left out, with reasons: unreadable or no label.
    """

    numbers: list[int]
    sample: torch.Tensor
    labels: list[int] | None
    skipped: list[tuple[str, str]]


@dataclass
class HeldOutReader(Dataset[HeldOutBatch]):
    """Reads held-out images in batches, in any process.

    Args:
        options ([`DiffusionOptions`]): Options.
        held_out ([`HeldOut`]): The images.
        numbers_of_batches (`list[range]`): Numbers of the images of each batch.
    """

    options: DiffusionOptions
    held_out: HeldOut
    numbers_of_batches: list[range]

    def __len__(self) -> int:
        return len(self.numbers_of_batches)

    def __getitem__(self, index: int) -> HeldOutBatch:
        return read_held_out(self.options, self.held_out, self.numbers_of_batches[index])


def load_held_out(options: DiffusionOptions, held_out: HeldOut, accelerator: Accelerator) -> DataLoader[Any]:
    """Loader of the held-out images of this process, which its workers read."""
    # Of two processes, the first one has the images 0, 2, 4 and so on.
    numbers = range(accelerator.process_index, len(held_out.rows), accelerator.num_processes)
    batch_size = options.per_device_train_batch_size
    numbers_of_batches = []
    for start in range(0, len(numbers), batch_size):
        numbers_of_batches.append(numbers[start : start + batch_size])
    return DataLoader(
        HeldOutReader(options, held_out, numbers_of_batches),
        batch_size=None,  # because each item of the reader is a batch
        num_workers=options.num_workers,
        generator=torch.Generator(),  # not the global one
        worker_init_fn=prepare_worker,
    )


def read_held_out(options: DiffusionOptions, held_out: HeldOut, numbers: range) -> HeldOutBatch:
    """Reads held-out images, and cuts their centres. Unreadable ones, and those without a label, are left out."""
    policy = CropPolicy([options.resolution], center_crop=True, random_flip=False, resize_range=[1.0, 1.0])
    label_column = options.label_column
    numbers_of_crops = []
    crops: list[Any] = []
    labels: list[int] = []  # stays empty without `--label_column`
    skipped: list[tuple[str, str]] = []
    for number in numbers:
        row = held_out.rows[number]
        try:
            image = read_labelled_image(row, label_column)
        except (OSError, ValueError) as error:
            skipped.append((row.key, fault_of(error)))
            continue
        if label_column is not None:
            labels.append(row.values[label_column])
        numbers_of_crops.append(number)
        crops.append(policy.cut(image, options.resolution, seed=[number]))
    if not crops:
        return HeldOutBatch([], torch.empty(0), None, skipped)
    processor = SVQVAEImageProcessor(pixel_range=PIXEL_RANGE)
    sample = processor.preprocess(crops)["pixel_values"]  # (B, 3, side, side)
    if label_column is None:
        return HeldOutBatch(numbers_of_crops, sample, None, skipped)
    return HeldOutBatch(numbers_of_crops, sample, labels, skipped)


def read_labelled_image(row: ImageRow, label_column: str | None) -> Image.Image:
    """Reads the image of a row. Raises OSError or ValueError if it is unreadable or has no label in the column."""
    image = read_image(row)
    if label_column is not None and not has_label(row.values[label_column]):
        raise ValueError("it has no label.")
    return image

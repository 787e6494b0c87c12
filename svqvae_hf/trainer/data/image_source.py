"""The images of a run: loaders of their crops."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger

from svqvae_hf.data.image_sets import ImageSet, open_images
from svqvae_hf.trainer.data.crop_batches import CropBatch, CropCutter
from svqvae_hf.trainer.data.crop_loader import CropLoader
from svqvae_hf.trainer.data.crops import CropPolicy
from svqvae_hf.trainer.data.sample_order import Share
from svqvae_hf.trainer.options import ImageOptions, about_split

logger = get_logger(__name__, log_level="INFO")


@dataclass
class ImageSource:
    """The image set of a run.

    Args:
        options ([`ImageOptions`]): Options.
        accelerator (`Accelerator`): Accelerator whose processes share the set.
        pixel_range (`tuple[float, float]`): Values of black and white.
        label_column (`str`, *optional*): Column that holds labels or captions.
        synthetic_fraction (`float`, defaults to 0.0): Fraction of the crops that are synthetic.

    Raises:
        ValueError: If there is no such image set.
    """

    options: ImageOptions
    accelerator: Accelerator
    pixel_range: tuple[float, float]
    label_column: str | None = None
    synthetic_fraction: float = 0.0

    def __post_init__(self) -> None:
        options = self.options
        columns = []
        if self.label_column is not None:
            columns.append(self.label_column)
        self.images = open_images(
            [options.train_data_dir or options.dataset_name or ""],
            config=options.dataset_config_name,
            split=options.split,
            image_column=options.image_column,
            columns=columns,
            keep_labels=False,
            data_files=options.data_files,
            copy=not options.streaming,
            results=options.output_dir,
        )
        self.mixed: ImageSet | None = None
        if options.mix_data_dir is not None:
            with about_split("mix_split"):
                self.mixed = open_images(
                    [options.mix_data_dir],
                    split=options.mix_split,
                    columns=columns,
                    keep_labels=False,
                    copy=True,
                    results=options.output_dir,
                )
        self.label_feature: Any = None
        if self.label_column is not None:
            self.label_feature = self.images.features[self.label_column]
            if self.mixed is not None and self.mixed.features[self.label_column] != self.label_feature:
                raise ValueError("`--mix_data_dir` must have the classes of the training images, but has others.")
        self.named_keys: list[str] = []  # of skipped images
        self.num_crops = 0
        self.has_warned = False

    def loader(self, sides: list[int], num_steps: int, seed: int, batches_per_step: int = 1) -> CropLoader:
        """Makes a loader of this process's crops, cut as [`CropPolicy`] says; the seed decides which they are."""
        options = self.options
        policy = CropPolicy(
            sides, options.center_crop, options.random_flip, options.resize_range, self.synthetic_fraction
        )
        cutter = CropCutter(
            policy,
            self.pixel_range,
            replace(Share.of(options, self.accelerator), batches=batches_per_step),
            num_steps,
            seed,
            self.label_column,
            self.mixed,
            options.mix_fraction,
        )
        return CropLoader(self.images, cutter, options.dataloader_num_workers, options.shuffle_buffer)

    def fresh_crops(self, sides: list[int], num_batches: int, step: int = 0) -> Iterator[torch.Tensor]:
        """Yields batches of crops on the device, other than those that the run trains on.

        Args:
            sides (`list[int]`): Sides of the crops in pixels, see [`CropPolicy`].
            num_batches (`int`): Number of batches.
            step (`int`, defaults to 0): Step of the run. Each has crops of its own.
        """
        loader = self.loader(sides, num_batches, self.options.seed + 1 + step)
        loader.shuffle_buffer = min(loader.shuffle_buffer, num_batches * self.options.per_device_train_batch_size)
        for batch in loader:
            yield batch.sample.to(self.accelerator.device)

    def to_device(self, batch: CropBatch) -> torch.Tensor:
        """Moves the crops of a batch to the device. Logs once which images are skipped, and that some are small."""
        for key, reason in batch.skipped:
            if key not in self.named_keys:
                self.named_keys.append(key)
                logger.warning(f"Skipped `{key}`: {reason}", main_process_only=False)
        self.num_crops += len(batch.sample)
        if batch.enlarged and not self.has_warned:
            self.has_warned = True
            side = batch.sample.shape[-1]
            logger.warning(
                f"{batch.enlarged} of the first {self.num_crops} images are smaller than their crops of {side} pixels,"
                " and are enlarged."
            )
        return batch.sample.to(self.accelerator.device, non_blocking=True)

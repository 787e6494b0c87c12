"""The images of a run: loaders of their crops."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger

from svqvae_hf.data.image_sets import ImageSet, open_images
from svqvae_hf.trainer.data.crop_batches import CropBatch, CropCutter
from svqvae_hf.trainer.data.crop_loader import CropLoader
from svqvae_hf.trainer.data.crops import CropPolicy
from svqvae_hf.trainer.data.held_out import check_held_out
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
        columns = []
        if self.label_column is not None:
            columns.append(self.label_column)
        self.images = self._open_training_images(columns)
        self.mixed: ImageSet | None = None
        if self.options.mix_data_dir is not None:
            self.mixed = self._open_mixed_images(self.options.mix_data_dir, columns)
        self.label_feature: Any = None
        if self.label_column is not None:
            self.label_feature = self.images.features[self.label_column]
            if self.mixed is not None and self.mixed.features[self.label_column] != self.label_feature:
                raise ValueError("`--mix_data_dir` must have the classes of the training images, but has others.")
        self.logged_keys: set[str] = set()  # of skipped images
        self.num_crops = 0
        self.has_warned_of_enlarged = False

    def _open_training_images(self, columns: Sequence[str]) -> ImageSet:
        """Opens the images of the options, with some of their columns."""
        options = self.options
        source = options.train_data_dir or options.dataset_name or ""
        return open_images(
            [source],
            config=options.dataset_config_name,
            split=options.split,
            image_column=options.image_column,
            columns=columns,
            keep_labels=False,
            copy=not options.streaming,
            results=options.output_dir,
        )

    def _open_mixed_images(self, name: str, columns: Sequence[str]) -> ImageSet:
        """Opens the other images, which are mixed into the training images."""
        with about_split("mix_split"):
            return open_images(
                [name],
                split=self.options.mix_split,
                columns=columns,
                keep_labels=False,
                copy=True,
                results=self.options.output_dir,
            )

    def check_held_out(self, held_out: ImageSet) -> None:
        """Raises ValueError if an image of a validation is trained on, see [`check_held_out`]."""
        for training_set in (self.images, self.mixed):
            check_held_out(held_out, training_set)

    def loader(self, sides: list[int], num_steps: int, seed: int, batches_per_step: int = 1) -> CropLoader:
        """Makes a loader of the crops of this process.

        Args:
            sides (`list[int]`): Sides of the crops in pixels, see [`CropPolicy`].
            num_steps (`int`): Number of steps.
            seed (`int`): Seed that decides which crops are cut.
            batches_per_step (`int`, defaults to 1): Batches of this process in a step.
        """
        options = self.options
        # The share says which crops of each step this process cuts. It depends on the number of batches in a step, for
        # which the options have the number of a training step.
        share_of_training = Share.of(options, self.accelerator)
        share = replace(share_of_training, batches=batches_per_step)
        cutter = CropCutter(
            policy=self._policy(sides),
            pixel_range=self.pixel_range,
            share=share,
            num_steps=num_steps,
            seed=seed,
            label_column=self.label_column,
            mixed=self.mixed,  # the images of `--mix_data_dir`
            mix_fraction=options.mix_fraction,
        )
        return CropLoader(self.images, cutter, options.num_workers, options.shuffle_buffer)

    def _policy(self, sides: list[int]) -> CropPolicy:
        """How crops of some sides are cut, as the options say."""
        options = self.options
        return CropPolicy(
            sides=sides,
            center_crop=options.center_crop,
            random_flip=options.random_flip,
            resize_range=options.resize_range,
            synthetic_fraction=self.synthetic_fraction,
        )

    def fresh_crops(self, sides: list[int], num_batches: int, step: int = 0) -> Iterator[torch.Tensor]:
        """Yields batches of crops on the device, other than those that the run trains on.

        Args:
            sides (`list[int]`): Sides of the crops in pixels, see [`CropPolicy`].
            num_batches (`int`): Number of batches.
            step (`int`, defaults to 0): Step of the run. Each has crops of its own.
        """
        seed = self.options.seed + 1 + step  # the training crops have the seed of the options itself
        loader = self.loader(sides, num_batches, seed)
        num_crops = num_batches * self.options.per_device_train_batch_size
        loader.shuffle_buffer = min(loader.shuffle_buffer, num_crops)  # a stream need not read more images
        for batch in loader:
            yield batch.sample.to(self.accelerator.device)

    def to_device(self, batch: CropBatch) -> torch.Tensor:
        """Moves the crops of a batch to the device. Logs once which images are skipped, and that some are small."""
        self.num_crops += len(batch.sample)
        self._log_skipped(batch)
        if batch.enlarged > 0 and not self.has_warned_of_enlarged:
            self._warn_of_enlarged(batch)
        return batch.sample.to(self.accelerator.device, non_blocking=True)

    def _log_skipped(self, batch: CropBatch) -> None:
        """Logs the images that were skipped, each once."""
        for key, reason in batch.skipped:
            if key not in self.logged_keys:
                self.logged_keys.add(key)
                logger.warning(f"Skipped `{key}`: {reason}", main_process_only=False)

    def _warn_of_enlarged(self, batch: CropBatch) -> None:
        """Warns, for the first batch with such images, that images are smaller than their crops."""
        self.has_warned_of_enlarged = True
        side = batch.sample.shape[-1]
        logger.warning(
            f"{batch.enlarged} of the first {self.num_crops} images are smaller than their crops of {side} pixels, "
            "and are enlarged."
        )

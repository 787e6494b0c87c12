"""The images of a run: crops to train on, and watch over those that cannot be read."""

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger

from svqvae_hf.trainer.data.crops import CropBatch, CropLoader, CropPolicy, load_images
from svqvae_hf.trainer.options import ImageOptions

JUDGED_IMAGES = 200  # read before the share of unreadable ones is judged

logger = get_logger(__name__, log_level="INFO")


class ImageSource:
    """The image set of a run.

    Args:
        config ([`ImageOptions`]): Options.
        accelerator (`Accelerator`): Whose processes share the set.
        pixel_range (`tuple[float, float]`): Values of black and white.
        label_column (`str`, *optional*): Column that holds labels or captions.

    Raises:
        ValueError: If there is no such image set.
    """

    def __init__(
        self,
        config: ImageOptions,
        accelerator: Accelerator,
        pixel_range: tuple[float, float],
        label_column: str | None = None,
    ):
        self.config = config
        self.accelerator = accelerator
        self.pixel_range = pixel_range
        self.images = load_images(
            config.dataset_name,
            config.dataset_config_name,
            config.data_files,
            config.train_data_dir,
            config.image_column,
            config.split,
            config.streaming,
            label_column,
        )
        self.num_read = self.num_unreadable = 0
        self.unreadable: set[str] = set()

    def loader(self, sides: list[int], num_batches: int, seed: int) -> CropLoader:
        """Crops of these sides for this process; another seed gives other ones."""
        config = self.config
        policy = CropPolicy(
            sides=sides,
            batch_size=config.train_batch_size,
            center_crop=config.center_crop,
            random_flip=config.random_flip,
            resize_range=tuple(config.resize_range),
        )
        return CropLoader(
            self.images,
            policy,
            self.pixel_range,
            seed=seed,
            num_workers=config.dataloader_num_workers,
            process_index=self.accelerator.process_index,
            num_processes=self.accelerator.num_processes,
            num_batches=num_batches,
            shuffle_buffer=config.shuffle_buffer,
        )

    def receive(self, batch: CropBatch) -> torch.Tensor:
        """Brings the crops of a batch to the accelerator, and names the images that could not be read.

        Raises:
            ValueError: If they are too many.
        """
        self.num_read += batch.num_read
        self.num_unreadable += len(batch.unreadable)
        for name in batch.unreadable:
            if name not in self.unreadable:
                self.unreadable.add(name)
                logger.warning(f"Left out, since it cannot be read as an image: {name}", main_process_only=False)
        share = self.num_unreadable / self.num_read
        if self.num_read >= JUDGED_IMAGES and share > self.config.max_unreadable_share:
            raise ValueError(
                f"At most {self.config.max_unreadable_share:.1%} of the images may be unreadable, but {share:.1%} of "
                f"the {self.num_read:,} read so far are, {min(self.unreadable)} among them. Mend or remove them, or "
                "raise `--max_unreadable_share`."
            )
        return batch.sample.to(self.accelerator.device, non_blocking=True)

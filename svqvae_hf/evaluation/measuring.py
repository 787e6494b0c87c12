"""Measures the images of a set one by one, split over all processes.

A *record* holds the values of one image as a dictionary. All images are compared in 8 bits.
"""

import logging
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from operator import length_hint
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from PIL import Image, ImageOps
from tqdm import tqdm

from svqvae_hf.data.image_rows import ImageRow, ImageSource, fault_of, image_name, read_image
from svqvae_hf.evaluation import metrics
from svqvae_hf.evaluation.perceptual import LPIPS
from svqvae_hf.tokens.image_tokens import OUT_OF_MEMORY, TooLargeError, is_out_of_memory

Images = Iterable[ImageSource | ImageRow]
Records = list[dict[str, Any]]
MAX_RESOLUTION = 8192  # such an image takes 200 MB
SECONDS_PER_LINE = 30  # of a log about the progress

logger = logging.getLogger(__name__)


def measure_images(
    measure: Callable[..., dict[str, Any]], images: Images, resolution: int | None, state: PartialState
) -> tuple[Records, Records]:
    """Measures every n-th image of a set in each of n processes.

    Args:
        measure (`Callable`): Called with an image, its `index` and its `name`; returns its values.
        images (`Iterable`): An [`ImageSet`], or other inputs of [`read_image`]: images, paths, undecoded rows of
            `datasets`.
        resolution (`int`, *optional*): Side in pixels. The shorter side of each image is resized to it (bicubic) and
            the centre cropped. Images keep their size if not given.
        state (`PartialState`): The processes.

    Returns:
        `tuple[list[dict], list[dict]]`: Records of the measured images and of the skipped ones, from all processes, in
        the order of the set. Images are skipped that cannot be read, or are too large for memory or for a codec.

    Raises:
        ValueError: `resolution` is out of range, or all images are skipped.
    """
    _check_resolution(resolution)
    records: Records = []
    skipped: Records = []
    with _progress(images, state) as images_with_progress:
        for index, source in enumerate(images_with_progress):
            process_of_image = index % state.num_processes
            if process_of_image != state.process_index:
                continue
            record: dict[str, Any] = {"index": index, "name": image_name(source, index)}
            try:
                image = _read_square(source, resolution)
                values = measure(image, index, record["name"])
            except (_SkippedError, TooLargeError) as error:
                skipped.append(record | {"reason": str(error)})
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                skipped.append(record | {"reason": OUT_OF_MEMORY})
            else:
                records.append(record | values)
    records = _of_all_processes(records)
    skipped = _of_all_processes(skipped)
    if not records:
        raise ValueError(_nothing_measured(skipped))
    return records, skipped


class _CountedImages:
    """Yields images, and counts those before the current one. Shows a bar if stderr is a terminal."""

    def __init__(self, images: Images):
        self.images = images
        self.total = length_hint(images) or None  # `length_hint` returns 0 for an unknown length
        self.num_measured = 0

    def __iter__(self) -> Iterator[ImageSource | ImageRow]:
        for num_before, source in enumerate(tqdm(self.images, total=self.total, unit="image", disable=None)):
            self.num_measured = num_before
            yield source

    def __str__(self) -> str:
        """Line of a log, such as `measured 2 of 5 images`."""
        if self.total is None:
            return f"measured {self.num_measured:,} images"
        return f"measured {self.num_measured:,} of {self.total:,} images"


@contextmanager
def _progress(images: Images, state: PartialState) -> Iterator[Images]:
    """Images of a set. The first process logs a line after each half minute, and one if a signal ends the block."""
    if not state.is_main_process:
        yield images
        return
    counted_images = _CountedImages(images)
    is_over = threading.Event()
    # A thread, because one large image may take minutes.
    thread = threading.Thread(target=_log_lines, args=(counted_images, is_over), daemon=True)
    thread.start()
    try:
        yield counted_images
    except (KeyboardInterrupt, SystemExit):  # Ctrl-C, SIGTERM
        logger.info(f"interrupted: {counted_images}, and wrote no report")
        raise
    finally:
        is_over.set()
        thread.join()


def _log_lines(counted_images: _CountedImages, is_over: threading.Event) -> None:
    """Logs the progress after each half minute."""
    while not is_over.wait(SECONDS_PER_LINE):
        logger.info(str(counted_images))


def _check_resolution(resolution: int | None) -> None:
    """Raises ValueError if a resolution is out of range."""
    if resolution is not None and not 1 <= resolution <= MAX_RESOLUTION:
        raise ValueError(f"`resolution` must be in [1, {MAX_RESOLUTION}], got {resolution}.")


class _SkippedError(Exception):
    """An image that cannot be read, with the reason."""


def _read_square(source: ImageSource | ImageRow, resolution: int | None) -> Image.Image:
    """Reads an image, and resizes and crops it to a square of this side, if any. Raises _SkippedError."""
    try:
        image = read_image(source)
    except (OSError, ValueError) as error:
        raise _SkippedError(fault_of(error)) from error
    if resolution is None:
        return image
    return ImageOps.fit(image, (resolution, resolution), Image.Resampling.BICUBIC)


def _of_all_processes(records: Records) -> Records:
    """Records of all processes, in the order of the set."""
    return sorted(gather_object(records), key=lambda record: record["index"])


def _nothing_measured(skipped: Records) -> str:
    """Message of the error if no image of a set could be measured."""
    message = f"At least one image must be usable, but none of {len(skipped)} is."
    if not skipped:
        return message
    first = skipped[0]
    return f"{message} The first, `{first['name']}`: {first['reason']}"


def image_metrics(sample: torch.Tensor, target: torch.Tensor, lpips: LPIPS | None = None) -> dict[str, float | None]:
    """Computes PSNR, SSIM and LPIPS of a reconstruction.

    Args:
        sample (`torch.Tensor` of shape `(1, 3, height, width)`): Reconstruction in uint8.
        target (`torch.Tensor` of shape `(1, 3, height, width)`): Reference in uint8.
        lpips ([`LPIPS`], *optional*): Network of LPIPS.

    Returns:
        `dict[str, float | None]`: `psnr`, `ssim` and `lpips`. `None` if the image is too small.
    """
    shorter_side = min(sample.shape[-2:])
    values: dict[str, float | None] = {"psnr": metrics.psnr(sample, target).item(), "ssim": None, "lpips": None}
    if shorter_side >= metrics.SSIM_SIDE:
        values["ssim"] = metrics.ssim(sample, target).item()
    if lpips is not None and shorter_side >= lpips.min_side:
        signed_sample = sample.float() / 127.5 - 1  # in [-1, 1]
        signed_target = target.float() / 127.5 - 1
        values["lpips"] = lpips(signed_sample, signed_target).item()
    return values


def to_tensor(image: Image.Image, device: torch.device | str = "cpu") -> torch.Tensor:
    """Converts an image to a uint8 tensor of shape `(1, 3, height, width)`."""
    pixels = torch.from_numpy(np.array(image))  # (height, width, 3)
    pixels = pixels.movedim(-1, 0)  # (3, height, width)
    return pixels[None].to(device)  # (1, 3, height, width)


def to_image(sample: torch.Tensor) -> Image.Image:
    """Converts an image `(1, 3, height, width)` in [-1, 1] to 8 bits."""
    pixels = ((sample[0] + 1) * 127.5).clamp(0, 255).round().byte()  # (3, height, width)
    pixels = pixels.movedim(0, -1)  # (height, width, 3)
    return Image.fromarray(pixels.cpu().numpy())

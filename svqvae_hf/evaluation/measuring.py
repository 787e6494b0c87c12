"""Measures the images of a set one by one, split over all processes, and summarizes their values.

A *record* holds the values of one image as a dictionary. All images are compared in 8 bits.
"""

import math
import platform
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import version
from operator import length_hint
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from PIL import Image, ImageOps
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance
from tqdm import tqdm

from svqvae_hf.data.image_rows import ImageRow, ImageSource, fault_of, image_name, read_image
from svqvae_hf.evaluation import metrics
from svqvae_hf.evaluation.perceptual import LPIPS
from svqvae_hf.tokens.image_tokens import OUT_OF_MEMORY, TooLargeError, is_out_of_memory

LIBRARIES = ("svqvae-hf", "torch", "diffusers", "torchmetrics", "lpips", "torch-fidelity", "pillow", "numpy")
MANY_IMAGES = 10_000  # papers report FID on at least this many
IDS_PER_CODE = 10  # with fewer, the frequencies of codes say little

Records = list[dict[str, Any]]


def measure_images(
    measure: Callable[..., dict[str, Any]],
    images: Iterable[ImageSource | ImageRow],
    resolution: int | None,
    state: PartialState,
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
        the order of the set. Images are skipped that cannot be read or are too large for memory.

    Raises:
        ValueError: `resolution` is out of range, or all images are skipped.
    """
    if resolution is not None and resolution < 1:
        raise ValueError(f"`resolution` must be at least 1, got {resolution}.")
    records: Records = []
    skipped: Records = []
    bar = tqdm(
        images, total=length_hint(images) or None, unit="image", disable=None if state.is_main_process else True
    )
    for index, source in enumerate(bar):
        if index % state.num_processes != state.process_index:
            continue
        identity: dict[str, Any] = {"index": index, "name": image_name(source, index)}
        try:
            image = _read_crop(source, resolution)
            records.append(identity | measure(image, **identity))
        except (_UnreadableError, TooLargeError) as error:
            skipped.append(identity | {"reason": str(error)})
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            skipped.append(identity | {"reason": OUT_OF_MEMORY})
    records, skipped = (sorted(gather_object(each), key=lambda record: record["index"]) for each in (records, skipped))
    if not records:
        first = f" The first, `{skipped[0]['name']}`: {skipped[0]['reason']}" if skipped else ""
        raise ValueError(f"At least one image must be usable, but none of {len(skipped)} is.{first}")
    return records, skipped


class _UnreadableError(Exception):
    """An image cannot be read."""


def _read_crop(source: ImageSource | ImageRow, resolution: int | None) -> Image.Image:
    try:
        image = read_image(source)
    except (OSError, ValueError) as error:
        raise _UnreadableError(fault_of(error)) from error
    if resolution is None:
        return image
    return ImageOps.fit(image, (resolution, resolution), Image.Resampling.BICUBIC)


def image_metrics(sample: torch.Tensor, target: torch.Tensor, lpips: LPIPS | None = None) -> dict[str, float | None]:
    """Computes PSNR, SSIM and LPIPS of a reconstruction.

    Args:
        sample (`torch.Tensor` of shape `(1, 3, height, width)`): Reconstruction in uint8.
        target (`torch.Tensor` of shape `(1, 3, height, width)`): Reference in uint8.
        lpips ([`LPIPS`], *optional*): Network of LPIPS.

    Returns:
        `dict[str, float | None]`: `psnr`, `ssim` and `lpips`. `None` if the image is too small.
    """
    side = min(sample.shape[-2:])
    values: dict[str, float | None] = {
        "psnr": metrics.psnr(sample, target).item(),
        "ssim": metrics.ssim(sample, target).item() if side >= metrics.SSIM_SIDE else None,
        "lpips": None,
    }
    if lpips is not None and side >= lpips.min_side:
        values["lpips"] = lpips(sample.float() / 127.5 - 1, target.float() / 127.5 - 1).item()
    return values


def to_tensor(image: Image.Image, device: torch.device | str = "cpu") -> torch.Tensor:
    """Converts an image to a uint8 tensor of shape `(1, 3, height, width)`."""
    return torch.from_numpy(np.array(image)).movedim(-1, 0)[None].to(device)


def to_image(sample: torch.Tensor) -> Image.Image:
    """Converts an image `(1, 3, height, width)` in [-1, 1] to 8 bits."""
    pixels = ((sample[0] + 1) * 127.5).clamp(0, 255).round().byte()
    return Image.fromarray(pixels.movedim(0, -1).cpu().numpy())


class ReconstructionFID:
    """rFID over the images of all processes: the Fréchet distance of reconstructions and their references.

    Args:
        inception (`nn.Module`): Maps uint8 images `(batch, 3, height, width)` to features `(batch, n)`.
        device (`torch.device`): Device of the images.
    """

    def __init__(self, inception: nn.Module, device: torch.device):
        self.fid = FrechetInceptionDistance(inception)
        self.fid.orig_dtype = torch.float32  # otherwise set by the first image, but a process may have none
        self.fid = self.fid.to("cpu" if device.type == "mps" else device)  # mps has no float64

    def add(self, sample: torch.Tensor, target: torch.Tensor) -> None:
        """Adds a reconstruction and its reference."""
        self.fid.update(sample.to(self.fid.device), real=False)
        self.fid.update(target.to(self.fid.device), real=True)

    def compute(self) -> float:
        """The distance."""
        return self.fid.compute().item()


def mean(values: Iterable[float | None]) -> float | None:
    """Mean of the available values. Infinite PSNRs (exact images) are excluded unless all are infinite."""
    present = [value for value in values if value is not None]
    counted = [value for value in present if value != math.inf] or present
    return math.fsum(counted) / len(counted) if counted else None


class Totals:
    """Codes and rFID of one tokenizer, or of one scale, over the images of this process.

    Args:
        codebook_size (`int`): Number of codes; 0 if there are no ids.
        inception (`nn.Module`, *optional*): Network of FID.
        device (`torch.device`): Device of the images.
    """

    def __init__(self, codebook_size: int, inception: nn.Module | None, device: torch.device):
        self.counts = torch.zeros(codebook_size, dtype=torch.int64)
        self.fid = ReconstructionFID(inception, device) if inception is not None else None

    def add(self, counts: torch.Tensor, sample: torch.Tensor, target: torch.Tensor) -> None:
        """Adds an image: how often each code occurs, its reconstruction and its reference."""
        self.counts += counts.cpu()
        if self.fid is not None:
            self.fid.add(sample, target)

    def values(self, results: Records, records: Records) -> dict[str, Any]:
        """Values of the whole set, from the sums of all processes, which `counts` then holds as well.

        Args:
            results (`list[dict]`): For each image, `bits`, `stored_bits` and the values of [`image_metrics`].
            records (`list[dict]`): Records of the images.
        """
        self.counts = torch.stack(gather_object([self.counts])).sum(0)
        pixels = sum(record["width"] * record["height"] for record in records)
        return {
            **{key: mean(each[key] for each in results) for key in ("psnr", "ssim", "lpips")},
            "rfid": self.fid.compute() if self.fid is not None and len(records) > 1 else None,
            "usage": metrics.usage(self.counts) if len(self.counts) else None,
            "perplexity": metrics.perplexity(self.counts) if len(self.counts) else None,
            "bits_per_pixel": sum(each["bits"] for each in results) / pixels,
            "bits_per_pixel_stored": sum(each["stored_bits"] for each in results) / pixels,
        }


def library_versions() -> dict[str, str]:
    """Versions of Python and of the libraries that affect the values."""
    return {"python": platform.python_version()} | {name: version(name) for name in LIBRARIES}


def missing_notes(
    records: Sequence[dict[str, Any]], lpips: LPIPS | None, inception: nn.Module | None, scale: float = 1.0
) -> list[str]:
    """Notes on values that are missing, or that mean little because the set or its images are small.

    Args:
        records (`Sequence[dict[str, Any]]`): Measured images.
        lpips ([`LPIPS`], *optional*): Network of LPIPS.
        inception (`nn.Module`, *optional*): Network of FID.
        scale (`float`, defaults to 1.0): Smallest scale at which images are compared.
    """
    notes = []
    if lpips is None:
        notes.append("LPIPS was not computed. Pass --lpips-weights, the weights of its network.")
    if inception is None:
        notes.append("rFID was not computed. Pass --inception-weights, the weights of its network.")
    elif len(records) == 1:
        notes.append("rFID was not computed: it needs at least two images.")
    elif len(records) < MANY_IMAGES:
        notes.append(f"rFID of {len(records)} images is far too high to be compared with published values.")
    sides = {"SSIM": metrics.SSIM_SIDE}
    if lpips is not None:
        sides["LPIPS"] = lpips.min_side
    for title, side in sides.items():
        small = sum(round(min(record["width"], record["height"]) * scale) < side for record in records)
        if small:
            at_scale = "" if scale == 1 else f" at scale {scale:g}"
            notes.append(
                f"{title}{at_scale} was not computed for {small} of {len(records)} images. It needs sides of at least "
                f"{side} pixels."
            )
    return notes

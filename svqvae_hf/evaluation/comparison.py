"""One image against its reconstructions, and against what JPEG and WebP make of it. All in 8 bits."""

import io
from typing import Any

import numpy as np
import torch
from PIL import Image

from svqvae_hf.evaluation import metrics
from svqvae_hf.evaluation.perceptual import LPIPS

QUALITIES = (1, 5, 10, 20, 40, 75)
CODEC_SIDES = {"JPEG": 65535, "WebP": 16383}  # the largest side, in pixels, that each can store


def compare(sample: torch.Tensor, target: torch.Tensor, lpips: LPIPS | None) -> dict[str, float | None]:
    """PSNR, SSIM, MS-SSIM and LPIPS of two images `(1, 3, height, width)` in uint8; `None` where too small."""
    side = min(sample.shape[-2:])
    values: dict[str, float | None] = {
        "psnr": metrics.psnr(sample, target).item(),
        "ssim": metrics.ssim(sample, target).item() if side >= metrics.SSIM_SIDE else None,
        "ms_ssim": metrics.ms_ssim(sample, target).item() if side >= metrics.MS_SSIM_SIDE else None,
        "lpips": None,
    }
    if lpips is not None and side >= lpips.min_side:
        values["lpips"] = lpips(sample.float() / 127.5 - 1, target.float() / 127.5 - 1).item()
    return values


def compare_at_full_size(
    reconstruction: Image.Image, image: Image.Image, device: torch.device
) -> dict[str, float | None]:
    """PSNR and SSIM of a reconstruction at any scale, brought to the size of its image."""
    sample, target = to_tensor(resize(reconstruction, image.size), device), to_tensor(image, device)
    return {
        "psnr": metrics.psnr(sample, target).item(),
        "ssim": metrics.ssim(sample, target).item() if min(image.size) >= metrics.SSIM_SIDE else None,
    }


def codec_points(image: Image.Image, device: torch.device) -> list[dict[str, Any]]:
    """What JPEG and WebP come to on an image, as Pillow writes them at each quality, the whole file counted."""
    points = []
    for codec, largest in CODEC_SIDES.items():
        for quality in QUALITIES if max(image.size) <= largest else ():
            file = io.BytesIO()
            image.save(file, codec, quality=quality)
            rate = metrics.bits_per_pixel(len(file.getvalue()), 8, image.width * image.height)
            with Image.open(file) as decoded:
                values = compare_at_full_size(decoded.convert("RGB"), image, device)
            points.append({"codec": codec, "quality": quality, "bits_per_pixel": rate, **values})
    return points


def resize(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Brings an image to a size (width, height): by area where a side gets shorter, else bicubic."""
    if image.size == size:
        return image
    smaller = size[0] < image.width or size[1] < image.height
    return image.resize(size, Image.Resampling.BOX if smaller else Image.Resampling.BICUBIC)


def to_tensor(image: Image.Image, device: torch.device) -> torch.Tensor:
    """An image as `(1, 3, height, width)` in uint8."""
    return torch.from_numpy(np.array(image)).movedim(-1, 0)[None].to(device)

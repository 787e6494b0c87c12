"""Metrics of one image's reconstructions, by the model or by JPEG and WebP. All images are 8-bit."""

import io
from typing import Any

import numpy as np
import torch
from PIL import Image

from svqvae_hf.evaluation import metrics
from svqvae_hf.evaluation.perceptual import LPIPS
from svqvae_hf.evaluation.pictures import resize_image

QUALITIES = (1, 5, 10, 20, 40, 75)
CODEC_SIDES = {"JPEG": 65535, "WebP": 16383}  # largest side that each format can store, in pixels


def image_metrics(sample: torch.Tensor, target: torch.Tensor, lpips: LPIPS | None) -> dict[str, float | None]:
    """Computes PSNR, SSIM, MS-SSIM and LPIPS of a reconstruction.

    Args:
        sample (`torch.Tensor` of shape `(1, 3, height, width)`): Reconstruction in uint8.
        target (`torch.Tensor` of shape `(1, 3, height, width)`): Reference in uint8.
        lpips ([`LPIPS`], *optional*): Network of LPIPS.

    Returns:
        `dict[str, float | None]`: `psnr`, `ssim`, `ms_ssim` and `lpips`. `None` if the image is too small.
    """
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


def full_size_metrics(
    reconstruction: Image.Image, image: Image.Image, device: torch.device
) -> dict[str, float | None]:
    """Computes PSNR and SSIM of a reconstruction at any scale, resized to the size of its image."""
    sample, target = to_tensor(resize_image(reconstruction, image.size), device), to_tensor(image, device)
    return {
        "psnr": metrics.psnr(sample, target).item(),
        "ssim": metrics.ssim(sample, target).item() if min(image.size) >= metrics.SSIM_SIDE else None,
    }


def codec_metrics(image: Image.Image, device: torch.device) -> list[dict[str, Any]]:
    """Computes rate, PSNR and SSIM of an image saved as JPEG and WebP by Pillow, at each quality.

    The rate counts the whole file, headers included.
    """
    points = []
    for codec, largest in CODEC_SIDES.items():
        for quality in QUALITIES if max(image.size) <= largest else ():
            file = io.BytesIO()
            image.save(file, codec, quality=quality)
            rate = metrics.bits_per_pixel(len(file.getvalue()), 8, image.width * image.height)
            with Image.open(file) as decoded:
                values = full_size_metrics(decoded.convert("RGB"), image, device)
            points.append({"codec": codec, "quality": quality, "bits_per_pixel": rate, **values})
    return points


def to_tensor(image: Image.Image, device: torch.device) -> torch.Tensor:
    """Converts an image to a uint8 tensor of shape `(1, 3, height, width)`."""
    return torch.from_numpy(np.array(image)).movedim(-1, 0)[None].to(device)

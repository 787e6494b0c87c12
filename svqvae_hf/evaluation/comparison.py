"""Metrics of one image's reconstructions, by the model or by a baseline. All images are 8-bit."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from svqvae_hf.evaluation import metrics
from svqvae_hf.evaluation.baselines.blocks import BlockBaseline
from svqvae_hf.evaluation.baselines.codecs import open_image, save_image, save_within, usable_codecs
from svqvae_hf.evaluation.perceptual import LPIPS
from svqvae_hf.tokens.image_tokens import resize_image

QUALITIES = (1, 5, 10, 20, 40, 75)


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


def codec_metrics(image: Image.Image, codecs: Sequence[str], device: torch.device) -> list[dict[str, Any]]:
    """Computes rate, PSNR and SSIM of an image saved by some of `CODECS` of Pillow, at each quality.

    The rate counts the whole file, headers included.
    """
    points = []
    for codec in usable_codecs(image, codecs):
        for quality in QUALITIES:
            content = save_image(image, codec, quality)
            rate = metrics.bits_per_pixel(len(content), 8, image.width * image.height)
            values = full_size_metrics(open_image(content), image, device)
            points.append({"codec": codec, "quality": quality, "bits_per_pixel": rate, **values})
    return points


def reconstruct_by_baselines(
    image: Image.Image,
    bits: float,
    block_baselines: Sequence[BlockBaseline],
    codecs: Sequence[str],
    device: torch.device,
) -> Iterator[tuple[str, float | None, Image.Image]]:
    """Codes and decodes an image by each baseline.

    Args:
        image (`PIL.Image.Image`): The image.
        bits (`float`): Bits of the model. Codecs take at most as many if their lowest quality does.
        block_baselines (`Sequence[BlockBaseline]`): Fitted baselines of blocks.
        codecs (`Sequence[str]`): Names of `CODECS`.
        device (`torch.device`): Device of these baselines.

    Yields:
        `tuple[str, float | None, PIL.Image.Image]`: Title of a baseline, its bits (`None` if it is not quantised), and
        its reconstruction.
    """
    sample = to_tensor(image, device)
    for baseline in block_baselines:
        pixels = baseline.reconstruct(sample)[0].clamp(0, 255).round().byte()
        reconstruction = Image.fromarray(pixels.movedim(0, -1).cpu().numpy())
        yield baseline.title, baseline.bits(image.height, image.width), reconstruction
    for codec in usable_codecs(image, codecs):
        content = save_within(image, codec, bits)
        yield codec, 8 * len(content), open_image(content)


def to_tensor(image: Image.Image, device: torch.device) -> torch.Tensor:
    """Converts an image to a uint8 tensor of shape `(1, 3, height, width)`."""
    return torch.from_numpy(np.array(image)).movedim(-1, 0)[None].to(device)

"""Padding, resizing and value ranges of samples and latents."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F

AREA_SCALE = 0.25  # largest scale at which images are resized by area


def pad_to_multiple(sample: torch.Tensor, downsampling: int) -> torch.Tensor:
    """Pads both sides to multiples of `downsampling`, at the bottom and right, by repeating the last row or column."""
    height, width = sample.shape[-2:]
    bottom = -height % downsampling  # rows to add
    right = -width % downsampling  # columns to add
    # A compiled graph always pads, because the same graph runs on images of any size.
    if not torch.compiler.is_compiling() and bottom == 0 and right == 0:
        return sample
    return F.pad(sample, (0, right, 0, bottom), mode="replicate")


def resize_sample(sample: torch.Tensor, scale: float, f: int) -> torch.Tensor:
    """Resizes images to a scale, so that their latents have the same grid as [`resize_latents`] returns.

    Images are padded as in [`SVQVAE.encode`], then resized to whole latents: bicubic with antialiasing, or by area at
    scales up to 0.25. On Kodak images bicubic was 0.16 dB better at 0.75, and both were equal at 0.25 and 0.1. At very
    small scales PyTorch's bicubic kernel for CUDA needs too much shared memory.

    Args:
        sample (`torch.Tensor` of shape `(batch, channels, height, width)`): Images of any size and range.
        scale (`float`): Above 0.
        f (`int`): Pixels per latent side.

    Returns:
        `torch.Tensor`: Images `(batch, channels, f * max(1, round(scale * h)), f * max(1, round(scale * w)))`, where
        `h = ceil(height / f)` and `w = ceil(width / f)`. Bicubic overshoot is not clamped.
    """
    padded = pad_to_multiple(sample, f)
    height, width = padded.shape[-2:]
    rows, columns = grid_shape(height, width, f, scale)
    size = (rows * f, columns * f)
    if scale <= AREA_SCALE:
        return resize(padded, size, "area")
    return resize(padded, size, "bicubic", antialias=True)


def resize_latents(latents: torch.Tensor, scale: float) -> torch.Tensor:
    """Resizes latents to a scale, by area below 1 and bilinearly above.

    Args:
        latents (`torch.Tensor` of shape `(batch, channels, h, w)`): Latents before quantisation.
        scale (`float`): Above 0.

    Returns:
        `torch.Tensor`: Latents `(batch, channels, max(1, round(scale * h)), max(1, round(scale * w)))`.
    """
    height, width = latents.shape[-2:]
    mode = "area" if scale < 1 else "bilinear"
    return resize(latents, grid_shape(height, width, downsampling=1, scale=scale), mode)


def grid_shape(height: int, width: int, downsampling: int, scale: float) -> tuple[int, int]:
    """Rows and columns of ids of an image at a scale.

    Args:
        height (`int`): Height of the image in pixels.
        width (`int`): Width of the image in pixels.
        downsampling (`int`): Pixels per id along each side: `f` of the model.
        scale (`float`): Output side over input side, more than 0.
    """
    rows = max(1, round(scale * math.ceil(height / downsampling)))
    columns = max(1, round(scale * math.ceil(width / downsampling)))
    return rows, columns


def resize(values: torch.Tensor, size: Sequence[int], mode: str, antialias: bool = False) -> torch.Tensor:
    """Resizes `(batch, channels, h, w)` in float32. Apple's GPUs cannot do it by area, so there the CPU does."""
    if list(values.shape[-2:]) == list(size):
        return values
    device = values.device
    if mode == "area" and device.type == "mps":
        device = torch.device("cpu")
    resized = F.interpolate(values.to(device, torch.float32), list(size), mode=mode, antialias=antialias)
    return resized.to(values)


def map_range(values: torch.Tensor, source: Sequence[float], target: Sequence[float]) -> torch.Tensor:
    """Maps values linearly from the range `source` (low, high) to `target` (low, high), without clamping."""
    if list(source) == list(target):
        return values
    source_low, source_high = source
    target_low, target_high = target
    gain = (target_high - target_low) / (source_high - source_low)
    return values * gain + (target_low - source_low * gain)

"""Chooses the scale at which an image is encoded, by quality or by bits."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from svqvae_hf.models.checks import check_scales
from svqvae_hf.models.image_processing_svqvae import SVQVAEImageProcessor, grid_shape, to_rgb
from svqvae_hf.models.modeling_svqvae import SVQVAE
from svqvae_hf.tokens.context_model import ContextModel
from svqvae_hf.tokens.image_tokens import encode_image, execution_device, image_tokens, resize_image
from svqvae_hf.tokens.token_files import UINT16_CODES, ImageTokens, token_file_content


class ScaleChoice(NamedTuple):
    """Ids of an image at the chosen scale.

    Args:
        scale (`float`): Output side over input side.
        ids (`torch.Tensor` of shape `(h, w)`): Ids, int64, on the device of the model.
        reached (`bool`): Whether the target is reached.
    """

    scale: float
    ids: torch.Tensor
    reached: bool


def encode_to_psnr(
    model: SVQVAE, image: Image.Image, scales: Sequence[float], min_psnr: float, scale_from: str = "image"
) -> tuple[ImageTokens, bool]:
    """Encodes an image at the smallest scale whose reconstruction, resized to the image, reaches a PSNR.

    Args:
        model ([`SVQVAE`]): Model in evaluation mode.
        image (`PIL.Image.Image`): Image of any size.
        scales (`Sequence[float]`): Output side over input side, each above 0, tried from the smallest.
        min_psnr (`float`): Lowest PSNR in dB of all pixels in 8 bits, resized as [`decode_image`] does.
        scale_from (`str`, defaults to `"image"`): What is resized to a scale, see [`SVQVAE.encode_scales`].

    Returns:
        `tuple[ImageTokens, bool]`: Ids at one scale, and whether the PSNR is reached. If no scale reaches it, they are
        the ids of the largest.
    """
    image = to_rgb(image)
    pixels = torch.from_numpy(np.array(image)).movedim(-1, 0)[None]
    (choice,) = choose_by_psnr(model, pixels, scales, min_psnr, scale_from)
    tokens = image_tokens(model, [choice.ids.cpu()], image.height, image.width, [choice.scale], scale_from)
    return tokens, choice.reached


def encode_to_bits(
    model: SVQVAE,
    image: Image.Image,
    scales: Sequence[float],
    max_bits: float,
    scale_from: str = "image",
    context_model: ContextModel | None = None,
) -> tuple[ImageTokens, bool]:
    """Encodes an image at the largest scale whose token file has at most so many bits.

    Args:
        model ([`SVQVAE`]): Model in evaluation mode.
        image (`PIL.Image.Image`): Image of any size.
        scales (`Sequence[float]`): Output side over input side, each above 0.
        max_bits (`float`): Most bits of the token file.
        scale_from (`str`, defaults to `"image"`): What is resized to a scale, see [`SVQVAE.encode_scales`].
        context_model ([`ContextModel`], *optional*): Context model that compresses the file.

    Returns:
        `tuple[ImageTokens, bool]`: Ids at one scale, and whether their file fits. If no scale fits, they are the ids
        of the smallest.
    """
    for scale in sorted(check_scales(scales), reverse=True):
        tokens = encode_image(model, image, scale, scale_from)
        fits = 8 * len(token_file_content(tokens, context_model)) <= max_bits
        if fits:
            break
    return tokens, fits


@torch.inference_mode()
def choose_by_psnr(
    model: SVQVAE, pixels: torch.Tensor, scales: Sequence[float], min_psnr: float, scale_from: str
) -> list[ScaleChoice]:
    """Encodes a batch of images as [`encode_to_psnr`] does, each at its own scale.

    Args:
        model ([`SVQVAE`]): Model in evaluation mode.
        pixels (`torch.Tensor` of shape `(batch, 3, height, width)`, uint8): Images.
        scales (`Sequence[float]`): As in [`encode_to_psnr`].
        min_psnr (`float`): As in [`encode_to_psnr`].
        scale_from (`str`): As in [`encode_to_psnr`].
    """
    height, width = pixels.shape[-2:]
    processor = SVQVAEImageProcessor(pixel_range=model.config["pixel_range"])
    sample = processor(pixels.to(execution_device(model)))["pixel_values"].to(model.dtype)
    targets = pixels.movedim(1, -1).numpy().astype(np.float64)
    largest_error = 255**2 * 10 ** (-min_psnr / 10)
    chosen: dict[int, ScaleChoice] = {}
    waiting = list(range(len(pixels)))
    for scale in sorted(check_scales(scales)):
        (ids,) = model.encode_tokens(sample[waiting], [scale], scale_from)
        decoded = processor.postprocess(model.resize_to_image(model.decode(ids).sample, (height, width), scale))
        for number, grid, image in zip(waiting, ids, decoded, strict=True):
            error = np.square(np.asarray(resize_image(image, (width, height))) - targets[number]).mean()
            chosen[number] = ScaleChoice(scale, grid, bool(error <= largest_error))
        waiting = [number for number in waiting if not chosen[number].reached]
        if not waiting:
            break
    return [chosen[number] for number in range(len(pixels))]


def choose_by_bits(
    model: SVQVAE, height: int, width: int, scales: Sequence[float], max_bits: float
) -> tuple[float, bool]:
    """Largest scale whose ids, as stored without compression, take at most so many bits, and whether there is one.

    Args:
        model ([`SVQVAE`]): Model that encodes the image.
        height (`int`): Height of the image in pixels.
        width (`int`): Width of the image in pixels.
        scales (`Sequence[float]`): Output side over input side, each above 0.
        max_bits (`float`): Most bits of the ids. If no scale fits, the smallest is returned.
    """
    code_bits = 16 if model.config["codebook_size"] <= UINT16_CODES else 32
    bits = {scale: math.prod(grid_shape(height, width, model.f, scale)) * code_bits for scale in check_scales(scales)}
    fitting = [scale for scale in bits if bits[scale] <= max_bits]
    return (max(fitting), True) if fitting else (min(bits), False)

"""Chooses the scale at which one image is encoded, by quality or by bits."""

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image

from svqvae_hf.models.checks import check_scales
from svqvae_hf.models.modeling_svqvae import SVQVAE
from svqvae_hf.tokens.image_tokens import decode_image, encode_image
from svqvae_hf.tokens.token_files import ImageTokens, grid_shape


def encode_to_psnr(
    model: SVQVAE, image: Image.Image, scales: Sequence[float], min_psnr: float, scale_from: str = "latents"
) -> tuple[ImageTokens, bool]:
    """Encodes an image at the smallest scale whose reconstruction, resized to the image, reaches a PSNR.

    Args:
        model ([`SVQVAE`]): Model in evaluation mode.
        image (`PIL.Image.Image`): Image of any size.
        scales (`Sequence[float]`): Output side over input side, each above 0, tried from the smallest.
        min_psnr (`float`): Lowest PSNR in dB of all pixels in 8 bits, resized as [`decode_image`] does.
        scale_from (`str`, defaults to `"latents"`): What is resized to a scale, see [`SVQVAE.forward`].

    Returns:
        `tuple[ImageTokens, bool]`: Ids at one scale, and whether the PSNR is reached. If no scale reaches it, they are
        the ids of the largest.
    """
    target = np.asarray(image.convert("RGB"), np.float64)
    largest_error = 255**2 / 10 ** (min_psnr / 10)
    for scale in sorted(check_scales(scales)):
        tokens = encode_image(model, image, scale, scale_from)
        (reconstruction,) = decode_image(model, tokens, full_size=True)
        if np.square(np.asarray(reconstruction, np.float64) - target).mean() <= largest_error:
            return tokens, True
    return tokens, False


def encode_to_bits(
    model: SVQVAE, image: Image.Image, scales: Sequence[float], max_bits: float, scale_from: str = "latents"
) -> tuple[ImageTokens, bool]:
    """Encodes an image at the largest scale whose ids take at most so many bits.

    Args:
        model ([`SVQVAE`]): Model in evaluation mode.
        image (`PIL.Image.Image`): Image of any size.
        scales (`Sequence[float]`): Output side over input side, each above 0.
        max_bits (`float`): Most bits of the image: ids times `log2(codebook_size)`.
        scale_from (`str`, defaults to `"latents"`): What is resized to a scale, see [`SVQVAE.forward`].

    Returns:
        `tuple[ImageTokens, bool]`: Ids at one scale, and whether they take at most `max_bits`. If the ids of no scale
        do, they are the ids of the smallest.
    """
    bits = {
        scale: math.prod(grid_shape(image.height, image.width, model.f, scale))
        * math.log2(model.config["codebook_size"])
        for scale in check_scales(scales)
    }
    fitting = [scale for scale in bits if bits[scale] <= max_bits]
    scale = max(fitting) if fitting else min(bits)
    return encode_image(model, image, scale, scale_from), bool(fitting)

"""Chooses the scale at which an image is encoded, by quality or by bits."""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from svqvae_hf.models.checks import check_scales
from svqvae_hf.models.context_model import ContextModel
from svqvae_hf.models.image_processing_svqvae import to_rgb
from svqvae_hf.models.modeling_svqvae import SVQVAE
from svqvae_hf.tokens.image_tokens import decode_image, encode_image
from svqvae_hf.tokens.token_files import ImageTokens, token_file_content


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
    target = np.asarray(image, np.float64)
    largest_error = 255**2 * 10 ** (-min_psnr / 10)
    for scale in sorted(check_scales(scales)):
        tokens = encode_image(model, image, scale, scale_from)
        (decoded,) = decode_image(model, tokens, full_size=True)
        reached = bool(np.square(np.asarray(decoded) - target).mean() <= largest_error)
        if reached:
            break
    return tokens, reached


def encode_to_bits(
    model: SVQVAE,
    image: Image.Image,
    scales: Sequence[float],
    max_bits: float,
    scale_from: str = "image",
    context_model: ContextModel | None = None,
) -> tuple[ImageTokens, bool]:
    """Encodes an image at the largest scale whose token file has at most this many bits.

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

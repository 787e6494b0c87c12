"""Encodes one image to its tokens and back, and checks the memory that this needs."""

import re
from collections.abc import Sequence
from typing import Any

import psutil
import torch
from PIL import Image

from svqvae_hf.models.checks import check_scales
from svqvae_hf.models.image_processing_svqvae import SVQVAEImageProcessor
from svqvae_hf.models.modeling_svqvae import SVQVAE
from svqvae_hf.tokens.encoding import encoding_of
from svqvae_hf.tokens.token_files import ImageTokens, check_tokens

GIB = 2**30
OUT_OF_MEMORY = "out of memory. Use smaller scales, tiles, images or batches."

PIXEL_BYTES = 64  # per pixel: the image, its float32 sample and reconstruction, and a copy of each


class TooLargeError(ValueError):
    """An image needs more memory than is available."""


def encode_image(
    model: SVQVAE, image: Image.Image, scales: float | Sequence[float] = 1, scale_from: str = "image"
) -> ImageTokens:
    """Encodes an image to ids at each scale.

    Args:
        model ([`SVQVAE`]): Model in evaluation mode.
        image (`PIL.Image.Image`): Image of any size.
        scales (`float` or `Sequence[float]`, defaults to 1): Output side over input side, each above 0.
        scale_from (`str`, defaults to `"image"`): What is resized to a scale, see [`SVQVAE.encode_scales`].

    Returns:
        [`ImageTokens`]: One grid of ids per scale, in the order of `scales`.
    """
    scales = check_scales(scales)
    processor = SVQVAEImageProcessor(pixel_range=model.config["pixel_range"])
    batch = processor([image])
    ((height, width),) = batch["image_sizes"]
    with torch.inference_mode():
        grids = model.encode_tokens(batch["pixel_values"].to(execution_device(model), model.dtype), scales, scale_from)
    return image_tokens(model, [grid[0].cpu() for grid in grids], height, width, scales, scale_from)


def image_tokens(
    model: SVQVAE,
    ids: list[torch.Tensor],
    height: int,
    width: int,
    scales: float | Sequence[float],
    scale_from: str = "image",
) -> ImageTokens:
    """Joins the ids of an image with the facts of the model that a token file stores.

    At scale 1 alone nothing is resized, and `scale_from` is always `"latents"`, so that equal ids make equal files.

    Args:
        model ([`SVQVAE`]): Model that encoded the image, with the same tiling.
        ids (`list[torch.Tensor]`, each of shape `(h, w)`): One grid per scale.
        height (`int`): Height of the image in pixels.
        width (`int`): Width of the image in pixels.
        scales (`float` or `Sequence[float]`): Output side over input side, one per grid.
        scale_from (`str`, defaults to `"image"`): What was resized to the scales.
    """
    scales = check_scales(scales)
    scale_from = "latents" if set(scales) == {1} else scale_from
    return ImageTokens(ids, height, width, **encoding_of(model, scales, scale_from))


def decode_image(model: SVQVAE, tokens: ImageTokens, full_size: bool = False) -> list[Image.Image]:
    """Decodes ids to the images that `model(image, scales)` reconstructs.

    Args:
        model ([`SVQVAE`]): Model in evaluation mode.
        tokens ([`ImageTokens`]): Ids of one image, from the codebook of the model.
        full_size (`bool`, defaults to `False`): Whether to resize all images to the size of the image that was
            encoded, with [`resize_image`].

    Returns:
        `list[PIL.Image.Image]`: One image per scale with sides of `round(scale * side)` pixels, or of the full size.

    Raises:
        TypeError: `tokens` are ids alone.
        ValueError: The ids belong to another codebook, or their f differs.
    """
    check_tokens(tokens)
    check_same_codebook(model, tokens)
    processor = SVQVAEImageProcessor(pixel_range=model.config["pixel_range"])
    image_size = tokens.height, tokens.width
    images: list[Image.Image] = []
    with torch.inference_mode():
        for ids, scale in zip(tokens.ids, tokens.scales, strict=True):
            decoded = model.decode(ids[None].to(execution_device(model))).sample
            images += processor.postprocess(model.resize_to_image(decoded, image_size, scale))
    return [resize_image(image, (tokens.width, tokens.height)) for image in images] if full_size else images


def resize_image(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Resizes an image to `(width, height)`: by area if a side gets shorter, otherwise bicubic.

    Area resampling averages all pixels, so a smaller reference has no aliasing.
    """
    if image.size == size:
        return image
    shrinks = size[0] < image.width or size[1] < image.height
    return image.resize(size, Image.Resampling.BOX if shrinks else Image.Resampling.BICUBIC)


def check_same_codebook(model: SVQVAE, tokens: Any) -> None:
    """Raises if the model cannot decode ids, because they belong to another codebook.

    Args:
        model ([`SVQVAE`]): Model to decode with.
        tokens ([`ImageTokens`] or [`TokenSettings`]): Ids, or the settings of a token set.

    Raises:
        ValueError: The codebook's fingerprint or size differs, or the model's f.
    """
    for fact, expected, found in (
        ("of the model's codebook, with fingerprint", model.codebook_fingerprint(), tokens.codebook_fingerprint),
        ("of a model with f =", model.f, tokens.f),
        ("of a codebook with this number of codes:", model.config["codebook_size"], tokens.codebook_size),
    ):
        if found != expected:
            raise ValueError(f"the ids must be {fact} {expected}, got {found}. Use the model that encoded them.")


def execution_device(model: torch.nn.Module) -> torch.device:
    """Device on which a model computes. With accelerate's offloading, its weights are elsewhere between calls."""
    for module in model.modules():
        device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
        if device is not None:
            return torch.device(device)
    return next(model.parameters()).device


def is_out_of_memory(error: MemoryError | RuntimeError) -> bool:
    """Whether an error means that memory is exhausted; PyTorch says so only in the message."""
    return isinstance(error, MemoryError) or re.search("allocate|out of memory", str(error)) is not None


def available_memory(device: torch.device) -> int:
    """Bytes that PyTorch can allocate on a device: free memory, and on a GPU also its unused reserve."""
    if device.type != "cuda":
        return psutil.virtual_memory().available
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def check_memory(model: SVQVAE, height: float, width: float, images: int = 1) -> None:
    """Raises before the work if images of one size would need more memory than is available.

    Args:
        model ([`SVQVAE`]): Model on its device, with its tiling configured.
        height (`float`): Height in pixels of the image, or of its largest scale.
        width (`float`): Width in pixels.
        images (`int`, defaults to 1): Number of images in a batch.

    Raises:
        TooLargeError: The estimate exceeds the available memory.
    """
    sides = [min(side, model.tile_size) if model.use_tiling else side for side in (height, width)]
    needed = images * (model.whole_bytes(*sides) + PIXEL_BYTES * height * width)
    available = available_memory(execution_device(model))
    if needed > available:
        tiles = f"in tiles of {model.tile_size} pixels" if model.use_tiling else "without tiles"
        raise TooLargeError(
            f"an image of {width:.0f} x {height:.0f} pixels {tiles} would take about {needed / GIB:,.2f} GiB of "
            f"memory, but {available / GIB:,.2f} GiB are available. Use smaller scales, smaller tiles or a smaller "
            "image, or `--large` on the command line."
        )


def fit_in_memory(model: SVQVAE, height: int, width: int, scales: Sequence[float], *tiles: int | None) -> None:
    """Sets the tiling of a model for an image at several scales, and raises if its memory does not suffice.

    Args:
        model ([`SVQVAE`]): Model.
        height (`int`): Height of the image in pixels.
        width (`int`): Width of the image in pixels.
        scales (`Sequence[float]`): Scales of the ids.
        *tiles (`int`, *optional*): Tile size and overlap, for [`SVQVAE.tile_if_large`].

    Raises:
        TooLargeError: The image does not fit, see [`check_memory`].
    """
    largest = max(1, *scales)
    model.tile_if_large(largest * height, largest * width, *tiles)
    check_memory(model, largest * height, largest * width)

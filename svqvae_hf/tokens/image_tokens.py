"""One image to the content of a token file and back."""

import math
import re
from collections.abc import Callable, Sequence

import psutil
import torch
from PIL import Image

from svqvae_hf.models.image_processing_svqvae import SVQVAEImageProcessor
from svqvae_hf.models.modeling_svqvae import SVQVAE
from svqvae_hf.models.tiling import CONTEXT_WINDOW_SIDE, CONTEXT_WINDOWS
from svqvae_hf.tokens.token_files import ImageTokens, TokenOrigin, check_codebook

GIB = 2**30

# Memory at the peak, in bytes, measured in float32 on the CPU.
PIXEL_BYTES = 64  # a pixel of the input when encoding, of the output when decoding
LATENT_BYTES = 128  # a latent that is quantised
TILE_BYTES = 64  # a pixel of what the networks read at once, for each of the base channels


def encode_image(model: SVQVAE, image: Image.Image, scales: Sequence[float]) -> ImageTokens:
    """Encodes an image to ids at each scale.

    Args:
        model ([`SVQVAE`]): Model in evaluation mode.
        image (`PIL.Image.Image`): Image of any size.
        scales (`Sequence[float]`): Output side over input side, each more than 0.

    Returns:
        [`ImageTokens`]: One grid of ids per scale, in the order of `scales`.
    """
    processor = SVQVAEImageProcessor(pixel_range=model.config["pixel_range"])
    batch = processor(image)
    ((height, width),) = batch["image_sizes"]
    with torch.inference_mode():
        grids = model.encode_tokens(batch["pixel_values"].to(model.device, model.dtype), scales)
    return image_tokens(model, [grid[0].cpu() for grid in grids], height, width, scales)


def image_tokens(
    model: SVQVAE, ids: list[torch.Tensor], height: int, width: int, scales: Sequence[float]
) -> ImageTokens:
    """Ids of an image with what the model says of them.

    Args:
        model ([`SVQVAE`]): The model that gave the ids, with its tiles set as they were.
        ids (`list[torch.Tensor]`, each of shape `(h, w)`): One grid per scale.
        height (`int`): Height of the image in pixels.
        width (`int`): Width of the image in pixels.
        scales (`Sequence[float]`): Output side over input side, one per grid.
    """
    return ImageTokens(
        ids=ids,
        height=height,
        width=width,
        scales=tuple(scales),
        f=model.f,
        tile_size=model.tile_size if model.use_tiling else None,
        overlap=model.overlap if model.use_tiling else None,
        codebook_size=model.config["codebook_size"],
        codebook_fingerprint=model.codebook_fingerprint(),
    )


def decode_image(model: SVQVAE, tokens: ImageTokens) -> list[Image.Image]:
    """Decodes ids to images, as `model(image, scales)` gives them.

    Args:
        model ([`SVQVAE`]): Model in evaluation mode.
        tokens ([`ImageTokens`]): Ids of one image, of the model's codebook.

    Returns:
        `list[PIL.Image.Image]`: One image per scale, `round(scale * side)` pixels a side.

    Raises:
        ValueError: If the ids are of another codebook, or their f or the size of their codebook is another.
    """
    check_same_codebook(model, tokens)
    processor = SVQVAEImageProcessor(pixel_range=model.config["pixel_range"])
    image_size = tokens.height, tokens.width
    images: list[Image.Image] = []
    with torch.inference_mode():
        for ids, scale in zip(tokens.ids, tokens.scales, strict=True):
            decoded = model.decode(ids[None].to(model.device)).sample
            images += processor.postprocess(model.resize_to_image(decoded, image_size, scale))
    return images


def check_same_codebook(model: SVQVAE, tokens: TokenOrigin) -> None:
    """Refuses ids that the model cannot decode.

    Args:
        model ([`SVQVAE`]): The model that is to decode them.
        tokens ([`TokenOrigin`]): The ids, or the settings of a token set.

    Raises:
        ValueError: If the ids are of another codebook, or their f or the size of their codebook is another.
    """
    check_codebook(tokens, model.codebook_fingerprint())
    if tokens.f != model.f:
        raise ValueError(f"the ids must be of a model with f = {model.f}, but are of one with f = {tokens.f}.")
    if tokens.codebook_size != model.config["codebook_size"]:
        raise ValueError(
            f"the ids must be of a codebook of {model.config['codebook_size']} codes, the model's, but are of one of "
            f"{tokens.codebook_size}."
        )


def configure_tiling(
    model: SVQVAE,
    tile_size: int | None,
    overlap: int | None,
    on_tile: Callable[[int, int], None] | None = None,
) -> None:
    """Switches tiling on if a size or an overlap is given, and off otherwise.

    Args:
        model ([`SVQVAE`]): The model.
        tile_size (`int`, *optional*): As of [`SVQVAE.enable_tiling`], whose default stands in.
        overlap (`int`, *optional*): Likewise.
        on_tile (`Callable`, *optional*): Likewise.

    Raises:
        ValueError: If a value does not fit the model.
    """
    given = {key: value for key, value in (("tile_size", tile_size), ("overlap", overlap)) if value is not None}
    if given:
        model.enable_tiling(**given, on_tile=on_tile)
    else:
        model.disable_tiling()


def is_out_of_memory(error: MemoryError | RuntimeError) -> bool:
    """Whether an error says that there is not enough memory, as torch's do by their text alone."""
    return isinstance(error, MemoryError) or re.search("allocate|out of memory", str(error)) is not None


def available_memory(device: torch.device) -> int:
    """Bytes that torch can allocate on a device: those that are free, and on a GPU those that it holds unused."""
    if device.type != "cuda":
        return psutil.virtual_memory().available
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def check_memory(
    model: SVQVAE, height: int, width: int, scales: Sequence[float], encodes: bool = True, decodes: bool = True
) -> None:
    """Refuses, before anything is computed, what would take more memory than is free.

    Args:
        model ([`SVQVAE`]): Model, on its device and with its tiles set.
        height (`int`): Height of the image in pixels.
        width (`int`): Width of the image in pixels.
        scales (`Sequence[float]`): Scales to encode or decode, each more than 0.
        encodes (`bool`, defaults to `True`): Whether the image is going to be encoded.
        decodes (`bool`, defaults to `True`): Whether the scales are going to be decoded.

    Raises:
        ValueError: If it would; the figures are an estimate.
    """
    pixels = height * width
    output = max(scale * scale for scale in scales) * pixels
    latents = sum(scale * scale for scale in scales) * pixels / model.f**2
    tile = TILE_BYTES * model.config["base_channels"]
    sample_pixels = CONTEXT_WINDOWS * (CONTEXT_WINDOW_SIDE * model.f) ** 2
    tile_pixels = max(model.tile_size**2, sample_pixels) if model.use_tiling else math.inf
    encoding = PIXEL_BYTES * pixels + LATENT_BYTES * latents + tile * min(tile_pixels, pixels)
    decoding = PIXEL_BYTES * output + tile * min(tile_pixels, output)
    needed = max(encodes * encoding, decodes * decoding)
    free = available_memory(model.device)
    if needed > free:
        tiles = f"in tiles of {model.tile_size} pixels" if model.use_tiling else "without tiles"
        raise ValueError(
            f"an image of {width} x {height} pixels at scales {', '.join(f'{scale:g}' for scale in scales)}, {tiles}, "
            f"would take about {needed / GIB:.3g} GiB of memory, but {free / GIB:.3g} GiB are free. Use smaller "
            "scales, smaller tiles or a smaller image, or `--large` on the command line."
        )

"""Encodes one image to its tokens and back, and checks the memory that this needs."""

import re
from collections.abc import Sequence

import psutil
import torch
from PIL import Image

from svqvae_hf.models.checks import check_same_codebook, check_scales, check_scales_differ
from svqvae_hf.models.image_processing_svqvae import SVQVAEImageProcessor
from svqvae_hf.models.loading import execution_device
from svqvae_hf.models.modeling_svqvae import SVQVAE
from svqvae_hf.models.tiling import Tiles
from svqvae_hf.tokens.encoding import encoding_of
from svqvae_hf.tokens.token_files import ImageTokens, check_tokens

GIB = 2**30
OUT_OF_MEMORY = "out of memory. Use smaller scales, tiles, images or batches."

FEATURES_HELD = 4  # feature maps that a residual block holds: its input, normalised values, two convolutions
PIXEL_BYTES = 64  # per pixel: the image, its float32 sample and reconstruction, and a copy of each


class TooLargeError(ValueError):
    """An image needs more memory than is available, or has more pixels than a codec takes."""


def encode_image(
    model: SVQVAE,
    image: Image.Image,
    scales: float | Sequence[float] = 1,
    scale_from: str = "image",
    tiles: Tiles | None = None,
) -> ImageTokens:
    """Encodes an image to ids at each scale.

    Args:
        model ([`SVQVAE`]): Model in evaluation mode.
        image (`PIL.Image.Image`): Image of any size.
        scales (`float` or `Sequence[float]`, defaults to 1): Output side over input side, each above 0.
        scale_from (`str`, defaults to `"image"`): What is resized to a scale, see [`SVQVAE.encode_scales`].
        tiles ([`Tiles`], *optional*): Tile size and overlap in pixels, see [`SVQVAE.enable_tiling`]. By
            default the model's, if tiling is enabled.

    Returns:
        [`ImageTokens`]: One grid of ids per scale, in the order of `scales`.
    """
    scales = check_scales(scales)
    check_scales_differ(scales)  # `ImageTokens` checks this too, but only after the encoding
    processor = SVQVAEImageProcessor(pixel_range=model.config["pixel_range"])
    batch = processor([image])
    ((height, width),) = batch["image_sizes"]
    sample = batch["pixel_values"].to(execution_device(model), model.dtype)
    with torch.inference_mode():
        grids = model.encode_tokens(sample, scales, scale_from, tiles)
    ids = [grid[0].cpu() for grid in grids]
    return image_tokens(model, ids, height, width, scales, scale_from, tiles)


def image_tokens(
    model: SVQVAE,
    ids: list[torch.Tensor],
    height: int,
    width: int,
    scales: float | Sequence[float],
    scale_from: str = "image",
    tiles: Tiles | None = None,
) -> ImageTokens:
    """Joins the ids of an image with the facts of the model that a token file stores.

    At scale 1 alone nothing is resized, so the ids do not depend on `scale_from`. It is then stored as `"latents"`,
    whatever it was, so that files of equal ids are equal.

    Args:
        model ([`SVQVAE`]): Model that encoded the image.
        ids (`list[torch.Tensor]`, each of shape `(h, w)`): One grid per scale.
        height (`int`): Height of the image in pixels.
        width (`int`): Width of the image in pixels.
        scales (`float` or `Sequence[float]`): Output side over input side, one per grid.
        scale_from (`str`, defaults to `"image"`): What was resized to the scales.
        tiles ([`Tiles`], *optional*): Tile size and overlap that the model was called with.
    """
    scales = check_scales(scales)
    is_unscaled = scales == [1]
    if is_unscaled:
        scale_from = "latents"
    return ImageTokens(ids, height, width, **encoding_of(model, scales, scale_from, tiles))


def decode_image(model: SVQVAE, tokens: ImageTokens, tiles: Tiles | None = None) -> list[Image.Image]:
    """Decodes ids to the images that `model(image, scales)` reconstructs.

    Args:
        model ([`SVQVAE`]): Model in evaluation mode.
        tokens ([`ImageTokens`]): Ids of one image, from the codebook of the model.
        tiles ([`Tiles`], *optional*): Tile size and overlap in pixels, see [`SVQVAE.enable_tiling`]. By
            default the model's, if tiling is enabled.

    Returns:
        `list[PIL.Image.Image]`: One image per scale with sides of `round(scale * side)` pixels.

    Raises:
        TypeError: `tokens` are ids alone.
        ValueError: The ids belong to another codebook, or their f differs.
    """
    check_tokens(tokens)
    check_same_codebook(model, tokens)
    processor = SVQVAEImageProcessor(pixel_range=model.config["pixel_range"])
    image_size = (tokens.height, tokens.width)
    device = execution_device(model)
    images: list[Image.Image] = []
    with torch.inference_mode():
        for ids, scale in zip(tokens.ids, tokens.scales, strict=True):
            grid = ids[None].to(device)  # (1, h, w)
            decoded = model.decode(grid, tiles=tiles).sample  # (1, 3, h * f, w * f)
            sample = model.resize_to_image(decoded, image_size, scale)
            images += processor.postprocess(sample)
    return images


def resize_image(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Resizes an image to `(width, height)`: by area if a side gets shorter, otherwise bicubic.

    Area resampling averages all pixels, so a smaller reference has no aliasing.
    """
    if image.size == size:
        return image
    width, height = size
    if width < image.width or height < image.height:
        return image.resize(size, Image.Resampling.BOX)
    return image.resize(size, Image.Resampling.BICUBIC)


def is_out_of_memory(error: MemoryError | RuntimeError) -> bool:
    """Whether an error means that memory is exhausted; PyTorch says so only in the message."""
    if isinstance(error, MemoryError):
        return True
    return re.search("allocate|out of memory", str(error)) is not None


def available_memory(device: torch.device) -> int:
    """Bytes that PyTorch can allocate on a device: free memory, and on a GPU also its unused reserve."""
    if device.type != "cuda":
        return psutil.virtual_memory().available
    free_bytes, _ = torch.cuda.mem_get_info(device)
    unused_bytes = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return free_bytes + unused_bytes


def choose_tiles(
    model: SVQVAE,
    height: int,
    width: int,
    scales: Sequence[float] = (1,),
    tile_size: int | None = None,
    overlap: int | None = None,
    images: int = 1,
) -> Tiles | None:
    """Chooses the tiles of an image at several scales, and checks before the work that its memory suffices.

    Args:
        model ([`SVQVAE`]): Model on its device. Tiles that are enabled on it are used.
        height (`int`): Height of the image in pixels.
        width (`int`): Width of the image in pixels.
        scales (`Sequence[float]`, defaults to `(1,)`): Scales of the ids.
        tile_size (`int`, *optional*): Tile size to use. By default the model's, if tiling is enabled or the image
            would take more than 1 GiB as a whole.
        overlap (`int`, *optional*): Overlap to use.
        images (`int`, defaults to 1): Number of images in a batch.

    Returns:
        [`Tiles`], *optional*: Tile size and overlap in pixels; `None` to run the image as a whole.

    Raises:
        TooLargeError: The estimate exceeds the available memory.
        ValueError: `tile_size` or `overlap` does not fit the model.
    """
    largest_scale = max(1, *scales)
    largest_height = largest_scale * height
    largest_width = largest_scale * width
    tiles = model.tiles_of_call(tile_size, overlap)  # `None` if neither the caller nor the model asks for tiles
    if tiles is None and whole_bytes(model, largest_height, largest_width) > GIB:
        tiles = model.tiles_of_call(model.tile_size)
    if tiles is None:
        network_bytes = whole_bytes(model, largest_height, largest_width)
        mode = "without tiles"
    else:
        tile_height = min(tiles.tile_size, largest_height)
        tile_width = min(tiles.tile_size, largest_width)
        network_bytes = whole_bytes(model, tile_height, tile_width)
        mode = f"in tiles of {tiles.tile_size} pixels"
    needed_bytes = images * (network_bytes + PIXEL_BYTES * largest_height * largest_width)
    available_bytes = available_memory(execution_device(model))
    if needed_bytes > available_bytes:
        raise TooLargeError(
            f"an image of {largest_width:.0f} x {largest_height:.0f} pixels {mode} would take about "
            f"{needed_bytes / GIB:,.2f} GiB of memory, but {available_bytes / GIB:,.2f} GiB are available. Use "
            "smaller scales, smaller tiles or a smaller image, or `--large` on the command line."
        )
    return tiles


def whole_bytes(model: SVQVAE, height: float, width: float) -> float:
    """Estimates the bytes that the network takes for an image without tiles.

    It holds `FEATURES_HELD` feature maps at full resolution, each with as many channels as the widest one.
    """
    encoder_multiple = model.config["encoder_ch_mult"][0]
    # The second level of the decoder ends with an enlargement to full resolution, with all its channels.
    decoder_multiples = model.config["decoder_ch_mult"][:2]
    channels = model.config["base_channels"] * max(encoder_multiple, *decoder_multiples)
    bytes_per_value = 4  # float32
    return FEATURES_HELD * bytes_per_value * channels * height * width

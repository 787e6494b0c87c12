"""Encodes and decodes images larger than memory, from file to file, one tile after the other."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from svqvae_files.outputs import new_file
from svqvae_hf.large.tiff_reader import open_large_image
from svqvae_hf.large.tiff_writer import TiffWriter
from svqvae_hf.models.checks import check_same_codebook, check_tiles
from svqvae_hf.models.image_processing_svqvae import SVQVAEImageProcessor
from svqvae_hf.models.layers import Area
from svqvae_hf.models.loading import execution_device
from svqvae_hf.models.modeling_svqvae import SVQVAE
from svqvae_hf.models.tiling import Read, RunWindow, TiledRun, Tiles, divide_rounding_up, run_tiles, tile_axis
from svqvae_hf.tokens.image_tokens import image_tokens
from svqvae_hf.tokens.token_files import ImageTokens


@torch.inference_mode()
def encode_large(model: SVQVAE, source: Path, tiles: Tiles | None = None) -> ImageTokens:
    """Encodes an image of any size to the ids of `encode_image` with equal tiles. Shows a progress bar on a terminal.

    Args:
        model ([`SVQVAE`]): Model in evaluation mode.
        source (`Path`): Image, see [`open_large_image`].
        tiles ([`Tiles`], *optional*): Tile size and overlap in pixels, see [`SVQVAE.enable_tiling`]. By
            default the model's: 256 and 32 unless others were set.

    Returns:
        [`ImageTokens`]: Ids at scale 1.

    Raises:
        ValueError: If the image cannot be read.
    """
    processor = SVQVAEImageProcessor(pixel_range=model.config["pixel_range"])
    device = execution_device(model)
    if tiles is None:
        tiles = Tiles(model.tile_size, model.overlap)
    with open_large_image(source) as image:
        grid_height = divide_rounding_up(image.height, model.f)
        grid_width = divide_rounding_up(image.width, model.f)
        ids = torch.empty(grid_height, grid_width, dtype=torch.int32)

        def read(rows: slice, columns: slice) -> torch.Tensor:
            """Sample `(1, 3, rows, columns)`. Padding repeats the last row and column, as in [`SVQVAE.encode`]."""
            # The image ends before the last tile does, unless its sides are multiples of f.
            bottom = min(rows.stop, image.height)
            right = min(columns.stop, image.width)
            rows_of_image = slice(rows.start, bottom)
            columns_of_image = slice(columns.start, right)
            pixels = image.read(rows_of_image, columns_of_image)  # (rows of image, columns of image, 3)
            sample = processor(pixels)["pixel_values"].to(device, model.dtype)
            pad_bottom = rows.stop - bottom
            pad_right = columns.stop - right
            return F.pad(sample, (0, pad_right, 0, pad_bottom), mode="replicate")

        results = _results_of_tiles(
            model, model.encode_window, read, latents_size=(grid_height, grid_width), input_stride=model.f, tiles=tiles
        )
        for area, latents in results:
            ids_of_area = model.quantize.nearest_ids(latents)[0]  # (rows, columns)
            ids[area.rows, area.columns] = ids_of_area.to("cpu", ids.dtype)
        return image_tokens(model, [ids.long()], image.height, image.width, [1.0], tiles=tiles)


@torch.inference_mode()
def decode_large(model: SVQVAE, tokens: ImageTokens, target: Path, tiles: Tiles | None = None) -> None:
    """Writes an image of any size: the same pixels as `decode_image` returns. Shows a progress bar on a terminal.

    Args:
        model ([`SVQVAE`]): Model in evaluation mode.
        tokens ([`ImageTokens`]): Ids at scale 1.
        target (`Path`): Image to write, a tiled BigTIFF; its folder is created. It is complete or absent.
        tiles ([`Tiles`], *optional*): As in [`encode_large`].

    Raises:
        ValueError: If the tokens have other scales or another codebook.
    """
    if tokens.scales != (1,):
        scales = ", ".join(f"{scale:g}" for scale in tokens.scales)
        raise ValueError(
            f"a large image must have scale 1 alone, got {scales}. Decode it without --large, or encode it at scale 1."
        )
    check_same_codebook(model, tokens)
    (ids,) = tokens.ids
    processor = SVQVAEImageProcessor(pixel_range=model.config["pixel_range"])
    device = execution_device(model)
    if tiles is None:
        tiles = Tiles(model.tile_size, model.overlap)

    def read(rows: slice, columns: slice) -> torch.Tensor:
        """Quantised latents `(1, codebook_embed_dim, rows, columns)`."""
        window = ids[rows, columns].to(device, torch.int64)
        shape = (1, *window.shape, model.config["codebook_embed_dim"])
        return model.quantize.get_codebook_entry(window, shape).to(model.dtype)

    grid_height, grid_width = ids.shape
    results = _results_of_tiles(
        model, model.decode_window, read, latents_size=(grid_height, grid_width), input_stride=1, tiles=tiles
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    with new_file(target) as partial, TiffWriter(partial, tokens.height, tokens.width) as output:
        for area, decoded in results:
            top = area.rows.start * model.f
            left = area.columns.start * model.f
            # The last tiles reach over the padding at the bottom and right of the image.
            rows_inside = tokens.height - top
            columns_inside = tokens.width - left
            inside = decoded[..., :rows_inside, :columns_inside]
            (tile,) = processor.postprocess(inside)
            output.write(top, left, np.asarray(tile))


def _results_of_tiles(
    model: SVQVAE, network: RunWindow, read: Read, *, latents_size: tuple[int, int], input_stride: int, tiles: Tiles
) -> Iterator[tuple[Area, torch.Tensor]]:
    """Runs a network over the tiles of an image. Shows a progress bar on a terminal.

    Args:
        model ([`SVQVAE`]): Model of the network.
        network (`Callable`): Its `encode_window` or `decode_window`.
        read (`Callable`): Returns the input of the network at two slices, see [`TiledRun`].
        latents_size (`tuple[int, int]`): Rows and columns of latents of the image.
        input_stride (`int`): Rows and columns of the input per latent.
        tiles ([`Tiles`]): Tile size and overlap in pixels.

    Returns:
        `Iterator[tuple[Area, torch.Tensor]]`: The area of each tile in latents, and the result there.

    Raises:
        ValueError: The tile size or the overlap does not fit the model.
    """
    hook = getattr(model, "_hf_hook", None)
    if hook is not None:
        hook.pre_forward(model)  # loads offloaded weights, as `encode` and `decode` do
    check_tiles(model.f, tiles.tile_size, tiles.overlap)
    height, width = latents_size
    tile_latents = tiles.tile_size // model.f
    overlap_latents = tiles.overlap // model.f
    tile_rows = tile_axis(height, tile_latents, overlap_latents)
    tile_columns = tile_axis(width, tile_latents, overlap_latents)
    num_tiles = len(tile_rows) * len(tile_columns)
    results = run_tiles(TiledRun(network, read, latents_size, tile_latents, overlap_latents, input_stride))
    return iter(tqdm(results, total=num_tiles, unit="tile", leave=False, delay=1, disable=None))

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
from svqvae_hf.models.tiling import Read, RunWindow, TiledRun, Tiles, run_tiles, tile_axis
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
        grid_height = -(-image.height // model.f)  # rounded up
        grid_width = -(-image.width // model.f)
        ids = torch.empty(grid_height, grid_width, dtype=torch.int32)

        def read(rows: slice, columns: slice) -> torch.Tensor:
            """Sample `(1, 3, rows, columns)`. Padding repeats the last row and column, as in [`SVQVAE.encode`]."""
            bottom = min(rows.stop, image.height)
            right = min(columns.stop, image.width)
            pixels = image.read(slice(rows.start, bottom), slice(columns.start, right))
            sample = processor(pixels)["pixel_values"].to(device, model.dtype)
            missing_rows = rows.stop - bottom
            missing_columns = columns.stop - right
            return F.pad(sample, (0, missing_columns, 0, missing_rows), mode="replicate")  # left, right, top, bottom

        for area, latents in _run_tiles(model, model.encode_window, read, ids.shape, model.f, tiles):
            ids[area.rows, area.columns] = model.quantize.nearest_ids(latents)[0].to("cpu", ids.dtype)
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

    target.parent.mkdir(parents=True, exist_ok=True)
    with new_file(target) as partial, TiffWriter(partial, tokens.height, tokens.width) as output:
        for area, decoded in _run_tiles(model, model.decode_window, read, ids.shape, 1, tiles):
            top = area.rows.start * model.f
            left = area.columns.start * model.f
            height_inside = tokens.height - top
            width_inside = tokens.width - left
            without_padding = decoded[..., :height_inside, :width_inside]  # padding at the end of the image
            (image,) = processor.postprocess(without_padding)
            output.write(top, left, np.asarray(image))


def _run_tiles(
    model: SVQVAE, run: RunWindow, read: Read, size: torch.Size, input_stride: int, tiles: Tiles
) -> Iterator[tuple[Area, torch.Tensor]]:
    """Yields area and result of each tile, see [`run_tiles`]. Shows a progress bar on a terminal."""
    hook = getattr(model, "_hf_hook", None)
    if hook is not None:
        hook.pre_forward(model)  # loads offloaded weights, as `encode` and `decode` do
    check_tiles(model.f, tiles.tile_size, tiles.overlap)
    height, width = size  # in latents, as the sides of tiles here
    latent_tile = tiles.tile_size // model.f
    latent_overlap = tiles.overlap // model.f
    tiled = TiledRun(run, read, (height, width), latent_tile, latent_overlap, input_stride)
    tile_rows = tile_axis(height, tiled.tile, tiled.overlap)
    tile_columns = tile_axis(width, tiled.tile, tiled.overlap)
    total = len(tile_rows) * len(tile_columns)
    results = run_tiles(tiled)
    return iter(tqdm(results, total=total, unit="tile", leave=False, delay=1, disable=None))

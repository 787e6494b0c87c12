"""Previews for the page of `svqvae demo`: the decoded image, its figures and the grid of its ids, per scale."""

import base64
import dataclasses
import io
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from svqvae_hf.evaluation.reconstruction_table import measure_reconstructions
from svqvae_hf.models.image_processing_svqvae import SVQVAEImageProcessor
from svqvae_hf.models.loading import execution_device
from svqvae_hf.models.modeling_svqvae import SVQVAE
from svqvae_hf.tokens.image_tokens import decode_image
from svqvae_hf.tokens.token_files import ImageTokens

CODES_AT_ONCE = 256  # codes per pass of the decoder
SHEET_COLUMNS = 64  # codes per row of the sheet


@dataclass(frozen=True, eq=False)
class ScalePreview:
    """One scale of an image, as the page shows it.

    Args:
        scale (`float`): Output side over input side.
        image (`PIL.Image.Image`): Image decoded from the ids.
        figures (`dict[str, str]`): Names and values as text.
        code_grid (`dict[str, Any]`): Input of `static/code_grid.js`: `width` and `height` of the grid in cells;
            `codes`, the distinct ids; `cells`, per cell the index of its id in `codes` (uint32, little-endian, row by
            row, in base64); `looks`, a sheet with a picture of each code (PNG as a data URL); `columns`, pictures per
            row of the sheet; `look_px`, side of a picture in pixels.
    """

    scale: float
    image: Image.Image
    figures: dict[str, str]
    code_grid: dict[str, Any]


def preview_scales(model: SVQVAE, tokens: ImageTokens, original: Image.Image) -> Iterator[ScalePreview]:
    """Decodes and measures each scale of an image.

    Args:
        model ([`SVQVAE`]): Model that made the ids.
        tokens ([`ImageTokens`]): Ids of the image, a grid per scale. The page calls an id a token.
        original (`PIL.Image.Image`): The image that was encoded.

    Yields:
        [`ScalePreview`]: One per scale, in the order of `tokens`, as soon as it is decoded.
    """
    for index, scale in enumerate(tokens.scales):
        ids = tokens.ids[index]  # (height, width) of the grid
        tokens_of_scale = dataclasses.replace(tokens, ids=[ids], scales=(scale,))
        # Both functions return a list with one entry per scale, here of one entry.
        images = decode_image(model, tokens_of_scale, tiles=tokens.tiles)
        measurements = measure_reconstructions(original, tokens_of_scale, images)
        image = images[0]
        psnr = measurements[0].psnr
        grid_height, grid_width = ids.shape
        figures = {
            "size": f"{image.width} × {image.height}",
            "tokens": f"{grid_width} × {grid_height} = {ids.numel():,}",
            "bits per pixel": f"{tokens.bits_per_pixel(index):.3f}",
            "PSNR": f"{psnr:.2f} dB",
        }
        yield ScalePreview(scale, image, figures, _code_grid(model, ids))


def draw_codes(model: SVQVAE, codes: torch.Tensor) -> np.ndarray:
    """Draws codes. For each code, decodes a 2 x 2 grid that holds only this code, and keeps the middle.

    Args:
        model ([`SVQVAE`]): Model with the codebook.
        codes (`torch.Tensor` of shape `(codes,)`): Ids to draw.

    Returns:
        `np.ndarray` of shape `(codes, f, f, 3)`: Pictures in uint8.
    """
    processor = SVQVAEImageProcessor(pixel_range=model.config["pixel_range"])
    start = model.f // 2
    middle = slice(start, start + model.f)  # f of the 2 * f rows or columns of pixels
    looks: list[np.ndarray] = []
    with torch.inference_mode():
        for batch in codes.split(CODES_AT_ONCE):
            grids = batch[:, None, None].expand(-1, 2, 2).contiguous()  # (codes, 2, 2)
            sample = model.decode(grids.to(execution_device(model))).sample  # (codes, 3, 2 * f, 2 * f)
            for look in processor.postprocess(sample[:, :, middle, middle]):
                looks.append(np.asarray(look))
    return np.stack(looks)


def _code_grid(model: SVQVAE, ids: torch.Tensor) -> dict[str, Any]:
    """Data of the page's grid of codes for ids `(height, width)`; see [`ScalePreview`]."""
    height, width = ids.shape
    codes, cells = ids.unique(return_inverse=True)  # the distinct ids (codes,), and an index in them per cell
    pictures = draw_codes(model, codes)  # (codes, f, f, 3)
    cell_bytes = cells.numpy().astype("<u4").tobytes()
    return {
        "width": width,
        "height": height,
        "codes": codes.tolist(),
        "cells": base64.b64encode(cell_bytes).decode(),
        "looks": _sheet_url(pictures),
        "columns": SHEET_COLUMNS,
        "look_px": model.f,
    }


def _sheet_url(looks: np.ndarray) -> str:
    """Pictures of shape `(codes, side, side, 3)` on one sheet, as a data URL."""
    num_looks, side = looks.shape[:2]
    num_rows = math.ceil(num_looks / SHEET_COLUMNS)
    cells = np.zeros((num_rows * SHEET_COLUMNS, side, side, 3), np.uint8)
    cells[:num_looks] = looks  # cells at the end of the last row stay black
    grid = cells.reshape(num_rows, SHEET_COLUMNS, side, side, 3)  # (rows, columns, y, x, 3)
    pixels = grid.swapaxes(1, 2)  # (rows, y, columns, x, 3)
    sheet = Image.fromarray(pixels.reshape(num_rows * side, SHEET_COLUMNS * side, 3))
    file = io.BytesIO()
    sheet.save(file, "png")
    encoded = base64.b64encode(file.getvalue()).decode()
    return f"data:image/png;base64,{encoded}"

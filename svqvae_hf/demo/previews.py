"""What the page of `svqvae demo` shows of an image: one view per scale."""

import base64
import dataclasses
import io
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from svqvae_hf.evaluation.metrics import SSIM_SIDE, ssim
from svqvae_hf.evaluation.reconstruction_table import measure, resized_original
from svqvae_hf.models.image_processing_svqvae import SVQVAEImageProcessor
from svqvae_hf.models.modeling_svqvae import SVQVAE
from svqvae_hf.tokens.image_tokens import decode_image
from svqvae_hf.tokens.token_files import ImageTokens

CODES_AT_ONCE = 256  # that are drawn by one pass of the decoder
SHEET_CODES = 64  # in a row of the sheet of drawn codes


@dataclass(frozen=True, eq=False)
class View:
    """One scale of an image.

    Args:
        scale (`float`): Output side over input side.
        image (`PIL.Image.Image`): What the ids decode to.
        figures (`dict[str, str]`): Names and values, to be read.
        code_grid (`dict[str, Any]`): What `static/code_grid.js` draws: `width` and `height` in cells, `codes`, the
            ids that occur, each once, `cells`, the place of each cell's id in them (uint32, little-endian, row by row,
            in base64), and `looks`, a sheet of what they look like (PNG as a data URL), `columns` in a row,
            `look_px` pixels a side.
    """

    scale: float
    image: Image.Image
    figures: dict[str, str]
    code_grid: dict[str, Any]


def views(model: SVQVAE, tokens: ImageTokens, original: Image.Image | None) -> Iterator[View]:
    """Decodes each scale and says what it came to.

    Args:
        model ([`SVQVAE`]): The model that gave the ids, its tiles set.
        tokens ([`ImageTokens`]): Ids of an image.
        original (`PIL.Image.Image`, *optional*): The image itself; without it there are no PSNR and SSIM.

    Yields:
        [`View`]: One per scale, in the order of `tokens`, each when it is done.
    """
    for index, (ids, scale) in enumerate(zip(tokens.ids, tokens.scales, strict=True)):
        start = time.perf_counter()
        (image,) = decode_image(model, dataclasses.replace(tokens, ids=[ids], scales=(scale,)))
        seconds = time.perf_counter() - start
        height, width = ids.shape
        figures = {
            "size": f"{image.width} × {image.height}",
            "tokens": f"{width} × {height} = {ids.numel():,}",
            "bits per pixel": f"{tokens.bits_per_pixel(index):.3f}",
        }
        if original is not None:
            (result,) = measure(original, dataclasses.replace(tokens, ids=[ids], scales=(scale,)), [image])
            figures |= {"PSNR": f"{result.psnr:.2f} dB", "SSIM": _ssim(original, image, scale)}
        figures["decoded in"] = f"{seconds:.2f} s"
        yield View(scale, image, figures, _code_grid(model, ids))


def draw_codes(model: SVQVAE, codes: torch.Tensor) -> np.ndarray:
    """What codes look like: the middle of a grid of 2 x 2 cells that all have the code, decoded.

    Args:
        model ([`SVQVAE`]): Model.
        codes (`torch.Tensor` of shape `(codes,)`): Rows of its codebook.

    Returns:
        `np.ndarray` of shape `(codes, f, f, 3)`, uint8.
    """
    processor = SVQVAEImageProcessor(pixel_range=model.config["pixel_range"])
    low, high = model.f // 2, model.f // 2 + model.f
    looks: list[np.ndarray] = []
    with torch.inference_mode():
        for some in codes.split(CODES_AT_ONCE):
            sample = model.decode(some[:, None, None].expand(-1, 2, 2).contiguous().to(model.device)).sample
            looks += map(np.asarray, processor.postprocess(sample[:, :, low:high, low:high]))
    return np.stack(looks)


def _ssim(original: Image.Image, image: Image.Image, scale: float) -> str:
    if min(image.size) < SSIM_SIDE:
        return f"needs {SSIM_SIDE} pixels"
    pair = [image, resized_original(original, image.size, scale)]
    sample, target = (torch.from_numpy(np.array(each)).movedim(-1, 0)[None] for each in pair)
    return f"{ssim(sample, target).item():.3f}"


def _code_grid(model: SVQVAE, ids: torch.Tensor) -> dict[str, Any]:
    codes, cells = ids.unique(return_inverse=True)
    return {
        "width": ids.shape[1],
        "height": ids.shape[0],
        "codes": codes.tolist(),
        "cells": base64.b64encode(cells.numpy().astype("<u4").tobytes()).decode(),
        "looks": _sheet(draw_codes(model, codes)),
        "columns": SHEET_CODES,
        "look_px": model.f,
    }


def _sheet(looks: np.ndarray) -> str:
    count, side = looks.shape[:2]
    rows = -(-count // SHEET_CODES)
    sheet = np.zeros((rows * SHEET_CODES, side, side, 3), np.uint8)
    sheet[:count] = looks
    sheet = sheet.reshape(rows, SHEET_CODES, side, side, 3).swapaxes(1, 2).reshape(rows * side, SHEET_CODES * side, 3)
    content = io.BytesIO()
    Image.fromarray(sheet).save(content, "png")
    return f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"

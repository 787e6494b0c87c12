"""Compares exported graphs with the model on images of ten sizes."""

import math

import torch

from svqvae_hf.export.graph_files import Graph
from svqvae_hf.export.graphs import example_images
from svqvae_hf.models.modeling_svqvae import SVQVAE

# Batch, rows and columns of ids. No grid equals the traced one. They include a single id, a single row and column,
# unequal sides, and more ids than the model searches at once.
CHECKED_GRIDS = (
    *((1, 1, 1), (2, 1, 3), (3, 5, 1), (1, 4, 4), (3, 2, 5), (2, 8, 8), (1, 7, 13), (1, 16, 16), (1, 11, 24)),
    (1, 20, 32),
)
PIXEL_TOLERANCE = 2 / 255  # where black and white differ by 1
# In float32 another library adds the same products in another order, so two nearly equal codes may change places.
MAX_CHANGED = 1e-3  # fraction of all ids
ADVICE = "Nothing was written. Try other versions of torch, onnx and onnxruntime."


def compare_graphs(model: SVQVAE, encode: Graph, decode: Graph, dtype: torch.dtype) -> tuple[int, float]:
    """Runs both graphs on all sizes and compares them with the model in float32.

    Args:
        model ([`SVQVAE`]): Model in float32.
        encode (`Callable`): Encoder graph.
        decode (`Callable`): Decoder graph.
        dtype (`torch.dtype`): Type of the graphs' images and weights. In float32, `MAX_CHANGED` of the ids may
            differ, and pixels by `PIXEL_TOLERANCE`. In float16, any finite difference passes.

    Returns:
        `tuple[int, float]`: Number of ids that differ, and largest difference of a pixel, where black and
            white differ by 1.

    Raises:
        ValueError: If a graph fails to run, returns a wrong shape, or differs by more.
    """
    changed, total, largest = 0, 0, 0.0
    for number, grid in enumerate(CHECKED_GRIDS):
        top, left = number % model.f, 3 * number % model.f  # so that many sides are not multiples of f
        sample = example_images(model, grid)[..., top:, left:]
        expected = model.encode_tokens(sample)
        name = f"encoder at {_size_text(sample)}"
        ids = _run(encode, sample.to(dtype), expected, name)
        changed, total = changed + int((ids != expected).sum()), total + ids.numel()
        largest = max(largest, _compare_pixels(model, decode, expected, dtype))
    if dtype == torch.float32 and changed > MAX_CHANGED * total:
        raise ValueError(f"the encoder: ids must equal the model's, but {changed} of {total} differ. {ADVICE}")
    return changed, largest


def _compare_pixels(model: SVQVAE, decode: Graph, ids: torch.Tensor, dtype: torch.dtype) -> float:
    expected = model.decode_tokens(ids)
    name = f"decoder at {_size_text(expected)}"
    pixels = _run(decode, ids, expected, name)
    low, high = model.config["pixel_range"]
    difference = float((pixels.float() - expected).abs().max() / (high - low))
    if not difference <= (PIXEL_TOLERANCE if dtype == torch.float32 else math.inf):  # NaN fails, too
        raise ValueError(
            f"the {name}: pixels must be within {PIXEL_TOLERANCE * 255:g}/255 of the model's, but differ by "
            f"{difference * 255:.3g}/255. {ADVICE}"
        )
    return difference


def _size_text(sample: torch.Tensor) -> str:
    batch, _, height, width = sample.shape
    return f"{width} x {height} pixels (width x height), batch {batch}"


def _run(graph: Graph, value: torch.Tensor, expected: torch.Tensor, name: str) -> torch.Tensor:
    try:
        result = graph(value)
    except Exception as error:  # each runtime raises its own errors
        raise ValueError(f"the {name} must run, but fails: {error} {ADVICE}") from error
    if result.shape != expected.shape:
        raise ValueError(
            f"the {name} must return the shape {tuple(expected.shape)}, got {tuple(result.shape)}. {ADVICE}"
        )
    return result

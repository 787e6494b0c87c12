"""Compares exported graphs with the model on images of ten sizes."""

import math

import torch
import torch.nn.functional as F

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
# Another library adds the same products in another order, so its latents differ in the last digits. In float32 they
# differ from float64 by up to 4e-6 of their length, measured with the layout of the original's release. Two codes
# whose similarities differ by no more than this are a tie, and either is right.
TIE = 1e-5
ADVICE = "Nothing was written. Try other versions of torch, onnx and onnxruntime."


def compare_graphs(model: SVQVAE, encode: Graph, decode: Graph, dtype: torch.dtype) -> tuple[int, float]:
    """Runs both graphs on all sizes and compares them with the model in float32.

    Args:
        model ([`SVQVAE`]): Model in float32.
        encode (`Callable`): Encoder graph.
        decode (`Callable`): Decoder graph.
        dtype (`torch.dtype`): Type of the graphs' images and weights. In float32, ids may differ only in ties, and
            pixels by `PIXEL_TOLERANCE`. In float16, any finite difference passes.

    Returns:
        `tuple[int, float]`: Number of ids that differ, and largest difference of a pixel, where black and
            white differ by 1.

    Raises:
        ValueError: If a graph fails to run, returns a wrong shape, or differs by more.
    """
    changed, largest = 0, 0.0
    for number, grid in enumerate(CHECKED_GRIDS):
        top, left = number % model.f, 3 * number % model.f  # so that many sides are not multiples of f
        sample = example_images(model, grid)[..., top:, left:]
        ids = model.encode_tokens(sample)
        changed += _compare_ids(model, encode, sample, ids, dtype)
        largest = max(largest, _compare_pixels(model, decode, ids, dtype))
    return changed, largest


def _compare_ids(
    model: SVQVAE, encode: Graph, sample: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype
) -> int:
    name = f"encoder at {_size_text(sample)}"
    ids = _run(encode, sample.to(dtype), expected, name)
    differs = ids != expected
    wrong = differs & ~(_similarity_gap(model, sample, ids, expected) <= TIE)
    if dtype == torch.float32 and wrong.any():
        raise ValueError(
            f"the {name}: ids must equal the model's, but {int(wrong.sum())} of {ids.numel()} differ and are not "
            f"ties. {ADVICE}"
        )
    return int(differs.sum())


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


def _similarity_gap(model: SVQVAE, sample: torch.Tensor, ids: torch.Tensor, nearest: torch.Tensor) -> torch.Tensor:
    """How much more similar latents are to their nearest codes than to the codes `ids`.

    Similarity is the cosine for normalised codes. Without L2 norm it is minus half the squared distance, divided by
    the mean of both squared lengths.
    """
    latents = model.encode(sample).latents.permute(0, 2, 3, 1).double()  # (batch, h, w, codebook_embed_dim)
    if model.config["codebook_l2_norm"]:
        latents = F.normalize(latents, dim=-1)
    chosen, best = (model.quantize.get_codebook_entry(rows).double() for rows in (ids, nearest))
    lengths = (latents.square().sum(-1) + best.square().sum(-1)) / 2
    return ((latents - chosen).square().sum(-1) - (latents - best).square().sum(-1)) / 2 / lengths

"""Compares exported graphs with their model, on photographs, noise and flat colours."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageColor

from svqvae_hf.export.graphs import coarse_noise
from svqvae_hf.export.onnx_graphs import Graph
from svqvae_hf.models.modeling_svqvae import SVQVAE
from svqvae_hf.models.resizing import map_range

PHOTOGRAPHS = ("osprey.webp", "wren.webp")
PHOTOGRAPHS_FOLDER = Path(__file__).parent / "photographs"
# Rows and columns of ids. With f = 8, the first grid is the size of the photographs, 640 x 360 pixels. It is large, so
# that sums over all positions have many terms, whose rounding errors add up.
PHOTOGRAPH_GRIDS = ((45, 80), (20, 31))
# Batch, rows and columns of ids. No grid equals the traced one. They include a single id, a single row and column,
# unequal sides, and more ids than the model searches at once.
NOISE_GRIDS = (
    (1, 1, 1),
    (2, 1, 3),
    (3, 5, 1),
    (1, 4, 4),
    (3, 2, 5),
    (2, 8, 8),
    (1, 7, 13),
    (1, 16, 16),
    (1, 11, 24),
    (1, 20, 32),
)
COLOURS = ("black", "white", "grey", "crimson", "teal", "khaki")
COLOUR_GRID = (20, 20)

PIXEL_TOLERANCE = 2 / 255  # where black and white differ by 1
# Another library adds the same products in another order, so two nearly equal codes may change places.
MAX_CHANGED = 1e-3  # fraction of the ids of each kind of image
ADVICE = "Nothing was written. Try other versions of torch, onnx and onnxruntime."


@dataclass
class ChangedIds:
    """Number of ids that differ from the model's in float64.

    Args:
        changed (`int`): Number of ids that differ.
        total (`int`): Number of all ids.
    """

    changed: int = 0
    total: int = 0


def compare_graphs(model: SVQVAE, encode: Graph, decode: Graph) -> str:
    """Runs both graphs on photographs, noise and flat colours of several sizes, and compares them with the model.

    Ids are compared with those of the model in float64. In float32, the model rounds as well, in some images more than
    the graph, so its ids would not tell which of the two is wrong.

    Args:
        model ([`SVQVAE`]): Model in float32.
        encode (`Callable`): Encoder graph.
        decode (`Callable`): Decoder graph.

    Returns:
        `str`: How many ids differ, and by how much pixels differ.

    Raises:
        ValueError: If a graph fails to run, returns a wrong shape, or differs from the model by more than
            `MAX_CHANGED` of the ids of one kind of image or by `PIXEL_TOLERANCE`.
    """
    exact_model = copy.deepcopy(model).double()
    samples_by_kind = {"photographs": photographs(model), "noise": noise(model), "flat colours": flat_colours(model)}
    counts = {}
    largest = 0.0
    for kind, samples in samples_by_kind.items():
        count = ChangedIds()
        for sample in samples:
            ids = exact_model.encode_tokens(sample.double())
            count.changed += count_changed(encode, sample, ids)
            count.total += ids.numel()
            largest = max(largest, largest_difference(decode, ids, model))
        counts[kind] = count
    phrases = []
    for kind, count in counts.items():
        check_changed(kind, count)
        phrases.append(f"{count.changed} of {count.total:,} ids of {kind}")
    return f"{', '.join(phrases)} differ from the model's in float64; pixels differ by at most {largest * 255:.2g}/255"


def check_changed(kind: str, count: ChangedIds) -> None:
    """Raises if too many ids of one kind of image differ."""
    if count.changed > MAX_CHANGED * count.total:
        raise ValueError(
            f"the encoder: at most 1 in {1 / MAX_CHANGED:,.0f} ids of {kind} may differ from the model's in float64, "
            f"but {count.changed} of {count.total:,} do. {ADVICE}"
        )


def count_changed(encode: Graph, sample: torch.Tensor, expected: torch.Tensor) -> int:
    """Encodes images, and counts the ids that differ from the expected ones."""
    name = f"encoder {size_of(sample)}"
    ids = run_graph(encode, sample, name)
    check_shape(ids, expected, name)
    return int((ids != expected).sum())


def largest_difference(decode: Graph, ids: torch.Tensor, model: SVQVAE) -> float:
    """Decodes ids, and returns the largest difference of a pixel, where black and white differ by 1.

    Raises:
        ValueError: If it is more than `PIXEL_TOLERANCE`.
    """
    expected = model.decode_tokens(ids)
    name = f"decoder {size_of(expected)}"
    sample = run_graph(decode, ids, name)
    check_shape(sample, expected, name)
    differences = (sample - expected).abs()
    differences = differences.nan_to_num(nan=torch.inf)  # because NaN would not exceed the tolerance below
    black, white = model.config["pixel_range"]
    largest = float(differences.max()) / (white - black)
    if largest > PIXEL_TOLERANCE:
        raise ValueError(
            f"the {name}: pixels must be within {PIXEL_TOLERANCE * 255:g}/255 of the model's, but differ by "
            f"{largest * 255:.3g}/255. {ADVICE}"
        )
    return largest


def run_graph(graph: Graph, value: torch.Tensor, name: str) -> torch.Tensor:
    """Runs a graph. Raises ValueError if that fails."""
    try:
        return graph(value)
    except Exception as error:  # each runtime raises its own errors
        raise ValueError(f"the {name} must run, but fails: {error} {ADVICE}") from error


def check_shape(result: torch.Tensor, expected: torch.Tensor, name: str) -> None:
    """Raises ValueError for a result of another shape."""
    if result.shape != expected.shape:
        raise ValueError(f"the {name} must return shape {tuple(expected.shape)}, got {tuple(result.shape)}. {ADVICE}")


def size_of(sample: torch.Tensor) -> str:
    """Size of images, in words."""
    return f"at {sample.shape[3]} x {sample.shape[2]} pixels (width x height), batch {len(sample)}"


def photographs(model: SVQVAE) -> Iterator[torch.Tensor]:
    """Yields each photograph at several sizes, as `(1, in_channels, height, width)` in the model's `pixel_range`."""
    for name in PHOTOGRAPHS:
        with Image.open(PHOTOGRAPHS_FOLDER / name) as file:
            photograph = file.convert("RGB")
        for rows, columns in PHOTOGRAPH_GRIDS:
            size = (columns * model.f, rows * model.f)  # width and height in pixels
            resized = photograph.resize(size, Image.Resampling.LANCZOS)
            pixels = torch.from_numpy(np.array(resized))  # (height, width, 3)
            yield sample_of_pixels(model, pixels.permute(2, 0, 1))


def noise(model: SVQVAE) -> Iterator[torch.Tensor]:
    """Yields batches of noise, `(batch, in_channels, height, width)`. Most sides are not multiples of `f`."""
    for number, grid in enumerate(NOISE_GRIDS):
        # Any numbers of rows and columns to cut off, less than f
        top = number % model.f
        left = 3 * number % model.f
        yield coarse_noise(model, grid)[..., top:, left:]


def flat_colours(model: SVQVAE) -> Iterator[torch.Tensor]:
    """Yields images of one colour each."""
    rows, columns = COLOUR_GRID
    height = rows * model.f  # in pixels
    width = columns * model.f
    for name in COLOURS:
        red_green_blue = torch.tensor(ImageColor.getrgb(name))  # (3,)
        pixel = red_green_blue.view(3, 1, 1)
        pixels = pixel.repeat(1, height, width)  # (3, height, width)
        yield sample_of_pixels(model, pixels)


def sample_of_pixels(model: SVQVAE, pixels: torch.Tensor) -> torch.Tensor:
    """Turns an image into an input of the model. If it has more than three channels, they repeat red, green and blue.

    Args:
        model ([`SVQVAE`]): The model.
        pixels (`torch.Tensor` of shape `(3, height, width)`): Red, green and blue in [0, 255].

    Returns:
        `torch.Tensor` of shape `(1, in_channels, height, width)`: Image in the model's `pixel_range`.
    """
    channels = torch.arange(model.config["in_channels"]) % 3  # 0, 1, 2, 0, 1, ...
    sample = pixels[channels].unsqueeze(0)  # (1, in_channels, height, width)
    return map_range(sample / 255, (0, 1), model.config["pixel_range"])

"""Synthetic crops: saturated, flat and smooth colours, which photographs hold too few of.

A tokenizer trained on photographs alone has no codes for them, so that a plain green comes back grey.
"""

import numpy as np

KINDS = ("flat", "flat", "gradient", "edge")  # half of the crops are flat
CORNERS = 0.1  # fraction of the colours that are corners of the RGB cube


def synthetic_crop(side: int, rng: np.random.Generator) -> np.ndarray:
    """Draws a crop of one colour, a linear gradient between two, or a straight edge between two.

    Most colours are uniform in the RGB cube, the others are its corners.

    Args:
        side (`int`): Side in pixels.
        rng (`np.random.Generator`): Source of randomness.

    Returns:
        `np.ndarray` of shape `(side, side, 3)`: uint8.
    """
    kind = rng.choice(KINDS)
    first = _colour(rng)
    second = _colour(rng)
    if kind == "flat":
        second = first
    angle = rng.uniform(0, 2 * np.pi)
    columns = np.linspace(-1, 1, side)  # (side,), 0 at the centre
    rows = columns[:, None]  # (side, 1)
    # Distance of each pixel from a line through the centre
    distance = np.cos(angle) * rows + np.sin(angle) * columns  # (side, side)
    if kind == "edge":
        edge = rng.uniform(-0.7, 0.7)
        share_of_second = (distance > edge).astype(np.float64)
    else:
        largest_difference = max(np.ptp(distance), 1e-9)  # not 0 for a single pixel
        share_of_second = (distance - distance.min()) / largest_difference
    crop = first + share_of_second[..., None] * (second - first)  # (side, side, 3)
    return np.rint(crop).astype(np.uint8)


def _colour(rng: np.random.Generator) -> np.ndarray:
    """Draws red, green and blue, each in [0, 255]."""
    if rng.random() < CORNERS:
        return 255.0 * rng.integers(0, 2, 3)
    return rng.uniform(0, 255, 3)

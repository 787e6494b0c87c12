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
    first_colour = _colour(rng)  # (3,)
    second_colour = _colour(rng)  # (3,)
    angle = rng.uniform(0, 2 * np.pi)
    # `share_of_second` is the fraction of the second colour in each pixel, from 0 to 1.
    if kind == "flat":
        share_of_second = np.zeros((side, side))
    elif kind == "edge":
        distance_of_edge = rng.uniform(-0.7, 0.7)  # from the centre; the border of the crop is at -1 and at 1
        is_beyond_edge = _distances(side, angle) > distance_of_edge
        share_of_second = is_beyond_edge.astype(np.float64)  # (side, side)
    else:
        share_of_second = _gradient(side, angle)  # (side, side)
    crop = first_colour + share_of_second[:, :, None] * (second_colour - first_colour)  # (side, side, 3)
    return np.rint(crop).astype(np.uint8)


def _distances(side: int, angle: float) -> np.ndarray:
    """Distance of each pixel from a line through the centre of a crop, `(side, side)`.

    Distances are negative on one side of the line. From the centre of the crop to its border it is 1.
    """
    positions = np.linspace(-1, 1, side)  # of the rows or columns of pixels; the centre is at 0
    y = positions[:, None]  # (side, 1)
    x = positions[None, :]  # (1, side)
    return np.cos(angle) * y + np.sin(angle) * x


def _gradient(side: int, angle: float) -> np.ndarray:
    """Numbers that rise linearly from 0 at one end of a crop to 1 at the other, `(side, side)`."""
    distances = _distances(side, angle)
    largest_difference = max(np.ptp(distances), 1e-9)  # not 0 for a single pixel
    return (distances - distances.min()) / largest_difference


def _colour(rng: np.random.Generator) -> np.ndarray:
    """Draws red, green and blue, each in [0, 255]."""
    if rng.random() < CORNERS:
        return 255.0 * rng.integers(0, 2, 3)
    return rng.uniform(0, 255, 3)

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
    first, second = (_colour(rng) for _ in range(2))
    if kind == "flat":
        second = first
    angle = rng.uniform(0, 2 * np.pi)
    axis = np.linspace(-1, 1, side)
    position = np.cos(angle) * axis[:, None] + np.sin(angle) * axis  # distance from a line through the centre
    if kind == "edge":
        mixture = (position > rng.uniform(-0.7, 0.7)).astype(np.float64)
    else:
        mixture = (position - position.min()) / max(np.ptp(position), 1e-9)
    return np.rint(first + mixture[..., None] * (second - first)).astype(np.uint8)


def _colour(rng: np.random.Generator) -> np.ndarray:
    if rng.random() < CORNERS:
        return 255.0 * rng.integers(0, 2, 3)
    return rng.uniform(0, 255, 3)

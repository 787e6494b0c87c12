"""Schedules of next-scale generation: the sizes, in ids, of the scales of an image."""

import itertools
from collections.abc import Sequence
from numbers import Integral
from typing import Any

Size = tuple[int, int]  # height and width
Scale = int | Sequence[int]  # longer side, or height and width

BISECTIONS = 60  # halvings of an interval; a float has fewer bits, so more would change nothing
GUIDANCE_MODES = ("rising", "constant")
RISING_STEPS = 9  # steps from the first to the one that has `guidance_scale` if guidance rises, as in VAR's ten steps


def make_schedule(size: Size, steps: int) -> list[Size]:
    """Spreads scales between one id along the longer side and a size. Sides grow by a constant factor, at least by 1.

    For 16 x 16 ids in 10 steps these are FlexVAR's own sides: 1, 2, 3, 4, 5, 6, 8, 10, 13 and 16.

    Args:
        size (`tuple[int, int]`): Height and width of the last scale.
        steps (`int`): Number of scales; a single one is `size`.

    Raises:
        ValueError: There are no steps, or more than the ids along the longer side.
    """
    longest = max(size)
    if not isinstance(steps, Integral):
        raise ValueError(f"`num_inference_steps` must be an integer, got {steps!r}.")
    if not 1 <= steps <= longest:
        raise ValueError(f"`num_inference_steps` must be in [1, {longest}] for {describe([size])} ids, got {steps}.")
    factor = _largest_factor(longest, steps)  # by this factor, the sides grow to `longest`
    sides = [_rounded_side(side) for side in _grow(factor, steps)]
    sides[-1] = longest  # a rounding error may have made the last side smaller
    # `fit_schedule` takes each of them for the longer side of a scale, and adds the other side.
    return fit_schedule(sides, size)


def _largest_factor(longest: int, steps: int) -> float:
    """Largest factor by which sides can grow without exceeding `longest` after so many steps, by bisection."""
    factor = 1.0  # small enough
    too_large = float(longest)
    for _ in range(BISECTIONS):
        middle = (factor + too_large) / 2
        last_side = _grow(middle, steps)[-1]
        if last_side > longest:
            too_large = middle
        else:
            factor = middle
    return factor


def _grow(factor: float, steps: int) -> list[float]:
    """One side per step, not rounded. They start at 1 and grow by a factor, at least by 1."""
    side = 1.0
    sides = [side]
    while len(sides) < steps:
        side = max(side + 1, side * factor)
        sides.append(side)
    return sides


def fit_schedule(schedule: Sequence[Scale], size: Size) -> list[Size]:
    """Checks a schedule. A single number is the longer side of a scale with the aspect ratio of the image.

    Args:
        schedule (list of `int` or `(height, width)`): Scales in ids, from coarse to fine.
        size (`tuple[int, int]`): Height and width of the image in ids.

    Raises:
        ValueError: An entry is not one or two integers above 0, a scale is not larger than the one before, or the last
            is not `size`.
    """
    sizes = [size_of_scale(entry, size) for entry in schedule]
    for size_before, next_size in itertools.pairwise(sizes):
        height_before, width_before = size_before
        height, width = next_size
        shrinks = height < height_before or width < width_before
        if next_size == size_before or shrinks:
            raise ValueError(f"`schedule` must rise, but {describe([next_size])} follows {describe([size_before])}.")
    if not sizes:
        raise ValueError(f"`schedule` must end with {describe([size])}, the ids of the image, got no scale.")
    if sizes[-1] != size:
        raise ValueError(f"`schedule` must end with {describe([size])}, the ids of the image, got {describe(sizes)}.")
    return sizes


def size_of_scale(entry: Any, size: Size) -> Size:
    """Height and width of the scale that an entry of a schedule stands for.

    Args:
        entry (`int` or `(height, width)`): A single number is the longer side of the scale.
        size (`tuple[int, int]`): Height and width of the image in ids. With a single number, the scale has the aspect
            ratio of the image.

    Raises:
        ValueError: The entry is not one or two integers above 0.
    """
    sides = list(entry) if isinstance(entry, list | tuple) else [entry]
    are_positive_integers = all(type(side) is int and side > 0 for side in sides)  # `True` is not an `int` here
    if len(sides) not in (1, 2) or not are_positive_integers:
        raise ValueError(f"`schedule` must hold sides or pairs (height, width), integers above 0, got {entry!r}.")
    if len(sides) == 1:
        return _size_with_longer_side(sides[0], size)
    height, width = sides
    return (height, width)


def _size_with_longer_side(longer_side: int, size: Size) -> Size:
    """Height and width of a scale with the aspect ratio of `size`, whose longer side is known."""
    height, width = size
    if height >= width:
        return (longer_side, _rounded_side(longer_side * width / height))
    return (_rounded_side(longer_side * height / width), longer_side)


def _rounded_side(side: float) -> int:
    """Nearest whole side, at least 1. A half is rounded up."""
    return max(1, int(side + 0.5))


def guidance_per_step(guidance_scale: float, mode: str, sizes: Sequence[Size], trained: Size) -> list[float]:
    """Lists the guidance scale of each step.

    Args:
        guidance_scale (`float`): Guidance scale; 1 means none.
        mode (`str`): `"constant"` for `guidance_scale` at each step. `"rising"` for guidance that rises by equal
            amounts from 1 at the first step to `guidance_scale` at the last: 1, 2, 3, 4 and 5 for five steps and a
            `guidance_scale` of 5. So a single step is not guided. With more than ten steps, the tenth has
            `guidance_scale`, as in VAR, and later ones have more. Scales larger than in training have
            `guidance_scale` itself.
        sizes (list of `(height, width)`): Schedule.
        trained (`tuple[int, int]`): Largest scale in training.

    Raises:
        ValueError: The mode is unknown.
    """
    if mode not in GUIDANCE_MODES:
        raise ValueError(f"`guidance_mode` must be one of {', '.join(GUIDANCE_MODES)}, got {mode!r}.")
    if mode == "constant":
        return [guidance_scale] * len(sizes)
    # Guidance is 1 at step 0, and `guidance_scale` at step `num_rises`: step 4 of five steps, and step 9 of 20 steps.
    num_rises = min(len(sizes) - 1, RISING_STEPS)
    num_rises = max(1, num_rises)  # a single step never rises, and 0 would be divided by
    rise_per_step = (guidance_scale - 1) / num_rises
    scales = []
    for step, size in enumerate(sizes):
        is_larger_than_in_training = max(size) > max(trained)
        if is_larger_than_in_training:
            scales.append(guidance_scale)
        else:
            scales.append(1 + rise_per_step * step)
    return scales


def describe(sizes: Sequence[Size]) -> str:
    """Formats sizes as `1 x 1, 2 x 2`, height first."""
    return ", ".join(f"{height} x {width}" for height, width in sizes)

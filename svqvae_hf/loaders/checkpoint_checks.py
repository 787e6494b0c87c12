"""Checks of the weights in an original checkpoint; each names all faulty keys in one error."""

from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

import torch

from svqvae_hf.untrusted.weights import is_dense, key_text, without_attributes

EMA = "ema"  # key of the averaged weights in a pickle
WEIGHT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def select_weights(
    content: Mapping[Any, Any], weights: Any, source: str | Path, *, use_ema: bool = False
) -> dict[str, Any]:
    """Weights of a file by name, without attributes that a pickle may give to tensors.

    Args:
        content (`Mapping`): Content of the file.
        weights: Part of the content that should hold the weights.
        source (`str` or `Path`): Name of the file in errors.
        use_ema (`bool`, defaults to `False`): Take the averaged weights of the file instead.

    Raises:
        ValueError: The file does not hold these weights.
    """
    selected = content.get(EMA) if use_ema else weights
    if isinstance(selected, Mapping):
        return {key_text(key): without_attributes(value) for key, value in selected.items()}
    if use_ema:
        raise ValueError(f"`{source}` must hold averaged weights (`{EMA}`) for `use_ema`, but has none. Leave it out.")
    raise ValueError(
        f"`{source}` must hold weights by their names, but holds a {type(selected).__name__}. Download it again."
    )


def check_tensors(weights: Mapping[str, Any], source: str | Path) -> None:
    """Raises unless all weights are tensors with data for each element."""
    not_tensors = set()
    not_dense = set()
    for name, weight in weights.items():
        if not isinstance(weight, torch.Tensor):
            not_tensors.add(name)
        elif not is_dense(weight):
            not_dense.add(name)
    raise_faults(source, {"not tensors": not_tensors, "not dense": not_dense})


def read_sizes(
    weights: Mapping[str, torch.Tensor], axes: Mapping[str, tuple[str, int]], source: str | Path
) -> dict[str, int]:
    """Reads config values that are sizes of weights.

    Args:
        weights (`Mapping[str, torch.Tensor]`): Weights of the file.
        axes (`Mapping[str, tuple[str, int]]`): For each config value, the name of a weight and the axis with the size.
        source (`str` or `Path`): Name of the file in errors.
    """
    missing = set()
    misshapen = set()
    sizes = {}
    for config_key, (name, axis) in axes.items():
        if name not in weights:
            missing.add(name)
            continue
        shape = weights[name].shape
        has_axis = len(shape) > axis
        is_empty = 0 in shape
        if has_axis and not is_empty:
            sizes[config_key] = shape[axis]
        else:
            misshapen.add(f"{name} {tuple(shape)}")
    raise_faults(source, {"missing": missing, "misshapen": misshapen})
    return sizes


def check_weights(weights: Mapping[str, torch.Tensor], shapes: Mapping[str, torch.Size], source: str | Path) -> None:
    """Raises unless the weights are exactly those in `shapes`, finite and of one of the `WEIGHT_DTYPES`."""
    misshapen = set()
    wrong_type = set()
    not_finite = set()
    for name in shapes.keys() & weights.keys():
        weight = weights[name]
        has_shape = weight.shape == shapes[name]
        has_type = weight.dtype in WEIGHT_DTYPES
        if not has_shape:
            misshapen.add(f"{name} {tuple(weight.shape)} instead of {tuple(shapes[name])}")
        if not has_type:
            wrong_type.add(f"{name} {weight.dtype}")
        if has_shape and has_type and not weight.isfinite().all():
            not_finite.add(name)
    faults = {
        "missing": shapes.keys() - weights.keys(),
        "unexpected": weights.keys() - shapes.keys(),
        "misshapen": misshapen,
        "not float32, float16 or bfloat16": wrong_type,
        "not finite": not_finite,
    }
    raise_faults(source, faults)


def raise_faults(source: str | Path, faults: Mapping[str, Set[str]]) -> None:
    """Raises one error that lists all faults by kind, sorted, if there are any."""
    descriptions = []
    for kind, names in faults.items():
        listed = ", ".join(sorted(names))
        if len(names) == 1:
            descriptions.append(f"{kind}: {listed}")
        elif names:
            descriptions.append(f"{kind} ({len(names)}): {listed}")
    if descriptions:
        raise ValueError(
            f"`{source}` must hold exactly the weights that its config asks for, but has faults: "
            f"{'; '.join(descriptions)}. Download the file again. If you replaced config values, they must fit the "
            "file, too."
        )

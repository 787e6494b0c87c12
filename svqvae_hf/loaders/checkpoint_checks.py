"""Checks of the weights in an original checkpoint; each names all faulty keys in one error."""

from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

import torch

from svqvae_hf.untrusted.weights import is_dense, key_text, without_attributes

WEIGHT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def select_weights(
    content: Mapping[Any, Any], weights: Any, source: str | Path, *, use_ema: bool = False
) -> dict[str, Any]:
    """Weights of a file, or its EMA weights, by name, and without attributes that a pickle may give to tensors."""
    weights = content.get("ema") if use_ema else weights
    if not isinstance(weights, Mapping):
        raise ValueError(f"`{source}` must hold averaged weights (`ema`) for `use_ema`, but has none. Leave it out.")
    return {key_text(key): without_attributes(value) for key, value in weights.items()}


def check_tensors(weights: Mapping[str, Any], source: str | Path) -> None:
    """Raises unless all weights are tensors with data for each element."""
    not_tensors = {key for key, value in weights.items() if not isinstance(value, torch.Tensor)}
    not_dense = {key for key in weights.keys() - not_tensors if not is_dense(weights[key])}
    raise_faults(source, {"not tensors": not_tensors, "not dense": not_dense})


def read_sizes(
    weights: Mapping[str, torch.Tensor], axes: Mapping[str, tuple[str, int]], source: str | Path
) -> dict[str, int]:
    """Reads config values that are sizes of weights. `axes` names the weight and the axis of each."""
    raise_faults(source, {"missing": {name for name, _ in axes.values()} - weights.keys()})
    misshapen = {
        f"{name} {tuple(weights[name].shape)}"
        for name, axis in axes.values()
        if weights[name].ndim <= axis or not weights[name].numel()
    }
    raise_faults(source, {"misshapen": misshapen})
    return {key: weights[name].shape[axis] for key, (name, axis) in axes.items()}


def check_weights(weights: Mapping[str, torch.Tensor], shapes: Mapping[str, torch.Size], source: str | Path) -> None:
    """Raises unless the weights are exactly those in `shapes`, finite and of one of the `WEIGHT_DTYPES`."""
    known = {name: weights[name] for name in shapes if name in weights}
    misshapen = {name for name, tensor in known.items() if tensor.shape != shapes[name]}
    wrong_type = {name for name, tensor in known.items() if tensor.dtype not in WEIGHT_DTYPES}
    readable = known.keys() - misshapen - wrong_type
    faults = {
        "missing": shapes.keys() - weights.keys(),
        "unexpected": weights.keys() - shapes.keys(),
        "misshapen": {f"{name} {tuple(known[name].shape)} instead of {tuple(shapes[name])}" for name in misshapen},
        "not float32, float16 or bfloat16": {f"{name} {known[name].dtype}" for name in wrong_type},
        "not finite": {name for name in readable if not known[name].isfinite().all()},
    }
    raise_faults(source, faults)


def raise_faults(source: str | Path, faults: Mapping[str, Set[str]]) -> None:
    """Raises one error that lists all faults by kind, sorted, if there are any."""
    found = "; ".join(
        f"{kind}{f' ({len(names)})' if len(names) > 1 else ''}: {', '.join(sorted(names))}"
        for kind, names in faults.items()
        if names
    )
    if found:
        raise ValueError(
            f"`{source}` must hold exactly the weights that its config asks for, but has faults: {found}. Download "
            "the file again. If you replaced config values, they must fit the file, too."
        )

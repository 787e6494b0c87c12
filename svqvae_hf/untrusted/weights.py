"""Guards for the weights in a checkpoint."""

from typing import Any

import torch


def without_attributes(value: Any) -> Any:
    """Takes from a tensor the attributes that a pickle gave it, which could hide its methods. Returns the value."""
    if isinstance(value, torch.Tensor):
        vars(value).clear()
    return value


def is_dense(tensor: torch.Tensor) -> bool:
    """Whether a tensor stores all its elements. Sparse and expanded tensors let a small file claim a huge shape."""
    is_plain = tensor.layout == torch.strided and not tensor.is_nested and not tensor.is_meta
    if not is_plain:
        return False
    num_bytes = tensor.numel() * tensor.itemsize
    return tensor.untyped_storage().nbytes() >= num_bytes


def key_text(key: Any) -> str:
    """Key as text for errors. Other keys than strings show only their type: the repr of nested tuples can be huge."""
    if isinstance(key, str):
        return key
    return f"a key of type {type(key).__name__}"

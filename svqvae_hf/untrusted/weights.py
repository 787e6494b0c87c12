"""Guards for the weights in a checkpoint."""

from typing import Any

import torch

# Far above every real model.
MAX_LEVELS = 16
MAX_BLOCKS = 64  # per level


def check_depth(name: str, levels: int, blocks: int) -> None:
    """Stops checkpoints and configs that claim thousands of levels or blocks, whose model would never be built."""
    if levels > MAX_LEVELS or blocks > MAX_BLOCKS:
        raise ValueError(
            f"{name} must have at most {MAX_LEVELS} levels and {MAX_BLOCKS} residual blocks per level, "
            f"got {levels} levels and {blocks} blocks."
        )


def is_dense(tensor: torch.Tensor) -> bool:
    """Stops sparse, expanded and empty tensors, by which a small file claims a shape larger than memory."""
    return (
        tensor.layout == torch.strided
        and not tensor.is_nested
        and not tensor.is_meta
        and tensor.untyped_storage().nbytes() >= tensor.numel() * tensor.itemsize
    )


def key_text(key: Any) -> str:
    """Stops nested tuples as keys, whose `repr` takes all memory: keys that are not text are shown by their type."""
    return key if isinstance(key, str) else f"a key of type {type(key).__name__}"

"""Context models for tests. Their weights are arithmetic, so that they are the same everywhere."""

import numpy as np

from svqvae_hf.tokens.context_model import ContextModel
from svqvae_hf.tokens.neighbourhood import num_inputs

FINGERPRINT = "0123456789abcdef" * 4


def pattern(shape: tuple[int, ...], salt: int) -> np.ndarray:
    """Numbers from -127 to 127 that look random."""
    numbers = np.arange(np.prod(shape), dtype=np.int64) * 2654435761 + salt * 40503
    return ((numbers >> 9) % 255 - 127).reshape(shape)


def make_context_model(fingerprint: str = FINGERPRINT, codes: int = 64, width: int = 24) -> ContextModel:
    """A context model of `codes` ids with codes of 8 numbers."""
    groups, features, inputs = 8, 16, num_inputs(8)
    shapes = {"codes": (codes, 8), "weight_1": (inputs, width), "weight_2": (width, width)}
    shapes |= {"weight_group": (width, groups), "weight_member": (width, features), "weight_code": (codes, features)}
    tensors = {name: pattern(shape, salt).astype(np.int8) for salt, (name, shape) in enumerate(shapes.items())}
    sizes = {"bias_1": width, "bias_2": width, "bias_group": groups, "bias_code": codes}
    tensors |= {name: (pattern((size,), 9) * 8).astype(np.int32) for name, size in sizes.items()}
    tensors["bias_member"] = pattern((groups, features), 10).astype(np.int32) * 8
    tensors["order"] = (np.arange(codes) * 27 % codes).astype(np.int32)  # 27 shares no factor with 64 and 100
    return ContextModel(tensors, fingerprint)

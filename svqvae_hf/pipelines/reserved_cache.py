"""A cache of keys and values in buffers of full length, so that a new token is stored without copying the others."""

from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


def reserve(cache: Any, tokens: int) -> None:
    """Moves the keys and values of a cache to buffers with room for more tokens. Leaves other kinds of caches alone.

    Args:
        cache (`DynamicCache` or another cache): Cache of a language model.
        tokens (`int`): Number of tokens to come.
    """
    if isinstance(cache, DynamicCache):
        cache.layers = [
            ReservedLayer(layer.keys, layer.values, tokens) if type(layer) is DynamicLayer else layer
            for layer in cache.layers
        ]


class ReservedLayer(DynamicLayer):
    """Keys and values of one layer, which are the first part of a buffer.

    Args:
        keys (`torch.Tensor` of shape `(batch, heads, length, head_dim)`): Keys so far.
        values (`torch.Tensor` of the same shape): Values so far.
        tokens (`int`): Number of tokens to come.
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, tokens: int):
        super().__init__()
        self.lazy_initialization(keys, values)
        length = keys.shape[-2]
        self.buffers = [
            torch.cat([each, each.new_empty(*each.shape[:2], tokens, each.shape[-1])], dim=-2)
            for each in (keys, values)
        ]
        self._view(length)

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any) -> Any:
        """Stores keys and values of new tokens, and returns those of all tokens."""
        start = self.keys.shape[-2]
        stop = start + key_states.shape[-2]
        for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[..., start:stop, :] = states
        self._view(stop)
        return self.keys, self.values

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps some sequences of the batch."""
        self.buffers = [buffer[indices] for buffer in self.buffers]
        self._view(self.keys.shape[-2])

    def _view(self, length: int) -> None:
        self.keys, self.values = (buffer[..., :length, :] for buffer in self.buffers)

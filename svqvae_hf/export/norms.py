"""Group normalisation in a form that exported graphs compute exactly."""

import copy

import torch
from torch import nn

from svqvae_hf.models.layers import GroupNorm


class NestedMeanGroupNorm(nn.Module):
    """Stands in for a [`~svqvae_hf.models.layers.GroupNorm`] in an exported network.

    `torch.group_norm` is exported as InstanceNormalization, which adds up all pixels of a group in one float32 sum.
    The sum of a photograph is so inexact that more than one id in a thousand changes. Here the mean of a group is
    the mean over its channels of means over rows of means over columns. Each of these sums is short.

    Args:
        norm ([`~svqvae_hf.models.layers.GroupNorm`]): Normalisation to stand in for.
    """

    def __init__(self, norm: GroupNorm):
        super().__init__()
        self.num_groups = norm.num_groups
        self.eps = norm.eps
        self.weight = norm.weight
        self.bias = norm.bias

    def forward(self, hidden: torch.Tensor, shared: None = None) -> torch.Tensor:
        """`(batch, channels, h, w)` -> the same shape. Tiles share nothing, because graphs do not tile."""
        grouped = hidden.unflatten(1, (self.num_groups, -1))  # (batch, groups, channels of the group, h, w)
        centred = grouped - nested_mean(grouped)
        variance = nested_mean(centred * centred)
        normed = centred * torch.rsqrt(variance + self.eps)
        normed = normed.flatten(1, 2)  # (batch, channels, h, w)
        return normed * self.weight[:, None, None] + self.bias[:, None, None]


def nested_mean(grouped: torch.Tensor) -> torch.Tensor:
    """Mean over columns, then rows, then channels: `(batch, groups, channels, h, w)` -> `(batch, groups, 1, 1, 1)`."""
    mean_of_rows = grouped.mean(4, keepdim=True)
    mean_of_channels = mean_of_rows.mean(3, keepdim=True)
    return mean_of_channels.mean(2, keepdim=True)


def with_nested_means(network: nn.Module) -> nn.Module:
    """Copies a network, with a [`NestedMeanGroupNorm`] in place of each normalisation."""
    network = copy.deepcopy(network)
    for name, module in list(network.named_modules()):
        if isinstance(module, GroupNorm):
            network.set_submodule(name, NestedMeanGroupNorm(module))
    return network

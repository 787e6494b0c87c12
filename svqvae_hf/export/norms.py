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
        centred = hidden - self.means_of_groups(hidden)
        variances = self.means_of_groups(centred * centred)
        normed = centred * torch.rsqrt(variances + self.eps)
        return normed * self.weight[:, None, None] + self.bias[:, None, None]

    def means_of_groups(self, hidden: torch.Tensor) -> torch.Tensor:
        """For each channel, the mean of its group: `(batch, channels, h, w)` -> `(batch, channels, 1, 1)`."""
        means_of_rows = hidden.mean(3)  # (batch, channels, h)
        means_of_channels = means_of_rows.mean(2)  # (batch, channels)
        grouped = means_of_channels.unflatten(1, (self.num_groups, -1))  # (batch, groups, channels of a group)
        means = grouped.mean(2, keepdim=True)  # (batch, groups, 1)
        means = means.expand_as(grouped).flatten(1)  # (batch, channels)
        return means[:, :, None, None]


def with_nested_means(network: nn.Module) -> nn.Module:
    """Copies a network, with a [`NestedMeanGroupNorm`] in place of each normalisation."""
    network = copy.deepcopy(network)
    for name, module in list(network.named_modules()):
        if isinstance(module, GroupNorm):
            network.set_submodule(name, NestedMeanGroupNorm(module))
    return network

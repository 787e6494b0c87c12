"""Operations tuned for speed or memory. Each computes exactly the plain operation that its docstring names."""

import torch
import torch.nn.functional as F
from torch import nn


def fast_layout(hidden: torch.Tensor) -> torch.Tensor:
    """Returns the same tensor in the memory format that the networks are fastest in.

    On CPU without gradients this is channels_last. With gradients the format stays, because the backward pass of a
    norm is slow in channels_last. On other devices the caller chooses, with
    `model.to(memory_format=torch.channels_last)`.
    """
    if hidden.device.type == "cpu" and not torch.is_grad_enabled():
        return hidden.contiguous(memory_format=torch.channels_last)
    return hidden


def silu(normed: torch.Tensor) -> torch.Tensor:
    """SiLU; in place when gradients are off, because on CPU allocating costs more than computing."""
    return F.silu(normed, inplace=not torch.is_grad_enabled())


def group_norm(hidden: torch.Tensor, norm: nn.GroupNorm) -> torch.Tensor:
    """`F.group_norm` without its check, which raises for a 1 x 1 image with one value per group."""
    return torch.group_norm(hidden, norm.num_groups, norm.weight, norm.bias, norm.eps)


def normalise(hidden: torch.Tensor, mean: torch.Tensor, variance: torch.Tensor, norm: nn.GroupNorm) -> torch.Tensor:
    """Group normalisation with given statistics.

    Args:
        hidden (`torch.Tensor` of shape `(images * windows, channels, h, w)`): Windows of each image, one after
            another.
        mean (`torch.Tensor` of shape `(images, groups)`): Mean of each group.
        variance (`torch.Tensor` of shape `(images, groups)`): Variance of each group.
        norm (`nn.GroupNorm`): Its weight, bias and epsilon are used.
    """
    per_group = hidden.shape[1] // norm.num_groups
    mean, variance = (each.repeat_interleave(per_group, dim=1) for each in (mean, variance))  # (images, channels)
    weight, bias = norm.weight.to(mean.dtype), norm.bias.to(mean.dtype)
    if len(mean) == 1 and not torch.is_grad_enabled():  # a fused kernel, which has no gradient for the statistics
        return F.batch_norm(hidden, mean[0], variance[0], weight, bias, eps=norm.eps)
    scale = weight * torch.rsqrt(variance + norm.eps)
    shift = bias - mean * scale
    by_image = hidden.unflatten(0, (len(mean), -1))  # (images, windows, channels, h, w)
    normed = by_image * scale[:, None, :, None, None] + shift[:, None, :, None, None]
    return normed.flatten(0, 1).to(hidden.dtype)


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """Type in which values of `dtype` are summed."""
    return torch.promote_types(dtype, torch.float32)


class RepeatConv2d(nn.Conv2d):
    """Nearest-neighbour upsampling by 2, then a 3 x 3 convolution with padding 1, in 4 / 9 of the arithmetic.

    Under the 3 x 3 kernel lie only four different pixels of the input. Summing the weights that meet the same pixel
    gives a transposed convolution of stride 2. Its 4 x 4 kernel is the sum of four shifted 3 x 3 kernels.

    Args:
        channels (`int`): Channels in and out.
    """

    def __init__(self, channels: int):
        super().__init__(channels, channels, 3)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """`(batch, channels, h, w)` -> `(batch, channels, 2 * h, 2 * w)`."""
        kernel = F.pad(self.weight.to(at_least_float32(self.weight.dtype)), (1, 1, 1, 1))
        kernel = kernel[..., 1:] + kernel[..., :-1]
        kernel = kernel[..., 1:, :] + kernel[..., :-1, :]
        kernel = kernel.flip(-2, -1).transpose(0, 1).to(self.weight.dtype)
        return F.conv_transpose2d(hidden, kernel, self.bias, stride=2, padding=1)

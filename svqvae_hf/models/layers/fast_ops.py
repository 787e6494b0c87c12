"""Operations tuned for speed or memory. Each computes exactly the plain operation that its docstring names."""

import contextlib
import ctypes
import mmap
import sys
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn


class Cuts(NamedTuple):
    """Sides at which windows are cut from their image: 1 for a cut, 0 for a border of the image.

    Args:
        top (`torch.Tensor` of shape `(windows, 1, 1, 1)`): Upper side of each window.
        bottom (`torch.Tensor` of shape `(windows, 1, 1, 1)`): Lower side.
        left (`torch.Tensor` of shape `(windows, 1, 1, 1)`): Left side.
        right (`torch.Tensor` of shape `(windows, 1, 1, 1)`): Right side.
    """

    top: torch.Tensor
    bottom: torch.Tensor
    left: torch.Tensor
    right: torch.Tensor


def make_cuts(sides: Sequence[tuple[bool, bool, bool, bool]], like: torch.Tensor) -> Cuts:
    """Cuts of windows from whether each is cut at its top, bottom, left and right."""
    return Cuts(*torch.tensor(sides, dtype=like.dtype, device=like.device).T[..., None, None, None])


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


def add(into: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Sum; in place when gradients are off, so that memory holds one tensor less."""
    return into + values if torch.is_grad_enabled() else into.add_(values)


def cat_on_own_pages(parts: list[torch.Tensor] | tuple[torch.Tensor, ...], dim: int) -> torch.Tensor:
    """`torch.cat` on pages that return to the system with the tensor: on Linux, on CPU, without gradients.

    In the heap of glibc, tensors that layers free would leave gaps, too small for the features of the next layer.
    Huge pages make this faster than `torch.cat` in the heap. Elsewhere parts are joined as usual, and a single part is
    returned as it is.
    """
    own_pages = sys.platform == "linux" and parts[0].device.type == "cpu"
    if not own_pages or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim)
    joined = torch.cat([torch.empty_like(part, device="meta") for part in parts], dim)
    try:
        pages = mmap.mmap(-1, joined.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError:  # out of memory: PyTorch finds some in its heap, or says so in its own way
        return torch.cat(parts, dim)
    with contextlib.suppress(OSError):  # a kernel without huge pages
        pages.madvise(mmap.MADV_HUGEPAGE)
    values = torch.frombuffer(pages, dtype=joined.dtype)
    return torch.cat(parts, dim, out=values.as_strided(joined.shape, joined.stride()))


def trim_heap() -> None:
    """Returns to the system what is free in the heap of glibc; elsewhere it does nothing."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def group_norm(hidden: torch.Tensor, norm: nn.GroupNorm) -> torch.Tensor:
    """`F.group_norm` without its check, which raises for a 1 x 1 image with one value per group."""
    return torch.group_norm(hidden, norm.num_groups, norm.weight, norm.bias, norm.eps)


def moments(hidden: torch.Tensor, norm: nn.GroupNorm) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and variance of each group of channels: `(batch, channels, h, w)` -> `(batch, groups)` each."""
    values = hidden.to(at_least_float32(hidden.dtype))
    if torch.is_grad_enabled():
        variance, mean = torch.var_mean(values.unflatten(1, (norm.num_groups, -1)), dim=(2, 3, 4), correction=0)
        return mean, variance
    # The fastest kernel that computes statistics. It also normalises the values, which are thrown away.
    batch, channels, height, width = values.shape
    layout = torch.channels_last if values.device.type == "cpu" else torch.contiguous_format
    _, mean, rstd = torch.native_group_norm(
        values.contiguous(memory_format=layout), None, None, batch, channels, height * width, norm.num_groups, norm.eps
    )
    return mean, (rstd.pow(-2) - norm.eps).clamp(min=0)


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


class Conv3x3(nn.Conv2d):
    """3 x 3 convolution with padding 1: zeros at a border of the image, and the edge repeated at a cut of a window.

    Args:
        in_channels (`int`): Channels in.
        out_channels (`int`): Channels out.
    """

    scale = 1  # rows out per row in

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(in_channels, out_channels, 3, padding=1)

    def forward(self, hidden: torch.Tensor, cuts: Cuts | None = None, inner_rows: bool = False) -> torch.Tensor:
        """`(windows, in_channels, h, w)` -> `(windows, out_channels, h, w)`, or only the rows between two rows."""
        output = F.conv2d(hidden, self.weight, self.bias, padding=(0 if inner_rows else 1, 1))
        return output if cuts is None else add_edges(output, hidden, self.weight, cuts, inner_rows=inner_rows)


class HalvingConv2d(nn.Conv2d):
    """3 x 3 convolution of stride 2, padded at the bottom and at the right only, as in [`Conv3x3`].

    Args:
        channels (`int`): Channels in and out.
    """

    scale = 0.5

    def __init__(self, channels: int):
        super().__init__(channels, channels, 3, stride=2)

    def forward(self, hidden: torch.Tensor, cuts: Cuts | None = None) -> torch.Tensor:
        """`(windows, channels, h, w)` -> `(windows, channels, h / 2, w / 2)`."""
        hidden = F.pad(hidden, (0, 1, 0, 1))
        if cuts is not None:
            hidden[..., -1:, :] = hidden[..., -2:-1, :] * cuts.bottom
            hidden[..., -1:] = hidden[..., -2:-1] * cuts.right
        return super().forward(hidden)


def add_edges(
    output: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    cuts: Cuts,
    repeat: int = 1,
    inner_rows: bool = False,
) -> torch.Tensor:
    """Adds to a 3 x 3 convolution, in place, the share of repeated edges beyond the cuts, which were zeros.

    Args:
        output (`torch.Tensor` of shape `(windows, out_channels, h * repeat, w * repeat)`): Result with zeros.
        hidden (`torch.Tensor` of shape `(windows, in_channels, h, w)`): Input.
        weight (`torch.Tensor` of shape `(out_channels, in_channels, 3, 3)`): Weight of the convolution.
        cuts ([`Cuts`]): Cut sides of the windows.
        repeat (`int`, defaults to 1): Repetitions of each position of the input along each side.
        inner_rows (`bool`, defaults to `False`): Whether the result has only the rows between two rows.
    """
    rows = (
        (cuts.top, hidden[..., :1, :], weight[..., :1, :], output[..., :1, :]),
        (cuts.bottom, hidden[..., -1:, :], weight[..., 2:, :], output[..., -1:, :]),
    )
    for cut, row, kernel, edge in () if inner_rows else rows:
        with_corners = torch.cat(
            [row[..., :1] * cuts.left, row.repeat_interleave(repeat, -1), row[..., -1:] * cuts.right], -1
        )
        edge += F.conv2d(with_corners * cut, kernel)
    for cut, column, kernel, edge in (
        (cuts.left, hidden[..., :1], weight[..., :1], output[..., :1]),
        (cuts.right, hidden[..., -1:], weight[..., 2:], output[..., -1:]),
    ):
        share = F.conv2d(column.repeat_interleave(repeat, -2) * cut, kernel, padding=(1, 0))
        edge += share[..., repeat:-repeat, :] if inner_rows else share
    return output


class RepeatConv2d(nn.Conv2d):
    """Nearest-neighbour upsampling by 2, then a 3 x 3 convolution with padding 1, in 4 / 9 of the arithmetic.

    Under the 3 x 3 kernel lie only four different pixels of the input. Summing the weights that meet the same pixel
    gives a transposed convolution of stride 2. Its 4 x 4 kernel is the sum of four shifted 3 x 3 kernels.

    Args:
        channels (`int`): Channels in and out.
    """

    scale = 2

    def __init__(self, channels: int):
        super().__init__(channels, channels, 3)

    def forward(
        self,
        hidden: torch.Tensor,
        cuts: Cuts | None = None,
        inner_rows: bool = False,
        kernels: list[torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """`(windows, channels, h, w)` -> `(windows, channels, 2 * h, 2 * w)`, with edges and rows as in [`Conv3x3`].

        A list that several calls share keeps the summed kernel between them.
        """
        kernels = [] if kernels is None else kernels
        if not kernels:
            kernels.append(cat_on_own_pages([self.summed_kernel()], 0))
        output = F.conv_transpose2d(hidden, kernels[0], self.bias, stride=2, padding=(3 if inner_rows else 1, 1))
        return output if cuts is None else add_edges(output, hidden, self.weight, cuts, 2, inner_rows)

    def summed_kernel(self) -> torch.Tensor:
        """Kernel of the transposed convolution, `(in_channels, out_channels, 4, 4)`."""
        flipped = self.weight.to(at_least_float32(self.weight.dtype)).flip(-2, -1).transpose(0, 1)
        kernel = F.pad(fast_layout(flipped), (0, 1, 0, 1))
        for row, column in ((0, 1), (1, 0), (1, 1)):
            kernel[..., row : row + 3, column : column + 3] += flipped
        return kernel.to(self.weight.dtype)

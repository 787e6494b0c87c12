"""Norm and convolutions of the networks, for whole images and for tiles, and the context that tiles share."""

from dataclasses import dataclass, field, replace
from typing import Self

import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from torch import nn

NORM_EPS = 1e-6

Core = tuple[slice, slice]  # rows and columns of a window
Pair = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True, eq=False)
class TileContext:
    """Values that all tiles of an image share, and the place of the window that a network runs on.

    Every tile is normalised alike and attends to the same positions, wherever it lies. [`WindowSample`] gathers these
    values.

    Args:
        size (`tuple[int, int]`): Height and width of the window, in latents.
        core (`tuple[slice, slice]`): Rows and columns of the window that count, in latents. Those around them are
            next to a cut.
        cuts (`torch.Tensor` of shape `(4, windows, 1, 1, 1)`, *optional*): 1 where a window is cut from its image, 0
            at a border of the image: at the top, bottom, left and right. `None` if no window is cut.
        moments (`dict`): Variance and mean `(images, groups)` of the input of each norm.
        attended (`dict`): Keys and values `(images, positions, 1, channels)` of each attention.
    """

    size: tuple[int, int]
    core: Core
    cuts: torch.Tensor | None
    moments: dict[nn.Module, Pair] = field(default_factory=dict)
    attended: dict[nn.Module, Pair] = field(default_factory=dict)

    def moments_of(self, norm: "GroupNorm", hidden: torch.Tensor) -> Pair:
        """Variance and mean of a norm's input `(windows, channels, h, w)`."""
        return self.moments[norm]

    def keys_and_values(self, attention: nn.Module, normed: torch.Tensor) -> Pair:
        """Keys and values of an attention, whose normalised input is `normed`."""
        return self.attended[attention]

    def core_of(self, hidden: torch.Tensor) -> torch.Tensor:
        """Crops features of any resolution to the core of the tile."""
        return hidden[..., *self._scaled_core(hidden)]

    def crop(self, hidden: torch.Tensor, margin: int) -> tuple[torch.Tensor, Self]:
        """Crops features to the core and `margin` positions around it. Returns them with their context.

        A compiled graph keeps one size instead.
        """
        if torch.compiler.is_compiling():
            return hidden, self
        (y, x), (height, width) = self._scaled_core(hidden), hidden.shape[-2:]
        rows = slice(max(0, y.start - margin), min(height, y.stop + margin))
        columns = slice(max(0, x.start - margin), min(width, x.stop + margin))
        core = move(y, -rows.start), move(x, -columns.start)
        cropped = replace(self, size=(rows.stop - rows.start, columns.stop - columns.start), core=core)
        return fast_layout(hidden[..., rows, columns]), cropped

    def _scaled_core(self, hidden: torch.Tensor) -> Core:
        spans = zip(self.core, hidden.shape[-2:], self.size, strict=True)
        rows, columns = (slice(span.start * side // of, span.stop * side // of) for span, side, of in spans)
        return rows, columns


@dataclass(frozen=True, eq=False)
class WindowSample(TileContext):
    """Sampled windows of images, as one batch, whose norms and attentions gather what the tiles will share.

    Args:
        images (`int`): Number of images, each with as many windows.
    """

    images: int = field(kw_only=True)

    def moments_of(self, norm: "GroupNorm", hidden: torch.Tensor) -> Pair:
        """Computes and keeps variance and mean of a norm's input over the windows of each image."""
        by_group = self.core_of(hidden).unflatten(0, (self.images, -1)).unflatten(2, (norm.num_groups, -1))
        by_group = by_group.to(torch.promote_types(hidden.dtype, torch.float32))
        self.moments[norm] = torch.var_mean(by_group, dim=(1, 3, 4, 5), correction=0)
        return self.moments[norm]

    def keys_and_values(self, attention: nn.Module, normed: torch.Tensor) -> Pair:
        """Computes and keeps keys and values of an attention."""
        self.attended[attention] = attention.keys_and_values(self.core_of(normed), self.images)  # type: ignore[operator]
        return self.attended[attention]

    def tile(self, window: torch.Tensor, core: Core, input_stride: int) -> TileContext:
        """Context of one tile, which is cut on the sides that its core does not reach.

        Args:
            window (`torch.Tensor`): Input at the tile.
            core (`tuple[slice, slice]`): Rows and columns to keep, in latents.
            input_stride (`int`): Input positions per latent along each side.
        """
        (y, x), (height, width) = core, (side // input_stride for side in window.shape[-2:])
        sides = [(y.start > 0, y.stop < height, x.start > 0, x.stop < width)]
        cuts = make_cuts(sides, window) if any(sides[0]) else None
        return TileContext((height, width), core, cuts, self.moments, self.attended)


def move(span: slice, by: int) -> slice:
    """Moves a slice along its axis."""
    return slice(span.start + by, span.stop + by)


def make_cuts(sides: list[tuple[bool, bool, bool, bool]], like: torch.Tensor) -> torch.Tensor:
    """`cuts` of a [`TileContext`], from whether each window is cut at its top, bottom, left and right."""
    return torch.tensor(sides, dtype=like.dtype, device=like.device).T[..., None, None, None]


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


class AttentionProcessor:
    """Runs attention on a backend of diffusers.

    Args:
        backend (`AttentionBackendName`, *optional*): Backend until `set_attention_backend` is called. The default
            follows `diffusers.attention_backend`.
    """

    def __init__(self, backend: AttentionBackendName | None = None):
        self._attention_backend = backend  # diffusers sets it

    def __call__(self, *query_key_value: torch.Tensor, scale: float | None = None) -> torch.Tensor:
        """Attends with a query, key and value `(batch, positions, heads, channels)`."""
        return dispatch_attention_fn(*query_key_value, scale=scale, backend=self._attention_backend)


class GroupNorm(nn.GroupNorm):
    """Group normalisation, with the statistics of the input, or with statistics that tiles share."""

    def __init__(self, num_groups: int, num_channels: int):
        super().__init__(num_groups, num_channels, eps=NORM_EPS)

    def forward(self, hidden: torch.Tensor, shared: TileContext | None = None) -> torch.Tensor:
        """`(batch, channels, h, w)` -> the same shape."""
        if torch.is_grad_enabled() and hidden.device.type == "cpu":
            hidden = hidden.contiguous()  # in channels_last the backward pass takes half of a training step on CPU
        if shared is None:  # not `F.group_norm`, which raises for a 1 x 1 image with one value per group
            return torch.group_norm(hidden, self.num_groups, self.weight, self.bias, self.eps)
        variance, mean = shared.moments_of(self, hidden)
        per_group = hidden.shape[1] // self.num_groups
        variance, mean = (each.repeat_interleave(per_group, dim=1) for each in (variance, mean))
        weight, bias = self.weight.to(mean.dtype), self.bias.to(mean.dtype)
        if len(mean) == 1 and not torch.is_grad_enabled():  # a fused kernel, which has no gradient for the statistics
            return F.batch_norm(hidden, mean[0], variance[0], weight, bias, eps=self.eps)
        scale = weight * torch.rsqrt(variance + self.eps)
        shift = bias - mean * scale
        by_image = hidden.unflatten(0, (len(mean), -1))  # (images, windows, channels, h, w)
        normed = by_image * scale[:, None, :, None, None] + shift[:, None, :, None, None]
        return normed.flatten(0, 1).to(hidden.dtype)


def pad_edges(hidden: torch.Tensor, cuts: torch.Tensor | None, before: int = 1) -> torch.Tensor:
    """Pads by `before` at the top and left and by 1 at the bottom and right.

    The padding repeats the edge where a window is cut, and is zero at a border of the image, as without tiles.
    """
    padded = F.pad(hidden, (before, 1, before, 1))
    if cuts is not None:
        top, bottom, left, right = cuts
        padded[..., :before, :] = padded[..., before : 2 * before, :] * top
        padded[..., -1:, :] = padded[..., -2:-1, :] * bottom
        padded[..., :before] = padded[..., before : 2 * before] * left
        padded[..., -1:] = padded[..., -2:-1] * right
    return padded


class Conv3x3(nn.Conv2d):
    """3 x 3 convolution with the padding of [`pad_edges`].

    Args:
        in_channels (`int`): Channels in.
        out_channels (`int`): Channels out.
    """

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(in_channels, out_channels, 3, padding=1)

    def forward(self, hidden: torch.Tensor, cuts: torch.Tensor | None = None) -> torch.Tensor:
        """`(windows, in_channels, h, w)` -> `(windows, out_channels, h, w)`."""
        return super().forward(hidden) if cuts is None else F.conv2d(pad_edges(hidden, cuts), self.weight, self.bias)


class RepeatConv2d(nn.Conv2d):
    """Nearest-neighbour upsampling by 2, then a 3 x 3 convolution with padding 1, in 4 / 9 of the arithmetic.

    Under the 3 x 3 kernel lie only four different pixels of the input. Summing the weights that meet the same pixel
    gives a transposed convolution of stride 2. Its 4 x 4 kernel is the sum of four shifted 3 x 3 kernels.

    Args:
        channels (`int`): Channels in and out.
    """

    def __init__(self, channels: int):
        super().__init__(channels, channels, 3)

    def forward(self, hidden: torch.Tensor, cuts: torch.Tensor | None = None) -> torch.Tensor:
        """`(windows, channels, h, w)` -> `(windows, channels, 2 * h, 2 * w)`."""
        padded, padding = (hidden, 1) if cuts is None else (pad_edges(hidden, cuts), 3)
        return F.conv_transpose2d(padded, self.summed_kernel(), self.bias, stride=2, padding=padding)

    def summed_kernel(self) -> torch.Tensor:
        """Kernel of the transposed convolution, `(in_channels, out_channels, 4, 4)`."""
        flipped = self.weight.to(torch.promote_types(self.weight.dtype, torch.float32)).flip(-2, -1).transpose(0, 1)
        flipped = fast_layout(flipped)
        first, *others = (F.pad(flipped, (x, 1 - x, y, 1 - y)) for y in (0, 1) for x in (0, 1))
        return sum(others, first).to(self.weight.dtype)

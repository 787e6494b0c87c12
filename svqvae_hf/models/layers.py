"""Norm and convolutions of the networks, for whole images and for tiles, and the context that tiles share."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Self

import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from torch import nn

NORM_EPS = 1e-6

Pair = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Area:
    """Rows and columns of an image, of its latents or of a window.

    Args:
        rows (`slice`): Rows, with a start and a stop.
        columns (`slice`): Columns, with a start and a stop.
    """

    rows: slice
    columns: slice

    @classmethod
    def of_size(cls, size: Sequence[int]) -> "Area":
        """The whole area of a height and a width."""
        height, width = size
        return cls(slice(0, height), slice(0, width))

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.rows.stop - self.rows.start, self.columns.stop - self.columns.start

    def scaled(self, stride: int) -> "Area":
        """The same area of an image that has `stride` times as many rows and columns."""
        rows = slice(self.rows.start * stride, self.rows.stop * stride)
        columns = slice(self.columns.start * stride, self.columns.stop * stride)
        return Area(rows, columns)

    def within(self, window: "Area") -> "Area":
        """The same area, with rows and columns counted from the top left corner of a window."""
        top = window.rows.start
        left = window.columns.start
        rows = slice(self.rows.start - top, self.rows.stop - top)
        columns = slice(self.columns.start - left, self.columns.stop - left)
        return Area(rows, columns)

    def widened(self, margin: int, size: Sequence[int]) -> "Area":
        """The area and a margin on each side, without what lies outside an image of this height and width."""
        height, width = size
        top = max(0, self.rows.start - margin)
        bottom = min(height, self.rows.stop + margin)
        left = max(0, self.columns.start - margin)
        right = min(width, self.columns.stop + margin)
        return Area(slice(top, bottom), slice(left, right))


class CutSides(NamedTuple):
    """Whether a window is cut from its image at each side, instead of lying at the border of the image."""

    top: bool
    bottom: bool
    left: bool
    right: bool

    @classmethod
    def of_window(cls, window: Area, image_size: Sequence[int]) -> "CutSides":
        """Sides of a window that are cut, in an image of this height and width."""
        height, width = image_size
        return cls(
            top=window.rows.start > 0,
            bottom=window.rows.stop < height,
            left=window.columns.start > 0,
            right=window.columns.stop < width,
        )


@dataclass(frozen=True, eq=False)
class TileContext:
    """Values that all tiles of an image share, and the place of the window that a network runs on.

    Every tile is normalised alike and attends to the same positions, wherever it lies. [`WindowSample`] gathers these
    values. A window is a core, which counts, and a margin around it, which the network only reads:

        +-----------------+  window
        |  margin         |
        |    +-------+    |
        |    | core  |    |
        |    +-------+    |
        |                 |
        +-----------------+

    Args:
        size (`tuple[int, int]`): Height and width of the window, in latents.
        core ([`Area`]): Part of the window that counts, in latents. The positions around it are next to a cut.
        cuts (`torch.Tensor` of shape `(4, windows, 1, 1, 1)`, *optional*): 1 where a window is cut from its image, 0
            at a border of the image: at the top, bottom, left and right. `None` if no window is cut.
        moments (`dict`): Variance and mean `(images, groups)` of the input of each norm.
        attended (`dict`): Keys and values `(images, positions, 1, channels)` of each attention.
    """

    size: tuple[int, int]
    core: Area
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
        rows, columns = self._core_in(hidden)
        return hidden[..., rows, columns]

    def crop(self, hidden: torch.Tensor, margin: int) -> tuple[torch.Tensor, Self]:
        """Crops the features of a window to a smaller window: the core and at most `margin` positions around it.

        For example, a window has 8 rows, and its core is the rows `3:5`. With a margin of 1, the rows `2:6` are kept.
        Counted from the first of these, the core is the rows `1:3`.

        A compiled graph does not crop, because it needs the same size for every tile.

        Returns:
            `tuple`: The cropped features, and their context, whose size and core are those of the smaller window.
        """
        if torch.compiler.is_compiling():
            return hidden, self
        rows, columns = self._core_in(hidden)
        core = Area(rows, columns)
        smaller_window = core.widened(margin, hidden.shape[-2:])
        cropped = hidden[..., smaller_window.rows, smaller_window.columns]
        core_in_smaller_window = core.within(smaller_window)
        context = replace(self, size=smaller_window.size, core=core_in_smaller_window)
        return fast_layout(cropped), context

    def _core_in(self, hidden: torch.Tensor) -> tuple[slice, slice]:
        """Rows and columns of the core in features `(..., h, w)` of the window, at any resolution."""
        latent_height, latent_width = self.size
        height, width = hidden.shape[-2:]
        core = self.core  # in latents
        top = core.rows.start * height // latent_height
        bottom = core.rows.stop * height // latent_height
        left = core.columns.start * width // latent_width
        right = core.columns.stop * width // latent_width
        # Not an `Area`: `torch.compile` would compile a network that makes one anew for each position of the core.
        return slice(top, bottom), slice(left, right)


@dataclass(frozen=True, eq=False)
class WindowSample(TileContext):
    """Sampled windows of images, as one batch, whose norms and attentions gather what the tiles will share.

    Args:
        images (`int`): Number of images, each with as many windows.
    """

    images: int = field(kw_only=True)

    def moments_of(self, norm: "GroupNorm", hidden: torch.Tensor) -> Pair:
        """Computes and keeps variance and mean of a norm's input over the windows of each image."""
        core = self.core_of(hidden)  # (images * windows, channels, h, w)
        core = core.to(torch.promote_types(core.dtype, torch.float32))
        by_image = core.unflatten(0, (self.images, -1))  # (images, windows, channels, h, w)
        by_group = by_image.unflatten(2, (norm.num_groups, -1))  # (images, windows, groups, channels, h, w)
        self.moments[norm] = torch.var_mean(by_group, dim=(1, 3, 4, 5), correction=0)  # both (images, groups)
        return self.moments[norm]

    def keys_and_values(self, attention: nn.Module, normed: torch.Tensor) -> Pair:
        """Computes and keeps keys and values of an attention."""
        self.attended[attention] = attention.keys_and_values(self.core_of(normed), self.images)  # type: ignore[operator]
        return self.attended[attention]

    def context_of_tile(self, window: torch.Tensor, core: Area, input_stride: int) -> TileContext:
        """Context of one tile, which is cut on the sides that its core does not reach.

        Args:
            window (`torch.Tensor`): Input at the tile.
            core ([`Area`]): Part of the tile to keep, in latents.
            input_stride (`int`): Input positions per latent along each side.
        """
        height, width = window.shape[-2:]
        size = (height // input_stride, width // input_stride)  # in latents
        cut_sides = CutSides.of_window(core, size)
        cuts = make_cuts([cut_sides], window) if any(cut_sides) else None
        return TileContext(size, core, cuts, self.moments, self.attended)


def make_cuts(sides_of_windows: Sequence[Sequence[bool]], like: torch.Tensor) -> torch.Tensor:
    """`cuts` of a [`TileContext`] in type and device of a tensor, from the [`CutSides`] of each window."""
    by_window = torch.tensor(sides_of_windows, dtype=like.dtype, device=like.device)  # (windows, 4)
    by_side = by_window.T
    return by_side[..., None, None, None]  # (4, windows, 1, 1, 1)


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

    def __call__(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None = None
    ) -> torch.Tensor:
        """Attends with a query, key and value `(batch, positions, heads, channels)`."""
        return dispatch_attention_fn(query, key, value, scale=scale, backend=self._attention_backend)


class GroupNorm(nn.GroupNorm):
    """Group normalisation, with the statistics of the input, or with statistics that tiles share."""

    def __init__(self, num_groups: int, num_channels: int):
        super().__init__(num_groups, num_channels, eps=NORM_EPS)

    def forward(self, hidden: torch.Tensor, shared: TileContext | None = None) -> torch.Tensor:
        """`(batch, channels, h, w)` -> the same shape.

        With `shared`, the images are normalised by the moments that all tiles share, instead of by their own.
        """
        trains_on_cpu = torch.is_grad_enabled() and hidden.device.type == "cpu"
        if trains_on_cpu:
            # The backward pass is slow in the memory format channels_last. It would take half of a training step.
            hidden = hidden.contiguous()
        if shared is None:
            # Not `F.group_norm`, which raises an error for a 1 x 1 image with one value per group.
            return torch.group_norm(hidden, self.num_groups, self.weight, self.bias, self.eps)
        variance, mean = shared.moments_of(self, hidden)
        return self._normalise(hidden, variance, mean)

    def _normalise(self, hidden: torch.Tensor, variance: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
        """Normalises windows `(images * windows, channels, h, w)` by the moments `(images, groups)` of each image."""
        channels_per_group = hidden.shape[1] // self.num_groups
        variance = variance.repeat_interleave(channels_per_group, dim=1)  # (images, channels)
        mean = mean.repeat_interleave(channels_per_group, dim=1)  # (images, channels)
        weight = self.weight.to(mean.dtype)
        bias = self.bias.to(mean.dtype)
        images = len(mean)
        if images == 1 and not torch.is_grad_enabled():
            # All windows are of one image, so each channel has one mean and one variance. This is what batch
            # normalisation in evaluation computes with. Its kernel is faster than the lines below, and gives the same
            # result, but no gradient for the moments.
            return F.batch_norm(
                hidden,
                running_mean=mean[0],
                running_var=variance[0],
                weight=weight,
                bias=bias,
                training=False,
                eps=self.eps,
            )
        scale = weight * torch.rsqrt(variance + self.eps)  # (images, channels)
        shift = bias - mean * scale  # (images, channels)
        by_image = hidden.unflatten(0, (images, -1))  # (images, windows, channels, h, w)
        # The axes of length 1 stand for the windows, the rows and the columns.
        scale = scale[:, None, :, None, None]  # (images, 1, channels, 1, 1)
        shift = shift[:, None, :, None, None]  # (images, 1, channels, 1, 1)
        normed = by_image * scale + shift
        return normed.flatten(0, 1).to(hidden.dtype)  # (images * windows, channels, h, w)


def pad_edges(hidden: torch.Tensor, shared: TileContext | None, before: int = 1) -> torch.Tensor:
    """Pads windows by `before` at the top and left, and by 1 at the bottom and right.

    The padding repeats the edge where a window is cut, and is zero at a border of the image, as without tiles. A
    window of 2 x 3 that is cut at the left and at the bottom becomes:

        0 0 0 0 0
        a a b c 0
        d d e f 0
        d d e f 0

    Args:
        hidden (`torch.Tensor` of shape `(windows, channels, h, w)`): Windows.
        shared ([`TileContext`], *optional*): Says where the windows are cut; by default nowhere.
        before (`int`, defaults to 1): 0 or 1.
    """
    padded = F.pad(hidden, (before, 1, before, 1))  # (windows, channels, before + h + 1, before + w + 1)
    if shared is None or shared.cuts is None:
        return padded
    cut_at_top, cut_at_bottom, cut_at_left, cut_at_right = shared.cuts  # each (windows, 1, 1, 1): 1 if cut, else 0
    # An edge times 1 repeats the edge. An edge times 0 leaves the padding zero.
    if before == 1:
        first_row = padded[:, :, 1:2, :]  # of the window; row 0 is padding
        padded[:, :, 0:1, :] = first_row * cut_at_top
    last_row = padded[:, :, -2:-1, :]  # of the window; row -1 is padding
    padded[:, :, -1:, :] = last_row * cut_at_bottom
    # The columns are repeated with their padding above and below, which fills the corners.
    if before == 1:
        first_column = padded[:, :, :, 1:2]
        padded[:, :, :, 0:1] = first_column * cut_at_left
    last_column = padded[:, :, :, -2:-1]
    padded[:, :, :, -1:] = last_column * cut_at_right
    return padded


class Conv3x3(nn.Conv2d):
    """3 x 3 convolution with the padding of [`pad_edges`].

    Args:
        in_channels (`int`): Channels in.
        out_channels (`int`): Channels out.
    """

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(in_channels, out_channels, 3, padding=1)

    def forward(self, hidden: torch.Tensor, shared: TileContext | None = None) -> torch.Tensor:
        """`(windows, in_channels, h, w)` -> `(windows, out_channels, h, w)`."""
        if shared is None or shared.cuts is None:
            return super().forward(hidden)
        return F.conv2d(pad_edges(hidden, shared), self.weight, self.bias)


class RepeatConv2d(nn.Conv2d):
    """Nearest-neighbour upsampling by 2, then a 3 x 3 convolution with padding 1, in 4 / 9 of the arithmetic.

    After upsampling, the 3 x 3 kernel covers nine pixels, which are copies of only four pixels of the input. So the
    weights that meet copies of one pixel are summed, which gives a transposed convolution of stride 2 with a 4 x 4
    kernel. See [`~RepeatConv2d.summed_kernel`].

    Args:
        channels (`int`): Channels in and out.
    """

    def __init__(self, channels: int):
        super().__init__(channels, channels, 3)

    def forward(self, hidden: torch.Tensor, shared: TileContext | None = None) -> torch.Tensor:
        """`(windows, channels, h, w)` -> `(windows, channels, 2 * h, 2 * w)`.

        The transposed convolution of `n` rows has `2 * n + 2` rows: two for each row, and an additional one at the top
        and at the bottom, because the kernel is larger than the stride. The same holds for columns.
        """
        is_cut = shared is not None and shared.cuts is not None
        if is_cut:
            hidden = pad_edges(hidden, shared)  # (windows, channels, h + 2, w + 2)
            crop = 3  # the additional row, and the two rows that come from the row of padding
        else:
            crop = 1  # the additional row
        # In a transposed convolution, `padding` is the number of positions that are cropped from each side.
        return F.conv_transpose2d(hidden, self.summed_kernel(), self.bias, stride=2, padding=crop)

    def summed_kernel(self) -> torch.Tensor:
        """Kernel of the transposed convolution, `(in_channels, out_channels, 4, 4)`.

        A convolution with the kernel `a b c` computes each result from three pixels: `a` times the pixel before, `b`
        times the pixel itself, and `c` times the pixel after. Seen from a pixel, it adds `c` times its value to the
        result before it, `b` times to its own result, and `a` times to the result after it: by the flipped kernel.

        In one dimension, upsampling makes two equal pixels of a pixel. If they are the pixels 1 and 2, then they add:

            to the result       0    1    2    3

            by pixel 1          c    b    a    .
            by pixel 2          .    c    b    a
            by both together    c   b+c  a+b   a     the kernel of length 4

        In two dimensions, upsampling makes four equal pixels. So the kernel is the sum of four flipped kernels, each
        in another corner of 4 x 4 positions.
        """
        weight = self.weight.to(torch.promote_types(self.weight.dtype, torch.float32))
        flipped = weight.flip(-2, -1).transpose(0, 1)  # (in_channels, out_channels, 3, 3)
        flipped = fast_layout(flipped)  # the sum below keeps this memory format, in which convolutions are fastest
        # `F.pad` takes the zeros to add at the left, right, top and bottom.
        top_left = F.pad(flipped, (0, 1, 0, 1))
        top_right = F.pad(flipped, (1, 0, 0, 1))
        bottom_left = F.pad(flipped, (0, 1, 1, 0))
        bottom_right = F.pad(flipped, (1, 0, 1, 0))
        summed = top_left + top_right + bottom_left + bottom_right
        return summed.to(self.weight.dtype)

"""Networks run in pieces, layer by layer, and the context that the tiles of an image share.

Pieces are windows sampled from an image, or bands of rows that make up a large image. A layer reads a few of them at a
time and frees what it has read, so that memory holds little more than the features between two layers.
"""

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from svqvae_hf.models.layers.fast_ops import (
    Cuts,
    add,
    cat_on_own_pages,
    fast_layout,
    make_cuts,
    moments,
    silu,
)

WHOLE_VALUES = 1 << 24  # an image with larger features, 64 MiB in float32, runs by bands
BAND_VALUES = 1 << 21  # maximum number of values of a band
BAND_ROWS = 16  # minimum number of rows of a band, because each reads two rows more
ATTENTION_GROWTH = 8  # features that an attention holds of each step, such as queries, keys and values
WINDOW_POSITIONS = 1 << 12  # positions of the windows that pass through a layer at once

Core = tuple[slice, slice]  # rows and columns of a window


class TileContext:
    """Statistics of each norm, and keys and values of each attention, that all tiles of an image share.

    [`Windows`] collect them from a sample. Every tile is then normalised alike and attends to the same positions,
    wherever it lies.
    """

    def __init__(self) -> None:
        self.moments: dict[nn.Module, tuple[torch.Tensor, torch.Tensor]] = {}  # mean and variance (images, groups)
        self.attended: dict[nn.Module, tuple[torch.Tensor, torch.Tensor]] = {}  # (images, 1, positions, channels)
        self.cuts: Cuts | None = None  # of the tile
        self.core: Core | None = None

    @classmethod
    def join(cls, contexts: Sequence["TileContext"]) -> "TileContext":
        """Joins the contexts of the images of a batch."""
        joined = cls()
        for norm in contexts[0].moments:
            joined.moments[norm] = _join(context.moments[norm] for context in contexts)
        for attention in contexts[0].attended:
            joined.attended[attention] = _join(context.attended[attention] for context in contexts)
        return joined

    def for_core(self, core: Core, window: torch.Tensor, stride: int = 1) -> "TileContext":
        """Copy for one tile, which is cut on the sides that its core does not reach.

        Args:
            core (`tuple[slice, slice]`): Rows and columns of the window, in latents.
            window (`torch.Tensor` of shape `(batch, channels, h * stride, w * stride)`): Input of the network.
            stride (`int`, defaults to 1): Input positions per latent along each side.
        """
        lengths = [side // stride for side in window.shape[-2:]]
        top, bottom, left, right = (
            cut for span, side in zip(core, lengths, strict=True) for cut in (span.start > 0, span.stop < side)
        )
        tile = copy.copy(self)
        tile.core = core
        tile.cuts = make_cuts([(top, bottom, left, right)], window) if top or bottom or left or right else None
        return tile

    def crop(self, upsampled: torch.Tensor, margin: int) -> torch.Tensor:
        """Crops the result of a decoder level to what the core depends on. A compiled graph keeps one size instead."""
        if self.core is None or torch.compiler.is_compiling():
            return upsampled
        cropped, self.core = crop_to_core(upsampled, scale_core(self.core, 2), margin)
        return fast_layout(cropped)


def crop_to_core(window: torch.Tensor, core: Core, margin: int = 0) -> tuple[torch.Tensor, Core]:
    """Crops a window to its core and `margin` around it. Returns the crop, and the core inside the crop."""
    kept = [
        slice(max(0, span.start - margin), min(side, span.stop + margin))
        for side, span in zip(window.shape[-2:], core, strict=True)
    ]
    rows, columns = (
        slice(span.start - around.start, span.stop - around.start) for span, around in zip(core, kept, strict=True)
    )
    return window[..., kept[0], kept[1]], (rows, columns)


def scale_core(core: Core, stride: int) -> Core:
    """Scales a core to a resolution `stride` times as high."""
    rows, columns = (slice(span.start * stride, span.stop * stride) for span in core)
    return rows, columns


def _join(pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    left, right = zip(*pairs, strict=True)
    return torch.cat(left), torch.cat(right)


class Sample(TileContext):
    """Context that windows sampled from an image are to fill.

    Args:
        window (`tuple[int, int]`): Height and width of a window, in latents at first.
        margin (`tuple[int, int]`): Positions at each end of the height and of the width that do not count, because
            they see repeated edges instead of their real neighbours.
        window_cuts ([`Cuts`]): Cut sides of the windows.
    """

    def __init__(self, window: Sequence[int], margin: Sequence[int], window_cuts: Cuts):
        super().__init__()
        self.window, self.margin, self.window_cuts = window, margin, window_cuts


class Pieces:
    """Features in parts along one dimension, which layers read step by step and free.

    Args:
        context ([`TileContext`]): Filled with the statistics, keys and values of the layers that the pieces pass.
        images (`int`): Number of images.
        parts (`Sequence[torch.Tensor]`): Features of shape `(batch, channels, h, w)`, cut along `dim`.
    """

    dim: int
    reach: int  # neighbours along `dim` that a convolution reads

    def __init__(self, context: TileContext, images: int, parts: Sequence[torch.Tensor] = ()):
        self.context, self.images = context, images
        self.parts = list(parts)
        self.freed = 0
        self.length = sum(part.shape[self.dim] for part in self.parts)

    def like(self) -> "Pieces":
        """Pieces of the same kind without parts."""
        return type(self)(self.context, self.images)

    def append(self, part: torch.Tensor) -> None:
        """Adds the next part."""
        self.parts.append(part)
        self.length += part.shape[self.dim]

    def store(self, part: torch.Tensor) -> None:
        """Copies the next part to memory of its own."""
        self.append(cat_on_own_pages([part], self.dim))

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Reads from `start` to `stop`."""
        found, begin = [], self.freed
        for part in self.parts:
            end = begin + part.shape[self.dim]
            first, last = max(start, begin), min(stop, end)
            if first < last:
                found.append(part.narrow(self.dim, first - begin, last - first))
            begin = end
        return found[0] if len(found) == 1 else cat_on_own_pages(found, self.dim)

    def free(self, stop: int) -> None:
        """Frees the parts that a step from `stop` on does not read."""
        before = stop if stop == self.length else stop - self.reach
        while self.parts and self.freed + self.parts[0].shape[self.dim] <= before:
            self.freed += self.parts.pop(0).shape[self.dim]

    def steps(self, growth: float = 1) -> list[tuple[int, int]]:
        """Start and stop of each step of a layer whose result has `growth` times the values."""
        size = self.step_length(max(1, growth))
        return [(start, min(start + size, self.length)) for start in range(0, self.length, size)]

    def step_length(self, growth: float) -> int:
        """Length of a step along `dim`."""
        raise NotImplementedError

    def convolve_step(self, start: int, stop: int, conv: Any, *before: Callable[..., torch.Tensor]) -> torch.Tensor:
        """Runs a convolution, and what comes before it, on one step with its neighbours."""
        raise NotImplementedError

    def interior(self, hidden: torch.Tensor) -> torch.Tensor:
        """Returns what counts for statistics, keys and values."""
        return hidden

    # Layers. Each frees the pieces and returns new ones.

    def run(self, conv_in: Any, blocks: Iterable[nn.Module], norm_out: nn.Module, conv_out: Any) -> torch.Tensor:
        """Runs a network: convolution, blocks, norm, SiLU and convolution."""
        pieces = self.convolve(conv_in)
        for block in blocks:
            pieces = block(pieces)
        pieces.measure(norm_out)
        output = pieces.convolve(conv_out, self.normalise(norm_out))
        return output.read(0, output.length)

    def convolve(self, conv: Any, *before: Callable[[torch.Tensor], torch.Tensor]) -> "Pieces":
        """Runs a convolution, and what comes before it."""
        output = self.like()
        for start, stop in self.steps(conv.scale**2 * conv.out_channels / conv.in_channels):
            output.store(self.convolve_step(start, stop, conv, *before))
            self.free(stop)
        return output

    def run_residual(self, block: Any) -> "Pieces":
        """Runs a residual block. Beyond its input it holds one more feature map of the image."""
        residual, output = self.like(), self.like()
        shortcut = self if block.nin_shortcut is None else self.like()
        self.measure(block.norm1)
        for start, stop in self.steps():
            residual.store(self.convolve_step(start, stop, block.conv1, self.normalise(block.norm1)))
            if shortcut is not self:
                shortcut.store(block.nin_shortcut(self.read(start, stop)))
                self.free(stop)
        residual.measure(block.norm2)
        for start, stop in residual.steps():
            part = residual.convolve_step(start, stop, block.conv2, self.normalise(block.norm2), block.dropout)
            output.append(add(shortcut.read(start, stop), part))
            residual.free(stop)
            shortcut.free(stop)
        return output

    def run_attention(self, attention: Any) -> "Pieces":
        """Runs an attention from each position to all positions of the image."""
        self.measure(attention.norm)
        steps = self.steps(ATTENTION_GROWTH)
        parts = []
        for start, stop in steps:
            normed = self.interior(attention.norm(self.read(start, stop), self.context))
            parts.append(attention.keys_and_values(normed, self.images))
        key, value = (torch.cat(each, 2) for each in zip(*parts, strict=True))
        del parts
        output = self.like()
        for start, stop in steps:
            hidden = self.read(start, stop)
            output.store(attention.attend(hidden, attention.norm(hidden, self.context), key, value))
            self.free(stop)
        self.keep_attended(attention, key, value)
        return output

    def crop(self, margin: int) -> "Pieces":
        """Drops what no later layer of a decoder reads."""
        return self

    def keep_attended(self, attention: nn.Module, key: torch.Tensor, value: torch.Tensor) -> None:
        """Adds keys and values to the context, if tiles share it."""

    def normalise(self, norm: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
        """Norm and SiLU, with the statistics of the context."""
        return lambda hidden: silu(norm(hidden, self.context))

    def measure(self, norm: Any) -> None:
        """Adds the statistics of a norm to the context."""
        means, variances, rows = [], [], []
        for start, stop in self.steps():
            hidden = self.interior(self.read(start, stop))
            mean, variance = (each.unflatten(0, (self.images, -1)) for each in moments(hidden, norm))
            means.append(mean)  # (images, windows, groups)
            variances.append(variance)
            rows += [hidden.shape[-2]] * mean.shape[1]
        mean, variance = torch.cat(means, 1), torch.cat(variances, 1)
        shares = mean.new_tensor(rows)[:, None] / sum(rows)
        whole = (shares * mean).sum(1)
        self.context.moments[norm] = whole, (shares * (variance + (mean - whole[:, None]).square())).sum(1)


class Windows(Pieces):
    """Windows of one size, `(windows, channels, h, w)`, sampled from one image. Steps are a few windows each."""

    dim, reach = 0, 0
    context: Sample

    def step_length(self, growth: float) -> int:
        """Number of windows."""
        if torch.compiler.is_compiling():
            return self.length
        return max(1, int(WINDOW_POSITIONS / growth) // math.prod(self.parts[0].shape[-2:]))

    def convolve_step(self, start: int, stop: int, conv: Any, *before: Callable[..., torch.Tensor]) -> torch.Tensor:
        """Convolves a few windows, which repeat their edges where they are cut."""
        hidden = self.read(start, stop)
        for layer in before:
            hidden = layer(hidden)
        return conv(hidden, Cuts(*(side[start:stop] for side in self.context.window_cuts)))

    def interior(self, hidden: torch.Tensor) -> torch.Tensor:
        """Windows without their margins."""
        return crop_to_core(hidden, self.core())[0]

    def core(self) -> Core:
        """Rows and columns that count, at the resolution of the pieces."""
        lengths = zip(self.parts[0].shape[-2:], self.context.window, self.context.margin, strict=True)
        rows, columns = (
            slice(margin * side // window, side - margin * side // window) for side, window, margin in lengths
        )
        return rows, columns

    def crop(self, margin: int) -> Pieces:
        """Crops windows to what counts and `margin` positions around it, which all later layers of a decoder read."""
        core = self.core()
        if all(span.start <= margin for span in core):
            return self
        cropped = self.like()
        for start, stop in self.steps():
            part, cropped_core = crop_to_core(self.read(start, stop), core, margin)
            cropped.store(part)
            self.free(stop)
        self.context.window, self.context.margin = part.shape[-2:], [span.start for span in cropped_core]
        return cropped

    def keep_attended(self, attention: nn.Module, key: torch.Tensor, value: torch.Tensor) -> None:
        """Adds keys and values to the context."""
        self.context.attended[attention] = key, value


class Bands(Pieces):
    """Bands of rows that make up images, `(images, channels, h, w)`. Results differ from the whole by rounding."""

    dim, reach = -2, 1

    def step_length(self, growth: float) -> int:
        """Even number of rows."""
        _, channels, _, width = self.parts[0].shape
        return max(BAND_ROWS, int(BAND_VALUES / growth) // (channels * width) // 2 * 2)

    def convolve_step(self, start: int, stop: int, conv: Any, *before: Callable[..., torch.Tensor]) -> torch.Tensor:
        """Convolves a band with the rows around it, and keeps the rows of the band."""
        first = start if conv.scale < 1 else max(0, start - 1)  # a halving convolution reads no row above
        hidden = self.read(first, min(stop + 1, self.length))
        for layer in before:
            hidden = layer(hidden)
        if conv.scale == 1 and 0 < start and stop < self.length:
            return conv(hidden, inner_rows=True)
        return conv(hidden).narrow(-2, int((start - first) * conv.scale), int((stop - start) * conv.scale))


def cut_pieces(hidden: torch.Tensor, shared: TileContext | None, growth: int) -> Pieces | None:
    """Cuts the input of a network into pieces: a sample of windows, or a large image without gradients.

    Args:
        hidden (`torch.Tensor` of shape `(batch, channels, h, w)`): Input of the network.
        shared ([`TileContext`], *optional*): A [`Sample`] for windows.
        growth (`int`): Values of the features at full resolution per position of the input.

    Returns:
        [`Pieces`], *optional*: `None` for what passes as a whole.
    """
    if isinstance(shared, Sample):
        return Windows(shared, 1, [hidden])
    if shared is not None or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return None
    if math.prod(hidden.shape[-2:]) * growth <= WHOLE_VALUES:  # not before, because a graph takes images of any size
        return None
    return Bands(TileContext(), hidden.shape[0], [hidden])

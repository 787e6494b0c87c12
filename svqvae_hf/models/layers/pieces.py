"""Networks run in pieces, layer by layer, and the context that the tiles of an image share.

Pieces are windows sampled from an image, or bands of rows that make up an image or a tile. A layer reads a few of them
at a time and frees what it has read, so that memory holds little more than the features between two layers.
"""

import copy
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
    trim_heap,
)

STEP_BYTES = 1 << 22  # features that pass through a layer at once, on CPU
GPU_STEP_BYTES = 1 << 26  # the same on other devices: small steps would leave a GPU idle
TRIM_BYTES = 1 << 26  # before larger features, what is free in the heap goes back to the system
ATTENTION_GROWTH = 8  # features that an attention holds of each step, such as queries, keys and values

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
        self.core: Core | None = None  # what counts of the tile, whose features have the sides `window`
        self.window: Sequence[int] = ()

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
        tile = copy.copy(self)
        tile.core, tile.window = core, [side // stride for side in window.shape[-2:]]
        top, bottom, left, right = (
            cut for span, side in zip(core, tile.window, strict=True) for cut in (span.start > 0, span.stop < side)
        )
        tile.cuts = make_cuts([(top, bottom, left, right)], window) if top or bottom or left or right else None
        return tile

    def core_of(self, size: Sequence[int]) -> Core:
        """Core of features of this height and width, which may have another resolution than `window`."""
        if self.core is None:
            return slice(0, size[0]), slice(0, size[1])
        rows, columns = (
            slice(span.start * side // window, span.stop * side // window)
            for span, side, window in zip(self.core, size, self.window, strict=True)
        )
        return rows, columns

    def keep(self, size: Sequence[int], margin: int) -> Core:
        """Rows and columns that later layers of a decoder read: the core and `margin` around it, which remain."""
        if self.core is None:
            return self.core_of(size)
        core = self.core_of(size)
        rows, columns = (
            slice(max(0, span.start - margin), min(side, span.stop + margin))
            for span, side in zip(core, size, strict=True)
        )
        top, left = rows.start, columns.start
        self.core = slice(core[0].start - top, core[0].stop - top), slice(core[1].start - left, core[1].stop - left)
        self.window = rows.stop - top, columns.stop - left
        return rows, columns

    def crop(self, upsampled: torch.Tensor, margin: int) -> torch.Tensor:
        """Crops the result of a decoder level to what later layers read. A compiled graph keeps one size instead."""
        if self.core is None or torch.compiler.is_compiling():
            return upsampled
        return fast_layout(upsampled[..., *self.keep(upsampled.shape[-2:], margin)])


def _join(pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    left, right = zip(*pairs, strict=True)
    return torch.cat(left), torch.cat(right)


class Sample(TileContext):
    """Context that windows sampled from an image are to fill.

    Args:
        window (`tuple[int, int]`): Height and width of a window in latents.
        margin (`tuple[int, int]`): Positions at each end of the height and of the width that do not count, because
            they see repeated edges instead of their real neighbours.
        window_cuts ([`Cuts`]): Cut sides of the windows.
    """

    def __init__(self, window: Sequence[int], margin: Sequence[int], window_cuts: Cuts):
        super().__init__()
        self.window, self.window_cuts = window, window_cuts
        rows, columns = (slice(ignored, side - ignored) for side, ignored in zip(window, margin, strict=True))
        self.core = rows, columns


class Pieces:
    """Features in parts along one dimension, which layers read step by step and free.

    Args:
        context ([`TileContext`]): Filled with the statistics, keys and values of the layers that the pieces pass.
        images (`int`): Number of images.
        parts (`Sequence[torch.Tensor]`): Features of shape `(batch, channels, h, w)`, cut along `dim`.
    """

    dim: int
    reach: int  # neighbours along `dim` that a convolution reads
    unit: int  # a step's length along `dim` is a multiple of it
    least: int  # minimum length of a step

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

    def read(self, start: int, stop: int, cat: Callable[..., torch.Tensor] = torch.cat) -> torch.Tensor:
        """Reads from `start` to `stop`, and joins several parts with `cat`."""
        found, begin = [], self.freed
        for part in self.parts:
            end = begin + part.shape[self.dim]
            first, last = max(start, begin), min(stop, end)
            if first < last:
                found.append(part.narrow(self.dim, first - begin, last - first))
            begin = end
        return found[0] if len(found) == 1 else cat(found, self.dim)

    def free(self, stop: int) -> None:
        """Frees the parts that a step from `stop` on does not read."""
        before = stop if stop == self.length else stop - self.reach
        while self.parts and self.freed + self.parts[0].shape[self.dim] <= before:
            self.freed += self.parts.pop(0).shape[self.dim]

    def steps(self, growth: float = 1) -> list[tuple[int, int]]:
        """Start and stop of each step of a layer whose result has `growth` times the values."""
        if torch.compiler.is_compiling():
            return [(0, self.length)]
        part = self.parts[0]
        units = int(step_bytes(part.device) / max(1, growth)) * part.shape[self.dim] // (part.nbytes * self.unit)
        size = max(self.least, units * self.unit)
        return [(start, min(start + size, self.length)) for start in range(0, self.length, size)]

    def size(self) -> tuple[int, int]:
        """Height and width of the features of a window or of the image."""
        raise NotImplementedError

    def convolve_step(
        self, start: int, stop: int, conv: Any, *before: Callable[..., torch.Tensor], **options: Any
    ) -> torch.Tensor:
        """Runs a convolution with `options`, and what comes before it, on one step with its neighbours."""
        raise NotImplementedError

    def crop_step(self, part: torch.Tensor, start: int, kept: Core) -> torch.Tensor:
        """Crops the result of a step, which starts at `start`, to the kept rows and columns."""
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

    def upsample(self, conv: Any, margin: int) -> "Pieces":
        """Runs an upsampling convolution, and drops what no later layer of a decoder reads."""
        height, width = self.size()
        kept = self.context.keep((height * conv.scale, width * conv.scale), margin)
        upsampled_bytes = sum(part.nbytes for part in self.parts) * conv.scale**2
        if self.parts[0].device.type == "cpu" and upsampled_bytes > TRIM_BYTES:
            trim_heap()
        kernels: list[torch.Tensor] = []
        output = self.like()
        for start, stop in self.steps(conv.scale**2):
            part = self.crop_step(self.convolve_step(start, stop, conv, kernels=kernels), start * conv.scale, kept)
            if part.shape[self.dim]:
                output.store(part)
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
            output.append(add(shortcut.read(start, stop, cat_on_own_pages), part))
            residual.free(stop)
            shortcut.free(stop)
        return output

    def run_attention(self, attention: Any) -> "Pieces":
        """Runs an attention from each position to all positions of the image."""
        self.measure(attention.norm)
        key, value = self.keys_and_values(attention)
        output = self.like()
        for start, stop in self.steps(ATTENTION_GROWTH):
            hidden = self.read(start, stop)
            output.store(attention.attend(hidden, attention.norm(hidden, self.context), key, value))
            self.free(stop)
        return output

    def keys_and_values(self, attention: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of all positions that count."""
        parts = []
        for start, stop in self.steps(ATTENTION_GROWTH):
            normed = self.interior(attention.norm(self.read(start, stop), self.context))
            parts.append(attention.keys_and_values(normed, self.images))
        key, value = zip(*parts, strict=True)
        return cat_on_own_pages(key, 2), cat_on_own_pages(value, 2)

    def normalise(self, norm: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
        """Norm and SiLU, with the statistics of the context."""
        return lambda hidden: silu(norm(hidden, self.context))

    def measure(self, norm: Any) -> None:
        """Adds the statistics of a norm to the context, unless tiles share them."""
        if norm in self.context.moments:
            return
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

    dim, reach, unit, least = 0, 0, 1, 1
    context: Sample

    def convolve_step(
        self, start: int, stop: int, conv: Any, *before: Callable[..., torch.Tensor], **options: Any
    ) -> torch.Tensor:
        """Convolves a few windows, which repeat their edges where they are cut."""
        hidden = self.read(start, stop)
        for layer in before:
            hidden = layer(hidden)
        return conv(hidden, Cuts(*(side[start:stop] for side in self.context.window_cuts)), **options)

    def size(self) -> tuple[int, int]:
        """Height and width of a window."""
        height, width = self.parts[0].shape[-2:]
        return height, width

    def crop_step(self, part: torch.Tensor, start: int, kept: Core) -> torch.Tensor:
        """Crops a few windows alike."""
        return part[..., *kept]

    def interior(self, hidden: torch.Tensor) -> torch.Tensor:
        """Windows without their margins."""
        return hidden[..., *self.context.core_of(hidden.shape[-2:])]

    def keys_and_values(self, attention: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Adds keys and values to the context."""
        self.context.attended[attention] = super().keys_and_values(attention)
        return self.context.attended[attention]


class Bands(Pieces):
    """Bands of rows that make up images or tiles, `(images, channels, h, w)`. Results differ by rounding."""

    dim, reach, unit, least = -2, 1, 2, 4  # rows: an even number, because a level halves them

    def size(self) -> tuple[int, int]:
        """Height and width of the features."""
        return self.length, self.parts[0].shape[-1]

    def convolve_step(
        self, start: int, stop: int, conv: Any, *before: Callable[..., torch.Tensor], **options: Any
    ) -> torch.Tensor:
        """Convolves a band with the rows around it, and keeps the rows of the band."""
        first = start if conv.scale < 1 else max(0, start - 1)  # a halving convolution reads no row above
        hidden = self.read(first, min(stop + 1, self.length))
        for layer in before:
            hidden = layer(hidden)
        if conv.scale >= 1 and 0 < start and stop < self.length:
            return conv(hidden, self.context.cuts, inner_rows=True, **options)
        convolved = conv(hidden, self.context.cuts, **options)
        return convolved.narrow(-2, int((start - first) * conv.scale), int((stop - start) * conv.scale))

    def crop_step(self, part: torch.Tensor, start: int, kept: Core) -> torch.Tensor:
        """Crops a band to its share of the kept rows."""
        rows, columns = kept
        return part[..., max(0, rows.start - start) : max(0, rows.stop - start), columns]

    def keys_and_values(self, attention: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the keys and values that tiles share; for an image without tiles, its own."""
        shared = self.context.attended.get(attention)
        return super().keys_and_values(attention) if shared is None else shared


def step_bytes(device: torch.device) -> int:
    """Bytes of features that pass through a layer at once."""
    return STEP_BYTES if device.type == "cpu" else GPU_STEP_BYTES


def cut_pieces(hidden: torch.Tensor, shared: TileContext | None, growth: int) -> Pieces | None:
    """Cuts the input of a network into pieces: a sample of windows, or a large image or tile without gradients.

    Args:
        hidden (`torch.Tensor` of shape `(batch, channels, h, w)`): Input of the network.
        shared ([`TileContext`], *optional*): A [`Sample`] for windows, or what tiles share for a tile.
        growth (`int`): Values of the features at full resolution per position of the input.

    Returns:
        [`Pieces`], *optional*: `None` for what passes as a whole.
    """
    if isinstance(shared, Sample):
        return Windows(shared, 1, [hidden])
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return None
    if hidden[:, 0].nbytes * growth <= step_bytes(hidden.device):  # not before: a graph takes images of any size
        return None
    return Bands(shared or TileContext(), hidden.shape[0], [hidden])

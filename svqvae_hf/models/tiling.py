"""Tiles of an image: their geometry, the context that they share, and how a network runs over them.

Lengths are in latents unless a name says otherwise, so that pixels and latents share one grid. Three steps:

1. [`gather_context`] runs the network over a few windows of the image, and keeps the statistics of each norm and the
   keys and values of each attention.
2. [`map_tiles`] runs it over each tile, which is read with an overlap (halo) on each side, with these shared values.
3. Only the core of each tile is kept. The cores partition the image, so nothing is blended.
"""

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from diffusers.models.autoencoders.vae import AutoencoderMixin
from torch import nn

from svqvae_hf.models.checks import check_tiles
from svqvae_hf.models.fast_ops import Cuts, fast_layout, make_cuts, moments, moments_of_bands, silu

OVERLAP_PX = 32  # default overlap of a tile in pixels, where it fits
CONTEXT_WINDOWS = 64  # maximum number of windows per image
CONTEXT_FRACTION = 1 / 4  # maximum fraction of the image that they cover
CONTEXT_WINDOW_SIDE = 12  # side of a window, in latents
CONTEXT_MARGIN = 3  # latents next to a cut that are ignored
WHOLE_VALUES = 1 << 25  # features of an image with more values, 128 MiB in float32, are cut into bands
BAND_VALUES = 1 << 22  # maximum number of values of a band
BAND_ROWS = 16  # minimum number of rows of a band, because each computes two rows more
GATHERED_POSITIONS = 1 << 12  # positions of the windows that pass through a block at once

Read = Callable[[slice, slice], torch.Tensor]
Core = tuple[slice, slice]  # rows and columns of a window


class Network(Protocol):
    """[`SVQVAE.encode_window`] or [`SVQVAE.decode_window`]."""

    def __call__(
        self, window: torch.Tensor, shared: "TileContext | None" = None, core: Core | None = None
    ) -> torch.Tensor:
        """Window and core -> result of the core."""


# Geometry


class Tile(NamedTuple):
    """One tile along one axis: the network reads `start:stop`, and `core_start:core_stop` of its result is kept."""

    start: int
    stop: int
    core_start: int
    core_stop: int


def tile_axis(length: int, tile: int, overlap: int) -> list[Tile]:
    """Cuts an axis into windows of one size, at most `tile`, whose cores partition it.

    Neighbouring windows share at least `2 * overlap`, so each core has at least `overlap` on each inner side. Windows
    are no longer than needed: an axis a little longer than a tile is cut into two windows of little more than half
    its length.

    Args:
        length (`int`): Length of the axis, at least 1.
        tile (`int`): Maximum length of a window, more than `2 * overlap`.
        overlap (`int`): Overlap on each side, at least 0.
    """
    if length <= tile:
        return [Tile(0, length, 0, length)]
    count = -(-(length - 2 * overlap) // (tile - 2 * overlap))
    window = -(-(length + 2 * overlap * (count - 1)) // count)
    starts = [round(i * (length - window) / (count - 1)) for i in range(count)]
    cuts = [0, *((left + window + right) // 2 for left, right in zip(starts, starts[1:], strict=False)), length]
    return [Tile(start, start + window, cuts[i], cuts[i + 1]) for i, start in enumerate(starts)]


class ContextWindows(NamedTuple):
    """Windows of one size, spread evenly over an image.

    Args:
        origins (`list[tuple[int, int]]`): Top and left of each window.
        size (`tuple[int, int]`): Height and width of each window.
        margin (`tuple[int, int]`): Rows at top and bottom, columns at left and right, that are next to a cut; 0 along
            an axis that a window spans.
    """

    origins: list[tuple[int, int]]
    size: tuple[int, int]
    margin: tuple[int, int]

    def cut_sides(self, size: Sequence[int]) -> list[tuple[bool, bool, bool, bool]]:
        """Whether each window of an image of this size is cut at its top, bottom, left and right."""
        (height, width), (rows, columns) = size, self.size
        return [(y > 0, y + rows < height, x > 0, x + columns < width) for y, x in self.origins]

    def read(self, read: Read, stride: int) -> torch.Tensor:
        """Reads the windows of each image: `(batch, windows, channels, height, width)`.

        Args:
            read (`Callable`): Returns the input `(batch, channels, rows, columns)` at two slices.
            stride (`int`): Input positions per latent along each side.
        """
        height, width = self.size
        windows = [read(_span(y, y + height, stride), _span(x, x + width, stride)) for y, x in self.origins]
        return torch.stack(windows, dim=1)


def context_windows(size: Sequence[int], side: int, margin: int, count: int) -> ContextWindows:
    """Spreads windows over an image in a grid of the image's proportions.

    Args:
        size (`tuple[int, int]`): Height and width of the image.
        side (`int`): Side of a window, if the image is at least as long.
        margin (`int`): Latents next to a cut, less than half of `side`.
        count (`int`): Maximum number of windows; fewer where they cover the image.
    """
    height, width = size
    most_down, most_across = (-(-length // side) for length in size)
    down = min(max(1, round(math.sqrt(count * height / width))), most_down, count)
    across = min(count // down, most_across)
    rows, columns = _spread(height, side, down), _spread(width, side, across)
    return ContextWindows(
        origins=[(y, x) for y in rows for x in columns],
        size=(min(side, height), min(side, width)),
        margin=(margin if height > side else 0, margin if width > side else 0),
    )


def _spread(length: int, side: int, count: int) -> list[int]:
    """Starts of `count` windows along an axis, from one end to the other; a single window is centred."""
    room = max(0, length - side)
    return [room // 2] if count == 1 else [round(i * room / (count - 1)) for i in range(count)]


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
    rows, columns = (_span(span.start, span.stop, stride) for span in core)
    return rows, columns


def _span(start: int, stop: int, stride: int) -> slice:
    return slice(start * stride, stop * stride)


# The context that tiles share


class TileContext:
    """Statistics of each norm, and keys and values of each attention, that all tiles of an image share.

    While `gathering`, the windows of the sample pass through the network together, block by block. Each norm takes its
    statistics from all of them, and in each attention they all see each other. Window borders are ignored: there the
    windows see repeated edges instead of their real neighbours. Afterwards every tile is normalised alike and attends
    to the same positions, wherever it lies.

    A block runs on a few windows at a time, and once more from its start for each value that it lacks. It ends early
    where [`measures`] or [`collects`] returns True. Only the windows themselves are held from block to block.

    Args:
        window (`tuple[int, int]`): Height and width of a window in latents.
        margin (`tuple[int, int]`): Ignored latents at each end of the height and of the width.
        window_cuts ([`Cuts`], *optional*): Cut sides of the windows.
    """

    def __init__(self, window: Sequence[int], margin: Sequence[int], window_cuts: Cuts | None = None):
        self.window_cuts = window_cuts
        self.window = window
        self.margin = margin
        self.gathering = True
        self.moments: dict[nn.Module, tuple[torch.Tensor, torch.Tensor]] = {}  # mean and variance (images, groups)
        self.attended: dict[nn.Module, tuple[torch.Tensor, torch.Tensor]] = {}  # (images, 1, positions, channels)
        self.lacking: nn.Module | None = None  # the layer whose values `parts` of the windows are
        self.parts: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.cuts: Cuts | None = None  # of the windows or of the tile that pass
        self.core: Core | None = None
        self.level_margins: Mapping[nn.Module, int] = {}

    @classmethod
    def join(cls, contexts: Sequence["TileContext"]) -> "TileContext":
        """Joins the contexts of the images of a batch."""
        joined = copy.copy(contexts[0])
        joined.gathering, joined.cuts = False, None
        joined.moments = {norm: _join(context.moments[norm] for context in contexts) for norm in joined.moments}
        joined.attended = {layer: _join(context.attended[layer] for context in contexts) for layer in joined.attended}
        return joined

    def gather(
        self, windows: torch.Tensor, conv_in: nn.Module, blocks: Iterable[Any], norm_out: nn.GroupNorm
    ) -> torch.Tensor:
        """Passes the sample of windows of one image through a network.

        Args:
            windows (`torch.Tensor` of shape `(windows, channels, height, width)`): Input of the network.
            conv_in (`nn.Module`): First convolution.
            blocks (`Iterable[nn.Module]`): Residual blocks, attentions, and levels of both.
            norm_out (`nn.GroupNorm`): Norm after the blocks.

        Returns:
            `torch.Tensor`: Input of `norm_out` of one window, `(1, channels, height, width)`.
        """
        held = list(windows.split(1))
        # Upsampling is part of the next step, because all windows together are largest after it.
        step: list[Callable[[torch.Tensor], torch.Tensor]] = [lambda hidden: conv_in(hidden, self.cuts)]
        for block in blocks:
            # A layer of a level is called through its level, where offloading puts its hooks.
            calls = block.layers() if hasattr(block, "layers") else [block]
            for index, layer in enumerate(calls):
                step.append(partial(block, shared=self) if layer is block else partial(block, shared=self, only=index))
                if _has_norm(layer):
                    self._gather_step(step, held)
                    step = []
        for window in held:
            self.measures(norm_out, window)
        self._complete()
        self.cuts = None
        return held[0]

    def _gather_step(self, step: Sequence[Callable[[torch.Tensor], torch.Tensor]], held: list[torch.Tensor]) -> None:
        """Runs a step, which ends with a block, on all windows, in place."""
        count = max(1, GATHERED_POSITIONS // math.prod(held[0].shape[-2:]))
        count = len(held) if torch.compiler.is_compiling() else count
        complete = False
        while not complete:
            for start in range(0, len(held), count):
                hidden = torch.cat(held[start : start + count])
                if self.window_cuts is not None:
                    self.cuts = Cuts(*(side[start : start + count] for side in self.window_cuts))
                for layer in step:
                    hidden = layer(hidden)
                if not self.parts:
                    held[start : start + count] = hidden.split(1)
            complete = not self.parts
            self._complete()

    def _complete(self) -> None:
        """Joins the parts of the layer that lacked them."""
        if isinstance(self.lacking, nn.GroupNorm):
            mean, variance = _join(self.parts)  # (windows, groups)
            whole = mean.mean(0, keepdim=True)
            self.moments[self.lacking] = whole, (variance + (mean - whole).square()).mean(0, keepdim=True)
        elif self.lacking is not None:
            key, value = _join(self.parts)
            self.attended[self.lacking] = to_positions(key.unsqueeze(0)), to_positions(value.unsqueeze(0))
        self.lacking, self.parts = None, []

    def measures(self, norm: nn.GroupNorm, hidden: torch.Tensor) -> bool:
        """Whether the statistics of a norm are incomplete. These windows are then added."""
        if norm in self.moments:
            return False
        self.lacking = norm
        self.parts.append(moments(self._interior(hidden), norm.num_groups))
        return True

    def collects(self, attention: nn.Module, project: Callable[[], tuple[torch.Tensor, torch.Tensor]]) -> bool:
        """Whether the keys and values of an attention are incomplete. Those of these windows are then added."""
        if attention in self.attended:
            return False
        self.lacking = attention
        key, value = project()
        self.parts.append((self._interior(key), self._interior(value)))
        return True

    def for_core(
        self, core: Core, window: torch.Tensor, stride: int = 1, level_margins: Mapping[nn.Module, int] | None = None
    ) -> "TileContext":
        """Copy for one tile, which is cut on the sides that its core does not reach.

        Args:
            core (`tuple[slice, slice]`): Rows and columns of the window, in latents.
            window (`torch.Tensor` of shape `(batch, channels, h * stride, w * stride)`): Input of the network.
            stride (`int`, defaults to 1): Input positions per latent along each side.
            level_margins (`Mapping[nn.Module, int]`, *optional*): Levels at which [`crop`] drops what the core of the
                tile does not depend on.
        """
        tile = copy.copy(self)
        tile.core, tile.level_margins = core, level_margins or {}
        lengths = [side // stride for side in window.shape[-2:]]
        top, bottom, left, right = (
            cut for span, side in zip(core, lengths, strict=True) for cut in (span.start > 0, span.stop < side)
        )
        tile.cuts = make_cuts([(top, bottom, left, right)], window) if top or bottom or left or right else None
        return tile

    def crop(self, hidden: torch.Tensor, level: nn.Module) -> torch.Tensor:
        """Crops the input of a decoder level to what the core depends on. A compiled graph keeps one size instead."""
        if self.core is None or level not in self.level_margins or torch.compiler.is_compiling():
            return hidden
        hidden, self.core = crop_to_core(hidden, self.core, self.level_margins[level])
        if level.upsample is not None:
            self.core = scale_core(self.core, 2)
        return fast_layout(hidden)

    def _interior(self, hidden: torch.Tensor) -> torch.Tensor:
        """Windows `(windows, channels, h, w)` without the ignored borders."""
        lengths = zip(hidden.shape[-2:], self.window, self.margin, strict=True)
        rows, columns = (
            slice(margin * side // window, side - margin * side // window) for side, window, margin in lengths
        )
        return hidden[..., rows, columns]


def _join(pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    left, right = zip(*pairs, strict=True)
    return torch.cat(left), torch.cat(right)


def _has_norm(layer: nn.Module) -> bool:
    return any(isinstance(module, nn.GroupNorm) for module in layer.modules())


def to_positions(windows: torch.Tensor) -> torch.Tensor:
    """`(images, windows, channels, h, w)` -> `(images, 1, windows * h * w, channels)`.

    Contiguous, because the fused attention kernels, which never hold all pairs of positions, take no other layout.
    """
    return windows.movedim(2, -1).flatten(1, 3).unsqueeze(1).contiguous()


def gather_context(network: Network, read: Read, size: Sequence[int], tile: int, input_stride: int) -> TileContext:
    """Runs a network over a few windows of an image, and returns the context that its tiles share.

    Args:
        network (`Callable`): [`SVQVAE.encode_window`] or [`SVQVAE.decode_window`].
        read (`Callable`): Returns the input `(batch, channels, rows, columns)` at two slices.
        size (`tuple[int, int]`): Height and width of the image.
        tile (`int`): Maximum side of a window.
        input_stride (`int`): Input positions per latent along each side.
    """
    side = min(CONTEXT_WINDOW_SIDE, tile)
    count = min(CONTEXT_WINDOWS, max(1, round(CONTEXT_FRACTION * math.prod(size) / side**2)))
    windows = context_windows(size, side, min(CONTEXT_MARGIN, (side - 1) // 2), count)
    contexts = []
    for of_image in windows.read(read, input_stride):
        contexts.append(TileContext(windows.size, windows.margin, make_cuts(windows.cut_sides(size), of_image)))
        network(of_image, contexts[-1])
    return TileContext.join(contexts)


def fits_whole(size: Sequence[int], tile: int) -> bool:
    """Whether an image is not tiled, because tiles and windows would read most of it twice.

    Args:
        size (`tuple[int, int]`): Height and width of the image.
        tile (`int`): Maximum side of a tile.
    """
    return math.prod(size) <= max(tile**2, CONTEXT_WINDOWS * min(CONTEXT_WINDOW_SIDE, tile) ** 2)


# Bands of an image that is run as a whole


def cut_bands(hidden: torch.Tensor) -> list[slice]:
    """Cuts large features into bands of rows. Returns none for others, with gradients, and in a compiled graph."""
    _, channels, height, width = hidden.shape
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or channels * height * width <= WHOLE_VALUES:
        return []
    rows = max(BAND_ROWS, BAND_VALUES // (channels * width))
    return [slice(start, min(start + rows, height)) for start in range(0, height, rows)]


def run_in_bands(block: Any, hidden: torch.Tensor, bands: Sequence[slice]) -> torch.Tensor:
    """Runs a residual block. Beyond its input and result it takes the memory of a few bands.

    Args:
        block ([`ResnetBlock`]): Residual block.
        hidden (`torch.Tensor` of shape `(batch, in_channels, h, w)`): Input.
        bands (`Sequence[slice]`): Rows of each band, from [`cut_bands`].
    """
    residual = fast_layout(hidden.new_empty(hidden.shape[0], block.conv1.out_channels, *hidden.shape[-2:]))
    _convolve_in_bands(hidden, bands, block.norm1, block.conv1, residual)
    _convolve_in_bands(residual, bands, block.norm2, lambda normed: block.conv2(block.dropout(normed)), residual)
    for rows in bands:
        band = hidden[..., rows, :]
        residual[..., rows, :] += band if block.nin_shortcut is None else block.nin_shortcut(band)
    return residual


def _convolve_in_bands(
    hidden: torch.Tensor,
    bands: Sequence[slice],
    norm: nn.GroupNorm,
    conv: Callable[[torch.Tensor], torch.Tensor],
    output: torch.Tensor,
) -> None:
    """Norm, SiLU and 3 x 3 convolution, band by band. `output`, which may be `hidden`, is filled with the result."""
    shared = TileContext(window=(1, 1), margin=(0, 0))
    shared.moments[norm] = moments_of_bands([hidden[..., rows, :] for rows in bands], norm)
    above: tuple[slice, torch.Tensor] | None = None
    for rows in bands:
        start = max(0, rows.start - 1)  # one row more on each side
        normed = silu(norm(hidden[..., start : rows.stop + 1, :], shared))
        if above is not None:
            output[..., above[0], :] = above[1]  # only now, because `normed` reads a row of it in `hidden`
        inner = slice(rows.start - start, rows.stop - start)
        above = rows, conv(normed)[..., inner, :]
    if above is not None:
        output[..., above[0], :] = above[1]


# Running a network over tiles


def map_tiles(
    network: Network,
    source: torch.Tensor,
    tile: int,
    overlap: int,
    input_stride: int = 1,
    output_stride: int = 1,
    on_tile: Callable[[int, int], None] | None = None,
) -> torch.Tensor:
    """Runs a network over the tiles of an image and joins the cores of its results.

    Beyond the input and the result it takes the memory of one tile.

    Args:
        network (`Callable`): Takes a window `(batch, channels, h, w)` and its `core`, and returns the result at the
            core.
        source (`torch.Tensor` of shape `(batch, channels, height, width)`): Sides are multiples of `input_stride`.
        tile (`int`): Maximum side of a tile.
        overlap (`int`): Overlap on each side.
        input_stride (`int`, defaults to 1): Input positions per latent along each side.
        output_stride (`int`, defaults to 1): Result positions per latent along each side.
        on_tile (`Callable`, *optional*): Called after each tile with the number of finished tiles and of all.
    """
    rows, columns = (side // input_stride for side in source.shape[-2:])
    grid = [(y, x) for y in tile_axis(rows, tile, overlap) for x in tile_axis(columns, tile, overlap)]
    joined = source
    for finished, (y, x) in enumerate(grid, start=1):
        core = map_tile(network, lambda rows, columns: source[..., rows, columns], y, x, input_stride)
        if finished == 1:
            joined = core.new_empty(*core.shape[:-2], rows * output_stride, columns * output_stride)
        core_rows, core_columns = (_span(axis.core_start, axis.core_stop, output_stride) for axis in (y, x))
        joined[..., core_rows, core_columns] = core
        if on_tile is not None:
            on_tile(finished, len(grid))
    return joined


def map_tile(network: Network, read: Read, y: Tile, x: Tile, input_stride: int = 1) -> torch.Tensor:
    """Runs a network over one tile of an image of any size. Only the tile is read.

    Args:
        network (`Callable`): As in [`map_tiles`].
        read (`Callable`): Returns the input `(batch, channels, rows, columns)` at two slices.
        y (`Tile`): The tile along the vertical axis.
        x (`Tile`): The tile along the horizontal axis.
        input_stride (`int`, defaults to 1): Input positions per latent along each side.

    Returns:
        `torch.Tensor`: Result at the core.
    """
    core = slice(y.core_start - y.start, y.core_stop - y.start), slice(x.core_start - x.start, x.core_stop - x.start)
    return network(read(_span(y.start, y.stop, input_stride), _span(x.start, x.stop, input_stride)), core=core)


def decode_core(decoder: Any, hidden: torch.Tensor, shared: TileContext, core: Core) -> torch.Tensor:
    """Decodes the core of a window, and crops between levels to what the core depends on.

    The result is exact, because each level keeps everything that the core still depends on.

    Args:
        decoder ([`Decoder`]): Decoder of the model.
        hidden (`torch.Tensor` of shape `(batch, z_channels, h, w)`): Input of the decoder.
        shared ([`TileContext`]): Values that the tiles of the image share.
        core (`tuple[slice, slice]`): Rows and columns of the window, in latents.
    """
    tile = shared.for_core(core, hidden, level_margins=_level_margins(decoder))
    decoded = decoder(hidden, tile)
    if tile.core is None or tile.core is core:  # a compiled decoder, which crops nothing
        return crop_to_core(decoded, scale_core(core, 2 ** (len(decoder.conv_blocks) - 1)))[0]
    return crop_to_core(decoded, tile.core)[0]


def _level_margins(decoder: Any) -> dict[nn.Module, int]:
    """Positions around a core that each level and all later layers read, at the resolution of the level."""
    # Two 3 x 3 convolutions per block, then one that follows the level.
    reach = 2 * len(decoder.conv_blocks[0].res) + 1
    margins = [reach]
    for _ in decoder.conv_blocks[1:]:
        margins.append(reach + margins[-1] // 2)
    return dict(zip(decoder.conv_blocks, reversed(margins), strict=True))


class TilingMixin(AutoencoderMixin):
    """Runs an autoencoder's `encode_window` and `decode_window` on slices of a batch, and on tiles of each image."""

    f: int
    overlap: int
    tile_size: int
    on_tile: Callable[[int, int], None] | None

    def enable_tiling(
        self,
        tile_size: int | None = None,
        overlap: int | None = None,
        on_tile: Callable[[int, int], None] | None = None,
        tile_sample_min_height: int | None = None,
        tile_sample_min_width: int | None = None,
    ) -> None:
        """Encodes and decodes large images tile by tile, so that memory grows only with the image and its latents.

        All tiles of an image share their normalisation statistics and what they attend to. Both come from at
        most 64 windows of 12 x 12 latents, spread over the image, which cover a quarter of it. An image with no more
        latents than these windows or one tile is not tiled, because tiles and windows would read most of it twice. At
        f = 8 that is up to 768 x 768 pixels.

        Args:
            tile_size (`int`, *optional*, defaults to 256): Maximum side of a tile in pixels, a multiple of `f`.
            overlap (`int`, *optional*): Overlap (halo) on each side of a tile in pixels, which is read but not kept: a
                multiple of `f`, less than half of `tile_size`. By default 32, or the largest that fits a small tile.
            on_tile (`Callable`, *optional*): Called after each tile with the number of finished tiles and of all.
            tile_sample_min_height (`int`, *optional*): `tile_size` by its name in diffusers.
            tile_sample_min_width (`int`, *optional*): `tile_size` by its name in diffusers.

        Raises:
            ValueError: If `tile_size` or `overlap` does not fit, or height and width of a tile differ.
        """
        given = [side for side in (tile_size, tile_sample_min_height, tile_sample_min_width) if side is not None]
        if len(set(given)) > 1:
            raise ValueError(f"Tiles must be squares, got sides of {' and '.join(map(str, given))}. Pass `tile_size`.")
        side = given[0] if given else 256
        check_tiles(self.f, side, overlap)
        super().enable_tiling()
        self.tile_size, self.on_tile = side, on_tile
        self.overlap = fit_overlap(self.f, side, OVERLAP_PX) if overlap is None else overlap

    def _tiles(self, tile_size: int | None = None, overlap: int | None = None) -> tuple[int, int] | None:
        """Tile and overlap in latents; `None` without tiling."""
        if not self.use_tiling and tile_size is None and overlap is None:
            return None
        tile_size = self.tile_size if tile_size is None else tile_size
        check_tiles(self.f, tile_size, overlap)
        overlap = fit_overlap(self.f, tile_size, self.overlap) if overlap is None else overlap
        return tile_size // self.f, overlap // self.f

    def _run(
        self,
        network: Network,
        source: torch.Tensor,
        tiles: tuple[int, int] | None,
        input_stride: int,
        output_stride: int,
    ) -> torch.Tensor:
        """Runs a network over a batch: as a whole, or by slices and tiles."""
        if self.use_slicing and source.shape[0] > 1:
            slices = [self._run(network, image, tiles, input_stride, output_stride) for image in source.split(1)]
            return torch.cat(slices)
        size = [side // input_stride for side in source.shape[-2:]]
        if tiles is None or fits_whole(size, tiles[0]):
            return network(source)
        if torch.is_grad_enabled() and self.is_gradient_checkpointing:
            raise ValueError(
                "Gradient checkpointing must be off for tiles with gradients, because it runs the network again after "
                "the values that tiles share have changed. Disable gradient checkpointing, tiling or gradients."
            )
        shared = gather_context(
            network, lambda rows, columns: source[..., rows, columns], size, tiles[0], input_stride
        )
        return map_tiles(
            partial(network, shared=shared), source, *tiles, input_stride, output_stride, on_tile=self.on_tile
        )


def fit_overlap(f: int, tile_size: int, overlap: int) -> int:
    """`overlap`, or the largest that fits a small tile, in pixels."""
    return max(0, min(overlap // f, (tile_size // f - 1) // 2)) * f

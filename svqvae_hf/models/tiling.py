"""Tiles of an image: their geometry, the context that they share, and how a network runs over them.

Lengths are in latents unless a name says otherwise, so that pixels and latents share one grid. Three steps:

1. [`gather_context`] runs the network over a few windows of the image, and keeps the statistics of each norm and the
   keys and values of each attention.
2. [`run_tiles`] runs it over each tile, which is read with an overlap (halo) on each side, with these shared values.
3. Only the core of each tile is kept. The cores partition the image, so nothing is blended.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from diffusers.models.autoencoders.vae import AutoencoderMixin
from torch import nn

from svqvae_hf.models.checks import check_tiles
from svqvae_hf.models.image_processing_svqvae import map_range, pad_to_multiple
from svqvae_hf.models.layers import Core, TileContext, make_cuts

OVERLAP_PX = 32  # default overlap of a tile in pixels, where it fits
CONTEXT_WINDOWS = 16  # maximum number of windows per image
CONTEXT_WINDOW_SIDE = 10  # side of a window, in latents
CONTEXT_MARGIN = 2  # latents next to a cut that are ignored
WHOLE_BYTES = 1 << 30  # memory of an image above which the commands tile it
FEATURES_HELD = 4  # feature maps that a residual block holds: its input, normalised values, two convolutions

Read = Callable[[slice, slice], torch.Tensor]
Write = Callable[[slice, slice, torch.Tensor], None]
RunWindow = Callable[..., torch.Tensor]  # [`SVQVAE.encode_window`] or [`SVQVAE.decode_window`]


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

    def core(self) -> Core:
        """Rows and columns of a window that are not next to a cut."""
        rows, columns = (slice(ignored, side - ignored) for side, ignored in zip(self.size, self.margin, strict=True))
        return rows, columns

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


def _span(start: int, stop: int, stride: int) -> slice:
    return slice(start * stride, stop * stride)


# The context that tiles share


def gather_context(run: RunWindow, read: Read, size: Sequence[int], tile: int, input_stride: int) -> TileContext:
    """Runs a network over a sample of windows of an image, as one batch, and returns the context that its tiles share.

    Args:
        run (`Callable`): [`SVQVAE.encode_window`] or [`SVQVAE.decode_window`].
        read (`Callable`): Returns the input `(batch, channels, rows, columns)` at two slices.
        size (`tuple[int, int]`): Height and width of the image.
        tile (`int`): Maximum side of a window.
        input_stride (`int`): Input positions per latent along each side.
    """
    side = min(CONTEXT_WINDOW_SIDE, tile)
    windows = context_windows(size, side, min(CONTEXT_MARGIN, (side - 1) // 2), CONTEXT_WINDOWS)
    sample = windows.read(read, input_stride)
    images = sample.shape[0]
    cuts = make_cuts(windows.cut_sides(size) * images, sample)
    context = TileContext(windows.size, windows.core(), cuts, images)
    run(sample.flatten(0, 1), context)
    return context


# Running a network over tiles


def run_tiles(
    run: RunWindow,
    read: Read,
    write: Write,
    size: Sequence[int],
    tile: int,
    overlap: int,
    input_stride: int = 1,
    on_tile: Callable[[int, int], None] | None = None,
) -> None:
    """Runs a network over the tiles of an image of any size. Only one tile is in memory at a time.

    Args:
        run (`Callable`): Takes a window `(batch, channels, h, w)` and its `core`, and returns the result at the
            core.
        read (`Callable`): Returns the input `(batch, channels, rows, columns)` at two slices.
        write (`Callable`): Takes rows and columns in latents, and the result there.
        size (`tuple[int, int]`): Height and width of the image, in latents.
        tile (`int`): Maximum side of a tile.
        overlap (`int`): Overlap on each side.
        input_stride (`int`, defaults to 1): Input positions per latent along each side.
        on_tile (`Callable`, *optional*): Called after each tile with the number of finished tiles and of all.
    """
    rows, columns = (tile_axis(length, tile, overlap) for length in size)
    for finished, (y, x) in enumerate(itertools.product(rows, columns), start=1):
        window = read(_span(y.start, y.stop, input_stride), _span(x.start, x.stop, input_stride))
        core = tuple(slice(axis.core_start - axis.start, axis.core_stop - axis.start) for axis in (y, x))
        write(slice(y.core_start, y.core_stop), slice(x.core_start, x.core_stop), run(window, core=core))
        if on_tile is not None:
            on_tile(finished, len(rows) * len(columns))


def map_tiles(
    run: RunWindow,
    source: torch.Tensor,
    tile: int,
    overlap: int,
    input_stride: int = 1,
    output_stride: int = 1,
    on_tile: Callable[[int, int], None] | None = None,
) -> torch.Tensor:
    """Runs a network over the tiles of an image in memory, and joins the cores of its results.

    Args:
        run (`Callable`): As in [`run_tiles`].
        source (`torch.Tensor` of shape `(batch, channels, height, width)`): Sides are multiples of `input_stride`.
        tile (`int`): Maximum side of a tile.
        overlap (`int`): Overlap on each side.
        input_stride (`int`, defaults to 1): Input positions per latent along each side.
        output_stride (`int`, defaults to 1): Result positions per latent along each side.
        on_tile (`Callable`, *optional*): As in [`run_tiles`].
    """
    size = [side // input_stride for side in source.shape[-2:]]
    joined: list[torch.Tensor] = []

    def write(rows: slice, columns: slice, core: torch.Tensor) -> None:
        if not joined:
            joined.append(core.new_empty(*core.shape[:2], *(side * output_stride for side in size)))
        down, across = (_span(axis.start, axis.stop, output_stride) for axis in (rows, columns))
        joined[0][..., down, across] = core

    run_tiles(run, lambda rows, columns: source[..., rows, columns], write, size, tile, overlap, input_stride, on_tile)
    return joined[0]


class TilingMixin(AutoencoderMixin):
    """Runs the networks of [`SVQVAE`] on whole images, on slices of a batch, and on tiles of each image."""

    config: Any
    encoder: nn.Module
    decoder: nn.Module
    quant_conv: nn.Module
    post_quant_conv: nn.Module
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

        An image that one tile holds is not tiled. All tiles of an image share their normalisation statistics and what
        they attend to. Both come from at most 16 windows of 10 x 10 latents, spread over the image.

        Args:
            tile_size (`int`, *optional*, defaults to 256): Maximum side of a tile in pixels, a multiple of `f`.
            overlap (`int`, *optional*): Overlap (halo) on each side of a tile in pixels, which is read but not kept: a
                multiple of `f`, less than half of `tile_size`. By default 32, or a quarter of a small tile.
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

    def tile_if_large(
        self,
        height: float,
        width: float,
        tile_size: int | None = None,
        overlap: int | None = None,
        on_tile: Callable[[int, int], None] | None = None,
    ) -> None:
        """Enables tiling if asked for, or if an image would take more than 1 GiB as a whole. Otherwise disables it.

        Args:
            height (`float`): Height of the image in pixels.
            width (`float`): Width of the image in pixels.
            tile_size (`int`, *optional*): As in [`~SVQVAE.enable_tiling`]; enables tiling.
            overlap (`int`, *optional*): As in [`~SVQVAE.enable_tiling`]; enables tiling.
            on_tile (`Callable`, *optional*): As in [`~SVQVAE.enable_tiling`].
        """
        self.enable_tiling(tile_size, overlap, on_tile)
        asked = tile_size is not None or overlap is not None
        self.use_tiling = asked or self.whole_bytes(height, width) > WHOLE_BYTES

    def whole_bytes(self, height: float, width: float) -> float:
        """Estimates the memory of an image as a whole: four float32 feature maps of the widest at full resolution."""
        encoder, decoder = self.config["encoder_ch_mult"], self.config["decoder_ch_mult"]
        channels = self.config["base_channels"] * max(encoder[0], *decoder[:2])  # the second level is enlarged
        return FEATURES_HELD * 4 * channels * height * width

    def _tiles(self, tile_size: int | None = None, overlap: int | None = None) -> tuple[int, int] | None:
        """Tile and overlap in latents; `None` without tiling."""
        if not self.use_tiling and tile_size is None and overlap is None:
            return None
        side = self.tile_size if tile_size is None else tile_size
        check_tiles(self.f, side, overlap)
        if overlap is None:
            overlap = self.overlap if tile_size is None else fit_overlap(self.f, side, self.overlap)
        return side // self.f, overlap // self.f

    def _encode(self, sample: torch.Tensor, tiles: tuple[int, int] | None) -> torch.Tensor:
        padded = pad_to_multiple(sample, self.f)
        return self._run(self.encode_window, padded, tiles, input_stride=self.f, output_stride=1)

    def _decode(self, quantized: torch.Tensor, tiles: tuple[int, int] | None) -> torch.Tensor:
        return self._run(self.decode_window, quantized, tiles, input_stride=1, output_stride=self.f)

    def encode_window(
        self, window: torch.Tensor, shared: TileContext | None = None, core: Core | None = None
    ) -> torch.Tensor:
        """Encodes a whole image or windows of it; for the tiling code.

        Args:
            window (`torch.Tensor` of shape `(batch, in_channels, h * f, w * f)`): Pixels in `pixel_range`.
            shared ([`TileContext`], *optional*): Values that the tiles of the image share.
            core (`tuple[slice, slice]`, *optional*): Rows and columns of a tile to return, in latents.
        """
        window = map_range(window, self.config["pixel_range"], self.config["network_range"])
        if shared is not None and core is not None:
            shared = shared.for_tile(core, (window.shape[-2] // self.f, window.shape[-1] // self.f), window)
        latents = self.quant_conv(self.encoder(window, shared))
        return (latents if core is None else latents[..., *core]).contiguous()

    def decode_window(
        self, window: torch.Tensor, shared: TileContext | None = None, core: Core | None = None
    ) -> torch.Tensor:
        """Decodes a whole grid of quantised latents or windows of it, not clamped; for the tiling code.

        The decoder crops, from level to level, to what the core depends on, so the result is exact.

        Args:
            window (`torch.Tensor` of shape `(batch, codebook_embed_dim, h, w)`): Quantised latents.
            shared ([`TileContext`], *optional*): Values that the tiles of the image share.
            core (`tuple[slice, slice]`, *optional*): Rows and columns of a tile to return, in latents. Ignored
                without `shared`.
        """
        hidden = self.post_quant_conv(window)
        if shared is not None and core is not None:
            shared = shared.for_tile(core, (window.shape[-2], window.shape[-1]), hidden)
        decoded = self.decoder(hidden, shared)
        if shared is not None:
            decoded = shared.core_of(decoded)
        return map_range(decoded.contiguous(), self.config["network_range"], self.config["pixel_range"])

    def _run(
        self,
        run: RunWindow,
        source: torch.Tensor,
        tiles: tuple[int, int] | None,
        input_stride: int,
        output_stride: int,
    ) -> torch.Tensor:
        """Runs a network over a batch: as a whole, or by slices and tiles."""
        if self.use_slicing and source.shape[0] > 1:
            slices = [self._run(run, image, tiles, input_stride, output_stride) for image in source.split(1)]
            return torch.cat(slices)
        size = [side // input_stride for side in source.shape[-2:]]
        if tiles is None or max(size) <= tiles[0]:
            return run(source)
        if torch.is_grad_enabled() and self.is_gradient_checkpointing:
            raise ValueError(
                "Gradient checkpointing must be off for tiles with gradients, because it runs the network again after "
                "the values that tiles share have changed. Disable gradient checkpointing, tiling or gradients."
            )
        shared = gather_context(run, lambda rows, columns: source[..., rows, columns], size, tiles[0], input_stride)
        return map_tiles(
            partial(run, shared=shared), source, *tiles, input_stride, output_stride, on_tile=self.on_tile
        )


def fit_overlap(f: int, tile_size: int, overlap: int) -> int:
    """`overlap`, or a quarter of a small tile, in pixels: a larger one would leave little of the tile."""
    return min(overlap // f, tile_size // f // 4) * f

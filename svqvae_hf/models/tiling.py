"""Tiles of an image: their geometry, the context that they share, and how a network runs over them.

Lengths are in latents unless a name says otherwise, so that pixels and latents share one grid. Three steps:

1. [`sample_windows`] runs the network over a few windows of the image, which gather the statistics of each norm and
   the keys and values of each attention.
2. [`run_tiles`] runs it over each tile, which is read with an overlap (halo) on each side, with these shared values.
3. Only the core of each tile is kept. The cores partition the image, so nothing is blended.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from diffusers.models.modeling_utils import ModelMixin

from .checks import check_tiles
from .layers import Area, CutSides, TileContext, WindowSample, make_cuts
from .resizing import map_range, pad_to_multiple

TILE_SIZE_PX = 256  # default side of a tile in pixels
OVERLAP_PX = 32  # default overlap of a tile in pixels, where it fits
CONTEXT_WINDOWS = 12  # maximum number of windows per image
CONTEXT_WINDOW_SIDE = 10  # side of a window, in latents
CONTEXT_MARGIN = 2  # latents next to a cut that are ignored

Read = Callable[[slice, slice], torch.Tensor]
RunWindow = Callable[..., torch.Tensor]  # [`SVQVAE.encode_window`] or [`SVQVAE.decode_window`]


class Tiles(NamedTuple):
    """Sides of the tiles that images are encoded and decoded in, in pixels.

    Args:
        tile_size (`int`): Maximum side of a tile, a multiple of `f`.
        overlap (`int`): Overlap (halo) on each side of a tile, which is read but not kept: a multiple of `f`, less
            than half of `tile_size`.
    """

    tile_size: int
    overlap: int


# Geometry


def tile_axis(length: int, tile: int, overlap: int) -> list[tuple[slice, slice]]:
    """Cuts an axis into windows of one size, at most `tile`, whose cores partition it. Returns windows and cores.

    Neighbouring windows share at least `2 * overlap`, so each core has at least `overlap` on each inner side. Windows
    are no longer than needed: an axis a little longer than a tile is cut into two windows of little more than half
    its length. An axis of 10 with tiles of 6 and an overlap of 1 (`#` is the core of a window, `.` its overlap):

        position    0123456789
        window 0    #####.
        window 1        .#####

    Args:
        length (`int`): Length of the axis, at least 1.
        tile (`int`): Maximum length of a window, more than `2 * overlap`.
        overlap (`int`): Overlap on each side, at least 0.
    """
    if length <= tile:
        whole = slice(0, length)
        return [(whole, whole)]
    count, window_length = _count_windows(length, tile, overlap)
    starts = _spread(length - window_length, count)
    windows = [slice(start, start + window_length) for start in starts]
    cores = _cores_of_windows(windows)
    return list(zip(windows, cores, strict=True))


def _count_windows(length: int, tile: int, overlap: int) -> tuple[int, int]:
    """Number of windows that cover an axis, as few as possible, and their length, as short as possible.

    A window shares `shared` positions with the next one, and has `new_per_window` others. So `count` windows cover
    `shared + count * new_per_window` positions, which must be at least the length of the axis. In the example of
    [`tile_axis`], two windows of 6 cover 2 + 2 * 4 = 10 positions.
    """
    shared = 2 * overlap
    count = divide_rounding_up(length - shared, tile - shared)
    new_per_window = divide_rounding_up(length - shared, count)
    return count, shared + new_per_window


def _cores_of_windows(windows: Sequence[slice]) -> list[slice]:
    """Parts of overlapping windows that partition an axis. Neighbouring cores meet in the middle of the overlap."""
    cores = []
    core_start = 0
    for window, next_window in itertools.pairwise(windows):
        # Both windows have the positions from the start of the next one to the stop of this one.
        middle_of_overlap = (next_window.start + window.stop) // 2
        cores.append(slice(core_start, middle_of_overlap))
        core_start = middle_of_overlap
    end_of_axis = windows[-1].stop
    cores.append(slice(core_start, end_of_axis))
    return cores


def window_origins(size: Sequence[int], side: int, count: int) -> list[tuple[int, int]]:
    """Spreads windows over an image in a grid of the image's proportions. Returns the top and left of each.

    Args:
        size (`tuple[int, int]`): Height and width of the image.
        side (`int`): Side of a window, if the image is at least as long.
        count (`int`): Maximum number of windows; fewer where they cover the image.
    """
    height, width = size
    # More rows or columns than these would only repeat what the others cover.
    rows_that_cover = divide_rounding_up(height, side)
    columns_that_cover = divide_rounding_up(width, side)
    # A grid has the proportions of the image if rows / columns = height / width. Together with
    # rows * columns = count, this means rows**2 = count * height / width.
    rows_in_proportion = max(1, round((count * height / width) ** 0.5))
    rows = min(rows_in_proportion, rows_that_cover, count)
    columns = min(count // rows, columns_that_cover)
    lowest_top = max(0, height - side)
    rightmost_left = max(0, width - side)
    tops = _spread(lowest_top, rows)
    lefts = _spread(rightmost_left, columns)
    return list(itertools.product(tops, lefts))


def _spread(last_start: int, count: int) -> list[int]:
    """Starts of `count` windows at equal distances, from 0 to `last_start`. A single window is centred."""
    if count == 1:
        return [last_start // 2]
    num_steps = count - 1  # from the first start to the last
    return [round(number * last_start / num_steps) for number in range(count)]


def divide_rounding_up(dividend: int, divisor: int) -> int:
    """Quotient of two integers, rounded up."""
    return -(-dividend // divisor)


# Running a network over tiles


@dataclass(frozen=True)
class TiledRun:
    """A network, the image that it runs over, and the tiles of the image.

    Args:
        network (`Callable`): [`SVQVAE.encode_window`] or [`SVQVAE.decode_window`].
        read (`Callable`): Returns the input `(batch, channels, rows, columns)` at two slices.
        size (`tuple[int, int]`): Height and width of the image, in latents.
        tile (`int`): Maximum side of a tile, in latents.
        overlap (`int`): Overlap on each side of a tile, in latents.
        input_stride (`int`, defaults to 1): Input positions per latent along each side.
    """

    network: RunWindow
    read: Read
    size: tuple[int, int]
    tile: int
    overlap: int
    input_stride: int = 1

    def read_area(self, area: Area) -> torch.Tensor:
        """Input `(batch, channels, rows, columns)` at an area in latents."""
        input_area = area.scaled(self.input_stride)
        return self.read(input_area.rows, input_area.columns)


def sample_windows(run: TiledRun) -> WindowSample:
    """Runs a network over a sample of windows of an image, as one batch.

    Returns:
        [`WindowSample`]: The statistics of each norm and the keys and values of each attention in these windows.
    """
    side = min(CONTEXT_WINDOW_SIDE, run.tile)
    areas = _areas_of_sample(run.size, side)
    windows = [run.read_area(area) for area in areas]  # each (images, channels, height, width)
    by_image = torch.stack(windows, dim=1)  # (images, windows, channels, height, width)
    images = len(by_image)
    batch = by_image.flatten(0, 1)  # all windows of the first image, then all windows of the second, ...
    cut_sides = [CutSides.of_window(area, run.size) for area in areas]
    cut_sides_of_batch = cut_sides * images  # windows lie at the same places in each image
    cuts = make_cuts(cut_sides_of_batch, like=batch)
    size_of_windows = areas[0].size  # all windows have the same size
    core_of_windows = _core_of_sample(run.size, side)
    sample = WindowSample(size=size_of_windows, core=core_of_windows, cuts=cuts, images=images)
    # While the network runs, its norms and attentions store their values in the sample. Its result is not needed.
    run.network(batch, sample)
    return sample


def _areas_of_sample(image_size: Sequence[int], side: int) -> list[Area]:
    """Areas of the sampled windows in latents: squares of `side`, or less along an axis where the image is shorter."""
    image_height, image_width = image_size
    height = min(side, image_height)
    width = min(side, image_width)
    areas = []
    for top, left in window_origins(image_size, side, CONTEXT_WINDOWS):
        areas.append(Area(slice(top, top + height), slice(left, left + width)))
    return areas


def _core_of_sample(image_size: Sequence[int], side: int) -> Area:
    """Core of the sampled windows: the part, the same in each window, from which norms and attentions gather values.

    Around it lies a margin. A window may be cut from the image there, and features next to a cut are not exact.
    """
    image_height, image_width = image_size
    return Area(_core_along_axis(image_height, side), _core_along_axis(image_width, side))


def _core_along_axis(length: int, side: int) -> slice:
    """Core of windows of `side` latents, along an axis of `length` latents.

    A window as long as the axis counts whole. A shorter one counts without a margin at either end.
    """
    if length <= side:
        return slice(0, length)
    margin = min(CONTEXT_MARGIN, (side - 1) // 2)
    return slice(margin, side - margin)


def run_tiles(run: TiledRun) -> Iterator[tuple[Area, torch.Tensor]]:
    """Runs a network over the tiles of an image of any size. Yields areas in latents, and the results there.

    Only one tile is in memory at a time. An image that fits into one tile is run as a whole, with its own statistics.
    """
    fits_one_tile = max(run.size) <= run.tile
    if fits_one_tile:
        whole = Area.of_size(run.size)
        yield whole, run.network(run.read_area(whole))
        return
    height, width = run.size
    values_of_all_tiles = sample_windows(run)  # statistics, keys and values
    for window_rows, core_rows in tile_axis(height, run.tile, run.overlap):
        for window_columns, core_columns in tile_axis(width, run.tile, run.overlap):
            window = Area(window_rows, window_columns)  # what the network reads: the core, and an overlap around it
            core = Area(core_rows, core_columns)  # where its result is kept
            tile_input = run.read_area(window)
            core_in_window = core.within(window)
            context = values_of_all_tiles.context_of_tile(tile_input, core_in_window, run.input_stride)
            result = run.network(tile_input, context)  # of the core alone
            yield core, result


def map_tiles(
    network: RunWindow, source: torch.Tensor, tile: int, overlap: int, input_stride: int = 1, output_stride: int = 1
) -> torch.Tensor:
    """Runs a network over the tiles of an image in memory, and joins the cores of its results.

    Args:
        network (`Callable`): As in [`TiledRun`].
        source (`torch.Tensor` of shape `(batch, channels, height, width)`): Sides are multiples of `input_stride`.
        tile (`int`): Maximum side of a tile, in latents.
        overlap (`int`): Overlap on each side, in latents.
        input_stride (`int`, defaults to 1): Rows and columns of `source` per latent.
        output_stride (`int`, defaults to 1): Rows and columns of the result per latent.
    """

    def read(rows: slice, columns: slice) -> torch.Tensor:
        return source[..., rows, columns]

    height = source.shape[-2] // input_stride  # in latents
    width = source.shape[-1] // input_stride  # in latents
    run = TiledRun(network, read, size=(height, width), tile=tile, overlap=overlap, input_stride=input_stride)
    joined = torch.empty(0)  # replaced when the first result shows the number of channels
    for area, result in run_tiles(run):
        is_first = joined.numel() == 0
        if is_first:
            batch, channels, _, _ = result.shape
            joined = result.new_empty(batch, channels, height * output_stride, width * output_stride)
        output_area = area.scaled(output_stride)
        joined[..., output_area.rows, output_area.columns] = result
    return joined


class TilingMixin(ModelMixin):
    """Runs the networks of [`SVQVAE`] on whole images, on slices of a batch, and on tiles of each image."""

    use_slicing = False
    use_tiling = False

    def enable_slicing(self) -> None:
        """Runs the images of a batch one at a time."""
        self.use_slicing = True

    def disable_slicing(self) -> None:
        """Runs the images of a batch together again."""
        self.use_slicing = False

    def disable_tiling(self) -> None:
        """Runs images as a whole again."""
        self.use_tiling = False

    def enable_tiling(self, tile_size: int = 256, overlap: int | None = None) -> None:
        """Encodes and decodes large images tile by tile, so that memory grows only with the image and its latents.

        An image that fits into one tile is not tiled. All tiles of an image share their normalisation statistics and
        what they attend to. Both come from at most 12 windows of 10 x 10 latents, spread over the image. `tile_size`
        and `overlap` of a call override these.

        Args:
            tile_size (`int`, defaults to 256): Maximum side of a tile in pixels, a multiple of `f`.
            overlap (`int`, *optional*): Overlap (halo) on each side of a tile in pixels, which is read but not kept: a
                multiple of `f`, less than half of `tile_size`. By default 32, or a quarter of a small tile,
                in whole ids.

        Raises:
            ValueError: If `tile_size` or `overlap` does not fit.
        """
        check_tiles(self.f, tile_size, overlap)
        self.use_tiling = True
        self.tile_size = tile_size
        self.overlap = default_overlap(tile_size, self.f) if overlap is None else overlap

    def tiles_of_call(self, tile_size: int | None = None, overlap: int | None = None) -> Tiles | None:
        """Tiles of a call with these arguments; `None` if images are not tiled.

        A call uses tiles if one of the arguments is given, or after [`~SVQVAE.enable_tiling`].

        Args:
            tile_size (`int`, *optional*): Tile size in pixels, by default the model's.
            overlap (`int`, *optional*): Overlap in pixels, by default the model's, or a quarter of a small tile.

        Raises:
            ValueError: If `tile_size` or `overlap` does not fit.
        """
        has_arguments = tile_size is not None or overlap is not None
        if not has_arguments and not self.use_tiling:
            return None
        tile_size_of_call = self.tile_size if tile_size is None else tile_size
        check_tiles(self.f, tile_size_of_call, overlap)
        if overlap is not None:
            return Tiles(tile_size_of_call, overlap)
        if tile_size is None:
            return Tiles(self.tile_size, self.overlap)
        # The model's overlap suits the model's tile size. It may be too large for the tile size of this call.
        most_overlap = quarter_of_tile(tile_size, self.f)
        return Tiles(tile_size, min(self.overlap, most_overlap))

    def _check_tiles(self, tiles: Tiles | tuple[int, int] | None) -> Tiles | None:
        """Tiles of a call, by default those that are enabled. Raises ValueError if they do not fit."""
        if tiles is None:
            return self.tiles_of_call()
        tile_size, overlap = tiles
        check_tiles(self.f, tile_size, overlap)
        return Tiles(tile_size, overlap)

    def _encode(self, sample: torch.Tensor, tiles: Tiles | None) -> torch.Tensor:
        """Encodes images of any size to latents, whole or tile by tile."""
        padded = pad_to_multiple(sample, self.f)
        return self._run(self.encode_window, padded, tiles, input_stride=self.f, output_stride=1)

    def _decode(self, quantized: torch.Tensor, tiles: Tiles | None) -> torch.Tensor:
        """Decodes quantised latents to images, whole or tile by tile."""
        return self._run(self.decode_window, quantized, tiles, input_stride=1, output_stride=self.f)

    def encode_window(self, window: torch.Tensor, shared: TileContext | None = None) -> torch.Tensor:
        """Encodes a whole image or windows of it; for the tiling code.

        Args:
            window (`torch.Tensor` of shape `(batch, in_channels, h * f, w * f)`): Pixels in `pixel_range`.
            shared ([`TileContext`], *optional*): Values that the tiles of the image share, and the core to return.
        """
        pixels = map_range(window, self.config["pixel_range"], self.config["network_range"])
        latents = self.quant_conv(self.encoder(pixels, shared))
        if shared is not None:
            latents = shared.core_of(latents)
        return latents.contiguous()

    def decode_window(self, window: torch.Tensor, shared: TileContext | None = None) -> torch.Tensor:
        """Decodes a whole grid of quantised latents or windows of it, not clamped; for the tiling code.

        The decoder crops, from level to level, to what the core depends on, so the result is exact.

        Args:
            window (`torch.Tensor` of shape `(batch, codebook_embed_dim, h, w)`): Quantised latents.
            shared ([`TileContext`], *optional*): Values that the tiles of the image share, and the core to return.
        """
        decoded = self.decoder(self.post_quant_conv(window), shared).contiguous()
        return map_range(decoded, self.config["network_range"], self.config["pixel_range"])

    def _run(
        self, network: RunWindow, source: torch.Tensor, tiles: Tiles | None, *, input_stride: int, output_stride: int
    ) -> torch.Tensor:
        """Runs a network over a batch: as a whole, image by image if slicing is on, or over tiles of each image.

        Args:
            network (`Callable`): `encode_window` or `decode_window`.
            source (`torch.Tensor` of shape `(batch, channels, height, width)`): Padded images, or quantised latents.
            tiles ([`Tiles`], *optional*): Tile size and overlap in pixels; by default images are not tiled.
            input_stride (`int`): Rows and columns of `source` per latent: `f` for images, 1 for latents.
            output_stride (`int`): Rows and columns of the result per latent: 1 for latents, `f` for images.
        """
        if self.use_slicing and len(source) > 1:
            results = []
            for image in source.split(1):
                result = self._run(network, image, tiles, input_stride=input_stride, output_stride=output_stride)
                results.append(result)
            return torch.cat(results)
        if tiles is None:
            return network(source)
        # These lengths are in latents, so that an image has the same tiles in the encoder and the decoder.
        tile = tiles.tile_size // self.f
        overlap = tiles.overlap // self.f
        longer_side = max(source.shape[-2:]) // input_stride
        if longer_side <= tile:
            return network(source)
        self._check_no_block_runs_again()
        return map_tiles(network, source, tile, overlap, input_stride, output_stride)

    def _check_no_block_runs_again(self) -> None:
        """Raises ValueError for tiles with gradients and gradient checkpointing.

        Gradient checkpointing runs each block a second time, in the backward pass. In the run over the sampled
        windows, a block stores the statistics, keys and values that the tiles read. When this run is repeated, the
        block would store new ones in their place.
        """
        if torch.is_grad_enabled() and self.is_gradient_checkpointing:
            raise ValueError(
                "Gradient checkpointing must be off for tiles with gradients, because it runs the network again after "
                "the values that tiles share have changed. Disable gradient checkpointing, tiling or gradients."
            )


def default_overlap(tile_size: int, downsampling: int) -> int:
    """Overlap in pixels of tiles of this size, if none is set: 32, or a quarter of a small tile, in whole latents.

    Args:
        tile_size (`int`): Side of a tile in pixels.
        downsampling (`int`): Pixels per latent along each side.
    """
    usual_overlap = OVERLAP_PX // downsampling * downsampling
    return min(usual_overlap, quarter_of_tile(tile_size, downsampling))


def quarter_of_tile(tile_size: int, downsampling: int) -> int:
    """A quarter of a tile in pixels, rounded down to whole latents."""
    latents_per_tile = tile_size // downsampling
    return latents_per_tile // 4 * downsampling

"""Tiles of an image: their geometry, the context that they share, and how a network runs over them.

Lengths are in latents unless a name says otherwise, so that pixels and latents share one grid. Three steps:

1. [`sample_windows`] runs the network over a few windows of the image, which gather the statistics of each norm and
   the keys and values of each attention.
2. [`run_tiles`] runs it over each tile, which is read with an overlap (halo) on each side, with these shared values.
3. Only the core of each tile is kept. The cores partition the image, so nothing is blended.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence

import torch
from diffusers.models.modeling_utils import ModelMixin

from .checks import check_tiles
from .layers import TileContext, WindowSample, make_cuts, move
from .resizing import map_range, pad_to_multiple

OVERLAP_PX = 32  # default overlap of a tile in pixels, where it fits
CONTEXT_WINDOWS = 12  # maximum number of windows per image
CONTEXT_WINDOW_SIDE = 10  # side of a window, in latents
CONTEXT_MARGIN = 2  # latents next to a cut that are ignored

Read = Callable[[slice, slice], torch.Tensor]
RunWindow = Callable[..., torch.Tensor]  # [`SVQVAE.encode_window`] or [`SVQVAE.decode_window`]
Tiles = tuple[int, int] | None  # tile and overlap; `None` if images are not tiled


# Geometry


def tile_axis(length: int, tile: int, overlap: int) -> list[tuple[slice, slice]]:
    """Cuts an axis into windows of one size, at most `tile`, whose cores partition it. Returns windows and cores.

    Neighbouring windows share at least `2 * overlap`, so each core has at least `overlap` on each inner side. Windows
    are no longer than needed: an axis a little longer than a tile is cut into two windows of little more than half
    its length.

    Args:
        length (`int`): Length of the axis, at least 1.
        tile (`int`): Maximum length of a window, more than `2 * overlap`.
        overlap (`int`): Overlap on each side, at least 0.
    """
    if length <= tile:
        return [(slice(0, length), slice(0, length))]
    count = -(-(length - 2 * overlap) // (tile - 2 * overlap))
    window = -(-(length + 2 * overlap * (count - 1)) // count)
    starts = [round(i * (length - window) / (count - 1)) for i in range(count)]
    cuts = [0, *((left + window + right) // 2 for left, right in zip(starts, starts[1:], strict=False)), length]
    return [(slice(start, start + window), slice(cuts[i], cuts[i + 1])) for i, start in enumerate(starts)]


def window_origins(size: Sequence[int], side: int, count: int) -> list[tuple[int, int]]:
    """Spreads windows over an image in a grid of the image's proportions. Returns the top and left of each.

    Args:
        size (`tuple[int, int]`): Height and width of the image.
        side (`int`): Side of a window, if the image is at least as long.
        count (`int`): Maximum number of windows; fewer where they cover the image.
    """
    height, width = size
    most_down, most_across = (-(-length // side) for length in size)
    down = min(max(1, round((count * height / width) ** 0.5)), most_down, count)
    across = min(count // down, most_across)
    tops, lefts = (  # from one end to the other; a single window is centred
        [room // 2] if windows == 1 else [round(i * room / (windows - 1)) for i in range(windows)]
        for room, windows in ((max(0, height - side), down), (max(0, width - side), across))
    )
    return [*itertools.product(tops, lefts)]


def scale_span(part: slice, stride: int) -> slice:
    """Multiplies both ends of a slice."""
    return slice(part.start * stride, part.stop * stride)


# Running a network over tiles


def sample_windows(run: RunWindow, read: Read, size: Sequence[int], tile: int, input_stride: int) -> WindowSample:
    """Runs a network over a sample of windows of an image, as one batch, and returns what they gathered.

    Args:
        run (`Callable`): [`SVQVAE.encode_window`] or [`SVQVAE.decode_window`].
        read (`Callable`): Returns the input `(batch, channels, rows, columns)` at two slices.
        size (`tuple[int, int]`): Height and width of the image.
        tile (`int`): Maximum side of a window.
        input_stride (`int`): Input positions per latent along each side.
    """
    side = min(CONTEXT_WINDOW_SIDE, tile)
    height, width = (min(side, length) for length in size)
    margin = min(CONTEXT_MARGIN, (side - 1) // 2)
    rows, columns = (slice(margin, side - margin) if length > side else slice(0, length) for length in size)
    origins = window_origins(size, side, CONTEXT_WINDOWS)
    areas = [(slice(y, y + height), slice(x, x + width)) for y, x in origins]
    windows = [read(scale_span(y, input_stride), scale_span(x, input_stride)) for y, x in areas]
    batch = torch.stack(windows, dim=1)  # (images, windows, channels, height, width)
    cut_sides = [(y > 0, y + height < size[0], x > 0, x + width < size[1]) for y, x in origins] * len(batch)
    sample = WindowSample((height, width), (rows, columns), make_cuts(cut_sides, batch), images=len(batch))
    run(batch.flatten(0, 1), sample)
    return sample


def run_tiles(
    run: RunWindow, read: Read, size: Sequence[int], tile: int, overlap: int, input_stride: int
) -> Iterator[tuple[slice, slice, torch.Tensor]]:
    """Runs a network over the tiles of an image of any size. Yields rows and columns in latents, and the result there.

    Only one tile is in memory at a time. An image that fits into one tile shares nothing, as without tiles.

    Args:
        run (`Callable`): [`SVQVAE.encode_window`] or [`SVQVAE.decode_window`].
        read (`Callable`): Returns the input `(batch, channels, rows, columns)` at two slices.
        size (`tuple[int, int]`): Height and width of the image, in latents.
        tile (`int`): Maximum side of a tile.
        overlap (`int`): Overlap on each side.
        input_stride (`int`): Input positions per latent along each side.
    """
    if max(size) <= tile:
        rows, columns = (slice(0, length) for length in size)
        yield rows, columns, run(read(scale_span(rows, input_stride), scale_span(columns, input_stride)))
        return
    sample = sample_windows(run, read, size, tile, input_stride)
    for (y, rows), (x, columns) in itertools.product(*(tile_axis(length, tile, overlap) for length in size)):
        window = read(scale_span(y, input_stride), scale_span(x, input_stride))
        core = move(rows, -y.start), move(columns, -x.start)
        yield rows, columns, run(window, sample.tile(window, core, input_stride))


def map_tiles(
    run: RunWindow, source: torch.Tensor, tile: int, overlap: int, input_stride: int = 1, output_stride: int = 1
) -> torch.Tensor:
    """Runs a network over the tiles of an image in memory, and joins the cores of its results.

    Args:
        run (`Callable`): As in [`run_tiles`].
        source (`torch.Tensor` of shape `(batch, channels, height, width)`): Sides are multiples of `input_stride`.
        tile (`int`): Maximum side of a tile.
        overlap (`int`): Overlap on each side.
        input_stride (`int`, defaults to 1): Input positions per latent along each side.
        output_stride (`int`, defaults to 1): Result positions per latent along each side.
    """
    size = [side // input_stride for side in source.shape[-2:]]
    joined: list[torch.Tensor] = []
    for y, x, core in run_tiles(run, lambda y, x: source[..., y, x], size, tile, overlap, input_stride):
        if not joined:
            joined.append(core.new_empty(*core.shape[:2], *(side * output_stride for side in size)))
        joined[0][..., scale_span(y, output_stride), scale_span(x, output_stride)] = core
    return joined[0]


class TilingMixin(ModelMixin):
    """Runs the networks of [`SVQVAE`] on whole images, on slices of a batch, and on tiles of each image."""

    use_slicing = use_tiling = False

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
        self.use_tiling, self.tile_size = True, tile_size
        self.overlap = min(OVERLAP_PX // self.f, tile_size // self.f // 4) * self.f if overlap is None else overlap

    def tiles_of_call(self, tile_size: int | None = None, overlap: int | None = None) -> Tiles:
        """Tile size and overlap in pixels of a call with these arguments; `None` if images are not tiled.

        Args:
            tile_size (`int`, *optional*): By default the model's. If one of the arguments is given, or after
                [`~SVQVAE.enable_tiling`], the call uses tiles.
            overlap (`int`, *optional*): By default the model's, or a quarter of a small tile.

        Raises:
            ValueError: If `tile_size` or `overlap` does not fit.
        """
        if not self.use_tiling and tile_size is None and overlap is None:
            return None
        side = self.tile_size if tile_size is None else tile_size
        check_tiles(self.f, side, overlap)
        if overlap is None:
            overlap = self.overlap if tile_size is None else min(self.overlap // self.f, side // self.f // 4) * self.f
        return side, overlap

    def _tiles(self, tile_size: int | None = None, overlap: int | None = None) -> Tiles:
        """Tile and overlap of a call in latents; `None` without tiles."""
        tiles = self.tiles_of_call(tile_size, overlap)
        return None if tiles is None else (tiles[0] // self.f, tiles[1] // self.f)

    def _encode(self, sample: torch.Tensor, tiles: Tiles) -> torch.Tensor:
        return self._run(self.encode_window, pad_to_multiple(sample, self.f), tiles, self.f, 1)

    def _decode(self, quantized: torch.Tensor, tiles: Tiles) -> torch.Tensor:
        return self._run(self.decode_window, quantized, tiles, 1, self.f)

    def encode_window(self, window: torch.Tensor, shared: TileContext | None = None) -> torch.Tensor:
        """Encodes a whole image or windows of it; for the tiling code.

        Args:
            window (`torch.Tensor` of shape `(batch, in_channels, h * f, w * f)`): Pixels in `pixel_range`.
            shared ([`TileContext`], *optional*): Values that the tiles of the image share, and the core to return.
        """
        latents = self.encoder(map_range(window, self.config["pixel_range"], self.config["network_range"]), shared)
        latents = self.quant_conv(latents)
        return (latents if shared is None else shared.core_of(latents)).contiguous()

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
        self, run: RunWindow, source: torch.Tensor, tiles: Tiles, input_stride: int, output_stride: int
    ) -> torch.Tensor:
        """Runs a network over a batch: as a whole, or by slices and tiles."""
        if self.use_slicing and source.shape[0] > 1:
            return torch.cat([self._run(run, image, tiles, input_stride, output_stride) for image in source.split(1)])
        size = [side // input_stride for side in source.shape[-2:]]
        if tiles is None or max(size) <= tiles[0]:
            return run(source)
        if torch.is_grad_enabled() and self.is_gradient_checkpointing:
            raise ValueError(
                "Gradient checkpointing must be off for tiles with gradients, because it runs the network again after "
                "the values that tiles share have changed. Disable gradient checkpointing, tiling or gradients."
            )
        return map_tiles(run, source, *tiles, input_stride, output_stride)

"""Tiles of an image: the grid, a function mapped over it or over one tile of it, and a sample of windows.

Lengths are in cells, so that pixels and latents share one grid.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

Read = Callable[[slice, slice], torch.Tensor]
Core = tuple[slice, slice]  # rows and columns of a window, in its cells


class Tile(NamedTuple):
    """One tile along one axis, in cells.

    The function reads `start:stop`, the core with its halo, and gives `core_start:core_stop`.
    """

    start: int
    stop: int
    core_start: int
    core_stop: int


def tile_axis(length: int, tile: int, overlap: int) -> list[Tile]:
    """Cuts an axis into windows of one size, at most `tile` cells, whose cores partition it.

    Neighbouring windows share at least `2 * overlap` cells, so each core has a halo of at least `overlap` cells on
    each inner side. The windows are no longer than the length asks for: an axis a little longer than a tile gives two
    windows of little more than half of it.

    Args:
        length (`int`): Cells along the axis, at least 1.
        tile (`int`): Largest window, in cells, more than `2 * overlap`.
        overlap (`int`): Halo on each side, in cells, at least 0.
    """
    if length <= tile:
        return [Tile(0, length, 0, length)]
    count = -(-(length - 2 * overlap) // (tile - 2 * overlap))
    window = -(-(length + 2 * overlap * (count - 1)) // count)
    starts = [round(i * (length - window) / (count - 1)) for i in range(count)]
    cuts = [0, *((left + window + right) // 2 for left, right in zip(starts, starts[1:], strict=False)), length]
    return [Tile(start, start + window, cuts[i], cuts[i + 1]) for i, start in enumerate(starts)]


class WindowSample(NamedTuple):
    """Windows of one size, spread over an image, in cells.

    Args:
        places (`list[tuple[int, int]]`): Top and left of each.
        window (`tuple[int, int]`): Height and width of each.
        margin (`tuple[int, int]`): Cells at the top and the bottom, at the left and the right, that are next to a cut;
            0 along an axis that a window spans.
    """

    places: list[tuple[int, int]]
    window: tuple[int, int]
    margin: tuple[int, int]

    def read(self, read: Read, cell: int) -> torch.Tensor:
        """The windows of each image one after the other, `(batch * windows, channels, height, width)`.

        Args:
            read (`Callable`): Gives the source `(batch, channels, rows, columns)` at two slices, in samples.
            cell (`int`): Samples of the source along a side of a cell.
        """
        height, width = self.window
        windows = [read(_span(y, y + height, cell), _span(x, x + width, cell)) for y, x in self.places]
        return torch.stack(windows, dim=1).flatten(0, 1)


def sample_windows(size: Sequence[int], side: int, margin: int, count: int) -> WindowSample:
    """Spreads windows evenly over an image, in rows and columns as its sides are to each other.

    Args:
        size (`tuple[int, int]`): Height and width of the image, in cells.
        side (`int`): Side of a window where the image is as long, in cells.
        margin (`int`): Cells next to a cut, less than half of `side`.
        count (`int`): Windows at most; fewer where they cover the image.
    """
    height, width = size
    most_down, most_across = (-(-length // side) for length in size)
    down = min(max(1, round(math.sqrt(count * height / width))), most_down, count)
    across = min(count // down, most_across)
    rows, columns = _spread(height, side, down), _spread(width, side, across)
    return WindowSample(
        places=[(y, x) for y in rows for x in columns],
        window=(min(side, height), min(side, width)),
        margin=(margin if height > side else 0, margin if width > side else 0),
    )


def _spread(length: int, side: int, count: int) -> list[int]:
    """Starts of `count` windows along an axis, from its one end to its other; of one window, in its middle."""
    room = max(0, length - side)
    return [room // 2] if count == 1 else [round(i * room / (count - 1)) for i in range(count)]


def map_tiles(
    function: Callable[..., torch.Tensor],
    source: torch.Tensor,
    tile: int,
    overlap: int,
    source_cell: int = 1,
    result_cell: int = 1,
    on_tile: Callable[[int, int], None] | None = None,
) -> torch.Tensor:
    """Maps a function over the tiles of an image and joins the cores of the results.

    Memory beyond the source and the result is that of one tile.

    Args:
        function (`Callable`): Takes a window `(batch, channels, h, w)` of the source and its `core`, rows and columns
            of the window in cells; gives the result there, `(batch, channels, rows * result_cell, columns *
            result_cell)`.
        source (`torch.Tensor` of shape `(batch, channels, height, width)`): Sides are multiples of `source_cell`.
        tile (`int`): Largest window, in cells.
        overlap (`int`): Halo on each side, in cells.
        source_cell (`int`, defaults to 1): Samples of the source along a side of a cell.
        result_cell (`int`, defaults to 1): Samples of the result along a side of a cell.
        on_tile (`Callable`, *optional*): Called with the tiles done and their number after each tile.
    """
    rows, columns = (side // source_cell for side in source.shape[-2:])
    grid = [(y, x) for y in tile_axis(rows, tile, overlap) for x in tile_axis(columns, tile, overlap)]
    joined = source
    for done, (y, x) in enumerate(grid, start=1):
        core = map_tile(function, lambda rows, columns: source[..., rows, columns], y, x, source_cell, result_cell)
        if done == 1:
            joined = core.new_empty(*core.shape[:-2], rows * result_cell, columns * result_cell)
        kept_y, kept_x = (_span(axis.core_start, axis.core_stop, result_cell) for axis in (y, x))
        joined[..., kept_y, kept_x] = core
        if on_tile is not None:
            on_tile(done, len(grid))
    return joined


def map_tile(
    function: Callable[..., torch.Tensor],
    read: Read,
    y: Tile,
    x: Tile,
    source_cell: int = 1,
    result_cell: int = 1,
) -> torch.Tensor:
    """Maps a function over one tile of an image, which may be of any size: only the tile is read.

    Args:
        function (`Callable`): As in [`map_tiles`].
        read (`Callable`): Gives the source `(batch, channels, rows, columns)` at two slices, in samples.
        y (`Tile`): The tile along the vertical axis.
        x (`Tile`): The tile along the horizontal axis.
        source_cell (`int`, defaults to 1): Samples of the source along a side of a cell.
        result_cell (`int`, defaults to 1): Samples of the result along a side of a cell.

    Returns:
        `torch.Tensor`: The core of the result.
    """
    core = slice(y.core_start - y.start, y.core_stop - y.start), slice(x.core_start - x.start, x.core_stop - x.start)
    return function(read(_span(y.start, y.stop, source_cell), _span(x.start, x.stop, source_cell)), core=core)


def trim(window: torch.Tensor, core: Core, margin: int) -> tuple[torch.Tensor, Core]:
    """Cuts off what is more than `margin` cells from the core of a window; gives what is left, and its core."""
    kept = [
        slice(max(0, span.start - margin), min(side, span.stop + margin))
        for side, span in zip(window.shape[-2:], core, strict=True)
    ]
    rows, columns = (
        slice(span.start - around.start, span.stop - around.start) for span, around in zip(core, kept, strict=True)
    )
    return window[..., kept[0], kept[1]], (rows, columns)


def zoom(core: Core, cell: int) -> Core:
    """The same core where a cell has become `cell` ones along each side."""
    rows, columns = (_span(span.start, span.stop, cell) for span in core)
    return rows, columns


def _span(start: int, stop: int, cell: int) -> slice:
    return slice(start * cell, stop * cell)

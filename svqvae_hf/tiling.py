"""Tiles of an image: the grid, and a function mapped over it.

Lengths are in cells, so that pixels and latents share one grid.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch


class Tile(NamedTuple):
    """One tile along one axis, in cells.

    The function reads `start:stop`, the core with its halo; of the result only `core_start:core_stop` is kept.
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


def map_tiles(
    function: Callable[[torch.Tensor], torch.Tensor],
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
        function (`Callable`): Takes a window `(batch, channels, h, w)` of the source and gives `(batch, channels, h',
            w')`, where `h' = h / source_cell * result_cell`, and the same for `w'`.
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
        result = function(source[..., _span(y.start, y.stop, source_cell), _span(x.start, x.stop, source_cell)])
        if done == 1:
            joined = result.new_empty(*result.shape[:-2], rows * result_cell, columns * result_cell)
        core_y = _span(y.core_start - y.start, y.core_stop - y.start, result_cell)
        core_x = _span(x.core_start - x.start, x.core_stop - x.start, result_cell)
        kept_y, kept_x = (_span(axis.core_start, axis.core_stop, result_cell) for axis in (y, x))
        joined[..., kept_y, kept_x] = result[..., core_y, core_x]
        if on_tile is not None:
            on_tile(done, len(grid))
    return joined


def _span(start: int, stop: int, cell: int) -> slice:
    return slice(start * cell, stop * cell)

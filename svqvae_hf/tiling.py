"""Tiles of an image: the grid, and a function mapped over it or over one tile of an image that is read by windows.

Lengths are in cells, so that pixels and latents share one grid.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

Read = Callable[[slice, slice], torch.Tensor]


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
        core = map_tile(function, lambda rows, columns: source[..., rows, columns], y, x, source_cell, result_cell)
        if done == 1:
            joined = core.new_empty(*core.shape[:-2], rows * result_cell, columns * result_cell)
        kept_y, kept_x = (_span(axis.core_start, axis.core_stop, result_cell) for axis in (y, x))
        joined[..., kept_y, kept_x] = core
        if on_tile is not None:
            on_tile(done, len(grid))
    return joined


def map_tile(
    function: Callable[[torch.Tensor], torch.Tensor],
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
    result = function(read(_span(y.start, y.stop, source_cell), _span(x.start, x.stop, source_cell)))
    core_y = _span(y.core_start - y.start, y.core_stop - y.start, result_cell)
    core_x = _span(x.core_start - x.start, x.core_stop - x.start, result_cell)
    return result[..., core_y, core_x]


def read_resized(
    read: Read, source_size: Sequence[int], size: Sequence[int], rows: slice, columns: slice
) -> torch.Tensor:
    """Reads a window of an image that is made smaller by area, as `torch.nn.functional.interpolate` does it.

    Only what the window needs is read; the values are those of the whole image resized, bit by bit on the CPU.

    Args:
        read (`Callable`): Gives the source `(batch, channels, rows, columns)` at two slices, in samples.
        source_size (`tuple[int, int]`): Height and width of the source.
        size (`tuple[int, int]`): Height and width of the resized image, at most those of the source.
        rows (`slice`): Rows of the resized image.
        columns (`slice`): Columns of it.
    """
    (y, height), (x, width) = (
        _areas(span, source, target) for span, source, target in zip((rows, columns), source_size, size, strict=True)
    )
    source = read(*(slice(int(start[0]), int(start[-1] + length[-1])) for start, length in ((y, height), (x, width))))
    y, x = y - y[0], x - x[0]
    total = torch.zeros((), device=source.device)
    for i in range(int(height.max())):
        for j in range(int(width.max())):
            last_y, last_x = (side - 1 for side in source.shape[-2:])
            values = source[..., (y + i).clamp(max=last_y), :][..., (x + j).clamp(max=last_x)].float()
            total = total + values * ((i < height)[:, None] & (j < width)).to(source.device)
    return (total / height[:, None].to(source.device) / width.to(source.device)).to(source.dtype)


def _areas(span: slice, source: int, target: int) -> tuple[torch.Tensor, torch.Tensor]:
    """First sample and number of samples of the source for each resized sample in a span."""
    index = torch.arange(span.start, span.stop)
    start = index * source // target
    return start, -(-(index + 1) * source // target) - start


def _span(start: int, stop: int, cell: int) -> slice:
    return slice(start * cell, stop * cell)

"""Writes windows of TIFF images that may be larger than memory."""

from pathlib import Path
from typing import Self

import numpy as np
import tifffile

from svqvae_hf.models.tiling import divide_rounding_up

TILE_PX = 256  # side of a tile of the file
BYTES_PER_PIXEL = 3


class TiffWriter:
    """Writes windows of an uncompressed tiled BigTIFF, in any order. Every tile has a fixed position in the file.

    Args:
        path (`Path`): File to create.
        height (`int`): Height of the image in pixels.
        width (`int`): Width of the image in pixels.
    """

    def __init__(self, path: Path, height: int, width: int):
        # Without pixels, tifffile reserves room in the file for all tiles. `write` fills it.
        tifffile.imwrite(
            path,
            shape=(height, width, 3),
            dtype=np.uint8,
            bigtiff=True,
            tile=(TILE_PX, TILE_PX),
            photometric="rgb",
            metadata=None,
        )
        with tifffile.TiffFile(path) as file:
            self._offsets = file.pages[0].dataoffsets
        self._tiles_per_row = divide_rounding_up(width, TILE_PX)
        self._file = path.open("r+b")

    def write(self, top: int, left: int, pixels: np.ndarray) -> None:
        """Writes pixels `(rows, columns, 3)` in uint8 at a position.

        The file holds one tile after the other, and the pixels of a tile row by row. So the pixels of one row that lie
        in the same tile are next to each other in the file, and are written at once.
        """
        num_rows, num_columns, _ = pixels.shape
        right = left + num_columns
        first_tile_column = left // TILE_PX
        last_tile_column = (right - 1) // TILE_PX  # of the tile that holds the last column
        for row in range(num_rows):
            for tile_column in range(first_tile_column, last_tile_column + 1):
                # Columns of the image that are written to this tile
                first_column = max(left, tile_column * TILE_PX)
                end_column = min(right, (tile_column + 1) * TILE_PX)
                pixels_in_tile = pixels[row, first_column - left : end_column - left]  # (columns, 3)
                self._seek(top + row, first_column)
                self._file.write(pixels_in_tile.tobytes())

    def _seek(self, row: int, column: int) -> None:
        """Moves to the position in the file of the pixel at a row and column of the image."""
        tile_row, row_in_tile = divmod(row, TILE_PX)
        tile_column, column_in_tile = divmod(column, TILE_PX)
        tile = tile_row * self._tiles_per_row + tile_column
        pixel_in_tile = row_in_tile * TILE_PX + column_in_tile
        self._file.seek(self._offsets[tile] + pixel_in_tile * BYTES_PER_PIXEL)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

"""Writes windows of TIFF images that may be larger than memory."""

from pathlib import Path
from typing import Self

import numpy as np
import tifffile

TILE_PX = 256  # side of a tile of the file


class TiffWriter:
    """Writes windows of an uncompressed tiled BigTIFF, in any order. Every tile has a fixed position in the file.

    Args:
        path (`Path`): File to create.
        height (`int`): Height of the image in pixels.
        width (`int`): Width of the image in pixels.
    """

    def __init__(self, path: Path, height: int, width: int):
        tile = {"tile": (TILE_PX, TILE_PX), "photometric": "rgb", "metadata": None}
        tifffile.imwrite(path, shape=(height, width, 3), dtype=np.uint8, bigtiff=True, **tile)
        with tifffile.TiffFile(path) as file:
            self._offsets = file.pages[0].dataoffsets
        self._across = -(-width // TILE_PX)
        self._file = path.open("r+b")

    def write(self, top: int, left: int, pixels: np.ndarray) -> None:
        """Writes pixels `(rows, columns, 3)` in uint8 at a position."""
        bottom, right = top + pixels.shape[0], left + pixels.shape[1]
        for y in range(top, bottom):
            for tile in range(left // TILE_PX, -(-right // TILE_PX)):
                start, stop = max(left, tile * TILE_PX), min(right, (tile + 1) * TILE_PX)
                within = y % TILE_PX * TILE_PX + start % TILE_PX
                self._file.seek(self._offsets[y // TILE_PX * self._across + tile] + within * 3)
                self._file.write(pixels[y - top, start - left : stop - left].tobytes())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

"""Guards for tiles of TIFF files."""

import math
from collections.abc import Sequence

MAX_CHUNK_BYTES = 1 << 28  # 256 MiB per tile, because each is decoded as a whole


def is_chunk_too_large(shape: Sequence[int], itemsize: int) -> bool:
    """Whether a tile would decompress to more than the limit: a few bytes of TIFF can hold a tile of any size."""
    return math.prod(shape) * itemsize > MAX_CHUNK_BYTES


def check_segments(sizes: Sequence[int], number: int, file_size: int) -> None:
    """Raises if a TIFF's directory names tiles that the file does not hold.

    Args:
        sizes (`Sequence[int]`): Bytes of each tile.
        number (`int`): Number of tiles that the image needs.
        file_size (`int`): Bytes of the file.
    """
    lacks_tiles = len(sizes) < number
    has_impossible_size = not lacks_tiles and (min(sizes) < 0 or max(sizes) > file_size)
    if lacks_tiles or has_impossible_size:
        raise ValueError("its tiles are missing, or larger than the file.")

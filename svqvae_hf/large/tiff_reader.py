"""Reads windows of TIFF images that may be larger than memory."""

import errno
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from PIL import Image
from tifffile import COMPRESSION, EXTRASAMPLE, PHOTOMETRIC

from svqvae_files.errors import os_error
from svqvae_hf.models.image_files import to_rgb
from svqvae_hf.untrusted.images import MAX_CHUNK_BYTES, check_segments, is_chunk_too_large

TIFF_HEADERS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # the last two: BigTIFF
EXTRA_CHANNELS = {1: (), 3: (), 4: (EXTRASAMPLE.UNASSALPHA,)}  # by the number of channels


class LargeImage:
    """A tiled TIFF image that is read window by window.

    Args:
        path (`Path`): The file.
        page (`tifffile.TiffPage`): Its first page, open while windows are read.
    """

    def __init__(self, path: Path, page: Any):
        self.path, self.page = path, page
        _check_page(path, page)
        self.height: int = page.imagelength
        self.width: int = page.imagewidth
        self._tiles: dict[int, np.ndarray | None] = {}  # of the last window, by number

    def read(self, rows: slice, columns: slice) -> np.ndarray:
        """Returns pixels `(rows, columns, 3)` in uint8, as `load_image` does."""
        with _named_errors(self.path):
            values = self._values(rows, columns)
        if values.dtype.itemsize == 2 and values.shape[2] > 1:
            values = (values >> 8).astype(np.uint8)  # Pillow reads 16-bit colours like this
        return np.asarray(to_rgb(Image.fromarray(values[..., 0] if values.shape[2] == 1 else values)))

    def _values(self, rows: slice, columns: slice) -> np.ndarray:
        """Returns stored values. Tiles that the next window needs as well are not decoded again."""
        height, width = self.page.chunks[:2]
        across = -(-self.width // width)
        down, right = range(rows.start // height, -(-rows.stop // height)), -(-columns.stop // width)
        numbers = [y * across + x for y in down for x in range(columns.start // width, right)]
        self._tiles = {n: self._tiles[n] if n in self._tiles else self._decode(n) for n in numbers}
        shape = rows.stop - rows.start, columns.stop - columns.start, self.page.samplesperpixel
        values = np.full(shape, self.page.nodata, self.page.dtype)
        for number, tile in self._tiles.items():
            if tile is not None:
                top, left = number // across * height - rows.start, number % across * width - columns.start
                y = slice(max(0, top), min(len(values), top + len(tile)))
                x = slice(max(0, left), min(values.shape[1], left + tile.shape[1]))
                values[y, x, : tile.shape[2]] = tile[y.start - top : y.stop - top, x.start - left : x.stop - left]
        return values

    def _decode(self, number: int) -> np.ndarray | None:
        """Decodes a tile to `(height, width, channels)`; None if the file leaves it out."""
        page, offset, size = self.page, self.page.dataoffsets[number], self.page.databytecounts[number]
        if offset == 0 or size == 0:
            return None
        page.parent.filehandle.seek(offset)
        content = page.parent.filehandle.read(size)  # at once: properties of the page read tags from the file
        tables = {"jpegtables": page.jpegtables, "jpegheader": page.jpegheader}
        present = {name: table for name, table in tables.items() if table is not None}
        return page.decode(content, number, **present)[0][0]  # the only plane along the depth


@contextmanager
def open_large_image(path: Path) -> Iterator[LargeImage]:
    """Opens a TIFF image for reading by windows.

    Args:
        path (`Path`): TIFF or BigTIFF whose first page is grey, RGB or RGBA with 8 or 16 bits, in tiles.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If it is an image of another kind, broken or cut short.
    """
    with _named_errors(path):
        with path.open("rb") as header:
            if header.read(4) not in TIFF_HEADERS:
                raise ValueError("a large image must be a TIFF. Convert it, or leave out --large.")
        file = tifffile.TiffFile(path)
    with file:
        with _named_errors(path):
            image = LargeImage(path, file.pages[0])
        yield image


@contextmanager
def _named_errors(path: Path) -> Iterator[None]:
    """Puts the file's name before errors, and turns the many error types of decoders into ValueError."""
    try:
        yield
    except (MemoryError, FileNotFoundError, PermissionError):
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):  # of the disk, maybe temporary
            raise os_error(f"`{path}` cannot be read: {error.strerror}.", error) from error
        raise ValueError(f"`{path}` cannot be read as a large image: {error}") from error


def _check_page(path: Path, page: Any) -> None:
    """Raises if a page cannot be read."""
    grey, jpeg = page.photometric == PHOTOMETRIC.MINISBLACK, page.compression == COMPRESSION.JPEG
    coloured = page.photometric == PHOTOMETRIC.RGB or (page.photometric == PHOTOMETRIC.YCBCR and jpeg)
    orientation = page.tags.valueof("Orientation", 1)
    if (
        not (grey or coloured)
        or EXTRA_CHANNELS.get(page.samplesperpixel) != page.extrasamples
        or grey != (page.samplesperpixel == 1)
        or page.bitspersample not in (8, 16)
        or page.dtype not in (np.uint8, np.uint16)
        or page.axes not in ("YX", "YXS")
        or orientation != 1
        or not page.is_tiled
    ):
        kind = getattr(page.photometric, "name", page.photometric)
        raise ValueError(
            f"a TIFF must be grey, RGB or RGBA with 8 or 16 bits, upright and in tiles, got {kind} with "
            f"{page.samplesperpixel} channels, {page.bitspersample} bits, orientation {orientation} and "
            f"{'' if page.is_tiled else 'no '}tiles. Convert it: vips autorot INPUT OUTPUT.tif[tile,bigtiff]."
        )
    if is_chunk_too_large(page.chunks, page.dtype.itemsize):
        raise ValueError(f"tiles must have at most {MAX_CHUNK_BYTES >> 20} MiB, got {page.chunks}. Use smaller ones.")
    if not all(isinstance(side, int) and side > 0 for side in page.shape):
        raise ValueError("its sides must be whole numbers of at least 1.")
    check_segments(page.databytecounts, math.prod(page.chunked), path.stat().st_size)

"""Reads windows of TIFF images that may be larger than memory."""

import errno
import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from PIL import Image
from tifffile import COMPRESSION, PHOTOMETRIC

from svqvae_hf.files.outputs import os_error
from svqvae_hf.models.image_processing_svqvae import to_rgb
from svqvae_hf.untrusted.images import MAX_CHUNK_BYTES, check_segments, is_chunk_too_large

TIFF_SUFFIXES = (".tif", ".tiff")
TIFF_HEADERS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # the last two: BigTIFF
MAX_BAND_PIXELS = 1 << 27  # maximum size of the band of strips or tiles kept between neighbouring windows
LAYOUTS = {  # number of channels, and TIFF's codes for the extra ones -> Pillow's name
    (1,): "L",
    (3,): "RGB",
    (4,): "RGBA",
    (4, 0): "RGBX",
    (4, 1): "RGBa",
    (4, 2): "RGBA",
}


class ImageError(ValueError):
    """An image that cannot be read."""


class UnsupportedError(ImageError):
    """An image file of a kind that is not supported, although it may be intact."""


@dataclass
class LargeImage:
    """A TIFF image that is read window by window.

    Args:
        path (`Path`): The file.
        height (`int`): Height in pixels.
        width (`int`): Width in pixels.
        segment_width (`int`): Pixels along a row that are decoded together: the width of a strip or tile.
        layout (`str`): Pillow's name for the layout of a pixel, one of `LAYOUTS`.
        stored_values (`Callable`): Returns the stored values `(rows, columns, channels)` at two slices.
    """

    path: Path
    height: int
    width: int
    segment_width: int
    layout: str
    stored_values: Callable[[slice, slice], np.ndarray]

    def __post_init__(self) -> None:
        self._band: tuple[slice, slice, np.ndarray] | None = None  # rows, columns and values read last

    def read(self, rows: slice, columns: slice) -> np.ndarray:
        """Returns pixels `(rows, columns, 3)` in uint8, as `load_image` does."""
        values = self._values(rows, columns)
        if self.layout == "L":
            grey = values[..., 0]
            image = Image.fromarray(np.ascontiguousarray(grey, grey.dtype.newbyteorder("=")))
        else:
            if values.dtype.itemsize == 2:
                values = values >> 8  # Pillow reads 16-bit colours like this
            mode = "RGBA" if self.layout in ("RGBA", "RGBa") else "RGB"
            size = values.shape[1], values.shape[0]
            image = Image.frombytes(mode, size, values.astype(np.uint8).tobytes(), "raw", self.layout)
        return np.asarray(to_rgb(image))

    def _values(self, rows: slice, columns: slice) -> np.ndarray:
        """Returns stored values of a window, from the band kept in memory if it contains the window."""
        if self._band is None or not _contains(self._band, rows, columns):
            self._band = None  # frees its memory before the next band is read
            with _named_errors(self.path):
                whole_segments = self._whole_segments(rows, columns)
                self._band = rows, whole_segments, self.stored_values(rows, whole_segments)
        _, kept, values = self._band
        return values[:, columns.start - kept.start : columns.stop - kept.start]

    def _whole_segments(self, rows: slice, columns: slice) -> slice:
        """Extends columns to whole strips or tiles, which the next window to the right needs as well."""
        width = self.segment_width
        whole = slice(columns.start // width * width, min(-(-columns.stop // width) * width, self.width))
        height = rows.stop - rows.start
        limit = columns.stop - columns.start + MAX_BAND_PIXELS // height
        if whole.stop - whole.start > limit:
            raise UnsupportedError(
                f"strips and tiles must have at most {limit} pixels per row, because {height} rows are kept in "
                f"memory, got {width}. Store the image in tiles."
            )
        return whole


def _contains(band: tuple[slice, slice, np.ndarray], rows: slice, columns: slice) -> bool:
    kept_rows, kept, _ = band
    return kept_rows == rows and kept.start <= columns.start and columns.stop <= kept.stop


@contextmanager
def open_large_image(path: Path) -> Iterator[LargeImage]:
    """Opens a TIFF image for reading by windows.

    Args:
        path (`Path`): TIFF or BigTIFF whose first page is grey, RGB or RGBA with 8 or 16 bits.

    Raises:
        FileNotFoundError: If the file does not exist.
        UnsupportedError: If it is an image of another kind.
        ImageError: If it is broken or cut short.
    """
    with _named_errors(path):
        with path.open("rb") as header:
            if header.read(4) not in TIFF_HEADERS:
                raise UnsupportedError("a large image must be a TIFF. Convert it, or leave out --large.")
        file = tifffile.TiffFile(path)
    with file:
        with _named_errors(path):
            image = _open_page(path, file.pages[0])
        yield image


@contextmanager
def _named_errors(path: Path) -> Iterator[None]:
    """Puts the file's name before errors, and turns the many error types of decoders into ImageError."""
    try:
        yield
    except (MemoryError, FileNotFoundError, PermissionError):
        raise
    except UnsupportedError as error:
        raise UnsupportedError(f"`{path}`: {error}") from error
    except Exception as error:
        if isinstance(error, OSError) and error.errno not in (
            None,
            errno.EINVAL,
        ):  # a disk error, maybe temporary
            raise os_error(f"`{path}` cannot be read: {error.strerror}.", error) from error
        raise ImageError(f"`{path}` cannot be read as TIFF, it may be broken or cut short: {error}") from error


def _open_page(path: Path, page: Any) -> LargeImage:
    layout = _check_page(path, page)
    if page.is_memmappable:
        return LargeImage(path, page.imagelength, page.imagewidth, 1, layout, _Uncompressed(path, page).read)
    if is_chunk_too_large(page.chunks, page.dtype.itemsize):
        raise UnsupportedError(
            f"strips and tiles must have at most {MAX_CHUNK_BYTES >> 20} MiB, because each is decoded as a whole, got "
            f"{page.chunks} of {page.dtype}. Store the image in tiles."
        )
    return LargeImage(path, page.imagelength, page.imagewidth, page.chunks[1], layout, _Segments(page).read)


def _check_page(path: Path, page: Any) -> str:
    """Returns the layout of a page, or raises if it cannot be read."""
    grey, jpeg = page.photometric == PHOTOMETRIC.MINISBLACK, page.compression == COMPRESSION.JPEG
    coloured = page.photometric == PHOTOMETRIC.RGB or (page.photometric == PHOTOMETRIC.YCBCR and jpeg)
    layout = LAYOUTS.get((page.samplesperpixel, *page.extrasamples))
    orientation = page.tags.valueof("Orientation", 1)
    if (
        not (grey or coloured)
        or layout is None
        or grey != (layout == "L")
        or page.bitspersample not in (8, 16)
        or page.dtype not in (np.uint8, np.uint16)
        or page.axes not in ("YX", "YXS", "SYX")
        or orientation != 1
    ):
        kind = getattr(page.photometric, "name", page.photometric)
        raise UnsupportedError(
            f"a TIFF must be grey, RGB or RGBA with 8 or 16 bits, and stored upright, got {kind} with "
            f"{page.samplesperpixel} channels, {page.bitspersample} bits and orientation {orientation}. Convert it."
        )
    if not all(isinstance(side, int) and side > 0 for side in page.shape):
        raise ValueError("its sides must be whole numbers of at least 1.")
    check_segments(page.databytecounts, math.prod(page.chunked), path.stat().st_size)
    return layout


class _Uncompressed:
    """Uncompressed values of a page, stored in one piece. Each read maps the file anew, so nothing stays mapped."""

    def __init__(self, path: Path, page: Any):
        self.path = path
        self.dtype = page.dtype.newbyteorder(page.parent.byteorder)
        self.offset = page.dataoffsets[0]
        self.shape = page.shaped  # (planes, 1, height, width, channels per plane)

    def read(self, rows: slice, columns: slice) -> np.ndarray:
        planes = np.memmap(self.path, self.dtype, "r", self.offset, self.shape)[:, 0, rows, columns]
        channels_last = np.moveaxis(planes, 0, 2)  # (rows, columns, planes, channels per plane)
        return channels_last.reshape(*channels_last.shape[:2], -1).copy()


class _Segments:
    """Values of a page in strips or tiles. A window decodes only the segments that it touches."""

    def __init__(self, page: Any):
        self.page = page
        self.height, self.width = page.chunks[:2]
        self.down, self.across = page.chunked[page.axes.index("Y") :][:2]  # segments per plane
        self.planes = page.shaped[0]

    def read(self, rows: slice, columns: slice) -> np.ndarray:
        shape = rows.stop - rows.start, columns.stop - columns.start, self.page.samplesperpixel
        values = np.full(shape, self.page.nodata, self.page.dtype)
        down = range(rows.start // self.height, -(-rows.stop // self.height))
        across = range(columns.start // self.width, -(-columns.stop // self.width))
        for plane, y, x in itertools.product(range(self.planes), down, across):
            segment = self._decode((plane * self.down + y) * self.across + x)
            if segment is not None:
                top, left = y * self.height - rows.start, x * self.width - columns.start
                _paste(values[..., plane:], segment, top, left)
        return values

    def _decode(self, index: int) -> np.ndarray | None:
        """Decodes a segment to `(height, width, channels)`; None if the file leaves it out."""
        page, offset, size = self.page, self.page.dataoffsets[index], self.page.databytecounts[index]
        if offset == 0 or size == 0:
            return None
        page.parent.filehandle.seek(offset)
        content = page.parent.filehandle.read(size)  # at once: properties of the page read tags from the file
        tables = {"jpegtables": page.jpegtables, "jpegheader": page.jpegheader}
        present = {name: table for name, table in tables.items() if table is not None}
        return page.decode(content, index, **present)[0][0]  # the only plane along the depth


def _paste(values: np.ndarray, segment: np.ndarray, top: int, left: int) -> None:
    """Copies into the values of a window the part of a segment that overlaps it."""
    rows = slice(max(0, top), min(len(values), top + len(segment)))
    columns = slice(max(0, left), min(values.shape[1], left + segment.shape[1]))
    window = segment[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]
    values[rows, columns, : segment.shape[2]] = window

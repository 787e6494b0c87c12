"""Reads windows of TIFF images that may be larger than memory."""

import errno
import math
import os
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
from svqvae_hf.models.tiling import divide_rounding_up
from svqvae_hf.untrusted.images import MAX_CHUNK_BYTES, check_segments, is_chunk_too_large

TIFF_HEADERS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # the last two are of BigTIFF
HEADER_BYTES = 4
UPRIGHT = 1  # value of the tag of the orientation
# What the channels beyond grey or RGB hold, by the number of channels: nothing, or alpha in the fourth channel
EXTRA_CHANNELS = {1: (), 3: (), 4: (EXTRASAMPLE.UNASSALPHA,)}
DECODER_ERRNOS = (None, errno.EINVAL)  # error numbers of an OSError that a decoder raises for a damaged file


class LargeImage:
    """A tiled TIFF image that is read window by window.

    Args:
        path (`Path`): The file.
        page (`tifffile.TiffPage`): Its first page, open while windows are read.
    """

    def __init__(self, path: Path, page: Any):
        _check_page(path, page)
        self.path = path
        self.page = page
        self.height: int = page.imagelength
        self.width: int = page.imagewidth
        self._tiles_of_last_window: dict[int, np.ndarray | None] = {}  # by number

    def read(self, rows: slice, columns: slice) -> np.ndarray:
        """Returns pixels `(rows, columns, 3)` in uint8, as `load_image` does."""
        with _named_errors(self.path):
            values = self._values(rows, columns)  # (rows, columns, channels)
        is_grey = values.shape[2] == 1
        has_16_bits = values.dtype == np.uint16
        if is_grey:
            values = values[..., 0]  # (rows, columns)
        # Pillow has images of 16-bit grey, which `to_rgb` converts, but no images of 16-bit colours. From a file it
        # reads the higher 8 bits of such colours.
        if has_16_bits and not is_grey:
            values = (values >> 8).astype(np.uint8)
        image = to_rgb(Image.fromarray(values))
        return np.asarray(image)

    def _values(self, rows: slice, columns: slice) -> np.ndarray:
        """Returns the stored values of a window, `(rows, columns, channels)`."""
        shape = (rows.stop - rows.start, columns.stop - columns.start, self.page.samplesperpixel)
        values = np.full(shape, self.page.nodata, self.page.dtype)  # also of tiles that the file leaves out
        tile_height, tile_width = self.page.chunks[:2]
        tiles_per_row = divide_rounding_up(self.width, tile_width)
        tiles_of_window = {}
        for tile_row in _tiles_under(rows, tile_height):
            for tile_column in _tiles_under(columns, tile_width):
                number = tile_row * tiles_per_row + tile_column
                tile = self._tile(number)
                tiles_of_window[number] = tile
                if tile is not None:
                    top = tile_row * tile_height - rows.start
                    left = tile_column * tile_width - columns.start
                    _paste(tile, values, top, left)
        # Kept for `_tile`, because the next window often needs some of the same tiles.
        self._tiles_of_last_window = tiles_of_window
        return values

    def _tile(self, number: int) -> np.ndarray | None:
        """Tile `(height, width, channels)`, from the last window or decoded; None if the file leaves it out."""
        if number in self._tiles_of_last_window:
            return self._tiles_of_last_window[number]
        return self._decode(number)

    def _decode(self, number: int) -> np.ndarray | None:
        """Decodes a tile to `(height, width, channels)`; None if the file leaves it out."""
        page = self.page
        offset = page.dataoffsets[number]
        size = page.databytecounts[number]
        if offset == 0 or size == 0:
            return None
        # Nothing may come between the two calls: properties of the page, such as `jpegtables`, read tags from the same
        # file, and so move its position.
        page.parent.filehandle.seek(offset)
        content = page.parent.filehandle.read(size)
        tables = {}
        if page.jpegtables is not None:
            tables["jpegtables"] = page.jpegtables
        if page.jpegheader is not None:
            tables["jpegheader"] = page.jpegheader
        decoded = page.decode(content, number, **tables)  # values, position and shape of the tile
        values = decoded[0]  # (depth, height, width, channels)
        return values[0]


def _tiles_under(window: slice, tile_side: int) -> range:
    """Rows or columns of tiles that hold the rows or columns of pixels of a window."""
    first_tile = window.start // tile_side
    end_tile = divide_rounding_up(window.stop, tile_side)
    return range(first_tile, end_tile)


def _paste(tile: np.ndarray, values: np.ndarray, top: int, left: int) -> None:
    """Copies the part of a tile that lies in a window to the values of the window.

    The tile begins at row `top` and column `left` of the window. They are negative if it begins outside.
    """
    height, width, _ = values.shape
    tile_height, tile_width, num_channels = tile.shape
    # Rows and columns of the window that the tile covers
    first_row = max(0, top)
    end_row = min(height, top + tile_height)
    first_column = max(0, left)
    end_column = min(width, left + tile_width)
    # The same rows and columns, counted from the first of the tile
    part_of_tile = tile[first_row - top : end_row - top, first_column - left : end_column - left]
    values[first_row:end_row, first_column:end_column, :num_channels] = part_of_tile


@contextmanager
def open_large_image(path: str | os.PathLike) -> Iterator[LargeImage]:
    """Opens a TIFF image for reading by windows.

    Args:
        path (`str` or `os.PathLike`): TIFF or BigTIFF whose first page is grey, RGB or RGBA with 8 or 16 bits, in
            tiles.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If it is an image of another kind, broken or cut short.
    """
    path = Path(path)
    # `_named_errors` says that the file cannot be read. It does not surround the `yield`, because errors of the caller
    # may be about something else.
    with _named_errors(path):
        _check_header(path)
        file = tifffile.TiffFile(path)
    with file:  # closes it at the end
        with _named_errors(path):
            image = LargeImage(path, file.pages[0])
        yield image


def _check_header(path: Path) -> None:
    """Raises ValueError if the first bytes of a file are not a header of TIFF."""
    with path.open("rb") as file:
        header = file.read(HEADER_BYTES)
    if header not in TIFF_HEADERS:
        raise ValueError("a large image must be a TIFF. Convert it, or leave out --large.")


@contextmanager
def _named_errors(path: Path) -> Iterator[None]:
    """Puts the file's name before errors, and turns the many error types of decoders into ValueError."""
    try:
        yield
    except (MemoryError, FileNotFoundError, PermissionError):
        raise
    except OSError as error:
        if error.errno in DECODER_ERRNOS:
            raise _damaged(path, error) from error
        # An error of the disk, which may be temporary, so the file is not called damaged.
        raise os_error(f"`{path}` cannot be read: {error.strerror}.", error) from error
    except Exception as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> ValueError:
    """Error about a file that is damaged or of another kind, with the reason."""
    return ValueError(f"`{path}` cannot be read as a large image: {error}")


def _check_page(path: Path, page: Any) -> None:
    """Raises if a page cannot be read."""
    if not _is_supported(page):
        raise ValueError(
            "a TIFF must be grey, RGB or RGBA with 8 or 16 bits, upright and in tiles, got "
            f"{_describe_page(page)}. Convert it: vips autorot INPUT OUTPUT.tif[tile,bigtiff]."
        )
    tile_shape = page.chunks  # of one tile in pixels, such as (256, 256) for grey or (256, 256, 3) for RGB
    if is_chunk_too_large(tile_shape, page.dtype.itemsize):
        raise ValueError(f"tiles must have at most {MAX_CHUNK_BYTES >> 20} MiB, got {tile_shape}. Use smaller ones.")
    has_valid_sides = all(isinstance(side, int) and side > 0 for side in page.shape)
    if not has_valid_sides:
        raise ValueError("its sides must be whole numbers of at least 1.")
    # Number of tiles along each axis. For 4 rows and 5 columns of tiles, this is (4, 5) for grey, and (4, 5, 1) for
    # RGB, because a tile holds all channels.
    tiles_per_axis = page.chunked
    check_segments(page.databytecounts, math.prod(tiles_per_axis), path.stat().st_size)


def _describe_page(page: Any) -> str:
    """Words for the layout of a page."""
    kind = getattr(page.photometric, "name", page.photometric)  # such as "RGB", or a number that has no name
    tiles = "tiles" if page.is_tiled else "no tiles"
    return (
        f"{kind} with {page.samplesperpixel} channels, {page.bitspersample} bits, orientation {_orientation(page)} "
        f"and {tiles}"
    )


def _is_supported(page: Any) -> bool:
    """Whether a page is grey, RGB or RGBA with 8 or 16 bits, upright and in tiles."""
    num_channels = page.samplesperpixel
    is_grey = page.photometric == PHOTOMETRIC.MINISBLACK and num_channels == 1
    is_jpeg = page.compression == COMPRESSION.JPEG and page.photometric == PHOTOMETRIC.YCBCR
    is_coloured = (page.photometric == PHOTOMETRIC.RGB or is_jpeg) and num_channels > 1
    supported_extra_channels = EXTRA_CHANNELS.get(num_channels)  # `None` for an unsupported number of channels
    has_supported_channels = page.extrasamples == supported_extra_channels
    has_supported_bits = page.bitspersample in (8, 16) and page.dtype in (np.uint8, np.uint16)
    is_plane = page.axes in ("YX", "YXS")  # rows and columns, with or without channels
    is_upright = _orientation(page) == UPRIGHT
    return (
        (is_grey or is_coloured)
        and has_supported_channels
        and has_supported_bits
        and is_plane
        and is_upright
        and page.is_tiled
    )


def _orientation(page: Any) -> Any:
    """Orientation of a page as its tag says it. A page without the tag is upright."""
    return page.tags.valueof("Orientation", UPRIGHT)

"""Images in files that are read and written by windows: TIFF and Zarr."""

import errno
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np
import tifffile
import zarr
from PIL import Image
from tifffile import COMPRESSION, PHOTOMETRIC

from svqvae_hf.atomic_io import os_error
from svqvae_hf.models.image_processing_svqvae import to_rgb
from svqvae_hf.paths import distinct_files, find_files
from svqvae_hf.untrusted.bounded_zarr import bound
from svqvae_hf.untrusted.images import MAX_CHUNK_BYTES, check_segments, is_chunk_too_large

TIFF_SUFFIXES = (".tif", ".tiff")
ZARR_METADATA = ("zarr.json", ".zarray")
OUTPUT_TILE = 256  # side of the tiles or chunks that are written, in pixels
BLOCK_LIMIT = 1 << 27  # pixels of a row of chunks that are kept beside a window
LAYOUTS = {  # channels and what those beyond the colours are, in TIFF's numbers, to Pillow's names
    (1,): "L",
    (3,): "RGB",
    (4,): "RGBA",
    (4, 0): "RGBX",
    (4, 1): "RGBa",
    (4, 2): "RGBA",
}


class UnsupportedError(ValueError):
    """An image file of a kind that is not supported, although it may be intact."""


def find_large_images(patterns: Sequence[str]) -> list[Path]:
    """TIFF files and Zarr arrays that the arguments name, each once: files, arrays, folders of files, and globs."""
    found = []
    for pattern in patterns:
        path = Path(pattern)
        found += [path] if _is_zarr(path) else find_files([pattern], TIFF_SUFFIXES)
    return distinct_files(found)


@dataclass
class LargeImage:
    """An image in a file, read by windows.

    Args:
        path (`Path`): The file, or the folder of a Zarr array.
        height (`int`): Height in pixels.
        width (`int`): Width in pixels.
        chunk_width (`int`): Pixels along a row that are decoded together.
        layout (`str`): Pillow's name of the layout of a pixel, one of `LAYOUTS`.
        values (`Callable`): Gives the stored values `(rows, columns)` or `(rows, columns, channels)` at two slices.
    """

    path: Path
    height: int
    width: int
    chunk_width: int
    layout: str
    values: Callable[[slice, slice], np.ndarray]

    def __post_init__(self) -> None:
        self._block: tuple[slice, slice, np.ndarray] | None = None

    def read(self, rows: slice, columns: slice) -> np.ndarray:
        """Pixels `(rows, columns, 3)` in uint8, as `load_image` returns them."""
        values = self._read_block(rows, columns)
        if self.layout == "L":
            image = Image.fromarray(np.ascontiguousarray(values, values.dtype.newbyteorder("=")))
        else:
            if values.dtype.itemsize == 2:
                values = values >> 8  # as Pillow reads colours of 16 bits
            mode, size = "RGBA" if self.layout in ("RGBA", "RGBa") else "RGB", (values.shape[1], values.shape[0])
            image = Image.frombytes(mode, size, values.astype(np.uint8).tobytes(), "raw", self.layout)
        return np.asarray(to_rgb(image))

    def _read_block(self, rows: slice, columns: slice) -> np.ndarray:
        """The stored values, of whole chunks along the rows, kept for the next window to the right."""
        if self._block is not None:
            held_rows, held, values = self._block
            if held_rows == rows and held.start <= columns.start and columns.stop <= held.stop:
                return values[:, columns.start - held.start : columns.stop - held.start]
        chunk = self.chunk_width
        held = slice(columns.start // chunk * chunk, min(-(-columns.stop // chunk) * chunk, self.width))
        self._block = None  # before the next one is read
        with _reading(self.path):
            height, width = rows.stop - rows.start, columns.stop - columns.start
            limit = width + BLOCK_LIMIT // height
            if held.stop - held.start > limit:
                raise UnsupportedError(
                    f"an image must be stored in strips, tiles or chunks of at most {limit} pixels a row, since "
                    f"{height} rows of them are kept, but has {chunk}. Store it in tiles."
                )
            self._block = rows, held, self.values(rows, held)
        return self._read_block(rows, columns)


@contextmanager
def open_large_image(path: Path) -> Iterator[LargeImage]:
    """Opens an image for reading by windows.

    Args:
        path (`Path`): TIFF or BigTIFF, its first page grey, RGB or RGBA of 8 or 16 bits; or the folder of a Zarr array
            `(height, width, 3)` of uint8.

    Raises:
        FileNotFoundError: If it is not there.
        UnsupportedError: If it is of another kind.
        ValueError: If it is broken or cut short.
    """
    if path.is_dir():
        with _reading(path):
            image = _zarr_image(path)
        yield image
        return
    with _reading(path):
        file = tifffile.TiffFile(path)
    with file:
        with _reading(path):
            image = _tiff_image(path, file.pages[0])
        yield image


def file_identity(path: Path) -> list[Any]:
    """What tells an input from another: name, size and time of change, of a Zarr array those of its metadata."""
    file = next(path / name for name in ZARR_METADATA if (path / name).is_file()) if path.is_dir() else path
    status = file.stat()
    return [path.name, status.st_size, status.st_mtime_ns]


class TiffOutput:
    """An uncompressed tiled BigTIFF, whose tiles have their place in the file before they are written."""

    @staticmethod
    def create(path: Path, height: int, width: int) -> None:
        """Makes the file, of zeros."""
        tile = (OUTPUT_TILE, OUTPUT_TILE)
        with tifffile.TiffWriter(path, bigtiff=True) as file:
            file.write(shape=(height, width, 3), dtype=np.uint8, tile=tile, photometric="rgb", metadata=None)

    def __init__(self, path: Path):
        with tifffile.TiffFile(path) as file:
            self._offsets = file.pages[0].dataoffsets
            self._across = -(-file.pages[0].imagewidth // OUTPUT_TILE)
        self._file = path.open("r+b")
        self.flush = self._file.flush

    def write(self, top: int, left: int, pixels: np.ndarray) -> None:
        """Puts `(rows, columns, 3)` in uint8 to its place."""
        bottom, right = top + pixels.shape[0], left + pixels.shape[1]
        for y in range(top, bottom):
            for tile in range(left // OUTPUT_TILE, -(-right // OUTPUT_TILE)):
                start, stop = max(left, tile * OUTPUT_TILE), min(right, (tile + 1) * OUTPUT_TILE)
                within = y % OUTPUT_TILE * OUTPUT_TILE + start % OUTPUT_TILE
                self._file.seek(self._offsets[y // OUTPUT_TILE * self._across + tile] + within * 3)
                self._file.write(pixels[y - top, start - left : stop - left].tobytes())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


class ZarrOutput:
    """A Zarr array `(height, width, 3)` of uint8, whose chunks are written at once."""

    @staticmethod
    def create(path: Path, height: int, width: int) -> None:
        """Makes the file, of zeros."""
        shape, chunks = (height, width, 3), (OUTPUT_TILE, OUTPUT_TILE, 3)
        zarr.create_array(path, shape=shape, chunks=chunks, dtype="uint8", overwrite=True)

    def __init__(self, path: Path):
        self._array = zarr.open_array(path, mode="r+")

    def write(self, top: int, left: int, pixels: np.ndarray) -> None:
        """Puts `(rows, columns, 3)` in uint8 to its place."""
        self._array[top : top + pixels.shape[0], left : left + pixels.shape[1]] = pixels

    def flush(self) -> None:
        """Nothing is held back."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (MemoryError, FileNotFoundError, PermissionError):
        raise
    except UnsupportedError as error:
        raise UnsupportedError(f"`{path}`: {error}") from error
    except Exception as error:  # decoders raise errors of many kinds
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):  # of the disk, which may pass
            raise os_error(f"`{path}` cannot be read: {error.strerror}.", error) from error
        raise ValueError(f"`{path}` cannot be read as TIFF or Zarr, it may be broken or cut short: {error}") from error


def _is_zarr(path: Path) -> bool:
    return any((path / name).is_file() for name in ZARR_METADATA)


def _zarr_image(path: Path) -> LargeImage:
    array = zarr.open_array(path, mode="r")
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or 0 in array.shape:
        raise UnsupportedError(
            f"an array must be (height, width, 3) of uint8, but is {array.shape} of {array.dtype}. Convert it."
        )
    _check_chunk(array)
    try:
        array = bound(array)
    except ValueError as error:  # of its encoding: the content is not read yet
        raise UnsupportedError(str(error)) from error
    height, width, _ = array.shape
    return LargeImage(path, height, width, array.chunks[1], "RGB", lambda rows, columns: array[rows, columns])


def _tiff_image(path: Path, page: Any) -> LargeImage:
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
            f"a TIFF must be grey, RGB or RGBA of 8 or 16 bits and stored upright, but is {kind} of "
            f"{page.samplesperpixel} channels and {page.bitspersample} bits, orientation {orientation}. Convert it."
        )
    if not all(isinstance(side, int) and side > 0 for side in page.shape):
        raise ValueError("its sides must be whole numbers of at least 1.")
    check_segments(page.databytecounts, math.prod(page.chunked), path.stat().st_size)
    if page.is_memmappable:
        array, chunk_width = _Uncompressed(path, page), 1
    else:
        array = zarr.open_array(page.aszarr(), mode="r")
        _check_chunk(array)
        chunk_width = array.chunks[page.axes.index("X")]

    def values(rows: slice, columns: slice) -> np.ndarray:
        return np.moveaxis(array[:, rows, columns], 0, -1) if page.axes == "SYX" else array[rows, columns]

    return LargeImage(path, page.imagelength, page.imagewidth, chunk_width, layout, values)


def _check_chunk(array: Any) -> None:
    if is_chunk_too_large(array.chunks, array.dtype.itemsize):
        raise UnsupportedError(
            f"strips, tiles and chunks must have at most {MAX_CHUNK_BYTES >> 20} MiB each, because each is decoded "
            f"as a whole, got {array.chunks} of {array.dtype}. Store the image in tiles."
        )


class _Uncompressed:
    """The values of a TIFF that are stored in one piece. Each window maps the file anew, so that none stays mapped."""

    def __init__(self, path: Path, page: Any):
        dtype = page.dtype.newbyteorder(page.parent.byteorder)
        self._map = partial(np.memmap, path, dtype, "r", page.dataoffsets[0], page.shape)

    def __getitem__(self, window: tuple[slice, ...]) -> np.ndarray:
        return np.array(self._map()[window])

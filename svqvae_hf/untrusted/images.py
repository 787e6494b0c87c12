"""Guards for image files."""

import math
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import BinaryIO

from PIL import Image, UnidentifiedImageError

MAX_CHUNK_BYTES = 1 << 28  # 256 MiB per tile, because each is decoded as a whole


@contextmanager
def opened_image(file: BinaryIO, name: str, formats: tuple[str, ...]) -> Iterator[Image.Image]:
    """Opens an image file to decode it. Raises one kind of error, because decoders raise almost any kind.

    Args:
        file (binary file object): Open file.
        name (`str`): Name of the file for errors.
        formats (`tuple[str, ...]`): Pillow's names of the formats that may be read. For some others, such as EPS,
            Pillow would start another program.

    Yields:
        `PIL.Image.Image`: The image, not decoded yet.

    Raises:
        ValueError: The file is of another format, broken, or a decompression bomb: it has over twice
            `PIL.Image.MAX_IMAGE_PIXELS`, is a BMP with run lengths, which have no size limit, or exhausts the memory.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # raised at half the limit
            with Image.open(file, formats=formats) as image:
                if any(tile.codec_name == "bmp_rle" for tile in image.tile):
                    raise UnidentifiedImageError
                yield image
    except Image.DecompressionBombError as error:
        raise ValueError(
            f"{name} must keep to Pillow's limit against decompression bombs: {error} Make it smaller. In "
            "Python you can raise `PIL.Image.MAX_IMAGE_PIXELS` if you trust it."
        ) from error
    except UnidentifiedImageError as error:
        size = file.seek(0, os.SEEK_END)
        raise ValueError(
            f"{name} ({size} bytes) is not a readable image. It must be intact, in one of the formats "
            f"{', '.join(formats)} (BMP without run-length encoding)."
        ) from error
    except MemoryError as error:
        raise ValueError(f"{name} takes more memory than there is to decode. Make it smaller.") from error
    except Exception as error:
        reason = str(error) or type(error).__name__
        raise ValueError(f"{name} is not a readable image: {reason}") from error


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
    if len(sizes) < number or not 0 <= min(sizes) <= max(sizes) <= file_size:
        raise ValueError("its tiles are missing, or larger than the file.")

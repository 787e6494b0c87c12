"""Guards for image files."""

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import BinaryIO

from PIL import Image, UnidentifiedImageError

PREFIX_BYTES = 16  # by which Pillow tells formats apart
MAX_CHUNK_BYTES = 1 << 28  # 256 MiB per strip, tile or chunk, because each is decoded as a whole


def open_image(file: BinaryIO, formats: tuple[str, ...]) -> Image.Image:
    """Opens an image file. Stops run-length encoded BMPs, which have no size limit, and all formats but those allowed.

    For some formats, such as EPS, Pillow would start another program.

    Args:
        file (binary file object): Open file.
        formats (`tuple[str, ...]`): Pillow's names of the formats that may be read.

    Returns:
        `PIL.Image.Image`: The image, not decoded yet.
    """
    image = Image.open(file, formats=formats)
    if any(tile.codec_name == "bmp_rle" for tile in image.tile):  # decoded in Python, beyond the image's size
        raise UnidentifiedImageError
    return image


def unidentified_reason(file: BinaryIO, formats: tuple[str, ...]) -> str | None:
    """Explains why [`open_image`] identified no image in a file.

    Args:
        file (binary file object): Open file.
        formats (`tuple[str, ...]`): Pillow's names of the formats that may be read.

    Returns:
        `str`, *optional*: Format that the file starts like, and Pillow's error; `None` if it starts like no format.
    """
    for name in formats:
        factory, accept = Image.OPEN[name]
        try:
            file.seek(0)
            if accept is not None and accept(file.read(PREFIX_BYTES)):
                file.seek(0)
                factory(file, "")
        except Exception as error:  # Pillow's readers raise almost anything for broken files
            return f"It is a {name} file that is broken or of an unsupported kind: {error}."
    return None


@contextmanager
def limited_pixels(name: str) -> Iterator[None]:
    """Stops decompression bombs: small files of more pixels than Pillow allows, twice `PIL.Image.MAX_IMAGE_PIXELS`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # raised at half the limit
        try:
            yield
        except Image.DecompressionBombError as error:
            raise ValueError(
                f"{name} must keep to Pillow's limit against decompression bombs: {error} Make it smaller or, if you "
                "trust it, raise `PIL.Image.MAX_IMAGE_PIXELS`."
            ) from error


def is_chunk_too_large(shape: Sequence[int], itemsize: int) -> bool:
    """Whether a chunk would decompress to more than the limit: a few bytes of TIFF can hold a strip of any size."""
    return math.prod(shape) * itemsize > MAX_CHUNK_BYTES


def check_segments(sizes: Sequence[int], number: int, file_size: int) -> None:
    """Raises if a TIFF's directory names strips or tiles that the file does not hold.

    Args:
        sizes (`Sequence[int]`): Bytes of each strip or tile.
        number (`int`): Number of strips or tiles that the image needs.
        file_size (`int`): Bytes of the file.
    """
    if len(sizes) < number or not 0 <= min(sizes) <= max(sizes) <= file_size:
        raise ValueError("its strips or tiles are missing, or larger than the file.")

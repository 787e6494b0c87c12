"""Reads image files as 8-bit RGB. A hostile file is an error: Pillow reads only listed formats, within its limits."""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

# Supported formats by Pillow's names, with their file suffixes. JPEG includes MPO.
IMAGE_FORMATS = {
    "BMP": (".bmp",),
    "GIF": (".gif",),
    "JPEG": (".jpg", ".jpeg"),
    "PNG": (".png",),
    "PPM": (".ppm", ".pgm", ".pnm"),
    "TIFF": (".tif", ".tiff"),
    "WEBP": (".webp",),
    "AVIF": (".avif",),
}
IMAGE_SUFFIXES = tuple(suffix for suffixes in IMAGE_FORMATS.values() for suffix in suffixes)


def load_image(file: str | os.PathLike | BinaryIO) -> Image.Image:
    """Reads an image file as 8-bit RGB. A file with several frames or pages yields the first.

    Args:
        file (`str`, `os.PathLike` or binary file object): Path or open file (`io.BytesIO(encoded)` for bytes in
            memory) in one of `IMAGE_FORMATS`. The content decides, not the name. Pillow's other formats raise an
            error, because some of them start another program. So do run-length encoded BMPs, because a few bytes can
            decode to any size.

    Returns:
        `PIL.Image.Image`: The image, converted by [`to_rgb`].

    Raises:
        OSError: If the file cannot be opened.
        ValueError: If it is not an image, is broken or truncated, has values outside the range of its mode, or has
            more pixels than Pillow allows: twice `PIL.Image.MAX_IMAGE_PIXELS`, by default 179 million.
    """
    if isinstance(file, str | os.PathLike):
        if "://" in os.fspath(file):
            raise ValueError(f"`{file}` must be a local file, because URLs are not read. Download it first.")
        with open(file, "rb") as opened:
            return _decode(opened, f"`{os.fspath(file)}`")
    return _decode(file, "the image")


def _decode(file: BinaryIO, name: str) -> Image.Image:
    with opened_image(file, name, tuple(IMAGE_FORMATS)) as image:
        _check_values(image)
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        return _convert(image)


def to_rgb(image: Image.Image) -> Image.Image:
    """Converts any Pillow image to 8-bit RGB, upright and with transparent parts on white.

    Args:
        image (`PIL.Image.Image`): Image of any mode. Its EXIF orientation is applied. Integer modes (`"I"`, `"I;16"`,
            ...) are read as 16-bit grey in [0, 65535], and `"F"` as grey in [0, 1].

    Returns:
        `PIL.Image.Image`: Image of mode `"RGB"`.

    Raises:
        ValueError: If a 16-bit or float image has values outside its range, or a TIFF has them signed, in 12 bits or
            with white as the lowest.
    """
    _check_values(image)
    image = ImageOps.exif_transpose(image)  # a copy
    return image if image.mode == "RGB" and not image.has_transparency_data else _convert(image)


def _check_values(image: Image.Image) -> None:
    """Raises for TIFFs that Pillow reads as if their values were other ones."""
    tags = getattr(image, "tag_v2", {})  # 258: bits per sample; 262: 0 if white is the lowest value; 339: 2 if signed
    is_signed = 2 in tags.get(339, ()) and tags.get(258) in ((8,), (16,))  # mode "I" has 32 bits
    if is_signed or tags.get(258) == (12,) or (tags.get(262) == 0 and image.mode[0] in "IF"):
        raise ValueError("a grey TIFF must have unsigned values of 8 or 16 bits, black the lowest. Convert it.")


def _convert(image: Image.Image) -> Image.Image:
    """Converts an upright image to RGB, without the metadata of its file."""
    if image.mode == "F" or image.mode.startswith("I"):  # scaled here, because Pillow's own conversion clips at 255
        values, top = np.asarray(image), 1 if image.mode == "F" else 65535
        low, high = values.min(), values.max()  # NaN if any value is
        if not (low >= 0 and high <= top):
            raise ValueError(f"an image of mode {image.mode!r} must lie in [0, {top}], got [{low}, {high}]. Scale it.")
        grey = np.rint(values * (255 / top))
        if "transparency" in image.info:  # the one grey value that a 16-bit PNG may declare transparent
            grey[values == image.info["transparency"]] = 255
        image = Image.fromarray(grey.astype(np.uint8))
    elif image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    image = image.convert("RGB")
    image.info = {}
    return image


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

"""Reads image files as 8-bit RGB. A hostile file is an error: Pillow reads only listed formats, within its limits."""

import itertools
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

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
IMAGE_SUFFIXES = tuple(itertools.chain.from_iterable(IMAGE_FORMATS.values()))

# Tags of TIFF, each followed by the value that is looked for
TAG_BITS_PER_SAMPLE = 258
TAG_COMPRESSION = 259
UNCOMPRESSED = 1
TAG_PHOTOMETRIC = 262
WHITE_IS_LOWEST = 0
TAG_PLANAR_CONFIGURATION = 284
PLANES_APART = 2  # all values of the first channel, then all of the second
TAG_SAMPLE_FORMAT = 339
SIGNED = 2

# Pillow's names of the pixel layouts in PNG files whose pixels it scales to 8 bits
PNG_GREY_FACTORS = {"1": 255, "L;2": 85, "L;4": 17}  # from grey of 1, 2 and 4 bits to 8 bits
PNG_RGB_16_BITS = "RGB;16B"

BMP_RUN_LENGTHS = "bmp_rle"  # Pillow's decoder of run-length encoded BMPs
WHITE_FLOAT = 1  # white in mode "F"
WHITE_16_BITS = 65535  # white in integer modes


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
        path = os.fspath(file)
        is_url = "://" in path
        if is_url:
            raise ValueError(f"`{path}` must be a local file, because URLs are not read. Download it first.")
        with open(path, "rb") as opened:
            return _decode(opened, f"`{path}`")
    return _decode(file, "the image")


def _decode(file: BinaryIO, name: str) -> Image.Image:
    """Decodes an open file to 8-bit RGB. `name` names the file in errors."""
    with opened_image(file, name, tuple(IMAGE_FORMATS)) as image:
        _load_pixels(image)
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
        ValueError: If a 16-bit or float image has values outside its range, or the image is one of the rare TIFFs that
            Pillow misreads, such as grey with signed values.
    """
    _load_pixels(image)
    upright = ImageOps.exif_transpose(image)  # a copy
    is_opaque_rgb = upright.mode == "RGB" and not upright.has_transparency_data
    if is_opaque_rgb:
        return upright
    return _convert(upright)


def to_grey(image: Image.Image) -> Image.Image:
    """Converts any Pillow image to 8-bit grey, upright. Transparency is ignored.

    Args:
        image (`PIL.Image.Image`): Image of any mode, with values as in [`to_rgb`].

    Returns:
        `PIL.Image.Image`: Image of mode `"L"`.

    Raises:
        ValueError: As in [`to_rgb`].
    """
    _check_values(image)
    upright = ImageOps.exif_transpose(image)
    if _has_deep_grey(upright):
        return _scale_grey(upright)
    return _unpremultiply_grey(upright).convert("L")


def _unpremultiply_grey(image: Image.Image) -> Image.Image:
    """Converts an image of mode `"La"` to `"LA"`, the only mode that Pillow converts it to."""
    if image.mode == "La":
        return image.convert("LA")
    return image


def _load_pixels(image: Image.Image) -> None:
    """Decodes the pixels of an image that was only opened so far. Raises ValueError for a TIFF that Pillow misreads.

    The colour that a PNG declares transparent is scaled to 8 bits, as Pillow scales the pixels.
    """
    _check_values(image)
    _scale_transparent_value(image)
    image.load()


def _check_values(image: Image.Image) -> None:
    """Raises ValueError for a TIFF that Pillow misreads."""
    tags = getattr(image, "tag_v2", {})  # only TIFFs have tags
    _check_planes(tags)
    _check_grey_values(image, tags)


def _check_planes(tags: Mapping[int, Any]) -> None:
    """Raises for uncompressed TIFFs with a plane per channel, unless they have 1 or 8 bits, black the lowest."""
    has_planes = tags.get(TAG_PLANAR_CONFIGURATION) == PLANES_APART
    is_uncompressed = tags.get(TAG_COMPRESSION, UNCOMPRESSED) == UNCOMPRESSED
    if not has_planes or not is_uncompressed:
        return
    # Pillow decodes every such plane as values of 1 or 8 bits with black the lowest. It ignores that the file says
    # otherwise, such as that values have 16 bits.
    bits_of_channels = set(tags.get(TAG_BITS_PER_SAMPLE, (1,)))
    has_supported_bits = bits_of_channels.issubset({1, 8})
    is_inverted = tags.get(TAG_PHOTOMETRIC) == WHITE_IS_LOWEST
    if is_inverted or not has_supported_bits:
        raise ValueError(
            "an uncompressed TIFF with a plane per channel must have 8 bits per channel, black the lowest. Convert it."
        )


def _check_grey_values(image: Image.Image, tags: Mapping[int, Any]) -> None:
    """Raises for grey TIFFs whose values Pillow misreads: signed, of 12 bits, or with white as the lowest value."""
    bits_per_channel = tags.get(TAG_BITS_PER_SAMPLE)  # a tuple, of one number for grey
    is_8_or_16_bits = bits_per_channel in ((8,), (16,))
    is_12_bits = bits_per_channel == (12,)
    is_signed = SIGNED in tags.get(TAG_SAMPLE_FORMAT, ())
    is_misread_as_unsigned = is_signed and is_8_or_16_bits  # Pillow reads 32 signed bits correctly
    white_is_lowest = tags.get(TAG_PHOTOMETRIC) == WHITE_IS_LOWEST
    stays_inverted = white_is_lowest and _has_deep_grey(image)  # Pillow inverts grey of at most 8 bits
    if is_misread_as_unsigned or is_12_bits or stays_inverted:
        raise ValueError("a grey TIFF must have unsigned values of 8 or 16 bits, black the lowest. Convert it.")


def _scale_transparent_value(image: Image.Image) -> None:
    """Scales the colour that a PNG declares transparent to 8 bits, in `image.info`.

    When Pillow decodes the image, it scales the pixels to 8 bits, such as grey 15 of 4 bits to 15 * 17 = 255. It does
    not scale this colour, so it would find no pixels of the colour. Call this before the image is decoded.
    """
    if image.format != "PNG":
        return
    colour = image.info.get("transparency")  # a grey value, or a value per channel
    layout = _layout_of_pixels(image)
    if colour is None or layout is None:
        return
    is_grey_value = isinstance(colour, int)  # a damaged file can declare channels for a grey image
    if layout in PNG_GREY_FACTORS and is_grey_value:
        image.info["transparency"] = colour * PNG_GREY_FACTORS[layout]
    elif layout == PNG_RGB_16_BITS:
        # Pillow reads the higher 8 bits of each channel.
        image.info["transparency"] = tuple(channel >> 8 for channel in colour)


def _layout_of_pixels(image: Image.Image) -> str | None:
    """Pillow's name for the layout of the pixels in a PNG, such as `L;4` for grey of 4 bits. `None` once decoded."""
    decoder_tiles = getattr(image, "tile", [])  # what Pillow still has to decode: one tile in a PNG
    if not decoder_tiles:
        return None
    return decoder_tiles[0].args  # the decoder of PNGs has one argument, the layout


def _has_deep_grey(image: Image.Image) -> bool:
    """Whether an image is grey with integers of more than 8 bits, or with floats."""
    return image.mode == "F" or image.mode.startswith("I")


def _scale_grey(image: Image.Image) -> Image.Image:
    """Scales an image of mode `"F"` in [0, 1] or of an integer mode in [0, 65535] to 8-bit grey.

    Pillow's own conversion would clip at 255.
    """
    values = np.asarray(image)
    white = WHITE_FLOAT if image.mode == "F" else WHITE_16_BITS
    lowest = values.min()
    highest = values.max()
    is_in_range = lowest >= 0 and highest <= white  # False for NaN
    if not is_in_range:
        raise ValueError(
            f"an image of mode {image.mode!r} must lie in [0, {white}], got [{lowest}, {highest}]. Scale it."
        )
    grey = np.rint(values * (255 / white))
    return Image.fromarray(grey.astype(np.uint8))


def _convert(image: Image.Image) -> Image.Image:
    """Converts an upright image to RGB, without the metadata of its file."""
    if _has_deep_grey(image):
        opaque = _put_deep_grey_on_white(image)
    elif image.has_transparency_data:
        opaque = _put_on_white(image)
    else:
        opaque = image
    rgb = opaque.convert("RGB")
    rgb.info = {}
    return rgb


def _put_deep_grey_on_white(image: Image.Image) -> Image.Image:
    """Scales deep grey to 8 bits. Pixels of the grey value that a 16-bit PNG declares transparent become white."""
    grey = _scale_grey(image)
    if "transparency" in image.info:
        is_transparent = np.asarray(image) == image.info["transparency"]  # (height, width)
        grey.paste(255, mask=Image.fromarray(is_transparent))
    return grey


def _put_on_white(image: Image.Image) -> Image.Image:
    """Blends an image with transparent parts over white."""
    rgba = _unpremultiply_grey(image).convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, rgba)


@contextmanager
def opened_image(file: BinaryIO, name: str, formats: tuple[str, ...]) -> Iterator[Image.Image]:
    """Opens an image file to decode it in a `with` block.

    Decoders raise errors of almost any type. Here all errors become ValueErrors, also in the `with` block.

    Args:
        file (binary file object): Open file.
        name (`str`): Name of the file for errors.
        formats (`tuple[str, ...]`): Pillow's names of the formats that may be read. For some others, such as EPS,
            Pillow would start another program.

    Yields:
        `PIL.Image.Image`: The image, not decoded yet.

    Raises:
        ValueError: The file is of another format, or it is broken. Or it may be a decompression bomb, a small file
            that decodes to a huge image: it has more than twice `PIL.Image.MAX_IMAGE_PIXELS`, is a run-length encoded
            BMP, or takes more memory than there is.
    """
    try:
        with warnings.catch_warnings():
            # Pillow warns of more pixels than MAX_IMAGE_PIXELS, and raises an error for more than twice as many.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(file, formats=formats) as image:
                _check_run_lengths(image)
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


def _check_run_lengths(image: ImageFile.ImageFile) -> None:
    """Raises the error that Pillow raises for unknown formats if an image is a run-length encoded BMP.

    A few bytes of such a file can decode to an image of any size.
    """
    has_run_lengths = any(tile.codec_name == BMP_RUN_LENGTHS for tile in image.tile)
    if has_run_lengths:
        raise UnidentifiedImageError

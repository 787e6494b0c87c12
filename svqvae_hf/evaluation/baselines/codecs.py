"""Baselines that are image files: JPEG, WebP and AVIF, as Pillow writes them."""

import io
from collections.abc import Sequence
from typing import Any, NamedTuple

from PIL import Image

BEST_QUALITY = 95  # Pillow's advice for JPEG: higher ones grow without a gain


class Codec(NamedTuple):
    """An image format.

    Args:
        max_side (`int`): Largest side that it can store, in pixels.
        lowest_quality (`int`): Lowest quality of Pillow.
        options (`dict[str, Any]`): Other options of Pillow.
    """

    max_side: int
    lowest_quality: int
    options: dict[str, Any]


CODECS = {"JPEG": Codec(65535, 1, {"optimize": True}), "WebP": Codec(16383, 0, {}), "AVIF": Codec(65535, 0, {})}


def usable_codecs(image: Image.Image, codecs: Sequence[str]) -> list[str]:
    """Names of those codecs that can store an image of this size."""
    return [name for name in codecs if max(image.size) <= CODECS[name].max_side]


def save_image(image: Image.Image, codec: str, quality: int) -> bytes:
    """Content of an image file of a codec at a quality, without the colour profile and other notes of the image."""
    file = io.BytesIO()
    bare = image.copy()
    bare.info = {}
    bare.save(file, codec, quality=quality, **CODECS[codec].options)
    return file.getvalue()


def open_image(content: bytes) -> Image.Image:
    """Image of the content of an image file."""
    with Image.open(io.BytesIO(content)) as image:
        return image.convert("RGB")


def save_within(image: Image.Image, codec: str, bits: float) -> bytes:
    """Content of the image file with the highest quality whose size is at most `bits`, or of the lowest quality.

    The search halves the range of qualities, so it takes for granted that a higher quality makes a larger file.
    """
    low, high = CODECS[codec].lowest_quality, BEST_QUALITY
    best = save_image(image, codec, low)
    while low < high:
        quality = (low + high + 1) // 2
        content = save_image(image, codec, quality)
        if 8 * len(content) <= bits:
            low, best = quality, content
        else:
            high = quality - 1
    return best

"""Baselines that are image files: JPEG, WebP and AVIF, as Pillow writes them."""

import io
from typing import Any

import torch
from PIL import Image

from svqvae_hf.evaluation.measuring import to_image, to_tensor
from svqvae_hf.tokens.image_tokens import TooLargeError

QUALITIES = (1, 5, 10, 20, 40, 75)
"""Qualities of the files that `svqvae evaluate --codecs` measures."""
CODECS: dict[str, dict[str, Any]] = {"JPEG": {"optimize": True}, "WebP": {}, "AVIF": {}}  # options of Pillow


class CodecTokenizer:
    """JPEG, WebP or AVIF as Pillow writes it. All bytes of the file count.

    Args:
        codec (`str`): One of `CODECS`.
        quality (`int`): Quality of Pillow.
    """

    f = 1
    codebook_size = None

    def __init__(self, codec: str, quality: int):
        self.title = f"{codec}, quality {quality}"
        self.codec = codec
        self.quality = quality

    def encode(self, sample: torch.Tensor) -> bytes:
        """Content of the file."""
        return save_image(to_image(sample), self.codec, self.quality)

    def decode(self, codes: bytes) -> torch.Tensor:
        """Image in the file."""
        return to_tensor(open_image(codes)) / 127.5 - 1


def save_image(image: Image.Image, codec: str, quality: int) -> bytes:
    """Content of an image file of a codec at a quality, without the colour profile and other notes of the image."""
    file = io.BytesIO()
    image_without_notes = image.copy()
    image_without_notes.info = {}
    try:
        image_without_notes.save(file, codec, quality=quality, **CODECS[codec])
    except (OSError, ValueError) as error:
        raise TooLargeError(f"{codec} cannot hold it: {error}") from error
    return file.getvalue()


def open_image(content: bytes) -> Image.Image:
    """Image of the content of an image file."""
    with Image.open(io.BytesIO(content)) as image:
        return image.convert("RGB")

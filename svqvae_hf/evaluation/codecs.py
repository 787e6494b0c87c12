"""Baselines that are image files: JPEG, WebP and AVIF, as Pillow writes them."""

import io
import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from svqvae_hf.evaluation.measuring import Records, to_image, to_tensor
from svqvae_hf.evaluation.tokenizers.protocol import Tokenizer
from svqvae_hf.tokens.image_tokens import TooLargeError

QUALITIES = (1, 5, 10, 20, 40, 75)
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


def add_psnr_of_codecs(rows: Records, tokenizers: Sequence[Tokenizer]) -> None:
    """Adds to the row of each model the PSNR that each codec reaches at the same number of stored bits per pixel.

    The PSNR is interpolated between the qualities of the codec, linearly over the logarithm of the bits. A row gets no
    value where the bits lie outside the range of the qualities.

    Args:
        rows (`list[dict[str, Any]]`): Rows of the table.
        tokenizers (`Sequence[Tokenizer]`): Tokenizer of each row.
    """
    # Stored bits per pixel and PSNR of each quality, by codec
    points_by_codec: dict[str, list[tuple[float, float]]] = defaultdict(list)
    rows_of_models = []
    for row, tokenizer in zip(rows, tokenizers, strict=True):
        if isinstance(tokenizer, CodecTokenizer):
            point = (row["bits_per_pixel_stored"], row["psnr"])
            points_by_codec[tokenizer.codec].append(point)
        else:
            rows_of_models.append(row)
    for codec, points in points_by_codec.items():
        rates, psnrs = np.array(sorted(points)).T  # both (qualities,), from the fewest bits to the most
        for row in rows_of_models:
            rate = row["bits_per_pixel_stored"]
            is_in_range = rates[0] <= rate <= rates[-1]
            if is_in_range:
                psnr_of_codec = np.interp(math.log(rate), np.log(rates), psnrs)
                row[f"as_{codec.lower()}"] = float(psnr_of_codec)

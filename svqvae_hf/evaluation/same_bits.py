"""Compares each model with image files of the same size: which PSNR do JPEG, WebP or AVIF reach with as many bits?"""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from svqvae_hf.evaluation.codecs import CodecTokenizer
from svqvae_hf.evaluation.measuring import Records
from svqvae_hf.evaluation.tokenizers.protocol import Tokenizer


@dataclass(frozen=True, eq=False)
class CodecCurve:
    """PSNR of a codec over the bits of its files.

    Args:
        rates (`np.ndarray` of shape `(qualities,)`): Bits per pixel of each quality, from the fewest to the most.
        psnrs (`np.ndarray` of shape `(qualities,)`): PSNR of each quality in dB.
    """

    rates: np.ndarray
    psnrs: np.ndarray

    def at(self, rate: float) -> dict[str, float]:
        """Bits per pixel and PSNR of the files whose size is nearest to a number of bits per pixel.

        The PSNR is interpolated between the qualities, linearly over the logarithm of the bits. Fewer bits than the
        lowest quality takes, or more than the highest one, are not possible.
        """
        nearest_rate = min(max(rate, self.rates[0]), self.rates[-1])
        psnr = np.interp(math.log(nearest_rate), np.log(self.rates), self.psnrs)
        return {"bits_per_pixel": float(nearest_rate), "psnr": float(psnr)}


def compare_with_codecs(rows: Records, tokenizers: Sequence[Tokenizer]) -> Records:
    """Compares each model with each codec that was measured beside it, at the same number of bits per pixel.

    Args:
        rows (`list[dict[str, Any]]`): Rows of the table.
        tokenizers (`Sequence[Tokenizer]`): Tokenizer of each row.

    Returns:
        `list[dict[str, Any]]`: `title`, `bits_per_pixel` and `psnr` of a model, and `image_files`: the values of
        [`CodecCurve.at`] by the name of the codec. A model whose stored bits differ from its bits by count is compared
        at both. Empty without codecs.
    """
    curves = _codec_curves(rows, tokenizers)
    if not curves:
        return []
    comparisons = []
    for row, tokenizer in zip(rows, tokenizers, strict=True):
        if isinstance(tokenizer, CodecTokenizer):
            continue
        for title, rate in _rates(row).items():
            image_files = {codec: curve.at(rate) for codec, curve in curves.items()}
            comparison = {"title": title, "bits_per_pixel": rate, "psnr": row["psnr"], "image_files": image_files}
            comparisons.append(comparison)
    return comparisons


def _codec_curves(rows: Records, tokenizers: Sequence[Tokenizer]) -> dict[str, CodecCurve]:
    """Curve of each codec, by its name."""
    points_by_codec: dict[str, list[tuple[float, float]]] = defaultdict(list)  # bits per pixel and PSNR
    for row, tokenizer in zip(rows, tokenizers, strict=True):
        if isinstance(tokenizer, CodecTokenizer):
            point = (row["bits_per_pixel_stored"], row["psnr"])
            points_by_codec[tokenizer.codec].append(point)
    curves = {}
    for codec, points in points_by_codec.items():
        rates, psnrs = np.array(sorted(points)).T  # both (qualities,), from the fewest bits to the most
        curves[codec] = CodecCurve(rates, psnrs)
    return curves


def _rates(row: dict[str, Any]) -> dict[str, float]:
    """Bits per pixel at which a model is compared, by the title of the comparison."""
    title = row["title"]
    rate_by_count = row["bits_per_pixel"]
    stored_rate = row["bits_per_pixel_stored"]
    if rate_by_count == stored_rate:
        return {title: rate_by_count}
    return {f"{title}, ids": rate_by_count, f"{title}, stored": stored_rate}

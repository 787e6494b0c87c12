"""Adapters of the baselines: image files at a quality, and blocks coded by k-means."""

import torch
import torch.nn.functional as F
from PIL import Image

from svqvae_hf.evaluation.baselines.blocks import KMeans, LinearDecoder
from svqvae_hf.evaluation.baselines.codecs import open_image, save_image
from svqvae_hf.evaluation.comparison import to_tensor


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
        self.codec, self.quality = codec, quality

    def encode(self, sample: torch.Tensor) -> bytes:
        """Content of the file."""
        return save_image(to_image(sample), self.codec, self.quality)

    def decode(self, codes: bytes) -> torch.Tensor:
        """Image in the file."""
        return to_tensor(open_image(codes), torch.device("cpu")) / 127.5 - 1


class BlockTokenizer:
    """k-means of blocks, alone or with a linear decoder.

    Args:
        baseline ([`KMeans`] or [`LinearDecoder`]): Baseline, fitted on images with values from 0 to 255.
    """

    def __init__(self, baseline: KMeans | LinearDecoder):
        self.title, self.baseline, self.f = baseline.title, baseline, baseline.side
        self.codebook_size = len(baseline.codes)

    def encode(self, sample: torch.Tensor) -> torch.Tensor:
        """Ids `(1, h, w)`."""
        return self.baseline.encode(F.pixel_unshuffle((sample + 1) * 127.5, self.f))

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Image from the codes of the ids."""
        return F.pixel_shuffle(self.baseline.decode(codes), self.f) / 127.5 - 1


def to_image(sample: torch.Tensor) -> Image.Image:
    """Converts an image `(1, 3, height, width)` in [-1, 1] to 8 bits."""
    pixels = ((sample[0] + 1) * 127.5).clamp(0, 255).round().byte()
    return Image.fromarray(pixels.movedim(0, -1).cpu().numpy())

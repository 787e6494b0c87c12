import numpy as np
import pytest
import torch
from PIL import Image

from svqvae_hf.models.checks import SCALE_SOURCES
from svqvae_hf.tokens.image_tokens import decode_image, encode_image
from svqvae_hf.tokens.scale_choice import encode_to_psnr


def full_size_psnr(model, image, tokens):
    (decoded,) = decode_image(model, tokens)
    enlarged = np.asarray(decoded.resize(image.size, Image.Resampling.BICUBIC), float)
    return 10 * np.log10(255**2 / np.square(enlarged - np.asarray(image, float)).mean())


@pytest.mark.slow
@pytest.mark.parametrize("scale_from", SCALE_SOURCES)
def test_smallest_scale_that_reaches_a_psnr(tiny_model, photo, scale_from):
    scales = (1.0, 0.25, 0.5)
    crops = [photo.crop((40 * i, 30 * i, 40 * i + 57, 30 * i + 35)) for i in range(4)]
    seen = set()
    for crop in crops:
        files = {scale: encode_image(tiny_model, crop, scale, scale_from) for scale in sorted(scales)}
        psnr = {scale: full_size_psnr(tiny_model, crop, tokens) for scale, tokens in files.items()}
        for min_psnr in (*(value + shift for value in psnr.values() for shift in (-1e-6, 1e-6)), 90):
            tokens, reached = encode_to_psnr(tiny_model, crop, scales, min_psnr, scale_from)
            expected = next((scale for scale in psnr if psnr[scale] >= min_psnr), 1.0)
            assert tokens.scales == (expected,)
            assert reached == (max(psnr.values()) >= min_psnr)
            assert torch.equal(tokens.ids[0], files[expected].ids[0])
            seen.add(expected)
    assert len(seen) > 1

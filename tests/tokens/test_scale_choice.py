import numpy as np
import pytest
import torch
from context_models import make_context_model
from PIL import Image

from svqvae_hf.models.checks import SCALE_SOURCES
from svqvae_hf.tokens.image_tokens import decode_image, encode_image
from svqvae_hf.tokens.scale_choice import encode_to_bits, encode_to_psnr
from svqvae_hf.tokens.token_files import token_file_content


@pytest.fixture
def crop(photo):
    return photo.crop((100, 100, 157, 135))


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


@pytest.mark.parametrize("compresses", [True, False])
def test_largest_scale_whose_file_has_at_most_a_number_of_bits(tiny_model, crop, compresses):
    scales = (0.5, 1.0, 0.25)
    context_model = make_context_model(tiny_model.codebook_fingerprint()) if compresses else None
    files = {scale: token_file_content(encode_image(tiny_model, crop, scale), context_model) for scale in scales}
    bits = {scale: 8 * len(content) for scale, content in files.items()}
    for scale, max_bits, fits in ((0.25, 1, False), *((scale, bits[scale], True) for scale in scales)):
        tokens, reached = encode_to_bits(tiny_model, crop, scales, max_bits, context_model=context_model)
        assert (tokens.scales, reached) == ((scale,), fits)
    assert encode_to_bits(tiny_model, crop, scales, bits[1.0] - 1, "image", context_model)[0].scales == (0.5,)

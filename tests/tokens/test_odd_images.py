"""Images of odd sizes and modes, to tokens and back."""

import numpy as np
import pytest
from PIL import Image

from svqvae_hf.models.image_processing_svqvae import load_image, to_rgb
from svqvae_hf.tokens.image_tokens import decode_image, encode_image
from svqvae_hf.tokens.token_files import load_tokens, save_tokens

pytestmark = pytest.mark.usefixtures("few_windows")


def test_long_thin_image_from_file_to_file(tiny_model, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (2, 8_000, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    image = load_image(tmp_path / "a.png")
    assert np.array_equal(np.asarray(image), pixels)
    tiny_model.enable_tiling()
    save_tokens(tmp_path / "a.safetensors", encode_image(tiny_model, image, [1.0, 0.01]))
    whole, small = decode_image(tiny_model, load_tokens(tmp_path / "a.safetensors"))
    assert (whole.size, small.size) == ((8_000, 2), (80, 1))


def test_one_pixel_in_every_mode(tiny_model, tmp_path):
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I", "I;16", "F"):
        image = to_rgb(Image.new(mode, (1, 1)))
        save_tokens(tmp_path / "a.safetensors", encode_image(tiny_model, image, [0.01, 1, 3]))
        images = decode_image(tiny_model, load_tokens(tmp_path / "a.safetensors"))
        assert [decoded.size for decoded in images] == [(1, 1), (1, 1), (3, 3)], mode

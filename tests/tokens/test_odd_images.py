"""Images of odd sizes and modes, to tokens and back."""

import pytest
from PIL import Image

from svqvae_hf.models.image_processing_svqvae import to_rgb
from svqvae_hf.tokens.image_tokens import decode_image, encode_image
from svqvae_hf.tokens.token_files import load_tokens, save_tokens

pytestmark = pytest.mark.usefixtures("few_windows")


def test_one_pixel_in_every_mode(tiny_model, tmp_path):
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I", "I;16", "F"):
        image = to_rgb(Image.new(mode, (1, 1)))
        save_tokens(tmp_path / "a.safetensors", encode_image(tiny_model, image, [0.01, 1, 3]))
        images = decode_image(tiny_model, load_tokens(tmp_path / "a.safetensors"))
        assert [decoded.size for decoded in images] == [(1, 1), (1, 1), (3, 3)], mode

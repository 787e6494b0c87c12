import io
import struct
import zlib

import pytest
from PIL import Image

from svqvae_hf.models.image_files import load_image


def test_decompression_bombs_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4000)
    for kind in ("BMP", "GIF", "PNG", "PPM", "TIFF", "WEBP"):
        Image.new("RGB", (90, 90)).save(tmp_path / "a", kind)
        with pytest.raises(ValueError, match="a` must keep to Pillow's limit against decompression bombs"):
            load_image(tmp_path / "a")


def test_text_chunk_that_unpacks_endlessly_is_refused(tmp_path):
    text = b"zTXt" + b"comment\0\0" + zlib.compress(bytes(1 << 26))
    chunk = struct.pack(">I", len(text) - 4) + text + struct.pack(">I", zlib.crc32(text))
    file = io.BytesIO()
    Image.new("RGB", (2, 2)).save(file, "png")
    (tmp_path / "a.png").write_bytes(file.getvalue()[:33] + chunk + file.getvalue()[33:])
    with pytest.raises(ValueError, match=r"a.png` is not a readable image"):
        load_image(tmp_path / "a.png")

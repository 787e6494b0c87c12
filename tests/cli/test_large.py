"""`--large` of encode and decode."""

import numpy as np
import pytest
import tifffile
from cli_runner import fails, svqvae, visible
from conftest import ROOT, make_tiny, save_tiff
from context_models import make_context_model
from PIL import Image

from svqvae_hf.tokens.image_tokens import decode_image, encode_image

pytestmark = pytest.mark.usefixtures("few_windows")
TILES = ["--tile-size", "32", "--overlap", "8"]


@pytest.fixture
def tiff(tmp_path, photo):
    return save_tiff(tmp_path / "photo.tif", np.asarray(photo)[100:160, 100:150])


@pytest.mark.slow
@pytest.mark.parametrize(("options", "name"), [([], "photo.safetensors"), (["--compress"], "photo.svqz")])
def test_to_tokens_and_back(options, name, tiff, tmp_path, capsys):
    make_tiny().save_pretrained(tmp_path / "model")
    make_context_model(make_tiny().codebook_fingerprint()).save_pretrained(tmp_path / "model")
    out, model = tmp_path / "out", ["--model", tmp_path / "model", "--device", "cpu"]
    assert svqvae("encode", tiff, "--large", "--output", out, *model, *TILES, *options) == 0
    assert svqvae("decode", out / name, "--large", "--output", out, *model) == 0
    written = f"written  {out} (token files: 1)\nwritten  {out} (images: 1)\n"
    assert capsys.readouterr().out == written
    assert visible(out) == [name, "photo_x1.tif"]
    in_memory = make_tiny()
    in_memory.enable_tiling(32, 8)
    (expected,) = decode_image(in_memory, encode_image(in_memory, Image.open(tiff), [1.0]))
    assert np.array_equal(tifffile.imread(out / "photo_x1.tif"), expected)
    (out / "photo_x1.tif").write_bytes((out / "photo_x1.tif").read_bytes()[:-1])
    error = fails(capsys, "decode", out / name, "--large", "--output", out, *model)
    assert "photo_x1.tif` has changed since it was written" in error
    (out / "photo_x1.tif").unlink()
    assert svqvae("decode", out / name, "--large", "--output", out, *model) == 0
    assert "resumed" not in capsys.readouterr().out
    assert svqvae("decode", out / name, "--large", "--output", out, *model) == 0
    assert "resumed: 1 of 1" in capsys.readouterr().out


def test_mistakes_are_one_line(saved_model, tiff, tmp_path, capsys):
    (tmp_path / "broken.tif").write_bytes(b"II*\0")
    out = ["--output", tmp_path / "out", "--model", saved_model]
    for argv, message in (
        (["encode", tiff, "--large", "--scales", "0.5"], "--scales is not for --large"),
        (["encode", ROOT / "docs" / "images", "--large"], "has no file that ends in .tif"),
        (["encode", ROOT / "docs" / "images" / "chelsea.png", "--large"], "must be a TIFF. Convert it"),
        (["encode", tmp_path / "broken.tif", "--large"], "cannot be read as a large image"),
        (["encode", tiff, "--large", "--tile-size", "31"], "multiple of 4"),
    ):
        assert message in fails(capsys, *argv, *out)
        assert not (tmp_path / "out").exists()

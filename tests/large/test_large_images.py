import itertools

import numpy as np
import pytest
import tifffile
import torch
from conftest import make_tiny, save_tiff
from PIL import Image

from svqvae_hf.large.large_images import decode_large, encode_large
from svqvae_hf.large.tiff_reader import LargeImage
from svqvae_hf.tokens.image_tokens import decode_image, encode_image
from svqvae_hf.tokens.token_files import load_tokens, save_tokens

pytestmark = pytest.mark.usefixtures("few_windows")
# Height and width, tile and overlap: sides that are not multiples of a tile or of f, or as small as possible.
GEOMETRIES = [((75, 49), (32, 8)), ((33, 90), (32, 4)), ((60, 1), (16, 4)), ((1, 1), (16, 0)), ((32, 24), (8, 0))]


@pytest.fixture
def model():
    tiny = make_tiny()
    tiny.enable_tiling(32, 8)
    return tiny


@pytest.fixture
def tiff(tmp_path, photo):
    """A TIFF of 70 x 60 pixels: 12 tiles."""
    return save_tiff(tmp_path / "photo.tif", np.asarray(photo)[100:160, 100:170])


@pytest.mark.parametrize(("size", "tiles"), GEOMETRIES)
def test_ids_and_pixels_equal_the_image_in_memory(size, tiles, model, photo, tmp_path):
    model.enable_tiling(*tiles)
    image = photo.crop((100, 100, 100 + size[1], 100 + size[0]))
    source = save_tiff(tmp_path / "a.tif", np.asarray(image))
    tokens = encode_image(model, image, [1.0])
    save_tokens(tmp_path / "memory.safetensors", tokens)
    (expected,) = decode_image(model, tokens)

    save_tokens(tmp_path / "large.safetensors", encode_large(model, source))
    decode_large(model, load_tokens(tmp_path / "large.safetensors"), tmp_path / "decoded.tif")

    assert (tmp_path / "large.safetensors").read_bytes() == (tmp_path / "memory.safetensors").read_bytes()
    assert np.array_equal(tifffile.imread(tmp_path / "decoded.tif"), expected)
    assert not list(tmp_path.glob("*.partial*"))


def test_no_window_is_larger_than_a_tile(model, tiff, monkeypatch):
    sides = []
    read = LargeImage.read

    def spy(image, rows, columns):
        sides.append(max(rows.stop - rows.start, columns.stop - columns.start))
        return read(image, rows, columns)

    monkeypatch.setattr(LargeImage, "read", spy)
    encode_large(model, tiff)
    assert max(sides) <= model.tile_size


def test_broken_image_is_an_error(model, tiff):
    tiff.write_bytes(tiff.read_bytes()[:-4000])
    with pytest.raises(ValueError, match="cannot be read"):
        encode_large(model, tiff)


def test_tokens_of_other_scales_or_another_codebook_are_an_error(model, tiff, tmp_path):
    with Image.open(tiff) as image:
        two, one = (encode_image(model, image, scales) for scales in ([1.0, 0.5], [1.0]))
    with pytest.raises(ValueError, match=r"scale 1 alone, got 1, 0\.5"):
        decode_large(model, two, tmp_path / "a.tif")
    with torch.no_grad():
        model.quantize.embedding.weight.add_(1)
    with pytest.raises(ValueError, match="codebook"):
        decode_large(model, one, tmp_path / "a.tif")


def test_an_interrupted_run_leaves_nothing_and_counts_the_tiles(model, tiff, tmp_path, monkeypatch):
    tokens = encode_large(model, tiff)
    totals = []

    def bar(tiles, total, **_):
        totals.append(total)
        yield from itertools.islice(tiles, 5)
        raise KeyboardInterrupt

    monkeypatch.setattr("svqvae_hf.large.large_images.tqdm", bar)
    with pytest.raises(KeyboardInterrupt):
        decode_large(model, tokens, tmp_path / "out" / "a.tif")
    assert totals == [12]
    assert not list(tmp_path.glob("out/*"))

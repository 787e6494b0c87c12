import errno
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from conftest import make_tiny, save_tiff
from PIL import Image

from svqvae_hf.evaluation.reconstruction_table import measure_reconstructions
from svqvae_hf.large.large_images import decode_large, encode_large, reconstruct_large
from svqvae_hf.large.run_record import record_path
from svqvae_hf.large.tiff_reader import LargeImage
from svqvae_hf.tokens.image_tokens import decode_image, encode_image, image_tokens
from svqvae_hf.tokens.token_files import load_tokens, save_tokens, token_file_header

pytestmark = pytest.mark.usefixtures("few_windows")
# Height and width, tile and overlap: sides that are not multiples of a tile or of f, or as small as possible.
GEOMETRIES = [
    ((75, 49), (32, 8)),
    ((33, 90), (32, 4)),
    ((31, 30), (32, 8)),
    ((5, 60), (16, 4)),
    ((60, 1), (16, 4)),
    ((1, 1), (16, 0)),
    ((32, 24), (8, 0)),
]


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

    encode_large(model, source, tmp_path / "large.safetensors")
    decode_large(model, tmp_path / "large.safetensors", tmp_path / "decoded.tif")
    figures = reconstruct_large(model, source, tmp_path / "reconstructed.tif")

    assert (tmp_path / "large.safetensors").read_bytes() == (tmp_path / "memory.safetensors").read_bytes()
    for name in ("decoded", "reconstructed"):
        assert np.array_equal(tifffile.imread(tmp_path / f"{name}.tif"), expected)
    (in_memory,) = measure_reconstructions(image, tokens, [expected])
    assert figures.psnr == pytest.approx(in_memory.psnr)
    assert np.array_equal(figures.codes, in_memory.codes)
    assert figures[:4] == in_memory[:4]
    assert not list(tmp_path.glob("*.partial*"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype, model, tmp_path, photo):
    model.to(dtype)
    source = save_tiff(tmp_path / "a.tif", np.asarray(photo)[100:148, 100:130])
    encode_large(model, source, tmp_path / "a.safetensors")
    decode_large(model, tmp_path / "a.safetensors", tmp_path / "b.tif")
    tokens = encode_image(model, Image.open(source), [1.0])
    assert torch.equal(load_tokens(tmp_path / "a.safetensors").ids[0], tokens.ids[0])
    assert np.array_equal(tifffile.imread(tmp_path / "b.tif"), decode_image(model, tokens)[0])


def test_no_window_is_larger_than_a_tile(model, tiff, tmp_path, monkeypatch):
    sides = []
    read = LargeImage.read

    def spy(image, rows, columns):
        sides.append(max(rows.stop - rows.start, columns.stop - columns.start))
        return read(image, rows, columns)

    monkeypatch.setattr(LargeImage, "read", spy)
    encode_large(model, tiff, tmp_path / "a.safetensors")
    assert max(sides) <= model.tile_size


@pytest.mark.parametrize("codebook_size", [64, 2**16, 2**16 + 1])
def test_header_is_the_header_of_a_token_file(codebook_size, tmp_path):
    model = make_tiny(codebook_size=codebook_size)
    tokens = image_tokens(model, [torch.randint(64, (5, 7))], 19, 27, [1.0])
    save_tokens(tmp_path / "a.safetensors", tokens)
    header = token_file_header(tokens)
    content = (tmp_path / "a.safetensors").read_bytes()
    assert content.startswith(header)
    assert len(content) == len(header) + 5 * 7 * (2 if codebook_size <= 2**16 else 4)


def test_broken_image_leaves_nothing(model, tiff, tmp_path):
    tiff.write_bytes(tiff.read_bytes()[:-4000])
    with pytest.raises(ValueError, match="cannot be read"):
        encode_large(model, tiff, tmp_path / "out" / "a.safetensors")
    assert not list(tmp_path.glob("out/*"))


def test_tokens_of_other_scales_or_another_codebook_are_an_error(model, tiff, tmp_path):
    with Image.open(tiff) as image:
        save_tokens(tmp_path / "two.safetensors", encode_image(model, image, [1.0, 0.5]))
        save_tokens(tmp_path / "one.safetensors", encode_image(model, image, [1.0]))
    with pytest.raises(ValueError, match=r"scale 1 alone .* got 1, 0\.5"):
        decode_large(model, tmp_path / "two.safetensors", tmp_path / "a.tif")
    with torch.no_grad():
        model.quantize.embedding.weight.add_(1)
    with pytest.raises(ValueError, match="codebook"):
        decode_large(model, tmp_path / "one.safetensors", tmp_path / "a.tif")


def test_tiling_must_be_enabled(tiny_model, tiff, tmp_path):
    with pytest.raises(ValueError, match="enable_tiling"):
        encode_large(tiny_model, tiff, tmp_path / "a.safetensors")


def test_output_must_not_be_a_folder(model, tiff, tmp_path):
    with pytest.raises(ValueError, match="must be a file"):
        reconstruct_large(model, tiff, tmp_path)


# Interrupted runs


def stop_at(tile):
    def on_tile(finished, total):
        if finished == tile:
            raise KeyboardInterrupt

    return on_tile


def test_resumed_run_equals_an_unbroken_run(model, tiff, tmp_path):
    counts = []
    reconstruct_large(model, tiff, tmp_path / "unbroken.tif", on_tile=lambda *count: counts.append(count))
    total = len(counts)
    assert counts == [(i + 1, total) for i in range(total)]
    target = tmp_path / "a.tif"
    for tile in range(3, total, 5):  # in both passes, in the first tile of a row and within a row
        with pytest.raises(KeyboardInterrupt):
            reconstruct_large(model, tiff, target, resume=True, on_tile=stop_at(tile))
        assert record_path(target).exists()
        assert not target.exists()
    remaining = []
    figures = reconstruct_large(model, tiff, target, resume=True, on_tile=lambda *count: remaining.append(count))
    assert remaining == counts[-len(remaining) :]
    assert len(remaining) < total / 3
    assert target.read_bytes() == (tmp_path / "unbroken.tif").read_bytes()
    assert figures.tokens == 15 * 18
    assert not list(tmp_path.glob("*.partial*"))


def test_resumed_encoding_and_decoding_equal_unbroken_ones(model, tiff, tmp_path):
    for name, stop in (("unbroken", 0), ("broken", 9)):
        for run, source, target in (
            (encode_large, tiff, tmp_path / f"{name}.safetensors"),
            (decode_large, tmp_path / f"{name}.safetensors", tmp_path / f"{name}.tif"),
        ):
            if stop:
                with pytest.raises(KeyboardInterrupt):
                    run(model, source, target, on_tile=stop_at(stop))
            run(model, source, target, resume=True)
    for suffix in (".safetensors", ".tif"):
        assert (tmp_path / f"broken{suffix}").read_bytes() == (tmp_path / f"unbroken{suffix}").read_bytes()


@pytest.mark.parametrize("run", [encode_large, reconstruct_large])
def test_a_run_that_was_killed_at_its_very_end_is_made_again(model, tiff, tmp_path, monkeypatch, run):
    """When its result had its name, but its record was not deleted yet."""
    unbroken, target = tmp_path / "unbroken.tif", tmp_path / "a.tif"
    run(model, tiff, unbroken)

    def kill_at_record(path, missing_ok=False):
        if path == record_path(target):
            raise KeyboardInterrupt
        unlink(path, missing_ok)

    unlink = Path.unlink
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", kill_at_record)
        with pytest.raises(KeyboardInterrupt):
            run(model, tiff, target)
    assert record_path(target).exists()
    target.unlink()
    run(model, tiff, target, resume=True)
    assert target.read_bytes() == unbroken.read_bytes()
    assert not list(tmp_path.glob("*.partial*"))


def test_run_resumes_after_a_disk_error(model, tiff, tmp_path, monkeypatch):
    reads = []
    read = LargeImage.read

    def fail_once(image, rows, columns):
        reads.append(rows)
        if len(reads) == 10:
            image.stored_values = unreadable
            image._band = None
        return read(image, rows, columns)

    def unreadable(rows, columns):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(LargeImage, "read", fail_once)
    target = tmp_path / "a.safetensors"
    with pytest.raises(OSError, match=r"^`.*photo.tif` cannot be read: Input/output error\.$") as caught:
        encode_large(model, tiff, target)
    assert caught.value.errno == errno.EIO
    remaining = []
    encode_large(model, tiff, target, resume=True, on_tile=lambda *count: remaining.append(count))
    assert len(remaining) < remaining[-1][1]

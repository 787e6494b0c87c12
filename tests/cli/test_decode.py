from dataclasses import replace

import pytest
import torch
from cli_runner import fails, svqvae
from conftest import make_tiny
from PIL import Image

from svqvae_hf import SVQVAE
from svqvae_hf.tokens.token_files import load_tokens, save_tokens

pytestmark = pytest.mark.usefixtures("few_windows")


@pytest.fixture
def tokens(two_images, tmp_path, saved_model):
    """A token file, encoded with tiles of 32 pixels and an overlap of 8."""
    argv = ["--output", tmp_path, "--model", saved_model, "--tile-size", "32", "--overlap", "8"]
    svqvae("encode", two_images / "a.png", *argv)
    return tmp_path / "a.safetensors"


def test_tokens_of_half_precision_decode_in_float32(two_images, out, saved_model):
    argv = ["--output", out, "--model", saved_model]
    assert svqvae("encode", two_images / "a.png", *argv, "--dtype", "bfloat16") == 0
    assert svqvae("decode", out / "a.safetensors", *argv) == 0
    assert Image.open(out / "a_x1.png").size == (57, 35)


@pytest.fixture
def used_tiles(monkeypatch):
    """Replaces the decoder, and collects the tiling of its calls."""
    used = []

    def decode_image(model, tokens, tiles):
        used.append(tiles)
        return [Image.new("RGB", (1, 1))]

    monkeypatch.setattr("svqvae_hf.tokens.image_tokens.decode_image", decode_image)
    return used


def test_tiles_default_to_the_tiles_of_the_file(tokens, out, saved_model, used_tiles):
    for options in ([], ["--overlap", "4"], ["--tile-size", "40"], ["--tile-size", "64", "--overlap", "0"]):
        assert svqvae("decode", tokens, "--output", out, "--model", saved_model, "--overwrite", *options) == 0
    assert used_tiles == [(32, 8), (32, 4), (40, 8), (64, 0)]


def test_tokens_of_another_codebook_are_an_error(tokens, out, tmp_path, saved_model, capsys):
    other = make_tiny()
    torch.nn.init.normal_(other.quantize.embedding.weight)
    other.save_pretrained(tmp_path / "other")
    error = fails(capsys, "decode", tokens, "--output", out, "--model", tmp_path / "other")
    assert "a.safetensors`: the ids must be of the model's codebook" in error
    assert other.codebook_fingerprint() in error
    assert SVQVAE.from_pretrained(saved_model).codebook_fingerprint() in error
    assert not out.exists()


def test_the_model_of_a_token_set_is_named_if_another_decodes_it(two_images, tmp_path, saved_model, capsys):
    other = make_tiny()
    torch.nn.init.normal_(other.quantize.embedding.weight)
    other.save_pretrained(tmp_path / "mixed")
    svqvae("tokenize", two_images, "--output", tmp_path / "set", "--model", tmp_path / "mixed", "--workers", "0")
    capsys.readouterr()
    error = fails(capsys, "decode", tmp_path / "set", "--output", tmp_path / "out", "--model", saved_model)
    assert error.endswith("Pass `--model` with the model that encoded them, `mixed`.\n")


def test_a_file_that_does_not_fit_the_model_is_skipped(tokens, out, tmp_path, saved_model, capsys):
    save_tokens(tmp_path / "b.safetensors", replace(load_tokens(tokens), tile_size=33))
    assert svqvae("decode", tmp_path, "--output", out, "--model", saved_model) == 1
    assert "b.safetensors`: `tile_size` must be a positive multiple" in capsys.readouterr().err
    assert [path.name for path in out.glob("*.png")] == ["a_x1.png"]

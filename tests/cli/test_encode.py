import re

import pytest
import torch
from cli_runner import fails, names, svqvae
from conftest import ROOT
from PIL import Image

from svqvae_cli import loading
from svqvae_hf.tokens.token_files import load_tokens

pytestmark = pytest.mark.usefixtures("few_windows", "process")


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def test_one_token_file_per_image(two_images, out, saved_model):
    argv = ["--model", saved_model, "--tile-size", "32", "--overlap", "8", "--scales", "1", "0.5"]
    assert svqvae("encode", two_images, "--output", out, *argv) == 0
    assert names(out) == ["a.safetensors", "b.safetensors"]
    tokens = load_tokens(out / "a.safetensors")
    assert tokens.scales == (1.0, 0.5)
    assert tokens.scale_from == "image"
    assert (tokens.tile_size, tokens.overlap) == (32, 8)


def test_scales_from_the_image_or_the_latents(two_images, tmp_path, saved_model):
    argv = ["encode", two_images / "a.png", "--model", saved_model, "--scales", "1", "0.5"]
    assert svqvae(*argv, "--output", tmp_path / "image") == 0
    assert svqvae(*argv, "--output", tmp_path / "latents", "--scale-from", "latents") == 0
    image, latents = (load_tokens(tmp_path / source / "a.safetensors") for source in ("image", "latents"))
    assert latents.scale_from == "latents"
    assert torch.equal(image.ids[0], latents.ids[0])
    assert image.ids[1].shape == latents.ids[1].shape
    assert not torch.equal(image.ids[1], latents.ids[1])


def test_bundled_model_is_the_default(two_images, out, saved_model, monkeypatch):
    assert loading.DEFAULT_MODEL == str(ROOT / "svqvae_hf" / "pretrained")
    monkeypatch.setattr(loading, "DEFAULT_MODEL", saved_model)
    assert svqvae("encode", two_images / "a.png", "--output", out) == 0
    assert load_tokens(out / "a.safetensors").f == 4


def test_folder_gives_all_formats(tmp_path, out, saved_model):
    for ending in (".ppm", ".bmp", ".webp"):
        Image.new("RGB", (8, 8), "red").save(tmp_path / f"{ending[1:]}{ending}")
    assert svqvae("encode", tmp_path, "--output", out, "--model", saved_model) == 0
    assert sorted(path.stem for path in out.iterdir()) == ["bmp", "ppm", "webp"]


@pytest.mark.parametrize("command", ["reconstruct", "encode"])
def test_scale_too_large_for_memory_is_an_error(two_images, out, saved_model, capsys, command):
    argv = ["--output", out, "--model", saved_model, "--scales", "100000"]
    error = fails(capsys, command, two_images / "a.png", *argv)
    estimate = r"a.png`: an image of 57 x 35 pixels at scales 100000, .* would take about \S+ GiB of memory"
    assert re.search(estimate, error)
    assert not out.exists()


@pytest.mark.parametrize("content", [b"", b"Dear diary,", "cut"])
def test_broken_image_stops_after_the_images_before_it(two_images, out, saved_model, capsys, content):
    whole = (two_images / "a.png").read_bytes()
    (two_images / "aa.png").write_bytes(whole[: len(whole) // 2] if content == "cut" else content)
    assert "aa.png` " in fails(capsys, "encode", two_images, "--output", out, "--model", saved_model)
    assert names(out) == ["a.safetensors"]
    load_tokens(out / "a.safetensors")


def test_inputs_of_one_stem_are_an_error(two_images, out, capsys):
    Image.open(two_images / "a.png").save(two_images / "a.bmp")
    error = fails(capsys, "encode", two_images, "--output", out)
    assert f"`{two_images / 'a.bmp'}` and `{two_images / 'a.png'}` would write the same files" in error


@pytest.mark.parametrize(("command", "ending"), [("reconstruct", "_x1.png"), ("encode", ".safetensors")])
def test_output_that_cannot_be_written_is_an_error(two_images, out, saved_model, capsys, command, ending):
    file = two_images / "notes.txt"
    for output in (file, file / "under"):
        error = fails(capsys, command, two_images, "--output", output)
        assert f"--output must be a writable folder, but `{file}` is not" in error
    (out / f"a{ending}").mkdir(parents=True)
    error = fails(capsys, command, two_images, "--output", out, "--model", saved_model)
    assert f"`{out / f'a{ending}'}` cannot be written: Is a directory." in error
    assert names(out) == [f"a{ending}"]
    assert names(two_images) == ["a.png", "b.jpg", "notes.txt"]

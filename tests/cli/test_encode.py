import os
import re

import pytest
from cli_runner import fails, names, svqvae, visible
from conftest import ROOT
from PIL import Image

from svqvae_cli import loading
from svqvae_hf import SVQVAE
from svqvae_hf.tokens.token_files import load_tokens

pytestmark = pytest.mark.usefixtures("few_windows")


def test_one_token_file_per_image(two_images, out, saved_model):
    argv = ["--model", saved_model, "--tile-size", "32", "--overlap", "8", "--scales", "1", "0.5"]
    assert svqvae("encode", two_images, "--output", out, *argv) == 0
    assert visible(out) == ["a.safetensors", "b.safetensors"]
    tokens = load_tokens(out / "a.safetensors")
    assert tokens.scales == (1.0, 0.5)
    assert tokens.scale_from == "image"
    assert (tokens.tile_size, tokens.overlap) == (32, 8)


def test_bundled_model_is_the_default(two_images, out, saved_model, monkeypatch):
    bundled_model = str(ROOT / "svqvae_hf" / "pretrained")
    assert bundled_model == loading.DEFAULT_MODEL
    monkeypatch.setattr(loading, "DEFAULT_MODEL", saved_model)
    assert svqvae("encode", two_images / "a.png", "--output", out) == 0
    assert load_tokens(out / "a.safetensors").f == 4


def test_token_files_do_not_lie_in_the_folder_of_the_model(two_images, saved_model, capsys):
    error = fails(capsys, "encode", two_images, "--output", f"{saved_model}/tokens", "--model", saved_model)
    assert error.endswith(f"/tokens` must not be in the folder of the model, `{saved_model}`. Choose another.\n")
    assert not os.path.exists(f"{saved_model}/tokens")


def test_a_name_that_safetensors_cannot_open_is_skipped(two_images, out, saved_model, capsys):
    os.rename(two_images / "a.png", os.fsdecode(os.fsencode(two_images) + b"/\xff.png"))
    assert svqvae("encode", two_images, "--output", out, "--model", saved_model) == 1
    assert visible(out) == ["b.safetensors"]
    assert (
        "/\\xff.safetensors` must be a path in UTF-8, because safetensors opens no others." in capsys.readouterr().err
    )


@pytest.mark.parametrize("command", ["reconstruct", "encode"])
def test_scale_too_large_for_memory_is_an_error(two_images, out, saved_model, capsys, command, monkeypatch):
    monkeypatch.setattr("svqvae_hf.tokens.image_tokens.available_memory", lambda device: 2**20)
    argv = ["--output", out, "--model", saved_model, "--scales", "2"]
    error = fails(capsys, command, two_images / "a.png", *argv)
    estimate = r"a.png`: an image of 114 x 70 pixels without tiles would take about \S+ GiB of memory"
    assert re.search(estimate, error)
    assert not out.exists()


def exhaust_memory(monkeypatch):
    """Lets memory run out in the middle of the work on an image of 200 pixels."""

    def exhausted(function):
        def run(self, values, *args, **kwargs):
            if values.shape[-1] in (200, 50):  # pixels or ids
                raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
            return function(self, values, *args, **kwargs)

        return run

    for name in ("encode_tokens", "decode"):
        monkeypatch.setattr(SVQVAE, name, exhausted(getattr(SVQVAE, name)))


@pytest.mark.parametrize("command", ["reconstruct", "encode", "decode"])
def test_images_too_large_for_memory_are_skipped(tmp_path, out, saved_model, monkeypatch, capsys, command):
    source, model = tmp_path / "images", ["--model", saved_model]
    source.mkdir()
    for name, side in (("large", 200), ("small", 8)):
        Image.new("RGB", (side, side)).save(source / f"{name}.png")
    if command == "decode":
        assert svqvae("encode", source, "--output", out / "tokens", *model) == 0
        source = out / "tokens"
    exhaust_memory(monkeypatch)
    capsys.readouterr()
    assert svqvae(command, source, "--output", out / "made", *model) == 1
    (written,) = visible(out / "made")
    assert written.startswith("small")
    skipped, last = capsys.readouterr().err.splitlines()
    assert re.match(r"svqvae: skipped: `.*/large\..*`: out of memory. Use smaller scales", skipped)
    assert last == "svqvae: 1 of 2 inputs were skipped"


@pytest.mark.parametrize("command", ["reconstruct", "encode", "decode"])
def test_what_cannot_be_read_is_named_counted_and_skipped(two_images, out, saved_model, capsys, command):
    source, model = two_images, ["--model", saved_model]
    if command == "decode":
        source = out / "tokens"
        svqvae("encode", two_images, "--output", source, *model)
        capsys.readouterr()
    whole = next(path for path in sorted(source.iterdir()) if path.stem == "a")
    for name, content in (
        ("a0", b""),
        ("a1", b"Dear diary,"),
        ("a2", whole.read_bytes()[: whole.stat().st_size // 2]),
    ):
        whole.with_stem(name).write_bytes(content)
    whole.with_stem("a3").symlink_to("nowhere")
    os.mkfifo(whole.with_stem("a4"))
    argv = [command, source, "--output", out / "made", *model]
    assert svqvae(*argv) == 1
    assert {name[0] for name in visible(out / "made")} == {"a", "b"}
    *skipped, last = capsys.readouterr().err.splitlines()
    assert last == "svqvae: 5 of 7 inputs were skipped"
    for line, name in zip(skipped, ("a0", "a1", "a2", "a3", "a4"), strict=True):
        assert line.startswith(f"svqvae: skipped: `{whole.with_stem(name)}`")
    assert [line.rpartition("` is ")[2] for line in skipped[3:]] == ["a broken link.", "not a file."]


def test_one_input_that_cannot_be_read_is_an_error(two_images, out, saved_model, capsys):
    (two_images / "a.png").write_bytes(b"")
    argv = ["--output", out, "--model", saved_model]
    assert "a.png` " in fails(capsys, "encode", two_images / "a.png", *argv)
    (two_images / "b.jpg").write_bytes(b"")
    assert svqvae("encode", two_images, *argv) == 2
    said, error = capsys.readouterr()
    assert error.splitlines()[2:] == ["svqvae: error: none of the 2 inputs could be used, for the reasons above."]
    assert said == ""
    assert not out.exists()


def test_outputs_keep_the_subfolders_of_the_inputs(two_images, tmp_path, saved_model, capsys):
    (two_images / "sub").mkdir()
    (two_images / "b.jpg").rename(two_images / "sub" / "a.jpg")
    model = ["--model", saved_model]
    tokens = two_images / "tokens"
    decoded = tmp_path / "decoded"
    reconstructed = two_images / "reconstructed"
    assert svqvae("encode", two_images, "--output", tokens, *model) == 0
    assert svqvae("decode", tokens, "--output", decoded, *model) == 0
    for _ in range(2):  # the second run does not take its own results for inputs
        assert svqvae("reconstruct", two_images, "--output", reconstructed, *model, "--overwrite") == 0
    for folder, name in ((tokens, "a.safetensors"), (decoded, "a_x1.png"), (reconstructed, "a_x1.png")):
        assert visible(folder) == [name, "sub"]
        assert visible(folder / "sub") == [name]
    out = capsys.readouterr().out
    assert "\nsub/a.jpg" in out
    assert f"written  {two_images / 'tokens'} (token files: 2)\nwritten  {tmp_path / 'decoded'} (images: 2)\n" in out


@pytest.mark.parametrize(("command", "ending"), [("reconstruct", "_x1.png"), ("encode", ".safetensors")])
def test_output_that_cannot_be_written_is_an_error(two_images, out, saved_model, capsys, command, ending):
    file = two_images / "notes.txt"
    for output in (file, file / "under"):
        error = fails(capsys, command, two_images, "--output", output)
        assert f"--output must be a writable folder, but `{file}` is not" in error
    (out / f"a{ending}").mkdir(parents=True)
    error = fails(capsys, command, two_images, "--output", out, "--model", saved_model, "--overwrite")
    assert f"`{out / f'a{ending}'}` already exists, but no run of this command has written it" in error
    assert visible(out) == [f"a{ending}"]
    assert names(two_images) == ["a.png", "b.jpg", "notes.txt"]

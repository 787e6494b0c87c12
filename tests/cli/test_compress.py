import pytest
from cli_runner import fails, svqvae, visible
from conftest import make_tiny
from context_models import make_context_model

pytestmark = pytest.mark.usefixtures("few_windows", "process")
SCALES = ["--scales", "1", "0.5"]


@pytest.fixture
def model(tmp_path):
    """Folder of a tiny model with a context model."""
    make_tiny().save_pretrained(tmp_path / "model")
    make_context_model(make_tiny().codebook_fingerprint()).save_pretrained(tmp_path / "model")
    return ["--model", tmp_path / "model"]


@pytest.fixture
def tokens(two_images, tmp_path, model):
    """Folder of compressed token files."""
    assert svqvae("encode", two_images, "--output", tmp_path / "tokens", *SCALES, "--compress", *model) == 0
    return tmp_path / "tokens"


def test_compressed_files_decode_without_an_option(two_images, tmp_path, model, tokens):
    assert visible(tokens) == ["a.svqz", "b.svqz"]
    assert svqvae("encode", two_images, "--output", tmp_path / "plain", *SCALES, *model) == 0
    for name in ("tokens", "plain"):
        assert svqvae("decode", tmp_path / name, "--output", tmp_path / f"{name}_out", *model) == 0
    assert visible(tmp_path / "tokens_out") == ["a_x0.5.png", "a_x1.png", "b_x0.5.png", "b_x1.png"]
    for name in visible(tmp_path / "plain_out"):
        assert (tmp_path / "tokens_out" / name).read_bytes() == (tmp_path / "plain_out" / name).read_bytes()
    for stem in "ab":
        plain, compressed = tmp_path / "plain" / f"{stem}.safetensors", tokens / f"{stem}.svqz"
        assert compressed.stat().st_size < plain.stat().st_size


def test_other_context_models_are_refused(two_images, tmp_path, model, tokens, capsys):
    make_context_model(make_tiny().codebook_fingerprint(), width=25).save_pretrained(model[1])
    capsys.readouterr()
    error = fails(capsys, "decode", tokens / "a.svqz", "--output", tmp_path / "out", *model)
    assert "a.svqz` must be a token file that can be decoded, but is not: its context model must be" in error
    make_context_model("f" * 64).save_pretrained(model[1])
    argv = ["--output", tmp_path / "out", *model, "--compress"]
    assert "must be for the codebook of its model" in fails(capsys, "encode", two_images / "a.png", *argv)
    assert not (tmp_path / "out").exists() or visible(tmp_path / "out") == []


def test_a_model_without_a_context_model(two_images, tmp_path, saved_model, capsys):
    argv = ["encode", two_images, "--output", tmp_path / "out", "--model", saved_model, "--compress"]
    assert f"context model for its codebook, `context_model.safetensors`, but `{saved_model}`" in fails(capsys, *argv)


def test_info_of_a_compressed_file(tokens, capsys):
    capsys.readouterr()
    assert svqvae("info", tokens / "a.svqz") == 0
    out = capsys.readouterr().out
    assert "compressed token file" in out
    assert "57 x 35 pixels" in out
    assert "15 x 9 = 135 tokens, " in out

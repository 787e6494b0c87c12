import os
import pickle
import re

import pytest
import torch
from cli_runner import fails, names, svqvae
from conftest import ROOT, make_tiny
from generators import make_autoregressive, make_next_scale
from safetensors.torch import load_file, save_file

from svqvae_hf import SVQVAE

pytestmark = pytest.mark.usefixtures("few_windows", "process")
GOLDEN = ROOT / "tests" / "golden" / "svqvae_tiny.safetensors"


def read_facts(capsys):
    return dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines())


def test_convert_and_info(tmp_path, capsys):
    repo = tmp_path / "repo"
    assert svqvae("convert", GOLDEN, repo, "--variant", "fp16", "--license", "mit") == 0
    assert "svqvae" in capsys.readouterr().out
    assert {"README.md", "config.json", "diffusion_pytorch_model.fp16.safetensors"} <= set(names(repo))
    assert svqvae("info", repo) == 0
    facts = read_facts(capsys)
    assert facts["kind"] == "SVQVAE model"
    model = SVQVAE.from_pretrained(repo)
    assert (facts["f"], facts["encoder_ch_mult"]) == ("2", "[1, 2]")
    assert facts["parameters"] == f"{model.num_parameters():,}"
    assert model.codebook_fingerprint() in facts["codebook"]
    assert svqvae("info", GOLDEN) == 0
    facts = read_facts(capsys)
    assert facts["kind"].startswith("original checkpoint, SVQVAE")
    assert facts["encoder_ch_mult"] == "(1, 2)"


def test_convert_with_config_values_that_no_shape_tells(tmp_path):
    options = ["--network-range", "-1", "1", "--no-codebook-l2-norm"]
    assert svqvae("convert", GOLDEN, tmp_path / "repo", *options) == 0
    config = SVQVAE.from_pretrained(tmp_path / "repo").config
    assert tuple(config["network_range"]) == (-1, 1)
    assert config["codebook_l2_norm"] is False


def test_info_of_a_token_file(two_images, tmp_path, saved_model, capsys):
    svqvae("encode", two_images / "a.png", "--output", tmp_path, "--model", saved_model, "--scales", "2", "1")
    capsys.readouterr()
    assert svqvae("info", tmp_path / "a.safetensors") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split(None, 1) == ["kind", "token file"]
    assert any("57 x 35 pixels" in line for line in lines)
    assert lines[-3].split() == ["scales", "from", "image"]
    assert lines[-2].startswith("scale 2")
    assert "30 x 18 = 540 tokens" in lines[-2]
    assert f"{15 * 9 * 6 / (57 * 35):.4f} bits/pixel" in lines[-1]


def test_info_shows_tiles_only_if_the_image_had_several(two_images, tmp_path, saved_model, capsys):
    for tile_size, tiles in (("60", "none"), ("56", "56 pixels, overlap 8")):
        argv = [
            "--output",
            tmp_path,
            "--model",
            saved_model,
            "--tile-size",
            tile_size,
            "--overlap",
            "8",
            "--overwrite",
        ]
        svqvae("encode", two_images / "a.png", *argv)
        assert svqvae("info", tmp_path / "a.safetensors") == 0
        assert f"tiles     {tiles}" in capsys.readouterr().out.splitlines()


def test_info_of_a_folder_of_token_files(two_images, tmp_path, saved_model, capsys):
    svqvae("encode", two_images, "--output", tmp_path / "tokens", "--model", saved_model, "--scales", "1", "0.5")
    capsys.readouterr()
    assert svqvae("info", tmp_path / "tokens") == 0
    facts = read_facts(capsys)
    assert (facts["kind"], facts["files"], facts["scales"]) == ("folder of token files", "2", "0.5, 1")
    assert int(facts["tokens"]) == 15 * 9 + 8 * 4 + 10 * 6 + 5 * 3
    codebook = f"64 codes, sha256 {SVQVAE.from_pretrained(saved_model).codebook_fingerprint()}"
    assert facts["codebook"] == codebook
    make_tiny(codebook_size=32).save_pretrained(tmp_path / "other")
    svqvae("encode", two_images / "a.png", "--output", tmp_path / "tokens" / "more", "--model", tmp_path / "other")
    capsys.readouterr()
    svqvae("info", tmp_path / "tokens")
    other, ours = read_facts(capsys)["codebook"].split("; ")
    assert (other[:8], ours) == ("32 codes", codebook)


def test_info_of_a_token_set(two_images, tmp_path, saved_model, capsys):
    argv = ["--model", saved_model, "--workers", "0", "--crops", "centre", "--resolution", "16", "--num-parts", "1"]
    argv += ["--tile-size", "32", "--overlap", "8", "--scale-from", "latents"]
    svqvae("tokenize", two_images, tmp_path / "set", *argv)
    capsys.readouterr()
    assert svqvae("info", tmp_path / "set") == 0
    lines = capsys.readouterr().out.splitlines()
    facts = {line[:13].strip(): line[13:].strip() for line in lines}
    assert (facts["kind"], facts["rows"], facts["Parquet files"]) == ("token set", "2", "1")
    assert (facts["crops"], facts["resolution"], facts["scales"]) == ("centre", "16", "1")
    assert (facts["tiles"], facts["scales from"]) == ("32 pixels, overlap 8", "latents")
    assert facts["codebook"] == f"64 codes, sha256 {SVQVAE.from_pretrained(saved_model).codebook_fingerprint()}"


def test_info_of_pipelines_and_their_generators(tmp_path, capsys):
    make_autoregressive(class_names=["cat", "dog", "fox"]).save_pretrained(tmp_path / "ids")
    make_next_scale().save_pretrained(tmp_path / "scales")
    for folder, facts in {
        "ids": {
            "kind": "pipeline, SVQVAEAutoregressivePipeline",
            "language_model": "LlamaForCausalLM of transformers",
            "images": "16 x 32 pixels (width x height)",
            "classes": "3",
            "class_names": "['cat', 'dog', 'fox']",
            "scales": "[0.25, 0.5, 1.0]",
        },
        "scales": {
            "kind": "pipeline, SVQVAENextScalePipeline",
            "vqvae": "SVQVAE of svqvae_hf",
            "images": "16 x 16 pixels (width x height)",
            "classes": "3",
            "schedule": "1 x 1, 2 x 2, 3 x 3, 4 x 4",
        },
        "ids/language_model": {"kind": "LlamaForCausalLM", "vocab_size": "70"},
        "scales/transformer": {"kind": "NextScaleTransformer", "num_classes": "3"},
    }.items():
        assert svqvae("info", tmp_path / folder) == 0
        assert facts.items() <= read_facts(capsys).items()


def test_a_converted_file_is_not_converted_again(tmp_path, saved_model, capsys):
    file = f"{saved_model}/diffusion_pytorch_model.safetensors"
    message = f"`{file}` is already converted. Load its folder, `{saved_model}`, with `from_pretrained`."
    assert message in fails(capsys, "convert", file, tmp_path / "out")
    assert message in fails(capsys, "info", file)


def test_info_of_an_image_says_what_to_do_with_it(two_images, capsys):
    error = fails(capsys, "info", two_images / "a.png")
    assert f"got the image `{two_images / 'a.png'}`. Encode it with `svqvae encode`" in error


def test_info_of_a_missing_file_is_an_error(capsys):
    error = fails(capsys, "info", "none.pt")
    assert "there is no file or folder `none.pt`" in error
    assert "`org/repo:file`" in error
    assert "(see `svqvae info --help`)" in fails(capsys, "info")


class Code:
    def __reduce__(self):
        return os.system, ("touch HACKED",)


def test_code_in_a_checkpoint_is_not_run(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.pt").write_bytes(pickle.dumps({"model": Code()}))
    torch.save({"model": Code()}, tmp_path / "worse.pt")
    for name in ("bad.pt", "worse.pt"):
        assert name in fails(capsys, "convert", name, "repo")
        assert name in fails(capsys, "info", name)
    assert names(tmp_path) == ["bad.pt", "worse.pt"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: weights.pop("quantize.embedding.weight"), r"missing: .*quantize\.embedding\.weight"),
        (lambda weights: weights.update(extra=torch.zeros(1)), "unexpected: extra"),
        (
            lambda weights: weights.update({"quant_conv.bias": torch.zeros(3)}),
            r"misshapen: quant_conv\.bias \(3,\) instead of \(8,\)",
        ),
    ],
)
def test_weights_that_do_not_fit_are_named(tmp_path, capsys, change, message):
    weights = load_file(GOLDEN)
    change(weights)
    save_file(weights, tmp_path / "changed.safetensors")
    assert re.search(message, fails(capsys, "convert", tmp_path / "changed.safetensors", tmp_path / "repo"))
    assert names(tmp_path) == ["changed.safetensors"]


@pytest.mark.parametrize("source", ["none.pt", "empty.pt", "text.pt", "cut.safetensors", "folder"])
def test_source_that_is_not_a_checkpoint_is_an_error(tmp_path, capsys, source):
    (tmp_path / "empty.pt").touch()
    (tmp_path / "text.pt").write_text("Dear diary,")
    (tmp_path / "cut.safetensors").write_bytes(GOLDEN.read_bytes()[:1000])
    (tmp_path / "folder").mkdir()
    before = names(tmp_path)
    assert source in fails(capsys, "convert", tmp_path / source, tmp_path / "repo")
    assert source in fails(capsys, "info", tmp_path / source)
    assert names(tmp_path) == before


def test_output_must_be_a_folder(tmp_path, capsys):
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file" / "under"):
        fails(capsys, "convert", GOLDEN, out)
    assert names(tmp_path) == ["file"]

"""Conversion of FlexVAR's transformer to a pipeline repository."""

import hashlib
import stat

import pytest
import torch
from cli_runner import fails, names, svqvae
from conftest import make_tiny
from huggingface_hub import ModelCard
from next_scale_golden import GOLDEN, OUTPUTS, Golden

from svqvae_hf import SVQVAENextScalePipeline
from svqvae_hf.conversion.convert import convert


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """Folder of a tokenizer with f = 4 and the codebook of the golden transformer."""
    folder = tmp_path_factory.mktemp("tokenizer")
    vqvae = make_tiny(codebook_size=160, codebook_embed_dim=32, sample_size=16)
    vqvae.quantize.embedding.weight.data = OUTPUTS["codebook"].clone()
    vqvae.save_pretrained(folder)
    return folder


def test_conversion_is_a_whole_repository(tokenizer, tmp_path):
    out = tmp_path / "out"
    printed = convert(GOLDEN, out, tokenizer, license="mit")
    assert names(tmp_path) == ["out"]
    assert {"README.md", "model_index.json", "transformer/config.json", "vqvae/config.json"} <= {
        str(file.relative_to(out)) for file in out.rglob("*")
    }
    sha256 = hashlib.sha256(GOLDEN.read_bytes()).hexdigest()
    assert sha256 in printed
    assert printed.count("\n") == 3
    modes = {stat.S_IMODE(file.stat().st_mode) for file in out.rglob("*") if file.is_file()}
    assert len(modes) == 1

    pipeline = SVQVAENextScalePipeline.from_pretrained(out)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.trained_schedule == Golden("trained").sizes
    arguments = {"guidance_scale": 3, "temperature": 0, "output_type": "latent"}
    ids = pipeline(OUTPUTS["class_labels"].tolist(), **arguments).images
    assert torch.equal(ids, Golden("trained").split("greedy_var_cfg2")[-1])

    card = (out / "README.md").read_text()
    assert ModelCard(card).data.license == "mit"
    assert sha256 in card
    assert "SVQVAENextScalePipeline.from_pretrained" in card
    assert str(tmp_path) not in card + (out / "model_index.json").read_text()
    assert str(tokenizer.parent) not in card


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tokenizer": GOLDEN.parent / "flexvar_tiny.pth"}, r"have the codebook of `vqvae`, .*, but has 160 x 32"),
        ({"image_size": 18}, "`image_size` must be a positive multiple of f = 4, got 18"),
        ({"source": GOLDEN.parent / "flexvar_tiny.pth"}, "must be a checkpoint of FlexVAR's transformer"),
    ],
)
def test_wrong_arguments_leave_nothing(tokenizer, tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        convert(**({"source": GOLDEN, "out": tmp_path / "out", "tokenizer": tokenizer} | arguments))
    assert not list(tmp_path.iterdir())


def test_the_command(tokenizer, tmp_path, capsys):
    options = ("--tokenizer", tokenizer, "--image-size", 16, "--variant", "bf16")
    assert svqvae("convert", GOLDEN, "--output", tmp_path / "out", *options) == 0
    assert "(flexvar-transformer, sha256 " in capsys.readouterr().out
    words = ("convert", GOLDEN, "--output", tmp_path / "new")
    assert "with `--tokenizer`" in fails(capsys, *words)
    assert "need --tokenizer" in fails(capsys, *words, "--image-size", 16)
    assert "are for tokenizers" in fails(capsys, *words, "--tokenizer", tokenizer, "--network-range", 0, 1)
    assert names(tmp_path) == ["out"]
    full = SVQVAENextScalePipeline.from_pretrained(tmp_path / "out")
    half = SVQVAENextScalePipeline.from_pretrained(tmp_path / "out", variant="bf16", torch_dtype=torch.bfloat16)
    assert full.trained_schedule[-1] == (4, 4)
    assert torch.equal(half.transformer.head.weight, full.transformer.head.weight.bfloat16())

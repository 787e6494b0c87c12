"""Checkpoints of LlamaGen's language models: layouts, what the file does not tell, and faults."""

from pathlib import Path

import pytest
import torch

from svqvae_hf import SVQVAE
from svqvae_hf.loaders.checkpoints import read_checkpoint
from svqvae_hf.loaders.llamagen_checkpoints import read_llamagen

GRID = {"grid_size": 4, "num_attention_heads": 4}


def golden(kind: str, golden_dir: Path) -> Path:
    return golden_dir / f"llamagen_gpt_{kind}_tiny.pt"


def weights_of(kind: str, golden_dir: Path) -> dict[str, torch.Tensor]:
    return torch.load(golden(kind, golden_dir), weights_only=True)["model"]


def with_attributes(weights):
    """Tensors that `torch.save` stores with their type, as FSDP's may be."""
    typed = {name: tensor.clone() for name, tensor in weights.items()}
    for tensor in typed.values():
        tensor.attribute = 1
    return typed


LAYOUTS = {
    "bare": lambda weights: weights,
    "model": lambda weights: {"model": weights, "steps": 3, "optimizer": {}},
    "module": lambda weights: {"module": weights},
    "state_dict": lambda weights: {"state_dict": weights},
    "older": lambda weights: {"model": weights | {"freqs_cis": torch.zeros(16 + 1, 8, 2)}},
    "with attributes": with_attributes,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_layouts_have_the_same_weights(layout, golden_dir, tmp_path):
    weights = weights_of("c2i", golden_dir)
    torch.save(LAYOUTS[layout](weights), tmp_path / "file.pt")
    checkpoint = read_llamagen(tmp_path / "file.pt", **GRID)
    expected = read_llamagen(golden("c2i", golden_dir), **GRID)
    assert checkpoint.config == expected.config
    assert checkpoint.state_dict.keys() == expected.state_dict.keys()
    assert all(torch.equal(tensor, expected.state_dict[key]) for key, tensor in checkpoint.state_dict.items())


# layers, channels, feed-forward channels, condition, parameters of the released files
def test_grid_is_read_where_the_file_tells_it(golden_dir, tmp_path):
    content = LAYOUTS["older"](weights_of("c2i", golden_dir))
    torch.save(content, tmp_path / "file.pt")
    assert read_llamagen(tmp_path / "file.pt", num_attention_heads=4).config["grid_size"] == 4
    with pytest.raises(ValueError, match=r"`grid_size` must be 4, as `freqs_cis` in .* got 5\."):
        read_llamagen(tmp_path / "file.pt", grid_size=5, num_attention_heads=4)


def test_what_a_file_does_not_tell_is_asked_for(golden_dir):
    path = golden("c2i", golden_dir)
    with pytest.raises(ValueError, match=r"does not state the size of its images. Pass `grid_size`, .*`--image-size`"):
        read_llamagen(path, num_attention_heads=4)
    with pytest.raises(ValueError, match=r"2 layers of 64 channels, .*Pass `num_attention_heads`, or `--num-heads`"):
        read_llamagen(path, grid_size=4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_read_as_float32(dtype, golden_dir, tmp_path):
    weights = {name: tensor.to(dtype) for name, tensor in weights_of("c2i", golden_dir).items()}
    torch.save(weights, tmp_path / "file.pt")
    head = read_llamagen(tmp_path / "file.pt", **GRID).state_dict["lm_head.weight"]
    assert head.dtype == torch.float32
    assert torch.equal(head, weights["output.weight"].float())


# Faults of the file


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"layers.1.attention.wo.weight": None}, "missing: layers.1.attention.wo.weight"),
        ({"layers.7.ffn_norm.weight": torch.zeros(64)}, r"missing \(7\): layers.2.*unexpected: layers.7.ffn_norm"),
        ({"layers.1.attention.wqkv.weight": torch.zeros(96, 64)}, r"misshapen: .*\(96, 64\) instead of \(192, 64\)"),
        ({"output.weight": torch.full((256, 64), torch.nan)}, "not finite: output.weight"),
        ({"output.weight": torch.zeros(1, 64).expand(256, 64)}, "not dense: output.weight"),
        ({"output.weight": 3}, "not tensors: output.weight"),
    ],
)
def test_faults_are_named_in_one_error(changes, fault, golden_dir, tmp_path):
    weights = weights_of("c2i", golden_dir) | changes
    torch.save({name: value for name, value in weights.items() if value is not None}, tmp_path / "file.pt")
    with pytest.raises(ValueError, match=f"`.*file.pt` must hold exactly .*{fault}") as error:
        read_llamagen(tmp_path / "file.pt", **GRID)
    assert "\n" not in str(error.value)


def test_tokenizers_and_language_models_are_told_apart(golden_dir):
    with pytest.raises(ValueError, match=r"must be a checkpoint of a language model .*`SVQVAE.from_single_file`"):
        read_llamagen(golden_dir / "llamagen_tiny.pt", **GRID)
    with pytest.raises(ValueError, match=r"is a language model of LlamaGen.*`--tokenizer`"):
        read_checkpoint(golden("c2i", golden_dir), SVQVAE)

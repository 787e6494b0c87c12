"""Original checkpoints of FlexVAR's transformer."""

import pytest
import torch
from next_scale_golden import GOLDEN
from safetensors.torch import save_file

from svqvae_hf import NextScaleTransformer
from svqvae_hf.loaders.next_scale_checkpoints import read_next_scale_checkpoint


@pytest.fixture
def weights():
    return torch.load(GOLDEN, weights_only=True)


def test_the_config_comes_from_the_shapes():
    checkpoint = read_next_scale_checkpoint(GOLDEN, NextScaleTransformer)
    expected = {"num_layers": 2, "num_attention_heads": 4, "attention_head_dim": 16, "num_classes": 10}
    assert checkpoint.config == expected | {"codebook_size": 160, "codebook_embed_dim": 32, "position_size": 32}
    assert not {key for key in checkpoint.state_dict if "zero_k_bias" in key or "attn_bias" in key}


def test_all_layouts_hold_the_same_model(weights, tmp_path):
    expected = NextScaleTransformer.from_single_file(GOLDEN).state_dict()
    files = [tmp_path / "trainer.pth", tmp_path / "plain.safetensors"]
    trainer = {"config": {"patch_nums": (1, 2, 3, 4)}, "var_wo_ddp": weights}
    torch.save({"epoch": 1, "iter": 0, "trainer": trainer, "args": {"depth": 2}}, files[0])
    save_file({key: weight.contiguous() for key, weight in weights.items()}, files[1])
    for file in files:
        loaded = NextScaleTransformer.from_single_file(file)
        assert not loaded.training
        assert all(torch.equal(loaded.state_dict()[key], weight) for key, weight in expected.items())
    assert NextScaleTransformer.from_single_file(GOLDEN, dtype=torch.bfloat16).dtype == torch.bfloat16


def change(weights, **changes):
    """Replaces weights whose names have `__` for `.`, or removes them."""
    changed = weights | {key.replace("__", "."): value for key, value in changes.items()}
    return {key: value for key, value in changed.items() if value is not None}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pos_start": None, "head__bias": None}, r"missing \(2\): head\.bias, pos_start\."),
        ({"lvl_1L": torch.zeros(1, 30)}, r"unexpected: lvl_1L\."),
        ({"pos_start": torch.zeros(1, 4, 64)}, r"misshapen: pos_start \(1, 4, 64\) instead of \(1, 1, 64\)"),
        ({"class_emb__weight": torch.zeros(1, 64)}, "at least one class"),
        ({"blocks__0__attn__scale_mul_1H11": torch.zeros(1, 5, 1, 1)}, "multiple of its heads"),
        ({"head__bias": torch.full((160,), torch.nan)}, r"not finite: head\.bias"),
        ({"word_embed__weight": None}, "must be a checkpoint of FlexVAR's transformer"),
        ({f"blocks__{layer}__x": torch.zeros(1) for layer in range(300)}, "at most 256 layers, got 300"),
    ],
)
def test_faults_are_one_error(weights, tmp_path, changes, message):
    torch.save(change(weights, **changes), tmp_path / "wrong.pth")
    with pytest.raises(ValueError, match=message) as error:
        NextScaleTransformer.from_single_file(tmp_path / "wrong.pth")
    assert "\n" not in str(error.value)

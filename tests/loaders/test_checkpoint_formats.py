import argparse

import pytest
import torch
from safetensors.torch import load_file

from svqvae_hf import SVQVAE
from svqvae_hf.loaders.checkpoint_formats import FAMILIES, count_numbers, rename
from svqvae_hf.loaders.checkpoints import read_checkpoint

FILES = {
    "svqvae": "svqvae_tiny.safetensors",
    "llamagen": "llamagen_tiny.pt",
    "flexvar": "flexvar_tiny.pth",
    "lightning": "lightning_tiny.ckpt",
    "taming": "taming_tiny.ckpt",
}


def load_content(path):
    if path.suffix == ".safetensors":
        return {None: load_file(path)}
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, weights_only=True)


def test_beginnings_of_keys_are_renamed():
    pairs = [("a.b.", "c."), ("a.", "d.")]
    assert [rename(key, pairs) for key in ("a.b.x", "a.x", "x.a.b.")] == ["c.x", "d.x", "x.a.b."]


def test_different_numbers_are_counted():
    keys = ["a.0.x", "a.0.y", "a.10.x", "a.x", "b.1.x", "ab0.x", 3]
    assert count_numbers(keys, "a.") == 2
    assert count_numbers(keys, "c.") == 0


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_the_first_family_that_holds_a_file_is_its_own(family, golden_dir):
    content = load_content(golden_dir / FILES[family.name])
    assert next(each for each in FAMILIES if each.holds(content)) is family


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_names_of_weights_are_mapped_one_to_one(family, golden_dir):
    path = golden_dir / FILES[family.name]
    checkpoint = read_checkpoint(path, SVQVAE)
    num_levels = len(checkpoint.config["encoder_ch_mult"])
    theirs = {key: family.original_name(key, num_levels) for key in checkpoint.state_dict}
    weights = load_content(path)[family.container]
    assert set(theirs.values()) == {key for key in weights if not key.startswith(family.training_keys)}
    back = [(new, old) for old, new in family.name_pairs(num_levels)]
    assert all(rename(name.removeprefix(family.prefix), back) == key for key, name in theirs.items())


def test_all_families_have_a_golden_file():
    assert [family.name for family in FAMILIES] == list(FILES)

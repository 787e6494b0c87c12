import argparse

import pytest
import torch
from janus import FORMATS as JANUS
from janus import make_janus, save_janus
from safetensors.torch import load_file

from svqvae_hf import SVQVAE
from svqvae_hf.loaders.checkpoint_formats import CHECKPOINT_FORMATS
from svqvae_hf.loaders.checkpoints import read_checkpoint

FILES = {"svqvae": "svqvae_tiny.safetensors", "llamagen": "llamagen_tiny.pt"}
FILES |= {"lightning": "lightning_tiny.ckpt", "taming": "taming_tiny.ckpt"}
each_format = pytest.mark.parametrize("format", CHECKPOINT_FORMATS, ids=lambda format: format.name)


def locate(format, golden_dir, tmp_path):
    return save_janus(tmp_path, format.name) if format.name in JANUS else golden_dir / FILES[format.name]


def load_content(path):
    if path.suffix == ".safetensors":
        return {None: load_file(path)}
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, weights_only=True)


@each_format
def test_first_format_that_matches_is_right(format, golden_dir, tmp_path):
    content = load_content(locate(format, golden_dir, tmp_path))
    assert next(each for each in CHECKPOINT_FORMATS if each.matches(content)) is format


@each_format
def test_names_map_one_to_one_to_the_file(format, golden_dir, tmp_path):
    path = locate(format, golden_dir, tmp_path)
    checkpoint = read_checkpoint(path, SVQVAE)
    num_levels = len(checkpoint.config["encoder_ch_mult"])
    names = {key for key in load_content(path)[format.container] if not key.startswith(format.training_keys)}
    assert sorted(format.to_original(key, num_levels) for key in checkpoint.state_dict) == sorted(names)


def test_every_format_has_a_file():
    assert [format.name for format in CHECKPOINT_FORMATS] == [*FILES, *JANUS]


@pytest.mark.usefixtures("no_grad")
@pytest.mark.parametrize("name", JANUS)
def test_janus_equals_transformers(name, tmp_path):
    model = SVQVAE.from_single_file(save_janus(tmp_path, name), pixel_range=(-1, 1))
    original = make_janus(6)
    sample = torch.rand(2, 3, 24, 24) * 2 - 1
    ids = original.encode(sample).image_tokens.view(2, 6, 6)
    assert len(ids.unique()) > 5
    assert torch.equal(model.encode_tokens(sample), ids)
    decoded = model.decode(ids).sample
    torch.testing.assert_close(decoded, original.decode(ids.flatten(1)), atol=1e-4, rtol=1e-4)

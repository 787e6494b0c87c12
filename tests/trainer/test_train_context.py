import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import train_context
from conftest import make_tiny
from context_models import make_context_model
from PIL import Image, ImageOps
from token_set_parts import load, save_photos, tokenize

from svqvae_hf.token_sets.settings import read_settings, row_tokens
from svqvae_hf.tokens.context_model import ContextModel
from svqvae_hf.tokens.neighbourhood import context, pad_ids
from svqvae_hf.tokens.token_files import token_file_content
from svqvae_hf.trainer.scripts import one_line_errors


def make_codes(codes=100):
    torch.manual_seed(0)
    return F.normalize(torch.randn(codes, 8), dim=1)


def test_the_network_computes_the_integers_of_the_context_model():
    network = train_context.ContextNetwork(make_codes(), torch.rand(100), hidden=24, features=16)
    model = network.to_integers("0" * 64)
    ids = torch.randint(100, (5, 7)).numpy()
    rows, columns = (each.ravel() for each in np.indices(ids.shape))
    inputs = context(model.inputs_of_ids, pad_ids(ids, 100), pad_ids(ids[:3, :4], 100), rows, columns)
    groups = model.rank[ids.ravel()] // model.network.num_members
    logits = network.logits(torch.from_numpy(inputs), torch.from_numpy(groups))
    hidden = model.network.hidden(inputs)
    expected = model.network.group_logits(hidden), model.network.member_logits(hidden, groups)
    for found, by_numpy in zip(logits, expected, strict=True):
        assert np.array_equal(found.detach().numpy(), by_numpy)
        assert found.std() > 100


def test_codes_of_a_group_are_similar():
    codes = make_codes(1000).numpy()
    order = train_context.order_codes(codes, group_size=32)
    assert sorted(order) == list(range(1000))
    assert np.mean([codes[order[i : i + 32]].var(0).sum() for i in range(0, 1000, 32)]) < 0.6 * codes.var(0).sum()


@pytest.mark.slow
@pytest.mark.usefixtures("few_windows")
def test_a_trained_context_model_takes_fewer_bits_than_a_count(tmp_path, monkeypatch, capsys):
    make_tiny().save_pretrained(tmp_path / "model")
    token_set = tmp_path / "tokens"
    tokenize(make_tiny(), save_photos(tmp_path / "photos"), token_set, scales=[0.5, 1.0])
    held_out = tmp_path / "held_out"
    other_photos = save_photos(tmp_path / "other")
    for path in other_photos.glob("?.png"):
        ImageOps.invert(Image.open(path)).save(path)
    tokenize(make_tiny(), other_photos, held_out, scales=[0.5, 1.0])
    argv = [str(tmp_path / "model"), str(token_set), "--held_out", str(held_out)]
    options = ["--max_steps", "40", "--hidden", "32", "--features", "16"]
    monkeypatch.setattr(sys, "argv", ["train_context.py", *argv, *options])
    monkeypatch.setattr(train_context, "WARM_UP", 5)
    train_context.main()
    assert f"{held_out}: finest alone " in capsys.readouterr().out
    trained = ContextModel.from_pretrained(tmp_path / "model")
    (row,) = load(token_set).select([4])
    tokens = row_tokens(row, read_settings(token_set))
    chunk = trained.compress(tokens.ids[1].numpy(), tokens.ids[0].numpy())
    assert 8 * len(chunk) < 6 * tokens.ids[1].numel()
    assert len(token_file_content(tokens, trained)) < len(token_file_content(tokens))
    argv[-1] = str(token_set)
    monkeypatch.setattr(sys, "argv", ["train_context.py", *argv, *options, "--overwrite"])
    with pytest.raises(ValueError, match="`--held_out` must hold images that are not trained on"):
        train_context.main()
    make_tiny(codebook_size=32).save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="must hold ids of MODEL, but has others"):
        train_context.main()


def test_a_compressed_token_set_is_refused_by_its_name(tmp_path):
    model = make_tiny()
    photos = save_photos(tmp_path / "photos")
    context_model = make_context_model(model.codebook_fingerprint())
    tokenize(model, photos, tmp_path / "tokens", scales=[1.0], context_model=context_model)
    with pytest.raises(ValueError, match=r"/tokens` must hold plain ids, but they are compressed. Make it without"):
        train_context.read_pyramids(str(tmp_path / "tokens"), model)


@pytest.mark.parametrize("is_there_at_the_start", [True, False])
def test_a_context_model_is_replaced_only_with_overwrite(is_there_at_the_start, tmp_path, monkeypatch, capsys):
    model = make_tiny()
    model.save_pretrained(tmp_path)
    old = make_context_model(model.codebook_fingerprint())
    pyramids = [[pad_ids(np.zeros((4, 4), np.int64), 64)]]

    def read(token_set, model):
        old.save_pretrained(tmp_path)  # as another run does meanwhile
        return pyramids

    monkeypatch.setattr(train_context, "read_pyramids", read)
    if is_there_at_the_start:
        old.save_pretrained(tmp_path)
    command = ["train_context.py", str(tmp_path), "tokens", "--max_steps", "1", "--hidden", "8", "--features", "8"]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as stop, one_line_errors():
        train_context.main()
    assert stop.value.code == 2
    assert "context_model.safetensors` exists." in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", [*command, "--max_steps=2"])
    with pytest.raises(ValueError, match="`--max_steps` must be given once, but is given twice"):
        train_context.main()
    assert ContextModel.from_pretrained(tmp_path).fingerprint == old.fingerprint
    monkeypatch.setattr(sys, "argv", [*command, "--overwrite"])
    train_context.main()
    assert ContextModel.from_pretrained(tmp_path).fingerprint != old.fingerprint

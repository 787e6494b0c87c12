"""Token sets whose rows are compressed."""

import numpy as np
import pytest
import torch
from cli_runner import fails, svqvae
from conftest import make_tiny
from context_models import make_context_model
from PIL import Image
from token_set_parts import load, make_tiled, save_photos, tokenize

from svqvae_hf.token_sets import shards
from svqvae_hf.token_sets.settings import read_settings, row_tokens
from svqvae_hf.trainer.data.token_sequences import TokenSource

pytestmark = pytest.mark.usefixtures("few_windows", "cache")
MODEL = make_context_model(make_tiny().codebook_fingerprint())


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return save_photos(tmp_path_factory.mktemp("images") / "photos")


def test_rows_hold_the_ids_of_a_plain_set(photos, tmp_path):
    for name, context_model in (("plain", None), ("compressed", MODEL)):
        tokenize(make_tiled(), photos, tmp_path / name, context_model=context_model)
    plain, settings = read_settings(tmp_path / "plain"), read_settings(tmp_path / "compressed")
    assert (plain.context_model, settings.context_model) == (None, MODEL.fingerprint)
    rows = load(tmp_path / "compressed")
    assert not {*rows.column_names} & {"ids_0", "ids_1"}
    numbers = [5, 0, 3]  # of rows, in any order
    for row, plain_row in zip(rows.select(numbers), load(tmp_path / "plain").select(numbers), strict=True):
        tokens, expected = row_tokens(row, settings, MODEL), row_tokens(plain_row, plain)
        assert tokens.scales == expected.scales
        assert all(torch.equal(*grids) for grids in zip(tokens.ids, expected.ids, strict=True))
    manifests = [(tmp_path / name / "manifest.jsonl").read_text() for name in ("plain", "compressed")]
    assert len({manifest.partition('"ids": ')[2].partition(",")[0] for manifest in manifests}) == 1


@pytest.mark.slow
def test_commands(photos, tmp_path, capsys):
    make_tiny().save_pretrained(tmp_path / "model")
    MODEL.save_pretrained(tmp_path / "model")
    argv = ["--model", tmp_path / "model"]
    options = [*argv, "--scales", "0.5", "1", "--workers", "0"]
    for name, compress in (("plain", []), ("compressed", ["--compress"])):
        svqvae("tokenize", photos, "--output", tmp_path / name, *options, *compress)
        assert svqvae("decode", tmp_path / name, "--output", tmp_path / f"{name}_out", *argv) == 0
    for path in (tmp_path / "plain_out").glob("*.png"):
        with Image.open(path) as image, Image.open(tmp_path / "compressed_out" / path.name) as other:
            assert np.array_equal(image, other)
    make_context_model(MODEL.codebook_fingerprint, width=25).save_pretrained(tmp_path / "model")
    capsys.readouterr()
    error = fails(capsys, "decode", tmp_path / "compressed", "--output", tmp_path / "other", *argv)
    assert "its context model must be" in error


def test_compressed_rows_are_not_trained_on_nor_decoded_without_their_model(photos, tmp_path):
    tokenize(make_tiled(), photos, tmp_path / "tokens", context_model=MODEL)
    with pytest.raises(ValueError, match="rows of the token set must not be compressed, .* without --compress"):
        TokenSource(str(tmp_path / "tokens"), None)
    row, settings = load(tmp_path / "tokens")[0], read_settings(tmp_path / "tokens")
    with pytest.raises(ValueError, match="it is compressed, so `context_model` must be its context model, got None"):
        row_tokens(row, settings)
    with pytest.raises(ValueError, match="`tokens` of a row must be bytes to match its settings, got None"):
        row_tokens({}, settings, MODEL)


def test_compressed_ids_count_once_for_the_size_of_a_file(photos, tmp_path, monkeypatch):
    tokenize(make_tiled(), photos, tmp_path / "tokens", context_model=MODEL, num_parts=1)
    size = 0
    for row in load(tmp_path / "tokens"):
        size += shards.ROW_BYTES
        size += sum(len(value) for value in row.values() if isinstance(value, str | bytes))
    # A file is full at the last row, so there is one file.
    monkeypatch.setattr(shards, "ROW_GROUP_BYTES", 1)
    monkeypatch.setattr(shards, "SHARD_BYTES", size)
    tokenize(make_tiled(), photos, tmp_path / "full", context_model=MODEL, num_parts=1)
    assert len(list((tmp_path / "full").rglob("*.parquet"))) == 1

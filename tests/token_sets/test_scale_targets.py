"""Token sets whose rows have ids at one scale each, chosen by quality or by bits."""

import json

import datasets
import numpy as np
import pytest
import torch
from cli_runner import fails, svqvae
from PIL import Image
from token_set_parts import SIZES, load, make_tiled, save_photos, tokenize

from svqvae_hf.token_sets.decoding import detokenize_set
from svqvae_hf.token_sets.settings import read_settings, row_tokens
from svqvae_hf.tokens.image_tokens import decode_image, encode_image
from svqvae_hf.tokens.scale_choice import choose_by_bits, encode_to_psnr
from svqvae_hf.trainer.data.token_sequences import TokenSource

SCALES = [1.0, 0.25, 0.5]


def encode_to_bits(model, image, scales, max_bits, scale_from):
    scale, fits = choose_by_bits(model, image.height, image.width, scales, max_bits)
    return encode_image(model, image, scale, scale_from), fits


TARGETS = {"min_psnr": (encode_to_psnr, 8.85), "max_bits": (encode_to_bits, 530.0)}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache, and no Hub."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return save_photos(tmp_path_factory.mktemp("images") / "photos")


@pytest.mark.usefixtures("few_windows")
@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize("target", TARGETS)
def test_rows_are_those_of_one_image_at_a_time(photos, tmp_path, target, batch_size):
    encode, limit = TARGETS[target]
    model = make_tiled()
    options = {"scales": SCALES, "scale_from": "image", "batch_size": batch_size, target: limit}
    tokenize(model, photos, tmp_path / "tokens", **options)
    settings, rows = read_settings(tmp_path / "tokens"), load(tmp_path / "tokens")
    assert (settings.scales, getattr(settings, target)) == (tuple(SCALES), limit)
    assert len(set(rows["scale"])) > 1
    assert [name for name in rows.column_names if name.startswith("ids")] == ["ids_0"]
    detokenize_set(model, tmp_path / "tokens", tmp_path / "images")
    for number, row in enumerate(rows):
        with Image.open(photos / row["key"]) as image:
            expected, _ = encode(model, image, SCALES, limit, "image")
        tokens = row_tokens(row, settings)
        assert tokens.scales == expected.scales == (row["scale"],)
        assert torch.equal(tokens.ids[0], expected.ids[0])
        with Image.open(tmp_path / "images" / f"{number:08}_x{row['scale']:g}.png") as image:
            assert np.array_equal(image, decode_image(model, expected)[0])
    assert len(list((tmp_path / "images").iterdir())) == len(SIZES)
    (part,) = (json.loads(line) for line in (tmp_path / "tokens" / "manifest.jsonl").read_text().splitlines())
    assert part["ids"] == sum(map(len, rows["ids_0"]))


def test_readers_refuse_a_scale_that_is_not_of_the_set_and_trainers_the_set(photos, tmp_path):
    tokenize(make_tiled(), photos, tmp_path / "tokens", scales=SCALES, max_bits=530)
    settings, row = read_settings(tmp_path / "tokens"), load(tmp_path / "tokens")[0]
    for scale in (0.75, None, "1", [1.0], float("nan")):
        with pytest.raises(ValueError, match=r"`scale` of a row must be one of the set's, 1, 0.25, 0.5, got "):
            row_tokens({**row, "scale": scale}, settings)
    with pytest.raises(ValueError, match="All rows of the token set must have the same scales, but each has one of"):
        TokenSource(str(tmp_path / "tokens"), None)
    record = json.loads((tmp_path / "tokens" / "svqvae_tokens.json").read_text())
    for name, value in (("min_psnr", 20.0), ("max_bits", 0), ("max_bits", True)):
        (tmp_path / "svqvae_tokens.json").write_text(json.dumps(record | {name: value}))
        with pytest.raises(ValueError, match="`max_bits` of a token set is out of range"):
            read_settings(tmp_path)


def test_command_and_its_card(photos, tmp_path, capsys):
    argv = ["tokenize", photos / "0.png", tmp_path / "tokens", "--min-psnr", "20"]
    assert "--min-psnr and --max-bits choose among at least two scales" in fails(capsys, *argv)
    crops = ["--crops", "centre", "--resolution", "16", "--max-images", "1"]
    assert "Pass them, such as --sides 8 16 32" in fails(capsys, *argv, *crops, "--sides", "2")
    assert svqvae(*argv[:2], tmp_path / "by-sides", *argv[3:], *crops, "--sides", "1", "2") == 0
    assert svqvae(*argv, "--scales", "0.25", "0.5", "1") == 0
    card = (tmp_path / "tokens" / "README.md").read_text()
    assert "| scale of a row | the smallest that reaches 20 dB, or else the largest |\n" in card
    assert "| `ids_0` | ids at the scale of the row, row by row |\n" in card
    assert "| `scale` | scale of the ids |\n" in card
    assert svqvae("info", tmp_path / "tokens") == 0
    assert "the smallest that reaches 20 dB, or else the largest" in capsys.readouterr().out

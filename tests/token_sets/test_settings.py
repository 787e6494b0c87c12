import json
import re

import datasets
import numpy as np
import pytest
from conftest import make_tiny
from PIL import Image
from token_set_parts import SCALES, SIZES, load, make_other, make_tiled, save_photos, tokenize

from svqvae_hf.models.checks import check_same_codebook
from svqvae_hf.token_sets.decoding import detokenize_set
from svqvae_hf.token_sets.settings import TokenSettings, read_settings, row_tokens
from svqvae_hf.tokens.image_tokens import decode_image, encode_image

pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return save_photos(tmp_path_factory.mktemp("images") / "photos")


@pytest.fixture(scope="module")
def token_set(photos, tmp_path_factory):
    """A token set to read, not to change."""
    out = tmp_path_factory.mktemp("sets") / "tokens"
    tokenize(make_tiled(), photos, out)
    return out


def test_settings_and_features(token_set):
    settings = read_settings(token_set)
    expected = {"model": "org/tiny", "scales": (0.5, 1.0), "f": 4, "codebook_size": 64, "tile_size": 32, "overlap": 8}
    expected |= {"crops": "whole", "resolution": None, "scale_from": "image"}
    assert settings == TokenSettings(**expected, codebook_fingerprint=make_tiny().codebook_fingerprint())
    ids = datasets.List(datasets.Value("uint16"))
    numbers = {"height": datasets.Value("int32"), "width": datasets.Value("int32")}
    rows = load(token_set)
    assert rows.features == {"ids_0": ids, "ids_1": ids, **numbers, "key": datasets.Value("string")}
    for row in rows:
        for index, scale in enumerate(settings.scales):
            height, width = settings.grid(scale, row["height"], row["width"])
            assert height * width == len(row[f"ids_{index}"])


@pytest.mark.slow
def test_detokenized_images_equal_encoding_and_decoding(photos, few_windows, tmp_path):
    tiled, model = make_tiled(), make_tiny()
    tokenize(tiled, photos, tmp_path / "tokens")
    detokenize_set(model, tmp_path / "tokens", tmp_path / "images")
    assert len(list((tmp_path / "images").iterdir())) == 12
    for i in range(len(SIZES)):
        with Image.open(photos / f"{i}.png") as image:
            expected = decode_image(tiled, encode_image(tiled, image, SCALES))
        for scale, picture in zip(SCALES, expected, strict=True):
            with Image.open(tmp_path / "images" / f"{i}_x{scale:g}.png") as found:
                assert np.array_equal(found, picture)
    detokenize_set(model, tmp_path / "tokens", tmp_path / "first", max_images=1)
    assert sorted(path.name for path in (tmp_path / "first").iterdir()) == ["0_x0.5.png", "0_x1.png"]


def test_another_codebook_raises(token_set, tmp_path):
    coarse = make_tiny(encoder_ch_mult=(1,) * 5, decoder_ch_mult=(1,) * 5)  # the set's tiles do not fit it either
    for model in (make_other(), coarse):
        with pytest.raises(ValueError, match="the ids must be of the model's codebook, with fingerprint"):
            detokenize_set(model, token_set, tmp_path / "images")
        with pytest.raises(ValueError, match="the ids must be of the model's codebook, with fingerprint"):
            check_same_codebook(model, read_settings(token_set))
    assert not (tmp_path / "images").exists()


def test_reading_settings_of_something_else_raises(token_set, photos, tmp_path):
    with pytest.raises(FileNotFoundError, match="a token set must be a folder with svqvae_tokens.json"):
        read_settings(photos)
    good = json.loads((token_set / "svqvae_tokens.json").read_text())
    file = tmp_path / "svqvae_tokens.json"
    for change, message in (
        ({"format_version": 2}, "must have format version 1"),
        ({"scales": [1e308]}, "a scale must be a number above 0"),
        ({"scale_from": "pixels"}, "`scale_from` must be one of latents, image, got 'pixels'"),
        ({"overlap": None}, "`overlap` must be an integer of at least 0 and under .*, got None"),
    ):
        file.write_text(json.dumps(good | change))
        with pytest.raises(ValueError, match=message):
            read_settings(tmp_path)
    file.write_text(json.dumps({"format_version": 1}))
    with pytest.raises(ValueError, match="token set of this version: it must also have scales, f, .*, resolution"):
        read_settings(tmp_path)
    file.write_text("[" * 100_000)
    with pytest.raises(ValueError, match="svqvae_tokens.json` must hold a JSON object, but is damaged: .* Delete it"):
        read_settings(tmp_path)


def test_rows_that_do_not_match_the_settings_raise(token_set):
    settings, row = read_settings(token_set), load(token_set)[0]
    with pytest.raises(ValueError, match="a row of 20 x 33 pixels has 45 ids at scale 1, not 44"):
        row_tokens({**row, "ids_1": row["ids_1"][1:]}, settings)
    with pytest.raises(ValueError, match=r"needs integer ids in \[0, 64\)"):
        row_tokens({**row, "ids_1": [64] * 45}, settings)
    rule = "a row must have integers as height, width, ids_0, ids_1 to match its settings, but has "
    for name, value in (("ids_1", None), ("ids_1", [0.5] * 45), ("height", 20.0)):
        with pytest.raises(ValueError, match=rf"{rule}.*\b{name} = {re.escape(f'{value!r:.40}')}"):
            row_tokens({**row, name: value}, settings)

import math
import warnings

import numpy as np
import pytest
import torch
from conftest import make_tiny

from svqvae_hf.models.checks import check_integer, check_number

pytestmark = pytest.mark.usefixtures("few_windows")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"norm_num_groups": 3}, "`norm_num_groups` must divide `base_channels`, but 3 does not divide 8"),
        ({"decoder_ch_mult": (1, 2)}, "equally many levels, .* 3 and 2"),
        ({"pixel_range": (1, 0)}, r"`pixel_range` must be two finite numbers \(low, high\).*\(1, 0\)"),
        ({"network_range": "ab"}, "`network_range` must be two finite numbers .* got 'ab'"),
        ({"base_channels": "eight"}, "`base_channels` must be an integer of at least 1 and .*, got 'eight'"),
        ({"encoder_ch_mult": None}, "`encoder_ch_mult` .* got None"),
        ({"encoder_ch_mult": (1, 0, 2)}, r"`encoder_ch_mult` .* got \(1, 0, 2\)"),
        ({"dropout_p": "a little"}, r"`dropout_p` must be in \[0, 1\], got 'a little'"),
        ({"commit_loss_beta": None}, "`commit_loss_beta` must be a finite number, got None"),
        ({"scaling_factor": [1]}, r"`scaling_factor` must be a finite number, got \[1\]"),
        ({"num_res_blocks": 10**9}, "at most 64 residual blocks per level"),
        ({"encoder_ch_mult": (1,) * 999, "decoder_ch_mult": (1,) * 999}, "at most 16 levels"),
    ],
)
def test_wrong_config_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        make_tiny(**config)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: m.encode(torch.rand(1, 1, 8, 8)), ValueError, r"\(batch, 3, height, width\).*\(1, 1, 8, 8\)"),
        (lambda m: m.encode(torch.zeros(1, 3, 8, 8, dtype=torch.uint8)), TypeError, "got torch.uint8"),
        (lambda m: m.decode(torch.rand(1, 3, 4, 4)), ValueError, "Pass the output of `encode`, not an image"),
        (lambda m: m.decode(torch.zeros(4, dtype=torch.int64)), ValueError, r"\(batch, h, w\).*\(4,\)"),
        (lambda m: m.decode_tokens(torch.full((1, 2, 2), 64)), ValueError, r"\[0, 64\).*\[64, 64\]"),
        (lambda m: m.decode_tokens(torch.rand(1, 8, 2, 2)), TypeError, "integer type, got torch.float32"),
        (lambda m: m(torch.rand(1, 3, 8, 8), patch_nums=[1], tile_size=0), ValueError, "positive multiple"),
        (lambda m: m(torch.rand(1, 3, 8, 8), scales=[0]), ValueError, "above 0, got 0"),
        (lambda m: m(torch.rand(1, 3, 8, 8), False), TypeError, "must be a number or a list of numbers, got False"),
        (lambda m: m.encode_scales(torch.rand(1, 3, 8, 8), [1, -1]), ValueError, "above 0, got -1"),
        (lambda m: m(torch.rand(1, 3, 8, 8), scales=[math.inf]), ValueError, "finite .* got inf"),
        (lambda m: m(torch.rand(1, 3, 8, 8), scales=[1], patch_nums=[1]), ValueError, "got both"),
        (lambda m: m(torch.rand(1, 3, 8, 8), scale_from="pixels"), ValueError, "of latents, image, got 'pixels'"),
        (lambda m: m.enable_tiling(62, 8), ValueError, "f = 4, got 62. The nearest is 64"),
        (lambda m: m.enable_tiling(64, 6), ValueError, "f = 4 .* got 6. The nearest is 8"),
        (lambda m: m.enable_tiling(64, 32), ValueError, "less than half .* got 32. The nearest is 28"),
        (lambda m: m(torch.rand(1, 3, 8, 8), tile_size="16"), ValueError, "integer number of pixels, got '16'"),
        (
            lambda m: m.encode_tokens(torch.rand(1, 3, 8, 8), tiles=(62, 8)),
            ValueError,
            "f = 4, got 62. The nearest is 64",
        ),
        (
            lambda m: m.decode_tokens(torch.zeros(1, 2, 2, dtype=int), (64, 32)),
            ValueError,
            "half .* got 32. The nearest",
        ),
        (lambda m: m.encode_tokens(torch.rand(1, 3, 8, 8), []), ValueError, "at least one scale, got none"),
        (lambda m: m.decode(m.encode(torch.rand(1, 3, 8, 8))), TypeError, "got SVQVAEEncoderOutput. Pass its `.lat"),
        (lambda m: m.decode(torch.zeros(30, dtype=int), shape=(1, 5, 6)), ValueError, r"be \(batch, h, w, 8\) for as"),
        (lambda m: m.decode(torch.zeros(30, dtype=int), shape=(1, 5, 6, 4)), ValueError, r"got \(1, 5, 6, 4\) for 30"),
        (lambda _: make_tiny(codebook_l2_norm="false"), ValueError, "must be True or False, got 'false'"),
    ],
)
def test_errors_say_what_must_hold_and_what_came(tiny_model, call, error, message):
    with pytest.raises(error, match=message):
        call(tiny_model)


@pytest.mark.parametrize("pixel_range", [(0, 1), (-1, 1), (0, 255)])
def test_samples_in_another_range_warn_once(pixel_range, no_grad):
    model = make_tiny(pixel_range=pixel_range)
    low, high = pixel_range
    unit = torch.rand(1, 3, 8, 8)
    calls = (model.encode, model.encode_tokens, model, lambda sample: model.encode_tokens(sample, [2], "image"))
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("default")
        for overshot in (unit * 1.2, unit * 1.2 - 0.2):
            for call in calls:
                call(low + overshot * (high - low))
    assert not found
    for wrong in (2 * unit - 1, 255 * unit, (unit - 0.45) / 0.225):
        for call in calls:
            with pytest.warns(UserWarning, match=rf"far outside \({low}, {high}\) \(`pixel_range`\).*SVQVAEImage"):
                call(low + wrong * (high - low))
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("default")
        for wrong in (unit - 1, unit - 2, unit + 1):
            model.encode(low + wrong * (high - low))
    assert len(found) == 1
    model.train()(low + 2 * unit * (high - low))


@pytest.mark.parametrize(
    ("low", "high", "advice"),
    [
        (-1, 1, r"`from_pretrained\(..., pixel_range=\(-1, 1\)\)`"),
        (0, 255, r"`from_pretrained\(..., pixel_range=\(0, 255\)\)`"),
        (-2.1, 2.6, r"scale them to \(0.0, 1.0\)"),  # normalised by ImageNet's mean and deviation
    ],
)
def test_the_warning_advises_the_range_of_the_sample(tiny_model, no_grad, low, high, advice):
    with pytest.warns(UserWarning, match=advice):
        tiny_model.encode(torch.linspace(low, high, 192).view(1, 3, 8, 8))


@pytest.mark.parametrize(
    ("limits", "value", "message"),
    [
        ({"least": 0, "most": 1}, 1.5, r"`x` must be in \[0, 1\], got 1.5"),
        ({"least": 0, "most": 1}, math.nan, r"in \[0, 1\], got nan"),
        ({"above": 0, "most": 1}, 0, "above 0 and at most 1, got 0"),
        ({"above": 0}, -1, "above 0, got -1"),
        ({"least": 1}, 0, "at least 1, got 0"),
        ({"most": 8}, 9, "at most 8, got 9"),
        ({}, "2", "a finite number, got '2'"),
        ({}, math.inf, "a finite number, got inf"),
        ({"least": 0}, True, "at least 0, got True"),
    ],
)
def test_numbers_out_of_range_are_refused(limits, value, message):
    with pytest.raises(ValueError, match=message):
        check_number("x", value, **limits)


def test_numbers_of_numpy_are_numbers():
    check_number("x", np.float32(0.5), above=0, most=1)
    check_number("x", np.int64(5), least=5)
    check_integer("x", np.int64(5), least=5)
    with pytest.raises(ValueError, match="`x` must be an integer of at least 6 and under"):
        check_integer("x", np.int64(5), least=6)
    with pytest.raises(ValueError, match="`x` must be an integer .* got 5.0"):
        check_integer("x", 5.0)


@pytest.mark.parametrize("scales", [np.array(0.5), np.float32(0.5), torch.tensor(0.5)])
def test_a_scale_may_be_an_array_without_dimensions(tiny_model, scales):
    sample = torch.rand(1, 3, 16, 16)
    assert torch.equal(tiny_model.encode_tokens(sample, scales), tiny_model.encode_tokens(sample, 0.5))
    assert torch.equal(tiny_model(sample, scales).sample, tiny_model(sample, 0.5).sample)


@pytest.mark.usefixtures("no_grad")
def test_a_model_of_signed_images_warns_if_no_value_is_negative():
    model, unit = make_tiny(pixel_range=(-1, 1)), torch.rand(1, 3, 8, 8)
    with pytest.warns(UserWarning, match=r"no value below 0, .* `SVQVAEImageProcessor.from_model\(vqvae\)`"):
        model.encode_tokens(unit)
    for sample in (unit * 2 - 1, unit - 1, torch.ones(1, 3, 8, 8)):  # white is an image
        model.encode_tokens(sample)

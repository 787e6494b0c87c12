"""The bundled model on the bundled photograph, which it was not trained on."""

import pytest
import torch
from tiles import measure

from svqvae_hf import DEFAULT_MODEL, SVQVAE, SVQVAEImageProcessor


@pytest.fixture(scope="module")
def model():
    return SVQVAE.from_pretrained(DEFAULT_MODEL).eval()


def test_it_is_small_and_of_the_documented_kind(model):
    assert sum(file.stat().st_size for file in DEFAULT_MODEL.iterdir()) <= 8e6
    assert (model.f, model.config["codebook_size"], model.config["sample_size"]) == (8, 16384, 256)
    assert model.dtype == torch.float32
    assert all(weight.isfinite().all() for weight in model.state_dict().values())


def test_tiles_cost_nothing_that_is_seen(model, photo):
    large = photo.resize((1056, 704))  # one as large as a tile's sample is taken whole
    figures = measure(model, SVQVAEImageProcessor()(large)["pixel_values"])
    assert figures["PSNR whole, dB"] > 25
    assert figures["PSNR tiled, dB"] > figures["PSNR whole, dB"] - 0.4
    assert figures["agreement, dB"] > 38
    assert figures["error along tile borders"] < 1.2
    assert figures["error along image border"] < 1.3


@pytest.mark.usefixtures("no_grad")
def test_half_precision_reconstructs_as_well(model, photo):
    pixels = SVQVAEImageProcessor()(photo.crop((100, 50, 228, 178)))["pixel_values"]
    error = (model(pixels).sample - pixels).square().mean()
    half = SVQVAE.from_pretrained(DEFAULT_MODEL, torch_dtype=torch.bfloat16).eval()
    assert (half(pixels.bfloat16()).sample.float() - pixels).square().mean() < 1.1 * error

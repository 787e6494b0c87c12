"""Quality of the bundled model on the photograph of the README, which it was not trained on."""

from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from tiles import Measurement, border_bands, moved_axis

from svqvae_hf import DEFAULT_MODEL, SVQVAE, SVQVAEImageProcessor


@pytest.fixture(scope="module")
def model():
    return SVQVAE.from_pretrained(DEFAULT_MODEL).eval()


def test_size_and_config_are_as_documented(model):
    assert sum(file.stat().st_size for file in Path(DEFAULT_MODEL).iterdir()) <= 8.1e6
    assert (model.f, model.config["codebook_size"], model.config["sample_size"]) == (8, 16384, 256)
    assert model.dtype == torch.float32
    assert all(weight.isfinite().all() for weight in model.state_dict().values())


@pytest.mark.slow
def test_tiles_are_invisible(model, photo):
    measurement = Measurement(model, SVQVAEImageProcessor()(photo.resize((704, 470)))["pixel_values"])
    figures = measurement.measure_tiles() | measurement.compare_with_whole()
    assert figures["PSNR whole, dB"] > 25
    assert figures["PSNR tiled, dB"] > figures["PSNR whole, dB"] - 0.4
    assert figures["agreement, dB"] > 38
    assert figures["error along tile borders"] < 1.2
    assert figures["error along image border"] < 1.3


@pytest.mark.slow
@pytest.mark.parametrize(("side", "tile_size", "overlap"), [(240, 96, 24), (480, None, None)])
def test_tiles_leave_no_lattice_on_flat_dark_and_gradient_images(model, side, tile_size, overlap):
    """Along tile borders, the result is as bright as with a moved grid. With default tiles, all ids are equal."""
    along = torch.linspace(0, 1, side)
    diagonal = (along[:, None] + along) / 2
    images = torch.stack([start + rise * diagonal for start, rise in ((0.02, 0), (0.02, 0.05), (0.2, 0.6))])
    model.enable_tiling(*(() if tile_size is None else (tile_size, overlap)))
    measurement = Measurement(model, images[:, None].expand(-1, 3, -1, -1))
    bands, _ = border_bands(measurement.image.shape[-1], model)
    with patch("svqvae_hf.models.tiling.tile_axis", moved_axis):
        ids, moved = measurement.reconstruct()
    for lattice in 255 * (measurement.tiled - moved).mean(1):
        assert lattice[bands].mean().abs() < 0.25
        assert lattice[:, bands].mean().abs() < 0.25
    assert (ids == measurement.ids).float().mean() > 0.99
    assert tile_size is not None or torch.equal(ids, measurement.ids)
    model.disable_tiling()


@pytest.mark.slow
@pytest.mark.usefixtures("no_grad")
def test_flat_colours_come_back(model):
    """The corners of the RGB cube, and other colours in every run."""
    corners = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 3)
    seed = torch.seed() % 2**32
    colours = torch.cat([corners, torch.rand(92, 3, generator=torch.Generator().manual_seed(seed))])
    sample = colours[:, :, None, None].expand(-1, -1, 64, 64).contiguous()
    error = 255 * (model(sample).sample - sample).abs().mean((1, 2, 3))
    assert error.mean() < 5, f"colours of seed {seed}"
    assert error.max() < 14, f"colours of seed {seed}"


@pytest.mark.slow
@pytest.mark.usefixtures("no_grad")
def test_scales_from_the_image_are_better_and_scale_2_beats_scale_1_enlarged(model, photo):
    sample = SVQVAEImageProcessor()(photo.crop((100, 50, 292, 242)))["pixel_values"]
    scales = [0.5, 2.0]
    targets = [F.interpolate(sample, scale_factor=scale, mode="bicubic", antialias=True) for scale in scales]

    def errors(outputs):
        return [(output - target).square().mean() for output, target in zip(outputs, targets, strict=True)]

    image, latents = (errors(model(sample, scales, scale_from=source).sample) for source in ("image", "latents"))
    assert image[0] < 0.8 * latents[0]
    enlarged = F.interpolate(model(sample).sample, scale_factor=2, mode="bicubic")
    assert image[1] < (enlarged - targets[1]).square().mean()


@pytest.mark.usefixtures("no_grad")
def test_half_precision_is_about_as_good(model, photo):
    pixels = SVQVAEImageProcessor()(photo.crop((100, 50, 228, 178)))["pixel_values"]
    error = (model(pixels).sample - pixels).square().mean()
    half = SVQVAE.from_pretrained(DEFAULT_MODEL, torch_dtype=torch.bfloat16).eval()
    assert (half(pixels.bfloat16()).sample.float() - pixels).square().mean() < 1.1 * error

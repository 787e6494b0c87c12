import numpy as np
import pytest
import torch
from features import SSIM, pixels
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from svqvae_hf.evaluation import metrics


@pytest.mark.parametrize(("width", "height", "blur"), [(200, 300, 2), (37, 11, 2)])
def test_psnr_and_ssim_equal_scikit_image(photo, width, height, blur):
    image = photo.crop((0, 0, width, height))
    blurred = image.resize((max(1, width // blur), max(1, height // blur))).resize(image.size)
    arrays, pair = (np.array(image), np.array(blurred)), (pixels(blurred), pixels(image))
    assert metrics.ssim(*pair).item() == pytest.approx(structural_similarity(*arrays, **SSIM), abs=1e-4)
    assert metrics.psnr(*pair).item() == pytest.approx(peak_signal_noise_ratio(*arrays, data_range=255), abs=1e-3)


@pytest.mark.parametrize("band", [7, 31])
def test_ssim_by_bands_equals_ssim_at_once(photo, band, monkeypatch):
    pair = [torch.cat([pixels(photo.crop((x, 0, x + 40, 50))) for x in lefts]) for lefts in ((0, 60), (5, 90))]
    whole = metrics.ssim(*pair)
    monkeypatch.setattr(metrics, "SSIM_BAND", band)
    torch.testing.assert_close(metrics.ssim(*pair), whole)


def test_ssim_works_from_its_smallest_side(photo):
    image = pixels(photo.crop((0, 0, 200, metrics.SSIM_SIDE)))
    assert metrics.ssim(image, image).item() == 1

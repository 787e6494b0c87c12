import numpy as np
import pytest
import torch
import torch.nn.functional as F
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from svqvae_hf.evaluation import metrics


def to_tensor(image):
    return torch.from_numpy(np.array(image)).movedim(-1, 0)[None]


@pytest.mark.parametrize(("width", "height", "blur"), [(200, 300, 2), (37, 11, 2)])
def test_psnr_and_ssim_equal_scikit_image(photo, width, height, blur):
    image = photo.crop((0, 0, width, height))
    blurred = image.resize((max(1, width // blur), max(1, height // blur))).resize(image.size)
    expected = structural_similarity(
        *(np.array(each) for each in (image, blurred)),
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
        data_range=255,
        channel_axis=2,
    )
    pair = to_tensor(blurred), to_tensor(image)
    assert metrics.ssim(*pair).item() == pytest.approx(expected, abs=1e-4)
    expected = peak_signal_noise_ratio(np.array(image), np.array(blurred), data_range=255)
    assert metrics.psnr(*pair).item() == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("band", [7, 256])
def test_ms_ssim_by_bands_equals_that_of_torchmetrics(photo, band, monkeypatch):
    images = [to_tensor(photo.crop((x, 0, x + 180, 201))) for x in (0, 60)]
    pair = torch.cat(images), torch.cat([images[0] // 2, 255 - images[1]])
    expected = multiscale_structural_similarity_index_measure(
        *(each.float() for each in pair), sigma=1.5, data_range=255.0, reduction="none", normalize="relu"
    )
    monkeypatch.setattr(metrics, "SSIM_BAND", band)
    torch.testing.assert_close(metrics.ms_ssim(*pair), expected)
    assert expected[1] == 0  # the correlation is negative
    assert expected[0] > 0.5


def test_metrics_work_from_their_smallest_side(photo):
    for metric, side in ((metrics.ssim, metrics.SSIM_SIDE), (metrics.ms_ssim, metrics.MS_SSIM_SIDE)):
        image = to_tensor(photo.crop((0, 0, 200, side)))
        assert metric(image, image).item() == 1
    with pytest.raises(ValueError, match="MS-SSIM needs sides of at least 176 pixels, got 200 x 175"):
        metrics.ms_ssim(image[..., 1:, :], image[..., 1:, :])


def test_redundancy_is_the_mean_cosine_to_the_nearest_code():
    assert metrics.redundancy(torch.eye(5) * 3) == pytest.approx(0, abs=1e-6)
    assert metrics.redundancy(torch.eye(3).repeat(2, 1)) == pytest.approx(1)
    assert metrics.redundancy(torch.tensor([[1.0, 0], [-1, 0]])) == pytest.approx(-1)


def test_mean_cosine_is_over_all_pairs():
    latents = F.normalize(torch.randn(20, 3, generator=torch.Generator().manual_seed(0)) + 0.5, dim=-1)
    assert metrics.mean_cosine(latents.sum(0), 20) == pytest.approx((latents @ latents.T).mean().item(), abs=1e-6)

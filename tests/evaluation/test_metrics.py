import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torchmetrics.functional.image import multiscale_structural_similarity_index_measure

from svqvae_hf.evaluation import metrics


def to_tensor(image):
    return torch.from_numpy(np.array(image)).movedim(-1, 0)[None]


@pytest.mark.parametrize(("width", "height", "blur"), [(200, 300, 2), (64, 48, 7), (37, 11, 2), (11, 12, 7)])
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


@pytest.mark.parametrize("band", [1, 7, 31])
def test_ssim_by_bands_equals_ssim_at_once(photo, band, monkeypatch):
    pair = [torch.cat([to_tensor(photo.crop((x, 0, x + 40, 50))) for x in lefts]) for lefts in ((0, 60), (5, 90))]
    whole = metrics.ssim(*pair)
    monkeypatch.setattr(metrics, "SSIM_BAND", band)
    torch.testing.assert_close(metrics.ssim(*pair), whole)


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


def test_each_image_of_a_batch_has_its_own_value(photo):
    image = to_tensor(photo.crop((0, 0, 200, 180)))
    darker = torch.cat([image // 2, image // 3])
    batch = image.expand(2, -1, -1, -1)
    for metric in (metrics.psnr, metrics.ssim, metrics.ms_ssim):
        values = metric(darker, batch)
        assert values.tolist() == pytest.approx([metric(each[None], image).item() for each in darker], rel=1e-5)
        assert values[0] > values[1]


def test_equal_images_are_the_best(photo):
    image = to_tensor(photo.crop((0, 0, 180, 176)))
    assert metrics.psnr(image, image).item() == math.inf
    assert metrics.ssim(image, image).item() == metrics.ms_ssim(image, image).item() == 1


def test_psnr_does_not_depend_on_the_range(photo):
    image = to_tensor(photo.crop((0, 0, 40, 30)))
    darker = image // 2
    assert metrics.psnr(darker / 255, image / 255, data_range=1.0).item() == pytest.approx(
        metrics.psnr(darker, image).item(), abs=1e-4
    )


def test_metrics_work_from_their_smallest_side(photo):
    for metric, side in ((metrics.ssim, metrics.SSIM_SIDE), (metrics.ms_ssim, metrics.MS_SSIM_SIDE)):
        image = to_tensor(photo.crop((0, 0, 200, side)))
        assert metric(image, image).item() == 1
    with pytest.raises(ValueError, match="MS-SSIM needs sides of at least 176 pixels, got 200 x 175"):
        metrics.ms_ssim(image[..., 1:, :], image[..., 1:, :])


def test_equally_frequent_codes():
    counts = metrics.count_codes(torch.arange(8).reshape(2, 2, 2), codebook_size=32)
    assert metrics.usage(counts) == 8 / 32
    assert metrics.entropy(counts) == pytest.approx(3)
    assert metrics.perplexity(counts) == pytest.approx(8)


def test_one_code_has_no_entropy():
    counts = metrics.count_codes(torch.full((5,), 3), codebook_size=4)
    assert (metrics.usage(counts), metrics.entropy(counts), metrics.perplexity(counts)) == (1 / 4, 0, 1)


def test_entropy_of_unequal_codes():
    assert metrics.entropy(torch.tensor([2, 1, 1, 0])) == pytest.approx(1.5)


def test_bits_per_pixel():
    assert metrics.bits_per_pixel(6, 14, 12) == 7


def test_redundancy_is_the_mean_cosine_to_the_nearest_code():
    assert metrics.redundancy(torch.eye(5) * 3) == pytest.approx(0, abs=1e-6)
    assert metrics.redundancy(torch.eye(3).repeat(2, 1)) == pytest.approx(1)
    assert metrics.redundancy(torch.tensor([[1.0, 0], [-1, 0]])) == pytest.approx(-1)


def test_redundancy_in_chunks(monkeypatch):
    codes = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    unit = F.normalize(codes, dim=-1)
    nearest = (unit @ unit.T - 3 * torch.eye(50)).amax(-1)
    monkeypatch.setattr(metrics, "SEARCH_SCORES", 350)  # 7 codes at once
    assert metrics.redundancy(codes) == pytest.approx(nearest.mean().item(), abs=1e-6)


def test_mean_cosine_is_over_all_pairs():
    latents = F.normalize(torch.randn(20, 3, generator=torch.Generator().manual_seed(0)) + 0.5, dim=-1)
    assert metrics.mean_cosine(latents.sum(0), 20) == pytest.approx((latents @ latents.T).mean().item(), abs=1e-6)


class OnSmallDevice(torch.Tensor):
    """Stand-in for a tensor on a device without float64: only its copy on the CPU may be float64."""

    @classmethod
    def __torch_function__(cls, function, types, arguments=(), keywords=None):
        result = super().__torch_function__(function, types, arguments, keywords)
        if function is torch.Tensor.cpu:
            return result.as_subclass(torch.Tensor)
        assert getattr(result, "dtype", None) != torch.float64
        return result


def test_devices_without_float64():
    counts, codes = torch.tensor([2, 1, 1, 0]), torch.randn(4, 3)
    for function, *arguments in (
        (metrics.usage, counts),
        (metrics.entropy, counts),
        (metrics.redundancy, codes),
        (metrics.mean_cosine, codes[0], 4),
        (metrics.fraction_changed, counts, counts.flip(0)),
    ):
        first, *others = arguments
        assert function(first.as_subclass(OnSmallDevice), *others) == function(*arguments)


def test_fraction_changed():
    assert metrics.fraction_changed(torch.tensor([[1, 2], [3, 4]]), torch.tensor([[1, 2], [3, 5]])) == 0.25

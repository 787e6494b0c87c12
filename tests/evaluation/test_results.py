import math

import pytest

from svqvae_hf.evaluation.results import TargetResult, choose_scales

SCALES = (1.0, 0.25, 0.5)


def record(*psnr):
    """Values of an image of 64 x 64 pixels, f = 8 and 16 codes, at each scale."""
    ids = {1.0: 64, 0.25: 4, 0.5: 16}
    return {
        "results": [
            {"scale": scale, "psnr_full_size": value, "ssim_full_size": value / 128}
            | {"ids": ids[scale], "bits_per_pixel": 4 * ids[scale] / 4096}
            for scale, value in zip(SCALES, psnr, strict=True)
        ]
    }


def test_each_image_has_the_smallest_scale_that_reaches_the_psnr():
    records = [record(30.5, 20.0, 24.5), record(25.5, 22.5, 25.0)]  # means 28, 21.25, 24.75
    results = choose_scales(records, SCALES)
    assert [each.min_psnr for each in results] == [22, 23, 24, 25, 26, 27, 28]
    assert results[0] == TargetResult(22, 2, (24.5 + 22.5) / 2, 23.5 / 128, 10, 40 / 4096, 0.5, 16)
    assert results[2] == TargetResult(24, 2, (24.5 + 25) / 2, 24.75 / 128, 16, 64 / 4096, 0.5, 16)
    assert results[3] == TargetResult(25, 2, (30.5 + 25) / 2, 27.75 / 128, 40, 160 / 4096, 1.0, 64)
    (given,) = choose_scales(records, SCALES, [24.4])
    assert given == results[2]._replace(min_psnr=24.4)
    assert results[4] == TargetResult(26, 1, 28, 28 / 128, 64, 256 / 4096, 1.0, 64)


def test_exact_images_count_for_targets_that_are_asked_for():
    (found,) = choose_scales([record(math.inf, 20, 20), record(30, 20, 26)], SCALES, [25])
    assert (found.reached, found.psnr, found.ids) == (2, 26, 40)


@pytest.mark.parametrize(("records", "scales"), [([record(math.inf, 20, 20)], SCALES), ([record(30, 2, 3)], (1.0,))])
def test_no_targets_for_one_scale_or_exact_images(records, scales):
    assert choose_scales(records, scales) == []

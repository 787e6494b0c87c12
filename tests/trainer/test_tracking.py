import numpy as np
import torch

from svqvae_hf.trainer.losses.objective import Pair, make_pairs
from svqvae_hf.trainer.tracking import ScaleStatistics, image_grid


def add_images(statistics, scale, num_images, decibels):
    target = torch.zeros(num_images, 3, 8, 8)
    statistics.add([scale], [Pair(target, target + 10 ** (-decibels / 20), 1.0)], [torch.zeros(4, dtype=torch.int64)])


def summary(statistics):
    return {name: round(value, 2) for name, value in statistics.summary(lambda value, _: value).items()}


def test_psnr_is_the_mean_over_images():
    statistics = ScaleStatistics(4, by_octave=False)
    add_images(statistics, 1.0, 3, 40)
    add_images(statistics, 1.0, 1, 20)
    assert summary(statistics)["psnr@1"] == 35


def test_only_random_scales_are_grouped_by_octave():
    for by_octave, expected in ((False, {"psnr@0.75": 40, "psnr@1": 20}), (True, {"psnr@1": 30})):
        statistics = ScaleStatistics(4, by_octave)
        for scale, decibels in ((0.75, 40), (1.0, 20)):
            add_images(statistics, scale, 2, decibels)
        numbers = summary(statistics)
        assert {name: value for name, value in numbers.items() if name.startswith("psnr")} == expected
        assert {f"usage@{name.partition('@')[2]}" for name in expected} < numbers.keys()


def test_grid_starts_with_the_image_in_any_order_of_scales():
    sample = torch.rand(2, 3, 16, 16)
    for sides in ((8, 16), (16, 8)):
        outputs = [torch.zeros(2, 3, side, side) for side in sides]
        grid = image_grid(make_pairs(sample, outputs, (0.0, 1.0)))
        assert grid.shape == (2 * 16 + 3 * 4, 3 * 16 + 4 * 4, 3)
        expected = (sample[0].permute(1, 2, 0) * 255).round().byte().numpy()
        assert np.array_equal(grid[4:20, 4:20], expected)
        assert not grid[4:20, 24:40].any()

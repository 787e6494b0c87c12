import torch

from svqvae_hf.trainer.losses.objective import Pair
from svqvae_hf.trainer.tracking import ScaleStatistics


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

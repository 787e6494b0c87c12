import math

import pytest
import torch
from PIL import Image

from svqvae_hf.evaluation.reconstruction_table import (
    measure_reconstructions,
    table_row,
)
from svqvae_hf.tokens.token_files import ImageTokens

GREY, LIGHTER = Image.new("RGB", (8, 4), (100, 100, 100)), Image.new("RGB", (8, 4), (110, 110, 110))


def make_tokens(ids, scales=(1.0,)):
    return ImageTokens(ids, 4, 8, scales, 4, None, None, 64, "0" * 64)


def test_figures_of_one_image():
    (figures,) = measure_reconstructions(GREY, make_tokens([torch.tensor([[5, 9]])]), [LIGHTER])
    assert figures.codes.tolist() == [5, 9]
    assert (figures.scale, figures.width, figures.height, figures.tokens) == (1, 8, 4, 2)
    assert figures.bits_per_pixel == 2 * 6 / 32
    assert figures.psnr == pytest.approx(10 * math.log10(255**2 / 100))


def test_row_of_several_images_has_sum_means_and_union():
    ids = [torch.tensor([[5, 9]]), torch.tensor([[9, 9]])]
    figures = [measure_reconstructions(GREY, make_tokens([each]), [LIGHTER])[0] for each in ids]
    assert table_row(9, "2 images", figures, 64).split() == ["2", "images", "1", "8x4", "4", "0.3750", "28.13", "3.1%"]

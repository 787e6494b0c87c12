import math

import numpy as np
import pytest
import torch
from PIL import Image

from svqvae_hf.evaluation.reconstruction_table import (
    measure_reconstructions,
    side_by_side,
    table_header,
    table_row,
    token_count,
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


def test_table_with_names_of_twenty_letters_is_80_columns_wide():
    figures = measure_reconstructions(GREY, make_tokens([torch.tensor([[5, 9]])]), [GREY])
    assert len(table_header(20)) == len(table_row(20, "n" * 20, figures, 64)) == 80


def test_one_token_is_singular():
    assert [token_count(number) for number in (1, 2)] == ["1 token", "2 tokens"]


def test_side_by_side_is_wider_than_its_images():
    images = [GREY, GREY.resize((16, 8))]
    tokens = make_tokens([torch.tensor([[5, 9]]), torch.zeros(2, 4).long()], (1.0, 2.0))
    figures = measure_reconstructions(GREY, tokens, images)
    assert np.asarray(side_by_side(GREY, images, figures)).shape[1] > 3 * 256

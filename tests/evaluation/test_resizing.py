import numpy as np
import pytest
from PIL import Image

from svqvae_hf.evaluation.resizing import resize_image


@pytest.mark.parametrize(
    ("size", "resampling"),
    [
        ((20, 15), Image.Resampling.BOX),
        ((20, 40), Image.Resampling.BOX),  # one side shorter
        ((40, 60), Image.Resampling.BICUBIC),
        ((40, 31), Image.Resampling.BICUBIC),
    ],
)
def test_area_below_and_bicubic_above_the_size(photo, size, resampling):
    image = photo.crop((100, 100, 140, 130))
    np.testing.assert_array_equal(resize_image(image, size), image.resize(size, resampling))


def test_image_of_the_target_size_is_returned_unchanged(photo):
    assert resize_image(photo, photo.size) is photo

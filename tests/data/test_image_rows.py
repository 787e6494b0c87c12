import os

import pytest

from svqvae_hf.data.image_rows import SmallImageError, image_name, read_image


@pytest.mark.parametrize("row", [None, {"bytes": None, "path": None}])
def test_an_empty_row_raises(row):
    assert image_name(row, 3) == "image 3"
    with pytest.raises(ValueError, match="the row must hold an image, but is empty"):
        read_image(row)


def test_a_smallest_side_can_be_asked_for(photo):
    small = photo.crop((0, 0, 9, 3))
    assert read_image(small, min_side=3).size == (9, 3)
    with pytest.raises(SmallImageError, match="its sides must be at least 4 pixels, but are 9 x 3"):
        read_image(small, min_side=4)


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(ValueError, match="it must be a file, but is something else"):
        read_image({"path": str(tmp_path / "pipe.png"), "bytes": None})

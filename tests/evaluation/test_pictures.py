import numpy as np
import pytest
from PIL import Image

from svqvae_hf.evaluation.pictures import GAP, Panel, contact_sheet
from svqvae_hf.tokens.image_tokens import resize_image


def sheet_of(*sizes):
    colours = [(200, 0, 0), (0, 200, 0), (0, 0, 200)]
    panels = [Panel(Image.new("RGB", size, colour), "t", "c") for size, colour in zip(sizes, colours, strict=False)]
    return np.asarray(contact_sheet(panels))


def box(sheet, colour):
    """Left, top, width and height of the area in this colour."""
    rows, columns = np.nonzero((sheet == colour).all(-1))
    return columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1


def test_all_panels_have_the_size_of_the_first():
    sheet = sheet_of((400, 300), (200, 150), (800, 600))
    assert box(sheet, (200, 0, 0)) == (GAP, GAP, 400, 300)
    assert box(sheet, (0, 200, 0)) == (2 * GAP + 400, GAP, 400, 300)
    assert box(sheet, (0, 0, 200)) == (3 * GAP + 800, GAP, 400, 300)
    assert sheet.shape[1] == 4 * GAP + 1200


@pytest.mark.parametrize(
    ("size", "shown"),
    [((1, 1), (256, 256)), ((3, 200), (4, 256)), ((4000, 2000), (1024, 512)), ((5000, 1), (1024, 1))],
)
def test_panels_have_256_to_1024_pixels(size, shown):
    assert box(sheet_of(size), (200, 0, 0))[2:] == shown


def test_labels_are_below_their_panels_and_widen_them():
    panels = [
        Panel(Image.new("RGB", (2, 256), "red"), "a long title", "a caption that is much longer than the panel")
    ] * 2
    sheet = np.asarray(contact_sheet(panels))
    under = (sheet[GAP + 256 :] < 128).any(-1).any(0)
    columns = np.nonzero(under)[0]
    assert columns.min() >= GAP
    assert columns.max() < sheet.shape[1] - GAP
    assert (np.diff(columns) >= GAP).sum() == 1  # two labels with a gap between them


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

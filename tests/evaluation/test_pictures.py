import numpy as np
import pytest
from PIL import Image

from svqvae_hf.evaluation.pictures import GAP, Panel, contact_sheet


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
    [((3, 200), (4, 256)), ((4000, 2000), (1024, 512))],
)
def test_panels_have_256_to_1024_pixels(size, shown):
    assert box(sheet_of(size), (200, 0, 0))[2:] == shown

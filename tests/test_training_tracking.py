import sys

import numpy as np
import torch
from conftest import ROOT

sys.path.insert(0, str(ROOT / "training"))

from losses import compare
from tracking import image_grid


def test_grid_begins_with_the_image_whatever_the_order_of_the_scales():
    sample = torch.rand(2, 3, 16, 16)
    for sides in ((8, 16), (16, 8)):
        outputs = [torch.zeros(2, 3, side, side) for side in sides]
        grid = image_grid(compare(sample, outputs, (0.0, 1.0), "resized"))
        assert grid.shape == (2 * 16 + 3 * 4, 3 * 16 + 4 * 4, 3)
        expected = (sample[0].permute(1, 2, 0) * 255).round().byte().numpy()
        assert np.array_equal(grid[4:20, 4:20], expected)
        assert not grid[4:20, 24:40].any()

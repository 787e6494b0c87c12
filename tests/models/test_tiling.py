from itertools import pairwise

import pytest
import torch

from svqvae_hf.models.tiling import map_tiles, tile_axis, window_origins


def kept(function):
    """A function of a window whose result is cut to the core."""
    return lambda window, shared=None: function(window) if shared is None else shared.core_of(function(window))


@pytest.mark.parametrize(("tile", "overlap"), [(8, 0), (9, 4), (3, 1), (1, 0)])
def test_windows_fit_the_tile_and_hold_the_overlap(tile, overlap):
    """test_properties.py has the rest: cores partition the axis, and tiles of a filter equal the whole."""
    for length in range(1, 40):
        tiles = tile_axis(length, tile, overlap)
        for window, core in tiles:
            assert 0 <= window.start <= core.start < core.stop <= window.stop <= length
            assert window.stop - window.start <= tile
            assert core.start - window.start >= min(overlap, core.start)
            assert window.stop - core.stop >= min(overlap, length - core.stop)
        assert len({window.stop - window.start for window, _ in tiles}) == 1


def test_axis_little_longer_than_a_tile_costs_little():
    tiles = tile_axis(300 // 4, 256 // 4, 32 // 4)
    assert sum(window.stop - window.start for window, _ in tiles) <= 1.25 * 75


@pytest.mark.parametrize("size", [(1, 1), (3, 11), (10, 10)])
def test_input_and_output_strides_may_differ(size):
    image = torch.rand(1, 2, *size)

    def up(window):
        return window.repeat_interleave(4, -1).repeat_interleave(4, -2)

    enlarged = map_tiles(kept(up), image, 4, 1, output_stride=4)
    assert torch.equal(enlarged, up(image))
    assert torch.equal(map_tiles(kept(lambda window: window[..., ::4, ::4]), enlarged, 4, 1, input_stride=4), image)


@pytest.mark.parametrize("size", [(1, 1), (5, 12), (13, 13), (38, 57), (1, 4000), (4000, 30), (192, 256)])
def test_context_windows_are_spread_over_the_image(size):
    origins = window_origins(size, 12, 32)
    assert 1 <= len(origins) == len(set(origins)) <= 32
    for axis, length in enumerate(size):
        starts = sorted({origin[axis] for origin in origins})
        window = min(12, length)
        assert all(0 <= start <= length - window for start in starts)
        gaps = {later - earlier for earlier, later in pairwise(starts)}
        assert not gaps or max(gaps) - min(gaps) <= 1
        assert len(starts) == 1 or (starts[0], starts[-1]) == (0, length - window)


def test_context_windows_have_the_proportions_of_the_image():
    for size, grid in [((192, 256), (5, 6)), ((100, 3200), (1, 32)), ((14, 14), (2, 2))]:
        origins = window_origins(size, 12, 32)
        assert (len({y for y, _ in origins}), len({x for _, x in origins})) == grid

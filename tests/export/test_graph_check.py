import pytest
import torch
import torch.nn.functional as F
from conftest import make_tiny

from svqvae_hf.export.graph_check import CHECKED_GRIDS, compare_graphs
from svqvae_hf.export.graphs import TRACED_GRID
from svqvae_hf.models import quantizer

SMALL = {"encoder_ch_mult": (1, 2), "decoder_ch_mult": (1, 2)}  # f = 2

pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.fixture(scope="module")
def small():
    return make_tiny(**SMALL, codebook_l2_norm=False)


def compare(model, change_ids=lambda ids: ids, change_pixels=lambda pixels: pixels, dtype=torch.float32):
    """Compares the model with itself, its outputs changed."""
    return compare_graphs(
        model,
        lambda sample: change_ids(model.encode_tokens(sample.float())),
        lambda ids: change_pixels(model.decode_tokens(ids)),
        dtype,
    )


def set_corner(tensor, value):
    """Changes one value of images with 16 x 16 ids at f = 2."""
    if tensor.shape[-1] == 32:
        tensor[0, 0, 0, 0] = value
    return tensor


def test_ten_sizes_are_checked():
    assert len(set(CHECKED_GRIDS)) == 10
    assert TRACED_GRID not in CHECKED_GRIDS
    assert all(any(grid[axis] == 1 for grid in CHECKED_GRIDS) for axis in range(3))
    assert max(rows * columns for _, rows, columns in CHECKED_GRIDS) * 16384 > 2 * quantizer.SEARCH_SCORES


def test_sides_that_are_not_multiples_of_f_are_checked(small):
    def encode(sample):  # pads by zeros, not by repetition
        return small.encode_tokens(F.pad(sample, (0, sample.shape[-1] % 2, 0, sample.shape[-2] % 2)))

    with pytest.raises(ValueError, match=r"the encoder: ids must equal the model's, but \d+ of 1\d+ differ"):
        compare_graphs(small, encode, small.decode_tokens, torch.float32)


def test_wrong_ids_fail_in_float32_and_count_in_float16(small):
    def change(ids, wrong):
        return torch.where(torch.arange(ids.numel()).view_as(ids) == wrong, ids ^ 1, ids)

    assert compare(small, change_ids=lambda ids: change(ids, 600))[0] == 1  # one id of 1,413
    with pytest.raises(ValueError, match="6 of "):
        compare(small, change_ids=lambda ids: change(ids, 20))  # one per size with more than 20 ids
    assert compare(small, change_ids=lambda ids: change(ids, 20), dtype=torch.float16)[0] == 6


def test_wrong_pixels_fail_in_float32_only(small):
    def change(pixels):
        return set_corner(pixels, 0.5) if pixels[..., 0, 0].min() < 0.4 else pixels

    with pytest.raises(ValueError, match=r"decoder at 32 x 32 .* within 2/255 of the model's, but differ by \d"):
        compare(small, change_pixels=change)
    compare(small, change_pixels=change, dtype=torch.float16)

import numpy as np
import pytest

from svqvae_hf.trainer.data.synthetic import synthetic_crop


@pytest.fixture(scope="module")
def crops():
    rng = np.random.default_rng(0)
    return [synthetic_crop(16, rng) for _ in range(400)]


def test_half_is_flat_and_the_rest_edges_and_gradients(crops):
    colours = [len(np.unique(crop.reshape(-1, 3), axis=0)) for crop in crops]
    assert {crop.shape for crop in crops} == {(16, 16, 3)}
    assert {crop.dtype for crop in crops} == {np.dtype(np.uint8)}
    assert 0.45 < np.mean([count == 1 for count in colours]) < 0.6  # some edges lie between equal colours
    assert 0.15 < np.mean([count == 2 for count in colours]) < 0.3
    assert 0.15 < np.mean([count > 2 for count in colours]) < 0.3


def test_a_tenth_of_the_colours_are_corners_of_the_cube(crops):
    flat = np.stack([crop[0, 0] for crop in crops if len(np.unique(crop.reshape(-1, 3), axis=0)) == 1])
    at_corner = np.isin(flat, (0, 255)).all(-1)
    assert 0.03 < at_corner.mean() < 0.2
    assert np.ptp(flat, axis=0).min() > 250


def test_gradients_are_linear(crops):
    for crop in crops:
        if len(np.unique(crop.reshape(-1, 3), axis=0)) > 2:
            for axis in (0, 1):
                assert np.abs(np.diff(crop.astype(float), 2, axis=axis)).max() <= 2  # rounding

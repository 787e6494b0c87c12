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

"""Sampling of ids from logits."""

import pytest
import torch

from svqvae_hf.pipelines.sampling import draw, sample

SCORES = torch.tensor([2.0, 1.0, -torch.inf, 0.0, -1.0])


def test_draws_follow_the_probabilities():
    draws = draw(SCORES.expand(100_000, -1), torch.Generator().manual_seed(0))
    shares = torch.bincount(draws, minlength=5) / len(draws)
    torch.testing.assert_close(shares, SCORES.softmax(0), atol=0.006, rtol=0)
    assert shares[2] == 0


def test_generators_are_one_per_image():
    with pytest.raises(ValueError, match="one generator per image, 4, got 1"):
        sample(SCORES.expand(4, -1), generator=[torch.Generator()])


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({}, {0, 1, 3, 4}),
        ({"top_k": 2}, {0, 1}),
        ({"top_p": 0.6}, {0}),
        ({"top_p": 0.7}, {0, 1}),
        ({"top_k": 3, "top_p": 0.95}, {0, 1, 3}),
        ({"temperature": 0.05}, {0}),
        ({"temperature": 0}, {0}),
    ],
)
def test_ids_that_can_be_sampled(settings, kept):
    ids = sample(SCORES.expand(5000, 2, -1), **settings, generator=torch.Generator().manual_seed(0))
    assert ids.shape == (5000, 2)
    assert set(ids.flatten().tolist()) == kept

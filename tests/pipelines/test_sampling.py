"""Choice of the tokens to sample from."""

import pytest
import torch
from transformers import LogitsProcessorList, TopKLogitsWarper, TopPLogitsWarper

from svqvae_hf.pipelines.sampling import NUM_CANDIDATES, TopPWarper, make_warpers

TOKENS = 3 * NUM_CANDIDATES


@pytest.mark.parametrize("spread", [0.01, 3.0])
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 0.95), (1, 0.5), (50, 0.5), (TOKENS + 1, 1e-6)])
def test_kept_tokens_are_those_of_transformers(spread, top_k, top_p):
    logits = spread * torch.randn(4, TOKENS, generator=torch.Generator().manual_seed(0))
    logits[:, ::2] = -torch.inf  # as a layout bars tokens
    expected = LogitsProcessorList([*([TopKLogitsWarper(top_k)] if top_k else []), TopPLogitsWarper(top_p)])
    found = LogitsProcessorList(make_warpers(1.0, top_k, top_p))
    assert torch.equal(found(None, logits), expected(None, logits))


def test_equally_likely_tokens_are_kept_together():
    logits = torch.tensor([[0.0, 3.0, 3.0, 3.0, 1.0]])
    assert TopPWarper(0.5)(None, logits).isfinite().tolist() == [[False, True, True, True, False]]


@pytest.mark.parametrize("fault", [torch.nan, torch.inf])
def test_faults_of_logits_stay_visible(fault):
    logits = torch.zeros(1, 8)
    logits[0, 3] = fault
    assert not TopPWarper(0.5)(None, logits).amax(-1).isfinite().any()

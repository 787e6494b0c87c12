"""Choice of the tokens to sample from."""

import pytest
import torch
from transformers import LogitsProcessorList

from svqvae_hf.pipelines.sampling import make_warpers


@pytest.mark.parametrize("fault", [torch.nan, torch.inf])
def test_faults_of_logits_stay_visible(fault):
    logits = torch.zeros(1, 8)
    logits[0, 3] = fault
    warpers = LogitsProcessorList(make_warpers(0.5, 5, 0.5))
    assert not warpers(None, logits).amax(-1).isfinite().any()

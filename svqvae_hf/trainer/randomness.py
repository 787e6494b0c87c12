"""Randomness of a step, as a function of the seed and the step."""

import numpy as np
import torch


def batch_generator(*seed: int) -> torch.Generator:
    """Random generator with a seed of several numbers: such as the seed of the run and the step."""
    words = np.random.SeedSequence(seed).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(words[0] >> 1))

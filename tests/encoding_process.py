"""What a process of `test_robustness` runs; beside it, so that the process imports no more than it needs."""

import multiprocessing

import torch

from svqvae_hf import SVQVAE


def encode(model: SVQVAE, sample: torch.Tensor, results: multiprocessing.Queue) -> None:
    with torch.inference_mode():
        results.put([model.encode_tokens(sample).tolist() for _ in range(3)])

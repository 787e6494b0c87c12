"""Runs in a process of tests/models/test_concurrency.py. A module of its own, so that the process imports little."""

import multiprocessing

import torch

from svqvae_hf import SVQVAE


def encode(model: SVQVAE, sample: torch.Tensor, results: multiprocessing.Queue) -> None:
    with torch.inference_mode():
        results.put([model.encode_tokens(sample).tolist() for _ in range(3)])

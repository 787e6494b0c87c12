"""Processes of their own: forks of one that has imported what they need, because that takes longer than a test."""

import multiprocessing
import os
import sys
from collections.abc import Callable
from unittest.mock import patch

PRELOADED = ["pytest", "train", "train_image_text", "svqvae_cli.tokenize", "svqvae_hf.token_sets.writer"]


def start(target: Callable[..., None], *args: object) -> multiprocessing.process.BaseProcess:
    """Starts a process that calls a function of a module."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    process = context.Process(target=target, args=args)
    with patch.dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)):  # else nothing outside the package is preloaded
        process.start()
    return process

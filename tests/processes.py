"""Processes of their own: forks of one that has imported what they need, because that takes longer than a test."""

import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from unittest.mock import patch

import psutil

PRELOADED = ["pytest", "train", "train_language_model", "train_next_scale", "odd_files", "svqvae_hf.evaluation.report"]


def start(target: Callable[..., None], *args: object) -> multiprocessing.process.BaseProcess:
    """Starts a process that calls a function of a module."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    process = context.Process(target=call, args=(multiprocessing.get_start_method(), target, *args))
    with patch.dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)):  # else nothing outside the package is preloaded
        process.start()
    return process


def call(start_method: str, target: Callable[..., None], *args: object) -> None:
    """Calls a function. Processes that it starts itself start as they do in a command, without a fork server."""
    multiprocessing.set_start_method(start_method, force=True)
    target(*args)


def running_after(pids: list[int], seconds: float) -> list[int]:
    """Waits until processes have ended, if only as zombies. Returns the ids of those that still run after a time."""
    deadline = time.monotonic() + seconds
    running = [pid for pid in pids if is_running(pid)]
    while running and time.monotonic() < deadline:
        time.sleep(0.1)
        running = [pid for pid in pids if is_running(pid)]
    return running


def is_running(pid: int) -> bool:
    """Whether there is a process of this id that is no zombie."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False

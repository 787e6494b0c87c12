"""`svqvae tokenize` in processes of their own; they import this file and no more than they need."""

import contextlib
import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

MODULES = ["tokenize_processes", "svqvae_cli.tokenize", "svqvae_hf.token_sets.writer"]


def processes() -> multiprocessing.context.BaseContext:
    """A way to start processes that imports the package only once: they are forks of a process that has done so."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(MODULES)
    return context


def run_killed(arguments: Sequence[str], num_shards: int) -> None:
    """Runs the command and kills the process when so many shards are written."""
    from svqvae_cli import main
    from svqvae_hf.token_sets.partial import PartialTokenSet

    write_shard = PartialTokenSet.write_shard

    def write_or_die(self, name, content):
        if len(self.finished_shards()) == num_shards:
            os.kill(os.getpid(), signal.SIGKILL)
        write_shard(self, name, content)

    PartialTokenSet.write_shard = write_or_die
    # The worker that reads images must be a child of this process, as on the command line, to end with it.
    multiprocessing.set_start_method("fork", force=True)
    main(arguments)


def run_rank(arguments: Sequence[str], rank: int, world_size: int, port: int, output: Path) -> None:
    """Runs the command as one of several processes, with the environment that torchrun and accelerate set."""
    from svqvae_cli import main

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with output.open("w") as file, contextlib.redirect_stdout(file):
        code = main(arguments)
    sys.exit(code)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]

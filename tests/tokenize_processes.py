"""`svqvae tokenize` in processes of their own; they import this file and no more than they need."""

import contextlib
import multiprocessing
import os
import resource
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

MODULES = ["tokenize_processes", "svqvae_cli.tokenize", "svqvae_hf.token_sets.writer"]


def processes() -> multiprocessing.context.BaseContext:
    """A way to start processes that imports the package only once: they are forks of a process that has done so."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(MODULES)
    return context


def run_killed(arguments: Sequence[str], step: str, count: int) -> None:
    """Runs the command and kills the process at a step, such as the creation of a claim, when it comes up again."""
    from svqvae_cli import main
    from svqvae_hf.files.folders import Folder
    from svqvae_hf.token_sets.records import PartRecords

    owner = PartRecords if step == "finish" else Folder
    original, calls = getattr(owner, step), []

    def die_or_go_on(*args):
        calls.append(args)
        if len(calls) > count:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args)

    setattr(owner, step, die_or_go_on)
    main(arguments)


def run_to_end(arguments: Sequence[str], output: Path) -> None:
    """Runs the command, and writes what it prints to a file."""
    from svqvae_cli import main

    with output.open("w") as file, contextlib.redirect_stdout(file):
        code = main(arguments)
    sys.exit(code)


def run_on_a_full_disk(arguments: Sequence[str], output: Path, room: int) -> None:
    """Runs the command, which cannot write more than `room` bytes to a file, and writes its errors to a file."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # so that writing raises an error
    with output.open("w") as file, contextlib.redirect_stderr(file):
        from svqvae_cli import main

        code = main(arguments)
    sys.exit(code)

"""`svqvae tokenize` in processes of their own."""

import contextlib
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path


def run_killed(arguments: Sequence[str], step: str) -> None:
    """Runs the command and kills the process at a step: writing a shard, writing a record, or before either."""
    from svqvae_cli import main
    from svqvae_hf.files.folders import Folder
    from svqvae_hf.token_sets import writer

    @contextlib.contextmanager
    def die_in_new_file(self, name):
        Path(self.path, name).parent.mkdir(parents=True, exist_ok=True)
        Path(self.path, name).with_name(f".{os.getpid()}.tmp").write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)
        yield

    write = Folder.write
    if step == "new_file":
        Folder.new_file = die_in_new_file
    elif step == "write":
        Folder.write = lambda self, name, content: die() if name[:7] == "parts/0" else write(self, name, content)
    else:
        writer._write_part = lambda *args: die()
    main(arguments)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def run_to_end(arguments: Sequence[str], output: Path) -> None:
    """Runs the command, and writes what it prints to a file."""
    from svqvae_cli import main

    with output.open("w") as file, contextlib.redirect_stdout(file):
        code = main(arguments)
    sys.exit(code)

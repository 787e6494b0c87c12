"""Feeds mutated files to a reader; README.md says how."""

import logging
import sys
import tempfile
import time
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["svqvae_hf", "PIL", "tifffile"]):
    from PIL import Image
    from readers import READERS

    Image.init()  # imports the decoders

from torch._weights_only_unpickler import Unpickler

FORBIDDEN = (
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "subprocess.Popen",
    "socket.connect",
    "ctypes.dlopen",
)


CPU_SECONDS = 10  # per input; libFuzzer's own limit also counts the time of other programs


def refuse_to_run(event: str, args: tuple) -> None:
    """Exits if a file starts a program or opens a connection."""
    if event in FORBIDDEN:
        raise SystemExit(f"a file ran {event} {args}")


def main() -> None:
    """Runs `fuzz.py READER [libFuzzer's options and folders of inputs]`."""
    read = READERS[sys.argv.pop(1)]
    with tempfile.TemporaryDirectory() as folder:
        sys.addaudithook(refuse_to_run)
        logging.disable(logging.CRITICAL)  # tifffile logs each broken file
        atheris.instrument_func(Unpickler.load)

        def read_in_time(content: bytes) -> None:
            start = time.process_time()
            read(content, Path(folder))
            assert time.process_time() - start < CPU_SECONDS

        atheris.Setup(sys.argv, read_in_time)
        atheris.Fuzz()


main()

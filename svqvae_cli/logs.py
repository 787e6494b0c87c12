"""Lines about progress in the log of a command that does not run on a terminal."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def lines_in_log(module: str) -> Iterator[None]:
    """Prints what a module logs on stderr, unless stderr is a terminal, where a bar shows the progress.

    Args:
        module (`str`): Name of the module, such as `"svqvae_hf.token_sets.writer"`.
    """
    if sys.stderr.isatty():
        yield
        return
    logger = logging.getLogger(module)
    handler = logging.StreamHandler()  # to stderr
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)

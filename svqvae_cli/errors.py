"""Adds context to errors: the file, the missing extra, and how to resume."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def prefix_errors(path: Path) -> Iterator[None]:
    """Puts the file's name before an error about it."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"`{path}`: {error}") from error


@contextmanager
def require_extra(feature: str, extra: str) -> Iterator[None]:
    """Names the extra that installs a missing package."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise ValueError(
            f"`{feature}` needs the package {error.name}. Install it with pip install 'svqvae-hf[{extra}]' or, in a "
            f"checkout, pip install '.[{extra}]'."
        ) from error


@contextmanager
def explain_resume(target: Path) -> Iterator[None]:
    """Says after an interruption how to resume the work on `target`."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        print(f"svqvae: `{target}` is not complete yet. Resume it by the same command with --resume.", file=sys.stderr)
        raise

"""Errors in the words of the user: with the file, the missing extra or how to resume."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from svqvae_files.inputs import printable


class SkippedError(ValueError):
    """Some inputs were skipped, and all others are done."""


def check_none_skipped(skipped: int, total: int) -> None:
    """Raises SkippedError if inputs were skipped."""
    if skipped:
        raise SkippedError(f"{skipped} of {total} inputs were skipped")


def one_line(message: str) -> str:
    """A message on one line, without control characters of a broken file, which must not reach the terminal."""
    return printable(" ".join(message.split()))


@contextmanager
def prefix_errors(path: Path | str) -> Iterator[None]:
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

"""Errors of libraries that read sets, as one line that names the set."""

from collections.abc import Iterator
from contextlib import contextmanager

import datasets


@contextmanager
def explained_set(name: str, kind: str = "image") -> Iterator[None]:
    """Turns the many types of errors of `datasets`, its file readers and the network into one line.

    Args:
        name (`str`): Path, URL or name of the set.
        kind (`str`, defaults to `"image"`): Kind of the set.
    """
    try:
        yield
    except Exception as error:
        cause: BaseException = error
        if isinstance(error, datasets.exceptions.DatasetGenerationError) and error.__cause__ is not None:
            cause = error.__cause__
        words_of_reason = str(cause).split()
        reason = " ".join(words_of_reason).removesuffix(".")
        if not reason:
            reason = type(error).__name__
        message = f"the {kind} set `{name}` cannot be opened: {reason}."
        if isinstance(error, OSError):
            raise OSError(message) from error
        raise ValueError(message) from error

"""Errors of file systems, as an `OSError` of one line that names the file."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

# Libraries that read and write files: starts of the names of their modules. Some of their errors are not OSErrors.
LIBRARIES = ("botocore", "aiohttp", "aiobotocore", "gcsfs", "google", "httpx", "requests", "safetensors")


class ExplainedError(OSError):
    """An error of a file system, as one line that names the file.

    Attributes:
        done (`str`): Past participle of what was done with the file, see [`explained`].
    """

    done = ""


class ExplainedMissingFileError(ExplainedError, FileNotFoundError):
    """A missing file, as one line that names it."""


def os_error(message: str, cause: Exception) -> ExplainedError:
    """An error with this message alone and the error number of its cause. A missing file stays a missing file."""
    kind = ExplainedMissingFileError if isinstance(cause, FileNotFoundError) else ExplainedError
    error = kind(message)
    error.errno = getattr(cause, "errno", None)
    return error


def is_unreachable(error: Exception, is_remote: bool) -> bool:
    """Whether an error of reading says that a file cannot be reached, and not that its content is damaged.

    Libraries raise an `OSError` without an error number for damaged content. The network does so, too.

    Args:
        error (`Exception`): Error of reading the file.
        is_remote (`bool`): Whether the file is read over the network.
    """
    if not isinstance(error, OSError):
        return False
    return is_remote or bool(error.errno)


@contextmanager
def explained(name: str | os.PathLike, done: str) -> Iterator[None]:
    """Makes an `OSError` of one line from the errors of file systems, which are of many types.

    Blocks may be nested. A block that writes `out.png` may read `photo.jpg` in an inner block. The error "`photo.jpg`
    cannot be read" stays as it is, because it names the file at fault. Or both blocks write, the inner one a temporary
    file. The error "`.1f2e.tmp` cannot be written" becomes "`out.png` cannot be written".

    Args:
        name (`str` or `os.PathLike`): Path or URL.
        done (`str`): Past participle of what the block does with it.

    Raises:
        FileNotFoundError: The file is absent.
        OSError: Another error of the file system.
    """
    try:
        yield
    except Exception as error:
        is_of_file_system = isinstance(error, OSError) or type(error).__module__.startswith(LIBRARIES)
        if not is_of_file_system:
            raise
        names_file_at_fault = isinstance(error, ExplainedError) and error.done != done
        if names_file_at_fault:
            raise
        reason = _reason(error).removesuffix(".")
        explained_error = os_error(f"`{name}` cannot be {done}: {reason}.", error)
        explained_error.done = done
        raise explained_error from error


def _reason(error: Exception) -> str:
    """What an error says, on one line, or its type if it says nothing."""
    message = getattr(error, "strerror", None) or str(error)
    words = message.split()
    if not words:
        return type(error).__name__
    return " ".join(words)

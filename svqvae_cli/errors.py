"""Errors in the words of the user: with the file, the missing extra or how to resume. Skips unreadable inputs."""

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from svqvae_hf.files.inputs import InputFile

Content = TypeVar("Content")


class SkippedError(ValueError):
    """Some inputs were skipped, and all others are done."""


class Skipping:
    """Names inputs that must be skipped on stderr, counts them, and goes on. A single input raises instead.

    Args:
        total (`int`): Number of inputs.
    """

    def __init__(self, total: int):
        self.total = total
        self.skipped = 0

    def read(
        self, files: "Iterable[InputFile]", read: Callable[[Path], Content]
    ) -> "Iterator[tuple[InputFile, Content]]":
        """Yields each readable input and what `read` returns for its path."""
        for file in files:
            with self.attempt(file.path, OSError, ValueError):
                yield file, read(file.path)

    @contextmanager
    def attempt(self, path: Path, *errors: type[Exception]) -> Iterator[None]:
        """Skips the input whose work raises one of these errors, or runs out of memory."""
        try:
            yield
        except errors as error:
            self._skip(error, str(error))
        except (MemoryError, RuntimeError) as error:
            from svqvae_hf.tokens.image_tokens import OUT_OF_MEMORY, is_out_of_memory

            if not is_out_of_memory(error):
                raise
            self._skip(error, f"`{path}`: {OUT_OF_MEMORY}")

    def _skip(self, error: Exception, reason: str) -> None:
        from tqdm import tqdm

        if self.total == 1:
            raise error
        self.skipped += 1
        tqdm.write(f"svqvae: skipped: {one_line(reason)}", sys.stderr)  # above the progress bars

    def finish(self) -> None:
        """Raises if inputs were skipped.

        Raises:
            SkippedError: Some inputs were skipped.
            ValueError: All inputs were skipped.
        """
        if self.skipped == self.total:
            raise ValueError(f"none of the {self.total} inputs could be used, for the reasons above.")
        check_none_skipped(self.skipped, self.total)


def check_none_skipped(skipped: int, total: int) -> None:
    """Raises SkippedError if inputs were skipped."""
    if skipped:
        raise SkippedError(f"{skipped} of {total} inputs were skipped")


def one_line(message: str) -> str:
    """A message on one line, without control characters of a broken file, which must not reach the terminal."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in " ".join(message.split()))


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
def explain_resume(target: Path | str, command: str) -> Iterator[None]:
    """Says after an interruption which command resumes the work on `target`."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        print(f"svqvae: `{target}` is not complete yet. Resume it with {command}.", file=sys.stderr)
        raise

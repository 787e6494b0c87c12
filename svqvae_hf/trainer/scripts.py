"""Scripts: their name, the parser of those that do not train, and errors of one line."""

import argparse
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

TRACEBACK = r"(?s).*Traceback \(most recent call last\):\n(?: [^\n]*\n)*"


def script_name() -> str:
    """File name of the running script."""
    return Path(sys.argv[0]).name


def script_parser(description: str | None) -> argparse.ArgumentParser:
    """Makes the parser of a script that does not train. Its description shows how to call it."""
    formatter = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(usage=argparse.SUPPRESS, description=description, formatter_class=formatter)


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Prints a user's mistake, or a missing package, as one line and exits with code 2, without a traceback."""
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        message = re.sub(TRACEBACK, "", str(error))  # a loader's process puts its traceback first
        if not message:
            message = repr(error)
        in_one_line = " ".join(message.split())
        sys.stderr.write(f"{script_name()}: error: {in_one_line}\n")
        sys.exit(2)

"""Scripts: their name, the parser of those that do not train, and errors of one line."""

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# A traceback up to its last line, which holds the message: the heading, and all lines that are indented.
TRACEBACK = r"(?s).*Traceback \(most recent call last\):\n(?: [^\n]*\n)*"


def script_name() -> str:
    """File name of the running script."""
    return Path(sys.argv[0]).name


def script_parser(description: str | None) -> argparse.ArgumentParser:
    """Makes the parser of a script that does not train. Its description shows how to call it."""
    formatter = argparse.RawDescriptionHelpFormatter
    return ScriptParser(usage=argparse.SUPPRESS, description=description, formatter_class=formatter)


class ScriptParser(argparse.ArgumentParser):
    """Parser for which an option that is given twice is an error."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Reads words, by default those of the command line. Raises ValueError for an option that is given twice."""
        words = sys.argv[1:] if args is None else args
        check_no_repeats(self, words)
        return super().parse_known_args(words, namespace)


def check_no_repeats(parser: argparse.ArgumentParser, words: Sequence[str]) -> None:
    """Raises ValueError for the first option that is given twice, because argparse would take its last value."""
    # An option may have several flags: `--token_set` and `--token-set`, or `--random_flip` and `--no_random_flip`.
    option_of_flag = {}
    for action in parser._actions:
        for flag in action.option_strings:
            option_of_flag[flag] = action.dest
    options_before = set()
    for word in words:
        flag = word.partition("=")[0]
        if flag not in option_of_flag:
            continue  # the word is a value
        option = option_of_flag[flag]
        if option in options_before:
            raise ValueError(f"`{flag}` must be given once, but is given twice. Leave one of them out.")
        options_before.add(option)


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Prints a user's mistake, or a missing package, as one line and exits with code 2, without a traceback."""
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        # The error of a loader's worker process holds the traceback of that process before the message.
        message = re.sub(TRACEBACK, "", str(error))
        if not message:
            message = repr(error)
        in_one_line = " ".join(message.split())
        sys.stderr.write(f"{script_name()}: error: {in_one_line}\n")
        sys.exit(2)

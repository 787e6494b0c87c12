"""Parses the command line, runs the command, and turns errors into one line and an exit code."""

import argparse
import io
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from typing import Any, NoReturn

from svqvae_cli.arguments import Parser, nearest
from svqvae_cli.errors import SkippedError, one_line
from svqvae_files.version import __version__

COMMANDS = {
    "reconstruct": "encodes and decodes images, and measures the difference",
    "encode": "encodes images to token files",
    "decode": "decodes token files or a token set to images",
    "tokenize": "encodes an image set to a token set",
    "evaluate": "measures a model on an image set",
    "convert": "converts an original checkpoint to a Hub repository",
    "export": "exports a model to ONNX, or writes a web page that runs it in the browser",
    "extend-lm": "adds image tokens to a causal language model",
    "generate": "generates images with a trained pipeline",
    "caption": "describes images with a language model that has image tokens",
    "info": "describes a model, pipeline, LoRA adapter, checkpoint, token file or token set",
    "demo": "serves a web page that encodes and decodes photographs",
}
TRAINING = ("train", "training", "finetune", "fine-tune")  # what users try as commands


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        argv (`Sequence[str]`, *optional*): Arguments, by default the arguments of the process.

    Returns:
        `int`: Exit code: 0 after success; 1 if some inputs were skipped; 2 after a user's mistake or out of memory,
        with one line on stderr; 130 after Ctrl-C; 141 if the reader of stdout has closed it.
    """
    _prepare_process()
    try:
        _run(argv)
    except KeyboardInterrupt:
        print("svqvae: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        _discard_output()
        return 141
    except SkippedError as error:
        print(f"svqvae: {error}", file=sys.stderr)
        return 1
    except (ValueError, OSError) as error:
        return _fail(str(error))
    except (MemoryError, RuntimeError) as error:
        from svqvae_hf.tokens.image_tokens import OUT_OF_MEMORY, is_out_of_memory

        if not is_out_of_memory(error):
            raise
        return _fail(OUT_OF_MEMORY)
    return 0


def _prepare_process() -> None:
    """Sets what this process does at SIGTERM, which warnings it shows, and how it prints."""
    signal.signal(signal.SIGTERM, _exit_at_signal)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")  # from libraries, about code that is not the user's
    _open_closed_streams()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # file names may contain any bytes


def _exit_at_signal(number: int, _: Any) -> NoReturn:
    """Exits by an exception, so that `with` blocks delete their temporary files. By default a signal skips them."""
    sys.exit(128 + number)


def _discard_output() -> None:
    """Discards what is still to be printed, because nobody reads stdout any more.

    Otherwise the interpreter would fail when it writes the rest of its buffer at exit.
    """
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, sys.stdout.fileno())


def _run(argv: Sequence[str] | None) -> None:
    """Parses the command line and runs its command."""
    try:
        args = parse(argv)
        args.run(args)
    finally:
        sys.stdout.flush()  # a closed stdout raises here, also after --help, and not when the interpreter exits


def _open_closed_streams() -> None:
    """Discards what is printed if the process was started without stdout or stderr, as by `>&-`."""
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, it is open until the process ends
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parses the command line. The result's `run` is the body of the command.

    Raises:
        ValueError: If the command line is wrong.
    """
    if argv is None:
        argv = sys.argv[1:]
    command = _first_word(argv)
    parser = build_parser(command)
    if command is not None and command not in COMMANDS:
        _refuse_command(parser, command)
    args, unknown_words = parser.parse_known_args(argv)
    if unknown_words:
        shown = " ".join(unknown_words)
        # `build_parser` sets `parser` to the parser of the command. Its error names the help of the command.
        args.parser.error(f"unrecognized arguments: {shown}")
    return args


def _first_word(argv: Sequence[str]) -> str | None:
    """The word in the place of the command; `None` if it is missing or an option."""
    if not argv or argv[0].startswith("-"):
        return None
    return argv[0]


def _refuse_command(parser: Parser, command: str) -> NoReturn:
    """Raises ValueError for a command that does not exist."""
    if command in TRAINING:
        raise ValueError(
            f"there is no command `{command}`, because models are trained by scripts of the repository, such as "
            "`accelerate launch training/train.py training/configs/train_photos.yaml`. See docs/training.md."
        )
    parser.error(f"there is no command `{command}`.{nearest(command, COMMANDS)}")


def build_parser(chosen: str | None = None) -> Parser:
    """Builds the parser of a command line.

    Args:
        chosen (`str`, *optional*): Command whose arguments are added. Only its module is imported.
    """
    parser = Parser(
        prog="svqvae",
        description="SVQVAE, a multi-scale image tokenizer: images to tokens and back.",
        epilog="example:\n  svqvae reconstruct photo.jpg --output out\n\n`svqvae COMMAND --help` shows more.",
    )
    parser.add_argument("--version", action="version", version=f"svqvae {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, summary in COMMANDS.items():
        command = commands.add_parser(name, help=summary)
        if name == chosen:
            module = import_module(f"svqvae_cli.{name.replace('-', '_')}")
            command.description = module.__doc__
            command.set_defaults(run=module.run, parser=command)
            module.add_arguments(command)
    return parser


def _fail(message: str) -> int:
    """Prints an error, and returns the exit code of a user's mistake."""
    print(f"svqvae: error: {one_line(message)}", file=sys.stderr)
    return 2

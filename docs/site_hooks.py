"""Hooks of MkDocs: the reference of the command line, made from its parser, and pages from files of the root."""

import argparse
import re
from pathlib import Path
from typing import Any

from svqvae_cli.command_line import COMMANDS, build_parser

ROOT = Path(__file__).parent.parent
PAGES = {"changelog.md": "CHANGELOG.md", "security.md": "SECURITY.md"}


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Called by MkDocs with the text of each page. Completes the pages that are made from other files."""
    if page.file.src_uri == "command_line.md":
        return f"{markdown}\n{command_reference()}"
    if page.file.src_uri in PAGES:
        text = (ROOT / PAGES[page.file.src_uri]).read_text()
        return text.replace("](docs/", "](").replace("](model_card.md)", "](index.md)")
    return markdown


def command_reference() -> str:
    """Section of each command: description, example and arguments."""
    return "\n".join(map(_command_section, COMMANDS))


def _command_section(name: str) -> str:
    (commands,) = (a for a in build_parser(name)._actions if isinstance(a, argparse._SubParsersAction))
    parser = commands.choices[name]
    description = re.sub(r"\n  (.*)", r"\n\n```bash\n\1\n```\n", parser.description.strip())
    arguments = [_argument(parser, action) for action in parser._actions if action.dest != "help"]
    return "\n".join([f"### svqvae {name}\n", f"{description}\n", *arguments, ""])


def _argument(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    formatter = parser._get_formatter()
    required = " (required)" if action.option_strings and action.required else ""
    return f"- `{formatter._format_action_invocation(action)}`{required}: {formatter._expand_help(action)}"

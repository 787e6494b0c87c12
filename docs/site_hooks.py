"""Hooks of MkDocs: the reference of the command line, made from its parser, and pages from files of the root."""

import argparse
import re
from pathlib import Path
from typing import Any

from svqvae_cli.command_line import build_parser

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
    """Section of each command: description, usage, arguments and example."""
    (commands,) = (action for action in build_parser()._actions if isinstance(action, argparse._SubParsersAction))
    return "\n".join(_command_section(name, parser) for name, parser in commands.choices.items())


def _command_section(name: str, parser: argparse.ArgumentParser) -> str:
    summary, _, details = parser.description.partition(".\n")
    details = re.sub(r"\n(  .*)", r"\n\n```bash\n\1\n```\n", details).replace("```bash\n  ", "```bash\n")
    example = parser.epilog.removeprefix("example:\n  ")
    arguments = [_argument(parser, action) for action in parser._actions if action.dest != "help"]
    return "\n".join(
        [
            f"### svqvae {name}\n",
            f"{summary[0].upper()}{summary[1:]}. {details}".rstrip() + "\n",
            f"For example:\n\n```bash\n{example}\n```\n",
            *arguments,
            "",
        ]
    )


def _argument(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    formatter = parser._get_formatter()
    required = " (required)" if action.option_strings and action.required else ""
    return f"- `{formatter._format_action_invocation(action)}`{required}: {formatter._expand_help(action)}"

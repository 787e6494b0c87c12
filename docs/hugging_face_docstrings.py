"""Converts docstrings in Hugging Face's form to Markdown. It extends griffe, which reads the package for the API."""

import contextlib
import re
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import griffe

SECTION = re.compile(r"^(Args|Returns|Yields|Raises|Example):\n((?:\n|    .*\n)+)", re.MULTILINE)
REFERENCE = re.compile(r"\[`(~?)([\w.]+)`\](?!\[)")
ENTRY = re.compile(r"^::: ([\w.]+)", re.MULTILINE)
PACKAGE = "svqvae_hf"
API_PAGES = Path(__file__).parent / "api"


class HuggingFaceDocstrings(griffe.Extension):
    """Rewrites the docstrings of the package once it is loaded."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Called by griffe."""
        listed = set()
        for page in API_PAGES.glob("*.md"):
            for path in ENTRY.findall(page.read_text()):
                with contextlib.suppress(KeyError):  # in tests the package is another one
                    listed.add(pkg[path.removeprefix(f"{PACKAGE}.")].canonical_path)
        _rewrite(pkg, pkg, listed)


def _rewrite(owner: griffe.Object, package: griffe.Module, listed: set[str]) -> None:
    """Rewrites the docstrings of an object and of its members.

    Args:
        owner (`griffe.Object`): The object.
        package (`griffe.Module`): The package that it belongs to.
        listed (`set[str]`): Full paths of the objects on the API pages.
    """

    def find_listed(name: str) -> str | None:
        path = _find(name, owner, package)
        if path is not None and _is_listed(path, listed):
            return path
        return None

    if owner.docstring is not None:
        owner.docstring.value = to_markdown(owner.docstring.value, find_listed)
    for member in owner.members.values():
        if isinstance(member, griffe.Object):  # not an import
            _rewrite(member, package, listed)


def _is_listed(path: str, listed: set[str]) -> bool:
    """Whether the API pages list an object, or an object that it is a member of."""
    return any(path == entry or path.startswith(f"{entry}.") for entry in listed)


def to_markdown(docstring: str, find: Callable[[str], str | None]) -> str:
    """Turns sections into lists under bold headings, and references into links.

    Args:
        docstring (`str`): In Hugging Face's form, without indentation.
        find (`Callable`): Returns the full path of an object on the API pages, `None` for other objects.
    """

    def link(match: re.Match[str]) -> str:
        tilde, name = match.groups()
        path = find(name)
        if path is None:
            return f"`{name}`"
        if tilde:  # only the last part of the name is shown
            name = name.rsplit(".", 1)[-1]
        return f"[`{name}`][{path}]"

    def section(match: re.Match[str]) -> str:
        title = match[1]
        body = textwrap.dedent(match[2]).strip()
        if title == "Example":
            return f"**Example**\n\n```pycon\n{body}\n```\n\n"
        if title in ("Args", "Raises"):
            body = re.sub(r"\n +", " ", body)  # one line per argument
            body = re.sub(r"^(?=\S)", "- ", body, flags=re.MULTILINE)
            body = re.sub(r"^- ([\w*]+)", r"- `\1`", body, flags=re.MULTILINE)
        return f"**{title}**\n\n{body}\n\n"

    return REFERENCE.sub(link, SECTION.sub(section, f"{docstring}\n"))


def _find(name: str, owner: griffe.Object, package: griffe.Module) -> str | None:
    """Full path of the object that a docstring refers to, `None` if it belongs to another package.

    Raises:
        ValueError: If the package has no such object.
    """
    first, dot, rest = name.partition(".")
    path = name
    for scope in (package, owner):
        with contextlib.suppress(griffe.NameResolutionError):
            path = scope.resolve(first) + dot + rest
    if not path.startswith(f"{PACKAGE}."):
        return None
    try:
        return package[path.removeprefix(f"{PACKAGE}.")].canonical_path
    except KeyError:
        raise ValueError(
            f"`{name}` in the docstring of {owner.path} must be an object, but {path} does not exist."
        ) from None

"""An extension of griffe, which reads the package for the API pages: docstrings in Hugging Face's form to Markdown."""

import contextlib
import inspect
import re
from collections.abc import Callable
from typing import Any

import griffe

SECTION = re.compile(r"^(Args|Returns|Yields|Raises|Example):\n((?:\n|    .*\n)+)", re.MULTILINE)
REFERENCE = re.compile(r"\[`(~?)([\w.]+)`\](?!\[)")
PACKAGE = "svqvae_hf"


class HuggingFaceDocstrings(griffe.Extension):
    """Rewrites the docstrings of the package once it is loaded."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Called by griffe."""
        _rewrite(pkg, pkg)


def _rewrite(owner: griffe.Object, package: griffe.Module) -> None:
    if owner.docstring is not None:
        owner.docstring.value = to_markdown(owner.docstring.value, lambda name: _find(name, owner, package))
    for member in owner.members.values():
        if isinstance(member, griffe.Object):  # not what a module imports
            _rewrite(member, package)


def to_markdown(docstring: str, find: Callable[[str], str | None]) -> str:
    """Sections as lists under bold headings, references as links.

    Args:
        docstring (`str`): In Hugging Face's form, without indentation.
        find (`Callable`): Gives the full path of an object of the package, `None` for one of another package.
    """

    def link(match: re.Match[str]) -> str:
        path = find(match[2])
        text = match[2].rsplit(".", 1)[-1] if match[1] and path else match[2]
        return f"[`{text}`][{path}]" if path else f"`{text}`"

    def section(match: re.Match[str]) -> str:
        title, body = match[1], inspect.cleandoc(match[2])
        if title == "Example":
            return f"**Example**\n\n```pycon\n{body}\n```\n\n"
        if title in ("Args", "Raises"):
            body = re.sub(r"^(?=\S)", "- ", re.sub(r"\n +", " ", body), flags=re.MULTILINE)
            body = re.sub(r"^- ([\w*]+)", r"- `\1`", body, flags=re.MULTILINE)
        return f"**{title}**\n\n{body}\n\n"

    return REFERENCE.sub(link, SECTION.sub(section, f"{docstring}\n"))


def _find(name: str, owner: griffe.Object, package: griffe.Module) -> str | None:
    """Full path of what a docstring refers to.

    Raises:
        ValueError: There is no such object.
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
        raise ValueError(f"`{name}` in the docstring of {owner.path} must be an object, but {path} is none.") from None

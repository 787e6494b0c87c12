"""The reference of Python in one Markdown page, for readers of the repository. The site shows `docs/api`."""

import re
from collections.abc import Iterator
from pathlib import Path

import griffe
import yaml
from hugging_face_docstrings import ENTRY, PACKAGE, to_markdown

ROOT = Path(__file__).parent.parent
API = ROOT / "docs" / "api"
PAGES = ("model.md", "tokens.md", "generators.md", "evaluation.md")
NOTE = "*Written by `docs/write_reference.py`.*\n"
OPTIONS = re.compile(r"    options:\n((?:      .*\n)+)")
LONGEST_LINE = 100


def python_reference() -> str:
    """Classes and functions of the pages of `docs/api`, in their order."""
    package = griffe.load(PACKAGE, search_paths=[str(ROOT)])
    lines = ["# Python\n", NOTE]
    for page in PAGES:
        text = (API / page).read_text()
        title = text.partition("\n")[0]
        lines.append(f"#{title}\n")
        for path, settings in entries(text):
            item = package[path.removeprefix(f"{PACKAGE}.")]
            lines += describe(item, path, settings)
    return "\n".join(lines)


def entries(text: str) -> Iterator[tuple[str, dict[str, list[str]]]]:
    """Paths that a page shows, with their settings, such as the members to show."""
    for match in ENTRY.finditer(text):
        options = OPTIONS.match(text, match.end() + 1)
        yield match[1], yaml.safe_load(options[1]) if options else {}


def describe(item: griffe.Object | griffe.Alias, path: str, settings: dict[str, list[str]]) -> list[str]:
    """Lines about a class with its members, a function, or all functions of a module."""
    lines = []
    if item.is_module:
        for name, member in item.members.items():
            if not member.is_alias and member.is_function and not name.startswith("_"):
                lines += section(member, f"{path}.{name}")
        return lines
    lines += section(item, path)
    if item.is_class:
        own_names = settings.get("members", [name for name in item.members if not name.startswith("_")])
        inherited_names = settings.get("inherited_members", [])
        for name in dict.fromkeys(own_names + inherited_names):
            member = find_member(item, name)
            if member is not None:
                lines += section(member, f"{item.name}.{name}")
    return lines


def find_member(item: griffe.Object | griffe.Alias, name: str) -> griffe.Object | griffe.Alias | None:
    """A documented method or property of a class or of its bases in this package; `None` if there is none."""
    for owner in [item, *item.mro()]:
        member = owner.members.get(name)
        if member is None or member.docstring is None:
            continue
        if member.is_function or "property" in member.labels:
            return member
    return None


def section(item: griffe.Object | griffe.Alias, path: str) -> list[str]:
    """Heading, call and docstring."""
    lines = [f"### {path}\n"]
    call = signature(item)
    if call:
        lines.append(f"```python\n{call}\n```\n")
    if item.docstring is not None:
        lines.append(to_markdown(item.docstring.value, lambda _: None).strip() + "\n")
    return lines


def signature(item: griffe.Object | griffe.Alias) -> str:
    """The call of a function or a class, a line per parameter if it is long."""
    function = item
    if item.is_class:
        function = item.all_members.get("__init__")
    if function is None or not function.is_function:
        return ""
    parameters = []
    for parameter in function.parameters:
        if parameter.name not in ("self", "cls"):
            parameters.append(parameter_text(parameter))
    line = f"{item.name}({', '.join(parameters)})"
    if len(line) <= LONGEST_LINE:
        return line
    indented = ",\n    ".join(parameters)
    return f"{item.name}(\n    {indented},\n)"


def parameter_text(parameter: griffe.Parameter) -> str:
    """A parameter as in the source, with its stars."""
    stars = {griffe.ParameterKind.var_positional: "*", griffe.ParameterKind.var_keyword: "**"}
    text = stars.get(parameter.kind, "") + parameter.name
    if parameter.annotation is not None:
        text += f": {parameter.annotation}"
    if parameter.default is not None and not text.startswith("*"):
        text += f" = {parameter.default}"
    return text

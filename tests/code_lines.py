"""Counts lines of code: without blank lines, comments and docstrings.

python tests/code_lines.py svqvae_hf svqvae_cli training tests
"""

import ast
import sys
from pathlib import Path

DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def count_code(source: str) -> int:
    """Counts the lines of code of a file's text."""
    text = {number for number, line in enumerate(source.split("\n"), 1) if line.strip() and line.lstrip()[0] != "#"}
    docstrings = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant | ast.JoinedStr):  # may hold blank lines
            text |= set(range(node.lineno, node.end_lineno + 1))
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
            docstrings |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return len(text - docstrings)


def count_folder(folder: Path) -> int:
    """Counts the lines of code of a folder's Python files."""
    return sum(count_code(path.read_text()) for path in folder.rglob("*.py"))


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(f"{count_folder(Path(name)):6} {name}")  # noqa: T201

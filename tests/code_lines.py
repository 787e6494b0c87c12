"""Counts lines of code: without blank lines, comments and docstrings.

python tests/code_lines.py svqvae_hf svqvae_cli training tests
"""

import ast
import io
import sys
import tokenize
from pathlib import Path

BLANK = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def count_code(source: str) -> int:
    """Counts the lines of code of a file's text."""
    lines, docstrings = set(), set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in BLANK:
            lines |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node) is not None:
            docstrings |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return len(lines - docstrings)


def count_folder(folder: Path) -> int:
    """Counts the lines of code of a folder's Python files."""
    return sum(count_code(path.read_text()) for path in folder.rglob("*.py"))


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(f"{count_folder(Path(name)):6} {name}")  # noqa: T201

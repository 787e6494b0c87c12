"""The subpackages of the package, top to bottom: each imports only from those below it."""

import ast
from pathlib import Path

from conftest import ROOT

PACKAGE = ROOT / "svqvae_hf"
SUBPACKAGES = [
    *("trainer", "demo", "large", "evaluation", "export", "token_sets", "data", "conversion", "language", "pipelines"),
    *("tokens", "models", "loaders", "hub", "untrusted", "files"),
]


def imported_modules(path: Path) -> set[str]:
    """Modules of this project that a file imports, at its top or inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{name.name}" for name in node.names}
        if isinstance(node, ast.Import):
            names |= {name.name for name in node.names}
    return {name for name in names if name.split(".")[0] in ("svqvae_hf", "svqvae_cli", "training", "conversion")}


def wrong_imports(path: Path, subpackage: str) -> list[str]:
    """Imports of a file that do not go down. `__init__.py` of the package may import all subpackages."""
    first = 0 if subpackage == "__init__.py" else SUBPACKAGES.index(subpackage)
    allowed = tuple(f"svqvae_hf.{name}." for name in SUBPACKAGES[first:])
    return sorted(module for module in imported_modules(path) if not module.startswith(allowed))


def test_every_subpackage_is_listed():
    assert {path.parent.name for path in PACKAGE.glob("*/__init__.py")} == {*SUBPACKAGES}
    assert [path.name for path in PACKAGE.glob("*.py")] == ["__init__.py"]


def test_subpackages_import_only_from_below():
    files = {path.relative_to(PACKAGE): path for path in PACKAGE.rglob("*.py")}
    wrong = {str(name): wrong_imports(path, name.parts[0]) for name, path in files.items()}
    assert {name: modules for name, modules in wrong.items() if modules} == {}

"""The subpackages of the package, top to bottom: each imports only from those below it."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

PACKAGE = ROOT / "svqvae_hf"
SUBPACKAGES = [
    *("trainer", "demo", "large", "evaluation", "export", "token_sets", "data", "conversion", "language", "pipelines"),
    *("tokens", "loaders", "hub", "untrusted", "models"),
]


def imported_modules(path: Path) -> set[str]:
    """Modules of this project that a file imports, at its top or inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:  # relative ones stay in the subpackage
            names |= {f"{node.module}.{name.name}" for name in node.names}
        if isinstance(node, ast.Import):
            names |= {name.name for name in node.names}
    ours = ("svqvae_hf", "svqvae_cli", "svqvae_files", "training", "conversion")
    return {name for name in names if name.split(".")[0] in ours}


def wrong_imports(path: Path, subpackage: str) -> list[str]:
    """Imports of a file that do not go down. `__init__.py` of the package may import all subpackages."""
    first = 0 if subpackage == "__init__.py" else SUBPACKAGES.index(subpackage)
    allowed = ("svqvae_files.", *(f"svqvae_hf.{name}." for name in SUBPACKAGES[first:]))
    return sorted(module for module in imported_modules(path) if not module.startswith(allowed))


def test_every_subpackage_is_listed():
    assert {path.parent.name for path in PACKAGE.glob("*/__init__.py")} == {*SUBPACKAGES}
    assert [path.name for path in PACKAGE.glob("*.py")] == ["__init__.py"]


def test_subpackages_import_only_from_below():
    files = {path.relative_to(PACKAGE): path for path in PACKAGE.rglob("*.py")}
    wrong = {str(name): wrong_imports(path, name.parts[0]) for name, path in files.items()}
    assert {name: modules for name, modules in wrong.items() if modules} == {}


def test_models_import_nothing_of_the_package_but_each_other():
    for path in (PACKAGE / "models").glob("*.py"):
        assert not imported_modules(path), path


def test_files_import_nothing_of_the_other_packages():
    for path in (ROOT / "svqvae_files").glob("*.py"):
        assert all(name.startswith("svqvae_files.") for name in imported_modules(path)), path


def test_files_need_no_torch():
    code = "import sys, svqvae_files.records, svqvae_files.folders; assert not {'torch', 'diffusers'} & {*sys.modules}"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (process.returncode, process.stderr) == (0, "")


# Prints what `import svqvae_hf` changed in the process.
IMPORT = """
import gc, signal
import diffusers, huggingface_hub, transformers
def state():
    handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
    constants = {name: value for name, value in vars(huggingface_hub.constants).items() if name.isupper()}
    return type(diffusers), handlers, constants, gc.isenabled(), gc.get_freeze_count(), gc.get_threshold()
before = state()
import svqvae_hf
from svqvae_hf import *
assert state() == before
ours = [name for name, value in vars(diffusers).items() if str(getattr(value, "__module__", "")).startswith("svqvae")]
assert not ours, ours
for name in svqvae_hf.__all__:
    assert name.isupper() or globals()[name].__module__.startswith("svqvae_hf."), name
"""


@pytest.mark.slow
def test_importing_the_package_changes_nothing_else():
    done = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr

"""The rooms of the package, top to bottom: each imports only from rooms below it."""

import ast
from pathlib import Path

from conftest import ROOT

PACKAGE = ROOT / "svqvae_hf"
ROOMS = [
    *(
        "trainer",
        "demo",
        "large",
        "evaluation",
        "tokenizing",
        "token_sets",
        "data",
        "conversion",
        "pipelines",
        "tokens",
        "models",
        "language_models",
        "loaders",
        "hub",
    ),
    *("untrusted", "paths", "storage", "atomic_io"),
]
TOP_LEVEL = ["training", "svqvae_cli", "svqvae_hf"]  # what a user starts with: nothing below imports it


def imported_modules(path: Path) -> set[str]:
    """Modules of this project that a file imports, at its top or inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{name.name}" for name in node.names}
        if isinstance(node, ast.Import):
            names |= {name.name for name in node.names}
    return {name for name in names if name.split(".")[0] in ("svqvae_hf", "svqvae_cli", "training", "conversion")}


def room_of(module: str) -> str:
    """Room of a module of the package; the package's own `__init__` is the roof, above all rooms."""
    name = module.split(".")[1] if "." in module else "svqvae_hf"
    return name if name in ROOMS else "svqvae_hf"


def wrong_imports(path: Path, room: str) -> list[str]:
    """Imports of a file that do not go down."""
    allowed = {"svqvae_hf": set(ROOMS)}.get(room, {room, *ROOMS[ROOMS.index(room) + 1 :]} if room in ROOMS else set())
    return [
        module
        for module in sorted(imported_modules(path))
        if not module.startswith("svqvae_hf") or room_of(module) not in allowed
    ]


def test_every_room_is_listed():
    rooms = {path.parent.name for path in PACKAGE.glob("*/__init__.py")} | {path.stem for path in PACKAGE.glob("*.py")}
    assert rooms == {*ROOMS, "__init__"}


def test_rooms_import_only_from_below():
    wrong = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        wrong[str(path.relative_to(ROOT))] = wrong_imports(path, "svqvae_hf" if room == "__init__" else room)
    assert {path: modules for path, modules in wrong.items() if modules} == {}


def test_an_import_upwards_is_found(tmp_path):
    file = tmp_path / "tiling.py"
    file.write_text("def late():\n    from svqvae_hf.tokens.token_files import load_tokens\n    return load_tokens\n")
    assert wrong_imports(file, "models") == ["svqvae_hf.tokens.token_files.load_tokens"]
    assert wrong_imports(file, "data") == []
    file.write_text("from svqvae_hf import SVQVAE\nimport svqvae_cli.encode\n")
    assert wrong_imports(file, "trainer") == ["svqvae_cli.encode", "svqvae_hf.SVQVAE"]

"""Code that a repository carries, so that its model runs without this package. It is made from the package's source.

A file holds a class and everything that it uses from other modules, in the order of their imports. It leaves out
checks of arguments, training, original checkpoints, all but the first line of docstrings, and the annotations of
arguments that fit on one line without them. Nothing else changes.

    python -m svqvae_hf.hub.standalone modeling_svqvae.py    # writes the file to stdout, to compare it with another
"""

import ast
import copy
import functools
import hashlib
import json
import re
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from svqvae_hf.hub.code import write_code as write_model_code

PACKAGE = "svqvae_hf"
LINE_LENGTH = 119
SOURCE = Path(__file__).parents[2]
VERSION = re.findall(r'__version__ = "(.*)"', Path(SOURCE, PACKAGE, "__init__.py").read_text(encoding="utf-8"))[0]
HEADER = '''"""{name} in one file, made from the source of svqvae-hf {version} (Apache-2.0). Do not edit it.

`python -m svqvae_hf.hub.standalone {file}` writes the same file.
"""
'''


class CodeFile(NamedTuple):
    """A file of code for repositories.

    Args:
        module (`str`): Module of the package that defines its class.
        name (`str`): Name of the class.
        auto_map (`Mapping[str, str]`): Classes of the file by the auto classes that load them.
        also (`tuple[str, ...]`): Further classes of the module.
    """

    module: str
    name: str
    auto_map: Mapping[str, str] = MappingProxyType({})
    also: tuple[str, ...] = ()


LEFT_OUT: frozenset[str] = frozenset()
CODE_FILES = {
    "component.py": CodeFile("hub.component", "AutoModel"),
    "modular_next_scale.py": CodeFile(
        "pipelines.modular_next_scale", "NextScaleBlocks", also=("NextScaleTextBlocks",)
    ),
    "modular_llamagen.py": CodeFile("pipelines.modular_llamagen", "LlamaGenBlocks", also=("LlamaGenTextBlocks",)),
}
LIBRARIES = (PACKAGE, "transformers")  # of the components of pipelines


class _Module:
    """Definitions and imports of a module of the package, without what is left out."""

    def __init__(self, name: str, left_out: frozenset[str], annotations: bool):
        self.left_out, self.annotations = left_out, annotations
        text = Path(SOURCE, *name.split(".")).with_suffix(".py").read_text(encoding="utf-8")
        self.lines: list[str | None] = list(text.splitlines())
        self.imports: dict[str, tuple[str, str]] = {}  # module, and name there or "", by the name here
        self.definitions: dict[str, ast.stmt] = {}
        for node in ast.parse(text).body:
            if isinstance(node, ast.Import):
                self.imports |= {alias.asname or alias.name: (alias.name, "") for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                module = f"{name.rpartition('.')[0]}.{node.module}" if node.level else str(node.module)
                self.imports |= {alias.asname or alias.name: (module, alias.name) for alias in node.names}
            elif name_of(node):
                self.definitions[name_of(node)] = node
                self._shorten(node)

    def source(self, name: str) -> str:
        """Source of a definition, with the comments above it."""
        start, stop = _span(self.definitions[name])
        while (self.lines[start - 1] or "").startswith("#"):
            start -= 1
        return "\n".join(line for line in self.lines[start:stop] if line is not None)

    def _shorten(self, node: ast.stmt) -> None:
        """Drops what is left out from a definition."""
        bases = getattr(node, "bases", [])
        for base in [base for base in bases if ast.unparse(base) in self.left_out]:
            bases.remove(base)
            self.lines[base.lineno - 1] = str(self.lines[base.lineno - 1]).replace(f"{ast.unparse(base)}, ", "")
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
            start, stop = node.body[0].lineno, int(node.body[0].end_lineno or 0)
            if stop > start:
                self.lines[start - 1] = f'{self.lines[start - 1]}"""'
            self.lines[start:stop] = [None] * (stop - start)
        if isinstance(node, ast.FunctionDef) and not self.annotations:
            self._drop_annotations(node)
        for body in (getattr(node, "body", []), getattr(node, "orelse", [])):
            for inner in list(body):
                called = getattr(getattr(inner, "value", None), "func", None)
                names = {f"{name_of(node)}.{name_of(inner)}", called and ast.unparse(called)}
                if names & self.left_out or (is_annotation(inner) and not self.annotations and not is_record(node)):
                    body.remove(inner)
                    start, stop = _span(inner)
                    start -= self.lines[start - 1] == ""
                    self.lines[start:stop] = [None] * (stop - start)
                else:
                    self._shorten(inner)

    def _drop_annotations(self, node: ast.FunctionDef) -> None:
        """Writes the arguments in one line without annotations, if they fit."""
        start, stop = node.lineno - 1, node.body[0].lineno - 1
        bare = copy.deepcopy(node.args)
        for argument in ast.walk(bare):
            if isinstance(argument, ast.arg):
                argument.annotation = None
        indent, names = " " * node.col_offset, ast.unparse(bare).replace("'", '"')
        text = [f"{indent}def {node.name}({names}):"]
        if len(text[0]) > LINE_LENGTH:
            text = [f"{indent}def {node.name}(", f"{indent}    {names}", f"{indent}):"]
        if max(map(len, text)) <= LINE_LENGTH:
            node.args, node.returns = bare, None
            self.lines[start:stop] = [*text, *[None] * (stop - start - len(text))]


def is_annotation(node: ast.stmt) -> bool:
    """Whether a statement only annotates a name."""
    return isinstance(node, ast.AnnAssign) and node.value is None


def is_record(node: ast.stmt) -> bool:
    """Whether the annotations of a class are the fields of its instances."""
    parts = (*getattr(node, "bases", []), *getattr(node, "decorator_list", []))
    return any(ast.unparse(part).startswith(("NamedTuple", "TypedDict", "dataclass")) for part in parts)


def name_of(node: ast.stmt) -> str:
    """Name that a statement defines, if any."""
    if isinstance(node, ast.ClassDef | ast.FunctionDef):
        return node.name
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return targets[0].id if isinstance(targets[0], ast.Name) else ""


def _span(node: ast.stmt) -> tuple[int, int]:
    """Lines of a statement with its decorators, from 0."""
    parts = [node, *getattr(node, "decorator_list", [])]
    return min(part.lineno for part in parts) - 1, int(node.end_lineno or 0)


@functools.cache
def code(file: str, left_out: frozenset[str] = LEFT_OUT, annotations: bool = False) -> str:
    """Makes a file of code for repositories.

    Args:
        file (`str`): Its name, one of `CODE_FILES`.
        left_out (`frozenset[str]`, *optional*): Names of the package that it does not need.
        annotations (`bool`, defaults to `False`): Whether to keep the annotations of arguments.
    """
    modules: dict[str, _Module] = {}  # each after those that it imports
    used: set[tuple[str, str]] = set()
    external: set[tuple[str, str, str]] = set()

    def read(name: str) -> None:
        if name not in modules:
            module = _Module(name, left_out, annotations)
            for imported, _ in module.imports.values():
                if imported.startswith(f"{PACKAGE}."):
                    read(imported)
            modules[name] = module

    def use(module: str, name: str) -> None:
        if name in modules[module].definitions:
            if (module, name) not in used:
                used.add((module, name))
                for node in ast.walk(modules[module].definitions[name]):
                    if isinstance(node, ast.Name):
                        use(module, node.id)
        elif name in modules[module].imports:
            source, original = modules[module].imports[name]
            if source in modules:
                use(source, original)
            else:
                external.add((source, original, name))

    root = CODE_FILES[file]
    if root.module.startswith(
        "pipelines."
    ):  # files that import each other relatively, and nothing else of the package
        return Path(SOURCE, PACKAGE, "pipelines", file).read_text(encoding="utf-8")
    read(f"{PACKAGE}.{root.module}")
    for name in (root.name, *root.also):
        use(f"{PACKAGE}.{root.module}", name)
    text = HEADER.format(name=root.name, version=VERSION, file=file) + _imports(external)
    for name, module in modules.items():
        is_block = True
        for definition in [each for each in module.definitions if (name, each) in used]:
            was_block, is_block = is_block, hasattr(module.definitions[definition], "body")
            text += ("\n\n" if is_block or was_block else "") + module.source(definition) + "\n"
    return text


def _imports(imported: set[tuple[str, str, str]]) -> str:
    """Import statements, those of the standard library first."""
    groups: list[dict[str, list[str]]] = [{}, {}]
    for module, original, name in sorted(imported):
        group = groups[module.partition(".")[0] not in sys.stdlib_module_names]
        renamed = "" if name in (module, original) else f" as {name}"
        if original:
            group.setdefault(f"from {module} import ", []).append(original + renamed)
        else:
            group[f"import {module}{renamed}"] = []
    text = ""
    for group in filter(None, groups):
        text += "\n"
        for line, names in group.items():
            one_line = f"{line}{', '.join(names)}\n"
            is_short = len(one_line) <= LINE_LENGTH + 1
            text += one_line if is_short else "".join([f"{line}(\n", *(f"    {name},\n" for name in names), ")\n"])
    return text


def code_hash(file: str) -> str:
    """SHA-256 of a file of code, in hexadecimal."""
    return hashlib.sha256(code(file).encode()).hexdigest()


def write_code(folder: Path, source: str) -> None:
    """Writes the code of each model in a saved repository beside its config, which names it from then on.

    For a pipeline it also writes the blocks and the index that diffusers' `ModularPipeline` loads.

    Args:
        folder (`Path`): Folder of a model, or of a pipeline with its components.
        source (`str`): Folder or Hub id that the repository will be loaded from.

    Raises:
        ValueError: If the pipeline has no blocks.
    """
    write_model_code(folder)
    if (folder / "model_index.json").exists():
        _write_blocks(folder, source)


def _write_blocks(folder: Path, source: str) -> None:
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    components = {name: value for name, value in index.items() if isinstance(value, list) and value[0] in LIBRARIES}
    file = pipeline_files(index["_class_name"])[0]
    blocks = CODE_FILES[file].also[0] if "tokenizer" in components else CODE_FILES[file].name
    modular: dict[str, Any] = {"_blocks_class_name": blocks, "_class_name": "ModularPipeline"}
    modular |= {name: index[name] or [] for name in ("class_names", "schedule") if name in index}
    for name, (library, cls) in components.items():
        is_ours = library == PACKAGE
        if is_ours:
            _write_file(folder / name, "component.py")
        hint = ("diffusers", "AutoModel") if is_ours else (library, cls)
        place = {"pretrained_model_name_or_path": source, "subfolder": name, "variant": None, "revision": None}
        modular[name] = [None, None, {"type_hint": hint, **place}]
    _write_file(folder, file)
    for name in re.findall(r"^from \.(\w+) import", code(file), re.MULTILINE):
        shutil.copy(Path(SOURCE, PACKAGE, "pipelines", f"{name}.py"), folder)
    _write_json(folder / "modular_config.json", {"auto_map": _references(file, {"ModularPipelineBlocks": blocks})})
    _write_json(folder / "modular_model_index.json", modular)
    index["auto_map"] = _references("component.py", {"AutoModel": "AutoModel"})
    _write_json(folder / "model_index.json", index)


def _references(file: str, auto_map: Mapping[str, str]) -> dict[str, str]:
    return {auto: f"{file.removesuffix('.py')}.{name}" for auto, name in auto_map.items()}


def _write_file(folder: Path, file: str) -> None:
    (folder / file).write_text(code(file), encoding="utf-8")


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def pipeline_files(pipeline: str) -> tuple[str, str]:
    """Files of code of a pipeline by its class: the blocks and the generator."""
    kind = "next_scale" if pipeline == "SVQVAENextScalePipeline" else "llamagen"
    return f"modular_{kind}.py", f"modeling_{kind}.py"


if __name__ == "__main__":
    sys.stdout.write(code(sys.argv[1]))

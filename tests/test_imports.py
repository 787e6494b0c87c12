"""The direction of imports: what stands alone <- checkpoints, codec <- conversion, pipelines, evaluation <- cli."""

import ast
from pathlib import Path

import pytest
from conftest import ROOT

PACKAGE = ROOT / "svqvae_hf"
LAYERS = {
    "tiling": set(),
    "modeling_svqvae": {"tiling"},
    "image_processing_svqvae": set(),
    "files": set(),
    "tokens": {"files"},
    "results": {"contact_sheet", "tokens"},
    "contact_sheet": set(),
    "model_cards": set(),
    "families": set(),
    "pickles": set(),
    "checkpoints": {"families", "modeling_svqvae", "pickles"},
    "conversion": {"checkpoints", "files", "model_cards", "modeling_svqvae"},
    "export": {"files", "modeling_svqvae"},
    "codec": {"image_processing_svqvae", "modeling_svqvae", "tokens"},
    "bounded_zarr": {"files"},
    "large_files": {"bounded_zarr", "files", "image_processing_svqvae"},
    "large_images": {
        *(
            "codec",
            "files",
            "image_processing_svqvae",
            "large_files",
            "modeling_svqvae",
            "results",
            "tiling",
            "tokens",
        ),
    },
    "sequences": {"tokens"},
    "pipeline_autoregressive": {"image_processing_svqvae", "modeling_svqvae", "sequences"},
    "metrics": set(),
    "views": {"codec", "image_processing_svqvae", "metrics", "modeling_svqvae", "results", "tokens"},
    "demo": {"checkpoints", "codec", "image_processing_svqvae", "modeling_svqvae", "tokens", "views"},
    "perceptual": {"pickles"},
    "image_sets": {"files", "image_processing_svqvae"},
    "token_sets": {"checkpoints", "codec", "files", "image_sets", "modeling_svqvae", "tokens"},
    "token_set_cards": {"model_cards"},
    "token_set_writer": {
        *("codec", "conversion", "files", "image_processing_svqvae", "image_sets", "modeling_svqvae"),
        *("token_set_cards", "token_sets", "tokens"),
    },
    "comparison": {"metrics", "perceptual"},
    "evaluation": {
        *("codec", "comparison", "image_processing_svqvae", "image_sets", "metrics", "modeling_svqvae", "perceptual"),
    },
    "evaluation_report": {"contact_sheet", "evaluation", "files", "image_sets"},
}
# A class method of the model that needs a file of a later layer imports it when it is called.
LATE = {"modeling_svqvae": {"checkpoints", "model_cards"}}


def own_imports(path: Path) -> tuple[set[str], set[str]]:
    """Files of the package that a file imports when it is loaded, and later."""
    tree = ast.parse(path.read_text())
    found = {True: set(), False: set()}
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "svqvae_hf":
            names = [node.module] if "." in node.module else [f"svqvae_hf.{name.name}" for name in node.names]
        if isinstance(node, ast.Import):
            names = [name.name for name in node.names if name.name.startswith("svqvae_hf")]
        found[node in tree.body] |= {name.split(".")[1] for name in names if "." in name}
    return found[True], found[False]


@pytest.mark.parametrize("name", sorted(LAYERS))
def test_lower_layers_import_only_what_is_below(name):
    at_load, later = own_imports(PACKAGE / f"{name}.py")
    assert at_load <= LAYERS[name]
    assert later <= LATE.get(name, set())


def test_pipelines_never_import_each_other():
    for path in PACKAGE.glob("pipeline_*.py"):
        at_load, later = own_imports(path)
        assert not any(name.startswith("pipeline_") for name in at_load | later)


def test_package_imports_neither_training_nor_conversion():
    for path in PACKAGE.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [name.name for name in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.split(".")[0] in ("training", "conversion") for name in names), path

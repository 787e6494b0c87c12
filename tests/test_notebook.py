"""The notebook runs, and the outputs in it are those that it gives."""

import re

import nbformat
import pytest
from conftest import ROOT
from nbclient import NotebookClient

NOTEBOOK = ROOT / "notebooks" / "inference_example.ipynb"


def outputs(notebook) -> list[list[tuple[str, str]]]:
    """Kind and text, without its numbers, of each output of each cell."""
    return [
        [
            (
                ", ".join([output.output_type, *sorted(output.get("data", ()))]),
                re.sub(r"\s*\d+\s*", "0", output.get("text", "")),
            )
            for output in cell.outputs
        ]
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]


@pytest.fixture
def kept():
    return nbformat.read(NOTEBOOK, as_version=4)


def test_it_runs_and_gives_what_is_kept(kept, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONWARNINGS", "ignore:IProgress")  # without ipywidgets, bars are text
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    for name in ("docs", "tests"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "notebooks").mkdir()
    expected = outputs(kept)
    NotebookClient(kept, timeout=600, resources={"metadata": {"path": str(tmp_path / "notebooks")}}).execute()
    assert outputs(kept) == expected
    assert not list((tmp_path / "notebooks").iterdir())


def test_it_is_small_and_shows_pictures(kept):
    assert NOTEBOOK.stat().st_size < 1e6
    assert sum("image/jpeg" in kind for cell in outputs(kept) for kind, _ in cell) >= 5
    assert "/site-packages" not in NOTEBOOK.read_text()  # warnings name paths of the machine

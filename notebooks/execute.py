"""Runs the notebook and keeps its outputs: `python notebooks/execute.py`."""

import argparse
import os
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parent / "inference_example.ipynb"


def main() -> None:
    """Executes the notebook in an empty folder, and writes it back."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    os.environ["PYTHONWARNINGS"] = "ignore:IProgress"  # without ipywidgets, progress bars are text
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        resources = {"metadata": {"path": folder}}
        NotebookClient(notebook, record_timing=False, resources=resources).execute()
    notebook.metadata["language_info"] = {"name": "python"}  # without the version of this machine
    nbformat.write(notebook, NOTEBOOK)


if __name__ == "__main__":
    main()

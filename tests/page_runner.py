"""Runs the Python blocks of pages and the cells of notebooks, and writes their errors as JSON.

    python page_runner.py HUB WORK PAGE...

The blocks of a page share one namespace. They run in a folder that has the files they name: the bundled photograph as
`photo.jpg`, in `photos` and in `docs/images`, a TIFF image, original checkpoints, and pipelines as training leaves
them. `HUB` is the folder of a stand-in for the Hub. A small random model replaces the bundled one. It has the
same config but for its width, so all shapes are equal.
"""

import json
import os
import re
import shutil
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
import torch
from conftest import ROOT, make_tiny
from context_models import make_context_model
from diffusers import DDIMScheduler, DiTPipeline
from generators import GOLDEN, make_llamagen
from IPython.core.interactiveshell import InteractiveShell
from IPython.display import display
from IPython.utils.capture import capture_output
from peft import LoraConfig, get_peft_model
from PIL import Image
from pipeline_parts import dit, make_pipeline, text_components

import svqvae_hf

RAW = {"svqvae.safetensors": "svqvae_tiny.safetensors", "gpt.pt": "llamagen_gpt_c2i_tiny.pt"}
RAW |= {"vq_ds16_c2i.pt": "llamagen_tiny.pt", "vq_ds8_c2i.pt": "llamagen_tiny.pt"}


def main(hub: Path, work: Path, *pages: Path) -> None:
    """Runs the pages. The last line of stdout maps each page to its error, empty without one."""
    make_small_default(work / "default")
    files = prepare_files(work / "files")
    prepare_hub(hub, files)
    errors = {}
    for page in pages:
        folder = work / page.stem
        is_notebook = page.suffix == ".ipynb"
        if is_notebook:
            folder.mkdir()  # notebooks need no files
        else:
            shutil.copytree(files, folder, symlinks=True)
        os.chdir(folder)
        torch.set_grad_enabled(True)
        errors[page.name] = run_notebook(page) if is_notebook else run_page(page)
    sys.stdout.write("\n" + json.dumps(errors))


def run_page(page: Path) -> str:
    """Runs the blocks of a page and returns the first traceback."""
    names: dict[str, object] = {"__name__": "__main__"}
    for lines, code in python_blocks(page.read_text()):
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("error", module="__main__|svqvae_hf")
                warnings.filterwarnings("error", category=FutureWarning, module="diffusers|transformers")
                warnings.filterwarnings("ignore", "`is_gradient_checkpointing`")  # peft still reads it
                exec(compile("\n" * lines + code, str(page), "exec"), names)
        except Exception:
            return traceback.format_exc()
        if torch.is_inference_mode_enabled() or not torch.is_grad_enabled():
            return f"The block at line {lines} turns gradients off for the code after it."
    return ""


def run_notebook(page: Path) -> str:
    """Runs the cells and returns the first error, or the first cell whose output is not the one in the file."""
    shell = InteractiveShell.instance()
    shell.display_trap.hook = lambda value: None if value is None else display(value)  # so that it is captured
    for cell in code_cells(page):
        with capture_output() as captured:
            result = shell.run_cell(cell.source)
        if not result.success:
            return captured.stdout + captured.stderr
        made = captured.stdout + captured.stderr, [sorted(output.data) for output in captured.outputs]
        if without_numbers(made[0]) != without_numbers(kept_text(cell)) or made[1] != kept_kinds(cell):
            return f"The output of this cell must be kept in the notebook, but is {made}:\n{cell.source}"
    return f"The notebook leaves {os.listdir()}." if os.listdir() else ""


def code_cells(notebook: Path) -> list[Any]:
    """Cells of a notebook that hold code."""
    import nbformat  # takes half a second

    return [cell for cell in nbformat.read(notebook, as_version=4).cells if cell.cell_type == "code"]


def kept_text(cell: Any) -> str:
    """Printed text of a cell, as kept in the notebook."""
    return "".join(output.get("text", "") for output in cell.outputs)


def kept_kinds(cell: Any) -> list[list[str]]:
    """MIME types of the shown outputs of a cell."""
    return [sorted(output.data) for output in cell.outputs if "data" in output]


def without_numbers(text: str) -> str:
    """The text with each number, and the space around it, as 0."""
    return re.sub(r"\s*[\d.,]*\d\s*", "0", text)


def python_blocks(text: str) -> list[tuple[int, str]]:
    """Number of lines above, and code, of each block."""
    found = re.finditer(r"```python\n(.*?)```", text, re.DOTALL)
    return [(text[: match.start(1)].count("\n"), match[1]) for match in found]


def make_small_default(folder: Path) -> None:
    """Replaces the bundled model by a narrow one."""
    config = json.loads(Path(svqvae_hf.DEFAULT_MODEL, "config.json").read_text())
    narrow = config | {"base_channels": 4, "encoder_ch_mult": (1, 1, 1, 1), "decoder_ch_mult": (1, 1, 1, 1)}
    vqvae = svqvae_hf.SVQVAE.from_config(narrow)
    vqvae.save_pretrained(folder)
    make_context_model(vqvae.codebook_fingerprint(), vqvae.config["codebook_size"]).save_pretrained(folder)
    svqvae_hf.DEFAULT_MODEL = str(folder)


def prepare_files(folder: Path) -> Path:
    """Makes the files that pages name."""
    (folder / "photos").mkdir(parents=True)
    for name in ("docs", "tests"):
        (folder / name).symlink_to(ROOT / name)
    photo = Image.open(ROOT / "docs" / "images" / "chelsea.png").convert("RGB")
    photo.save(folder / "photo.jpg")
    for name in ("a.png", "b.png"):
        photo.save(folder / "photos" / name)
    tifffile.imwrite(folder / "scan.tif", np.asarray(photo.resize((640, 600))), photometric="rgb", tile=(256, 256))
    for name, golden in RAW.items():
        shutil.copy(GOLDEN / golden, folder / name)
    make_pipeline(DiTPipeline).save_pretrained(folder / "out")
    classes = DiTPipeline(dit(4), make_tiny(pixel_range=(-1, 1)), DDIMScheduler(), id2label={0: "cat", 1: "dog"})
    classes.register_to_config(id2label={0: "cat", 1: "dog"})
    classes.save_pretrained(folder / "out-dit")
    make_tiny(codebook_size=256).save_pretrained(folder / "tokenizer")
    svqvae_hf.SVQVAE.from_pretrained(svqvae_hf.DEFAULT_MODEL).save_pretrained(folder / "adapted")
    (folder / "adapted" / "samples").mkdir()
    for name in ("step-0000000.png", "step-0000800.png"):
        photo.save(folder / "adapted" / "samples" / name)
    pipeline = make_llamagen("t2i", **text_components())
    pipeline.save_pretrained(folder / "llamagen-t2i")
    adapter = get_peft_model(pipeline.language_model, LoraConfig(target_modules="all-linear"))
    adapter.save_pretrained(folder / "adapter")
    return folder


def prepare_hub(hub: Path, files: Path) -> None:
    """Makes the repositories that pages name."""
    for name, source in {"svqvae": svqvae_hf.DEFAULT_MODEL, "dit": files / "out"}.items():
        shutil.copytree(source, hub / "org" / name / "main")
    (hub / "org" / "svqvae" / "main" / "README.md").write_text("---\nlicense: mit\n---\n")
    (hub / "org" / "raw" / "main").mkdir(parents=True)
    for name, golden in RAW.items():
        shutil.copy(GOLDEN / golden, hub / "org" / "raw" / "main" / name)
    for repo in (hub / "org").iterdir():
        (repo / "settings.json").write_text("{}")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))

"""Runs the Python blocks of pages and writes what failed as JSON: `python page_runner.py HUB WORK PAGE...`.

The blocks of a page share one namespace, and run in a folder that has what they name: the bundled photograph as
`photo.jpg`, in `photos` and in `docs/images`, a TIFF image, raw checkpoints, pipelines that training leaves. `HUB` is
the folder of a stand-in for the Hub, which the process sees as its own.
"""

import json
import os
import re
import shutil
import sys
import traceback
import warnings
from pathlib import Path

import numpy as np
import tifffile
import torch
from conftest import ROOT, make_tiny
from diffusers import AmusedPipeline, DDIMScheduler, DiTPipeline, DiTTransformer2DModel, LDMPipeline
from PIL import Image
from pipeline_parts import make_pipeline

import svqvae_hf

GOLDEN = ROOT / "tests" / "golden"
RAW = {
    "svqvae.safetensors": "svqvae_tiny.safetensors",
    "vq_ds16_c2i.pt": "llamagen_tiny.pt",
    "vq_ds8_c2i.pt": "llamagen_tiny.pt",
}


def main(hub: Path, work: Path, *pages: Path) -> None:
    """Runs the pages; what failed is the last line of stdout."""
    files = prepare_files(work / "files")
    prepare_hub(hub, files)
    json.dump({str(page): run(page, work / page.stem, files) for page in pages}, sys.stdout)


def run(page: Path, folder: Path, files: Path) -> str:
    """Runs the blocks of a page; gives the traceback of the first error, empty without one."""
    shutil.copytree(files, folder, symlinks=True)
    os.chdir(folder)
    torch.set_grad_enabled(True)  # which pages may turn off
    names: dict[str, object] = {"__name__": "__main__"}
    for lines, code in python_blocks(page.read_text()):
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("error", module="__main__|svqvae_hf")
                exec(compile("\n" * lines + code, str(page), "exec"), names)
        except Exception:
            return traceback.format_exc()
    return ""


def python_blocks(text: str) -> list[tuple[int, str]]:
    """Lines above, and code, of each block."""
    found = re.finditer(r"```python\n(.*?)```", text, re.DOTALL)
    return [(text[: match.start(1)].count("\n"), match[1]) for match in found]


def prepare_files(folder: Path) -> Path:
    """What pages name."""
    (folder / "photos").mkdir(parents=True)
    (folder / "docs").symlink_to(ROOT / "docs")
    photo = Image.open(ROOT / "docs" / "images" / "chelsea.png").convert("RGB")
    photo.save(folder / "photo.jpg")
    for name in ("a.png", "b.png"):
        photo.save(folder / "photos" / name)
    tifffile.imwrite(folder / "scan.tif", np.asarray(photo.resize((640, 600))), photometric="rgb")
    for name, golden in RAW.items():
        shutil.copy(GOLDEN / golden, folder / name)
    make_pipeline(LDMPipeline).save_pretrained(folder / "out-ldm")
    make_pipeline(AmusedPipeline).save_pretrained(folder / "out-masked")
    transformer = DiTTransformer2DModel(
        sample_size=4, in_channels=8, out_channels=8, num_layers=1, num_attention_heads=1, attention_head_dim=8
    )
    classes = DiTPipeline(transformer, make_tiny(pixel_range=(-1, 1)), DDIMScheduler(), id2label={0: "cat", 1: "dog"})
    classes.register_to_config(id2label={0: "cat", 1: "dog"})
    classes.save_pretrained(folder / "out-dit")
    return folder


def prepare_hub(hub: Path, files: Path) -> None:
    """The repositories that pages name."""
    for name, source in {"svqvae": svqvae_hf.DEFAULT_MODEL, "amused": files / "out-masked"}.items():
        shutil.copytree(source, hub / "org" / name / "main")
    (hub / "org" / "svqvae" / "main" / "README.md").write_text("---\nlicense: mit\n---\n")
    (hub / "org" / "raw" / "main").mkdir(parents=True)
    for name, golden in RAW.items():
        shutil.copy(GOLDEN / golden, hub / "org" / "raw" / "main" / name)
    for repo in (hub / "org").iterdir():
        (repo / "settings.json").write_text("{}")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))

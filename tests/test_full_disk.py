"""A full disk leaves either the old file or no file, and one line that says why."""

import numpy as np
import pytest
import torch
from conftest import ROOT, Lazy, fill, make_tiny
from PIL import Image

from svqvae_files.outputs import save_png, write_file
from svqvae_hf.conversion.convert import convert
from svqvae_hf.tokens.token_files import ImageTokens, save_tokens

pytestmark = pytest.mark.usefixtures("few_windows")
CHECKPOINT = ROOT / "tests" / "golden" / "svqvae_tiny.safetensors"


def tokens_of(side: int) -> ImageTokens:
    ids = torch.randint(300, (side, side), generator=torch.Generator().manual_seed(0))
    encoding = {"scales": (1.0,), "f": 8, "tile_size": None, "overlap": None}
    return ImageTokens([ids], side * 8, side * 8, **encoding, codebook_size=300, codebook_fingerprint=64 * "0")


def noise(side: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8))


WRITERS = {
    "file": lambda path, side: write_file(path, bytes(side * side)),
    "tokens": lambda path, side: save_tokens(path, tokens_of(side)),
    "png": lambda path, side: save_png(noise(side), path),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_old_file_stays(disk, kind):
    path = disk / "kept"
    WRITERS[kind](path, 8)
    old = path.read_bytes()
    fill(disk)
    with pytest.raises(OSError, match=r"/kept` cannot be written: No space left on device\.$"):
        WRITERS[kind](path, 200)
    assert path.read_bytes() == old
    assert sorted(each.name for each in disk.iterdir()) == ["ballast", "kept"]


def test_no_part_of_a_folder_stays(disk, monkeypatch):
    export = Lazy("svqvae_hf.export.export")
    large = export.onnx.helper.make_model(export.onnx.helper.make_graph([], "g" * (1 << 20), [], []))
    monkeypatch.setattr("svqvae_hf.export.export.encoder_graph", lambda model: large)
    fill(disk)
    for make in (
        lambda out: convert(CHECKPOINT, out, license="mit"),
        lambda out: export.export_graphs(make_tiny(), out),
    ):
        with pytest.raises(OSError, match="/made` cannot be written: .*(No space left|os error 28)"):
            make(disk / "made")
        assert [path.name for path in disk.iterdir()] == ["ballast"]

"""A full disk leaves either the old file or no file, and one line that says why."""

import numpy as np
import pytest
import torch
from conftest import ROOT, Lazy, fill, make_tiny
from PIL import Image

from svqvae_hf.conversion.convert import convert
from svqvae_hf.data.image_sets import open_images
from svqvae_hf.files.outputs import save_png, write_file
from svqvae_hf.token_sets.settings import read_settings
from svqvae_hf.token_sets.writer import tokenize_set
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
    monkeypatch.setattr("svqvae_hf.export.export.trace_graphs", lambda model: (None, None))
    monkeypatch.setattr("svqvae_hf.export.export.save_graph", lambda _, path, __: path.write_bytes(bytes(1 << 20)))
    fill(disk)
    for make in (
        lambda out: convert(CHECKPOINT, out, license="mit"),
        lambda out: Lazy("svqvae_hf.export.export").export_graphs(make_tiny(), out),
    ):
        with pytest.raises(OSError, match="/made` cannot be written: .*(No space left|os error 28)"):
            make(disk / "made")
        assert [path.name for path in disk.iterdir()] == ["ballast"]


def test_token_set_is_written_once_there_is_space(disk, tmp_path):
    for index in range(6):
        noise(64).save(tmp_path / f"{index}.png")

    def tokenize():
        images = open_images([str(tmp_path / f"{index}.png") for index in range(6)])
        return tokenize_set(make_tiny(), images, disk / "set", model_name="org/tiny", num_parts=6)

    fill(disk)
    with pytest.raises(OSError, match="cannot be written: .*No space left on device"):
        tokenize()
    assert not list(disk.rglob("*.parquet"))
    assert not list(disk.rglob("*[0-9].json"))  # no part is marked as done
    (disk / "ballast").unlink()
    assert tokenize().rows == 6
    assert read_settings(disk / "set").model == "org/tiny"

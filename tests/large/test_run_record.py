import errno

import numpy as np
import pytest
import tifffile
from conftest import make_tiny, save_tiff

from svqvae_hf.files.outputs import os_error
from svqvae_hf.large import run_record
from svqvae_hf.large.large_images import encode_large
from svqvae_hf.large.run_record import record_path
from svqvae_hf.tokens.token_files import load_tokens

pytestmark = pytest.mark.usefixtures("few_windows")


@pytest.fixture
def model():
    tiny = make_tiny()
    tiny.enable_tiling(32, 8)
    return tiny


@pytest.fixture
def tiff(tmp_path):
    """A TIFF of 40 x 60 pixels: 2 x 3 tiles."""
    return save_tiff(tmp_path / "noise.tif", np.random.default_rng(0).integers(0, 256, (60, 40, 3), dtype=np.uint8))


def interrupt(finished, total):
    if finished == 3:
        raise KeyboardInterrupt


def test_only_the_same_run_is_resumed(model, tiff, tmp_path):
    target = tmp_path / "a.safetensors"
    with pytest.raises(KeyboardInterrupt):
        encode_large(model, tiff, target, on_tile=interrupt)
    with pytest.raises(ValueError, match="Resume it with --resume, or remove"):
        encode_large(model, tiff, target)
    other = make_tiny(commit_loss_beta=0.5)
    other.enable_tiling(32, 8)
    with pytest.raises(ValueError, match="differ: model"):
        encode_large(other, tiff, target, resume=True)
    model.enable_tiling(16, 4)
    with pytest.raises(ValueError, match="differ: tile_size, overlap"):
        encode_large(model, tiff, target, resume=True)
    model.enable_tiling(32, 8)
    kept = record_path(target).read_bytes()
    record_path(target).write_text("{")
    with pytest.raises(ValueError, match="must be the record of a run, but is not. Remove it"):
        encode_large(model, tiff, target, resume=True)
    record_path(target).write_bytes(kept)
    save_tiff(tiff, tifffile.imread(tiff)[:, :39])
    with pytest.raises(ValueError, match="differ: input"):
        encode_large(model, tiff, target, resume=True)
    record_path(target).unlink()
    encode_large(model, tiff, target)
    assert load_tokens(target).width == 39
    assert not list(tmp_path.glob("*.partial*"))


def test_full_disk_says_how_to_resume(model, tiff, tmp_path, monkeypatch):
    write = run_record.write_file
    records = []

    def full_disk(path, content):
        records.append(content)
        if len(records) == 3:
            raise os_error("no space", OSError(errno.ENOSPC, "No space left on device"))
        write(path, content)

    monkeypatch.setattr(run_record, "write_file", full_disk)
    with pytest.raises(OSError, match=r"a.safetensors` cannot be written: No space .* again with `resume`"):
        encode_large(model, tiff, tmp_path / "a.safetensors")
    encode_large(model, tiff, tmp_path / "a.safetensors", resume=True)

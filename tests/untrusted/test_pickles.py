import pickle
import struct
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from svqvae_hf import SVQVAE
from svqvae_hf.loaders.checkpoints import read_checkpoint


def archive(path: Path, names: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, content in names.items():
            file.writestr(name, content)


def test_compressed_archive_is_not_unpacked(tmp_path):
    torch.save({"model": {"a": torch.zeros(100)}}, tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt") as file:
        content = {name: file.read(name) for name in file.namelist()}
    content = {name: bytes(1 << 24) if "/data/" in name else each for name, each in content.items()}
    archive(tmp_path / "bomb.pt", content, zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match=r"bomb.pt` must be a whole PyTorch checkpoint .* compressed") as error:
        read_checkpoint(tmp_path / "bomb.pt", SVQVAE)
    assert "the archive unpacks to 167" in str(error.value.__cause__)


def test_entries_that_share_their_bytes_are_not_unpacked(tmp_path):
    archive(tmp_path / "a.pt", {"a/data.pkl": pickle.dumps({}, 2), "a/data/0": bytes(10_000)})
    content = (tmp_path / "a.pt").read_bytes()
    start, end = content.index(b"PK\1\2"), content.rindex(b"PK\5\6")
    directory = content[start:end] + 99 * content[content.rindex(b"PK\1\2") : end]
    last = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 101, 101, len(directory), start, 0)
    (tmp_path / "a.pt").write_bytes(content[:start] + directory + last)
    with zipfile.ZipFile(tmp_path / "a.pt") as file:
        assert len(file.namelist()) == 101
    with pytest.raises(ValueError, match=r"a.pt` must be a whole PyTorch checkpoint .* compressed") as error:
        read_checkpoint(tmp_path / "a.pt", SVQVAE)
    assert "the archive unpacks to 1000" in str(error.value.__cause__)


def test_two_threads_read_checkpoints(golden_dir, monkeypatch):
    """torch's list of safe classes belongs to the process: one reader must not reset it for another."""
    load = torch.load
    two_readers = threading.Barrier(2)

    def slow_load(*args, **options):
        try:
            two_readers.wait(0.2)
        except threading.BrokenBarrierError:
            two_readers.reset()
        return load(*args, **options)

    monkeypatch.setattr(torch, "load", slow_load)
    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(read_checkpoint, golden_dir / "llamagen_tiny.pt", SVQVAE) for _ in range(2)]
    for job in jobs:
        assert job.result().format.name == "llamagen"

import os
from unittest.mock import Mock

import fsspec
import pytest

from svqvae_files.folders import Folder


@pytest.fixture(params=["local", "memory"])
def folder(request, tmp_path):
    if request.param == "local":
        yield Folder(tmp_path / "folder")
    else:
        yield Folder("memory://folder")
        fsspec.filesystem("memory").rm("/", recursive=True)


def test_files_are_written_listed_and_deleted(folder):
    assert folder.read("a/b.txt") is None
    assert folder.names("a") == set()
    folder.write("a/b.txt", b"one")
    assert folder.read("a/b.txt") == b"one"
    folder.write("a/b.txt", b"three")
    folder.write("a/c/d.txt", b"four")
    assert folder.names("a") == {"b.txt", "c"}
    assert folder.sizes("a") == {"a/b.txt": 5, "a/c/d.txt": 4}
    folder.delete("a/b.txt")
    folder.delete("a/b.txt")
    folder.delete("a")
    folder.delete("a")
    assert folder.read("a/c/d.txt") is None


def test_a_new_file_is_complete_or_absent(folder):
    with folder.new_file("a/b.txt") as path:
        path.write_bytes(b"one")
        assert folder.read("a/b.txt") is None
    assert folder.read("a/b.txt") == b"one"

    def interrupted():
        with folder.new_file("a/b.txt") as path:
            path.write_bytes(b"tw")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert folder.read("a/b.txt") == b"one"
    assert folder.names("a") == {"b.txt"}
    with pytest.raises(FileNotFoundError), folder.new_file("a/c.txt") as path:
        pass  # the file was not written


@pytest.mark.parametrize("has_links", [True, False])
def test_of_several_processes_that_create_a_file_the_first_succeeds(tmp_path, monkeypatch, has_links):
    if not has_links:
        monkeypatch.setattr(os, "link", Mock(side_effect=PermissionError(1, "Operation not permitted")))
    folder = Folder(tmp_path / "set")
    folder.create("a/b.json", b"first")
    folder.create("a/b.json", b"second")
    assert folder.read("a/b.json") == b"first"
    assert folder.sizes("a") == {"a/b.json": 5}
    assert folder.sizes("none") == {}
    if has_links:
        monkeypatch.setattr(folder, "read", lambda name: None)  # as if another process wrote it just now
        folder.create("a/b.json", b"third")
        assert (tmp_path / "set" / "a" / "b.json").read_bytes() == b"first"
    assert len(list((tmp_path / "set" / "a").iterdir())) == 1
    folder.delete_empty("a")
    assert (tmp_path / "set" / "a").exists()
    folder.delete("a/b.json")
    folder.delete_empty("a")
    assert not (tmp_path / "set" / "a").exists()

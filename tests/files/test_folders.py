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
    assert sorted(folder.all_files("a")) == ["a/b.txt", "a/c/d.txt"]
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

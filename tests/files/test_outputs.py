import errno
from pathlib import Path

import pytest
from cli_runner import names

from svqvae_files.errors import explained
from svqvae_files.outputs import check_new_folder, new_file, write_file


def test_failed_write_keeps_old_file_and_leaves_no_other(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    write_file(path, b"old")

    def full_disk(self, data):
        with open(self, "wb") as file:
            file.write(data[:1])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_bytes", full_disk)
    with pytest.raises(OSError, match=r"^`.*a.safetensors` cannot be written: No space left on device\.$") as caught:
        write_file(path, b"new")
    assert caught.value.errno == errno.ENOSPC
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["a.safetensors"]


def test_errors_name_the_target_and_not_the_temporary_file(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match=r"/folder` cannot be written: Is a directory\.$"):
        write_file(tmp_path / "folder", b"new")
    assert names(tmp_path) == ["folder"]
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"/file/a` cannot be written: Not a directory\.$"):
        write_file(tmp_path / "file" / "a", b"new")


def test_a_folder_that_cannot_be_made_is_named():
    with pytest.raises(ValueError, match="`/proc/new` must be a new or empty folder, but `/proc` cannot be"):
        check_new_folder(Path("/proc/new"))  # permissions alone do not tell: not even root can write there


def test_a_failed_read_names_the_file_that_was_read(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"^`{tmp_path}/image` cannot be read: No such file or directory.$"):
        with new_file(tmp_path / "shard"), explained(tmp_path / "image", "read"):
            (tmp_path / "image").read_bytes()

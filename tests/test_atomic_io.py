import errno
import os

import pytest
from PIL import Image

from svqvae_hf.atomic_io import check_output, check_targets, find_files, save_png, scale_endings, write_file


def names(folder):
    return [path.name for path in folder.iterdir()]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
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


def test_a_folder_in_the_way_is_named(tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(OSError, match=r"/a` cannot be written: Is a directory\.$"):
        write_file(tmp_path / "a", b"new")
    assert names(tmp_path) == ["a"]


def test_a_file_where_the_folder_should_be_is_no_other_error(tmp_path):
    (tmp_path / "a").touch()
    with pytest.raises(OSError, match=r"/a/b` cannot be written: Not a directory\.$"):
        write_file(tmp_path / "a" / "b", b"new")


def test_a_name_as_long_as_can_be(tmp_path):
    write_file(tmp_path / ("n" * 255), b"new")
    assert names(tmp_path) == ["n" * 255]


def test_a_png_in_a_new_folder(tmp_path):
    save_png(Image.new("RGB", (2, 3), "teal"), tmp_path / "new" / "a.png")
    with Image.open(tmp_path / "new" / "a.png") as image:
        assert image.size == (2, 3)


def test_each_file_is_found_once(tmp_path):
    (tmp_path / "a.png").touch()
    (tmp_path / "b.PNG").touch()
    for ignored in ("c.txt", ".d.png"):
        (tmp_path / ignored).touch()
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "fifo.png")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "link").symlink_to(tmp_path)
    found = find_files([str(tmp_path), f"{tmp_path}/../{tmp_path.name}/a.png", f"{tmp_path}/in/link"], (".png",))
    assert found == [tmp_path / "a.png", tmp_path / "b.PNG"]


def test_links_to_one_file_are_files_of_their_own(tmp_path):
    (tmp_path / "blob").touch()
    for folder in ("snapshot", "other"):
        (tmp_path / folder).mkdir()
    links = [tmp_path / "snapshot" / "a.png", tmp_path / "snapshot" / "b.png", tmp_path / "other" / "a.png"]
    for link in links:
        link.symlink_to("../blob")
    assert find_files([str(tmp_path / "snapshot"), str(tmp_path / "other")], (".png",)) == links


def test_what_is_neither_file_nor_folder_is_refused(tmp_path):
    os.mkfifo(tmp_path / "fifo.png")
    with pytest.raises(ValueError, match=r"an input must be a file or a folder, but `.*fifo.png` is neither"):
        find_files([str(tmp_path / "fifo.png")], (".png",))


def test_an_output_that_leads_nowhere(tmp_path):
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(ValueError, match=r"--output must be a folder that can be written, but `.*link` is not"):
        check_output([], tmp_path / "link")
    with pytest.raises(ValueError, match=r"but `.*link` is not"):
        check_output([], tmp_path / "link" / "under")


def test_inputs_are_not_overwritten(tmp_path):
    inputs = [tmp_path / "a.png", tmp_path / "a_x1.png"]
    check_targets(inputs, inputs, tmp_path / "out", ["_x1.png"])
    check_targets(inputs, inputs, tmp_path, ["_x2.png"])
    with pytest.raises(ValueError, match=r"the input `.*a_x1.png` would be overwritten"):
        check_targets(inputs, inputs, tmp_path, ["_x1.png"])


def test_scales_name_files_by_six_digits():
    assert scale_endings([0.5, 1.0, 1 / 3]) == ["_x0.5.png", "_x1.png", "_x0.333333.png"]
    with pytest.raises(ValueError, match=r"scales must differ in six digits, .* but are 1, 1.0000001"):
        scale_endings([1, 1.0000001])

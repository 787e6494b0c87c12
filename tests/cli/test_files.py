import os

import pytest

from svqvae_cli.files import check_source, find_inputs
from svqvae_files import file_names
from svqvae_hf.models import image_files


def find_files(patterns, suffixes):
    return [file.path for file in find_inputs(patterns, suffixes)]


def test_suffixes_agree_with_the_models():
    """They have their own copy, because they import nothing of the other packages."""
    assert file_names.IMAGE_SUFFIXES == image_files.IMAGE_SUFFIXES


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
    assert found == [tmp_path / "a.png", tmp_path / "b.PNG", tmp_path / "fifo.png"]
    assert find_files([f"{tmp_path}/*.png"], (".png",)) == found[:1]


def test_a_pattern_stands_for_files_and_folders_as_its_matches_would(tmp_path):
    for name in ("a.png", "sub/b.png", "sub/deep/c.png", "out/d.png", "empty/e.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    inputs = find_inputs([f"{tmp_path}/*"], (".png",), tmp_path / "out")
    assert [str(file.name) for file in inputs] == ["a.png", "b.png", "deep/c.png"]
    assert inputs[2].folder == tmp_path / "sub"
    with pytest.raises(ValueError, match="matches only folders without a file that ends in .png"):
        find_inputs([f"{tmp_path}/em*"], (".png",))


def test_folders_are_searched_with_their_subfolders_but_not_the_output(tmp_path):
    for name in ("b.png", "a/d.png", "a/c/e.png", "a/out/b_x1.png", ".hidden/f.png", "z.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "a" / "up").symlink_to(tmp_path / "a")  # not followed
    found = find_inputs([str(tmp_path)], (".png",), tmp_path / "a" / ".." / "a" / "out")
    assert [str(file.name) for file in found] == ["a/c/e.png", "a/d.png", "b.png"]
    assert found[0].target(tmp_path / "out", "_x1.png") == tmp_path / "out" / "a" / "c" / "e_x1.png"
    with pytest.raises(ValueError, match="--output must not be an input folder"):
        find_inputs([str(tmp_path)], (".png",), tmp_path / "a" / "..")


@pytest.mark.parametrize("source", ["org/repo/vqvae", "org/repo/models/vqvae"])
def test_a_part_of_a_repository_may_lie_at_any_depth(source):
    check_source("org/repo", allow_subfolder=True)
    check_source(source, allow_subfolder=True)
    with pytest.raises(ValueError, match="On the Hub a model is `org/repo`"):
        check_source(source)


@pytest.mark.parametrize("source", ["org/repo/", "org/repo/../vqvae", "org/repo//vqvae", "/gone/repo/vqvae"])
def test_no_other_path_is_taken_for_a_part_of_a_repository(source):
    with pytest.raises(ValueError, match="there is no file or folder"):
        check_source(source, allow_subfolder=True)

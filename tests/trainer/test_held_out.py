import json
import os
import shutil

import pytest
from numbered_images import encode, numbered, write_set, write_tar

from svqvae_hf.data.image_sets import open_images
from svqvae_hf.trainer.data.held_out import check_held_out

pytestmark = pytest.mark.usefixtures("cache")


@pytest.mark.parametrize("kind", ["folder", "webdataset", "parquet", "captions"])
@pytest.mark.parametrize("copy", [False, True])
def test_a_file_of_both_sets_is_an_error_for_all_kinds_of_sets(tmp_path, kind, copy):
    for name, numbers in (("train", range(12)), ("new", range(100, 112))):
        write_set(tmp_path / name, "folder" if kind == "captions" else kind, [encode(numbered(n)) for n in numbers])
    if kind == "captions":
        for name in ("train", "new"):
            lines = [json.dumps({"file_name": f"{number:03}.png", "caption": "a"}) for number in range(12)]
            (tmp_path / name / "metadata.jsonl").write_text("\n".join(lines))
    trained, held_out = (open_images([str(tmp_path / name)], copy=copy) for name in ("train", "new"))
    check_held_out(held_out, trained)
    check_held_out(held_out, None)
    path = held_out.files.paths()[1]
    shutil.copy(trained.files.paths()[0], path)
    again = open_images([str(tmp_path / "new")], copy=copy)
    names = f"`{os.path.basename(path)}` is `{os.path.basename(trained.files.paths()[0])}` of the training images"
    with pytest.raises(ValueError, match=f"must hold images that are not trained on, but {names}"):
        check_held_out(again, trained)


def test_only_images_with_a_row_in_the_metadata_are_compared(tmp_path):
    for name in ("train", "new"):
        write_set(tmp_path / name, "folder", [encode(numbered(number)) for number in range(2)])
    (tmp_path / "train" / "metadata.csv").write_text("file_name,caption\n000.png,a")
    (tmp_path / "new" / "000.png").unlink()
    trained, held_out = (open_images([str(tmp_path / name)]) for name in ("train", "new"))
    check_held_out(held_out, trained)
    (tmp_path / "train" / "metadata.csv").write_text("file_name,caption\n../new/001.png,a")
    with pytest.raises(ValueError, match="`001.png` is `../new/001.png` of the training images"):
        check_held_out(held_out, open_images([str(tmp_path / "train")]))


def test_files_at_urls_are_compared_by_their_urls(tmp_path):
    for name in ("a", "b"):
        write_tar(tmp_path / f"{name}.tar", [(f"{name}.png", encode(numbered(ord(name))))])
    trained, held_out = (open_images([f"file://{tmp_path}/{name}.tar"]) for name in ("a", "b"))
    check_held_out(held_out, trained)
    with pytest.raises(ValueError, match="`a.tar` is `a.tar` of the training images"):
        check_held_out(trained, trained)

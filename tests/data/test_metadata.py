import json
import os
import subprocess
import sys

import datasets
import pytest
from numbered_images import numbered

from svqvae_hf.data.image_rows import read_image
from svqvae_hf.data.image_sets import open_images

pytestmark = pytest.mark.usefixtures("cache")


def save_photos(folder, count=2):
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        numbered(number).save(folder / f"{number}.png")


def values(folder, columns=("caption",)):
    return [[row.values[name] for name in columns] for row in open_images([str(folder)], columns=columns)]


def test_cells_of_csv_files_are_read_as_they_stand(tmp_path):
    save_photos(tmp_path, 3)
    lines = ["file_name,caption,number,label", "0.png,NA,007,3", '1.png,"null, or none",12,-4', "2.png,,1.0,0"]
    (tmp_path / "metadata.csv").write_text("\n".join(lines))
    assert values(tmp_path, ["caption", "number"]) == [["NA", "007"], ["null, or none", "12"], ["", "1.0"]]
    images = open_images([str(tmp_path)])
    assert [row.values["label"] for row in images] == [3, -4, 0]
    assert images.features == {"caption": datasets.Value("string"), "label": datasets.Value("int64")}


def test_quoted_cells_of_csv_files_may_hold_lines_and_quotes(tmp_path):
    save_photos(tmp_path)
    (tmp_path / "metadata.csv").write_text(
        'file_name,caption\r\n"0.png","two\nlines, ""quoted"""\r\n1.png,5" disk\r\n'
    )
    assert values(tmp_path) == [['two\nlines, "quoted"'], ['5" disk']]


def test_several_metadata_files_have_one_order_in_all_processes(tmp_path):
    for name in "abcdef":
        save_photos(tmp_path / name)
        lines = [json.dumps({"file_name": f"{number}.png", "caption": f"{name}{number}"}) for number in (1, 0)]
        (tmp_path / name / "metadata.jsonl").write_text("\n".join(lines))
    expected = []
    for name in "abcdef":
        expected += [f"{name}/1.png", f"{name}/0.png"]
    images = open_images([str(tmp_path)])
    assert [row.key for row in images] == expected
    for row in images:
        assert row.values["caption"] == row.key.replace("/", "").removesuffix(".png")
    code = (
        f"from svqvae_hf.data.image_sets import open_images; print([row.key for row in open_images(['{tmp_path}'])])"
    )
    environment = {"PYTHONHASHSEED": "1", "PYTHONPATH": ":".join(sys.path)}  # this process has a random one
    printed = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=True).stdout
    assert printed.decode().strip() == str(expected)


def test_a_captioned_folder_may_have_any_name(tmp_path):
    folder = tmp_path / "photos [2024] *"
    save_photos(folder)
    (folder / "metadata.jsonl").write_text('{"file_name": "1.png", "caption": "one"}\n{"file_name": "none.png"}\n')
    images = open_images([str(folder)])
    assert len(images.rows) == images.length == 2
    first, missing = images
    assert (first.key, first.values, read_image(first).getpixel((0, 0))[0]) == ("1.png", {"caption": "one"}, 1)
    with pytest.raises(FileNotFoundError):
        read_image(missing)


@pytest.mark.parametrize("name", ["../outside/0.png", ".hidden/0.png"])
def test_images_that_a_search_of_the_folder_does_not_find_are_part_of_the_identity(tmp_path, name):
    folder = tmp_path / "photos"
    save_photos(folder)
    save_photos((folder / name).parent)
    rows = [{"file_name": "1.png"}, {"file_name": name}, {"file_name": "\0.png"}]
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    images = open_images([str(folder)])
    listed = ["0.png", "1.png", "metadata.jsonl", name, "\0.png"]
    assert [file.name for file in images.files.inputs()] == listed
    before = images.fingerprint
    os.utime(folder / name, ns=(0, 0))
    assert images.fingerprint != before


def test_classes_of_parquet_metadata_are_kept(tmp_path):
    save_photos(tmp_path)
    features = datasets.Features(
        {"file_name": datasets.Value("string"), "label": datasets.ClassLabel(names=["b", "a"])}
    )
    rows = datasets.Dataset.from_dict({"file_name": ["0.png", "1.png"], "label": [1, 0]}, features=features)
    rows.to_parquet(tmp_path / "metadata.parquet")
    images = open_images([str(tmp_path)])
    assert images.features["label"].names == ["b", "a"]
    assert [row.values["label"] for row in images] == [1, 0]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "metadata.csv",
            "name,caption\n0.png,a",
            "metadata.csv` must have a column `file_name`, but has name, caption",
        ),
        ("metadata.csv", "file_name,caption\n0.png,a,b", "line 2 of .*metadata.csv` must have 2 cells, but has more"),
        (
            "metadata.csv",
            'file_name,caption\n0.png,"a\n1.png,b\n',
            "metadata.csv` must hold a table, but is damaged: unexpected end of data",
        ),
        (
            "metadata.csv",
            'file_name,caption\n0.png,"a\n1.png,"b"\n2.png,c\n',
            "metadata.csv` must hold a table, but is damaged: ',' expected after '\"'",
        ),
        ("metadata.csv", b"file_name\n\xff", "metadata.csv` must hold a table, but is damaged"),
        (
            "metadata.jsonl",
            f'{{"file_name": "0.png", "label": {10**30}}}',
            "metadata.jsonl` must hold a table, but is damaged: Python int too large",
        ),
        ("metadata.jsonl", "[1]", "metadata.jsonl, line 1` must hold a JSON object, but holds a list"),
        (
            "metadata.jsonl",
            '{"file_name": 1}',
            "`file_name` in .*metadata.jsonl` must be a text in each row, got 1",
        ),
        ("metadata.parquet", b"PAR1", "metadata.parquet` must hold a table, but is damaged"),
    ],
)
def test_a_damaged_metadata_file_is_named(tmp_path, name, content, message):
    save_photos(tmp_path)
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message) as raised:
        open_images([str(tmp_path)])
    assert "\n" not in str(raised.value)


def test_a_folder_with_two_metadata_files_is_an_error(tmp_path):
    save_photos(tmp_path / "photos")
    (tmp_path / "photos" / "metadata.csv").write_text("file_name\n0.png")
    (tmp_path / "photos" / "metadata.jsonl").write_text('{"file_name": "0.png"}')
    with pytest.raises(ValueError, match="photos` must have one metadata file, but has metadata.csv and"):
        open_images([str(tmp_path)])


def test_metadata_files_must_agree_on_types(tmp_path):
    for name, caption in (("a", "text"), ("b", 1), ("c", None)):
        save_photos(tmp_path / name, 1)
        (tmp_path / name / "metadata.jsonl").write_text(json.dumps({"file_name": "0.png", "caption": caption}))
    with pytest.raises(ValueError, match="columns of one type, but `caption` of `.*/b/metadata.jsonl` is Value"):
        open_images([str(tmp_path)])
    (tmp_path / "b" / "metadata.jsonl").unlink()
    assert values(tmp_path) == [["text"], [None]]

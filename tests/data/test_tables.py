import os
import re

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub_server import run_python, serve_hub
from numbered_images import encode, numbered, write_tar

from svqvae_hf.data.image_rows import read_image
from svqvae_hf.data.image_sets import open_images
from svqvae_hf.data.tables import is_table

pytestmark = pytest.mark.usefixtures("cache")
PLAIN = {"write_page_checksum": True, "write_statistics": False, "compression": "none", "use_dictionary": False}


def make_rows(numbers, names=("a", "b")):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(names))})
    images = [{"bytes": encode(numbered(number)), "path": f"{number}.png"} for number in numbers]
    labels = [number % 2 for number in numbers]
    return datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)


def reds(images):
    return [read_image(row).getpixel((0, 0))[0] for row in images]


@pytest.mark.parametrize("prefix", ["", "file://"])
def test_files_with_other_classes_are_an_error(tmp_path, prefix):
    make_rows([0, 1]).to_parquet(tmp_path / "0.parquet")
    make_rows([2, 3], ["b", "a"]).to_parquet(tmp_path / "1.parquet")
    with pytest.raises(ValueError, match="same classes in the same order, but `label` of `.*1.parquet` is Class"):
        list(open_images([f"{prefix}{tmp_path}"]))
    make_rows([2, 3]).remove_columns("label").to_parquet(tmp_path / "1.parquet")
    with pytest.raises(ValueError, match="must have the column `label`, but `.*1.parquet` has none"):
        list(open_images([f"{prefix}{tmp_path}"]))


def write_columns(folder, column, *values_of_files):
    """Writes Parquet files `0.parquet` and so on with two images each, and one more column."""
    images = [{"bytes": encode(numbered(number)), "path": f"{number}.png"} for number in range(2)]
    for number, values in enumerate(values_of_files):
        pq.write_table(pa.table({"image": images, column: values}), folder / f"{number}.parquet")


README = """---
configs:
- config_name: default
  data_files: "*.parquet"
---
"""
README_WITH_TYPES = """---
configs:
- config_name: default
  data_files: "*.parquet"
dataset_info:
  features:
  - {name: image, dtype: image}
  - {name: caption, dtype: string}
---
"""


@pytest.mark.parametrize("is_repository", [False, True])
@pytest.mark.parametrize(
    ("column", "first", "second", "type_of_file", "type_in_set"),
    [
        ("label", pa.array([1, 2]), pa.array([1.5, 2.5]), "Value('float64')", "Value('int64')"),
        ("label", pa.array([1, 2]), pa.array(["x", "y"]), "Value('string')", "Value('int64')"),
        ("label", pa.array([1, 2], pa.int8()), pa.array([300, 70000]), "Value('int64')", "Value('int8')"),
        ("caption", pa.array(["a", "b"]), pa.array([["c"], ["d"]]), "List(Value('string'))", "Value('string')"),
    ],
)
def test_files_with_other_types_are_an_error_that_names_file_and_column(
    tmp_path, is_repository, column, first, second, type_of_file, type_in_set
):
    write_columns(tmp_path, column, first, second)
    if is_repository:
        (tmp_path / "README.md").write_text(README)
    message = f"`{column}` of `{tmp_path}/1.parquet` is {type_of_file}, and {type_in_set} in the set. Convert it."
    with pytest.raises(ValueError, match="must have columns of one type, but " + re.escape(message)):
        open_images([str(tmp_path)])
    assert open_images([str(tmp_path)], keep_labels=False).features == {}


def test_a_file_at_a_url_with_other_types_is_an_error_when_it_is_read(tmp_path):
    write_columns(tmp_path, "label", pa.array([1, 2]), pa.array([1.5, 2.5]))
    first, second = open_images([f"file://{tmp_path}"]).parts
    assert [row.values["label"] for row in first.read()] == [1, 2]
    with pytest.raises(ValueError, match="one type, but `label` of `file://.*1.parquet` is Value.'float64'"):
        list(second.read())


@pytest.mark.parametrize("readme", ["", README, README_WITH_TYPES])
def test_a_column_that_is_empty_in_a_file_has_the_type_of_another(tmp_path, readme):
    write_columns(tmp_path, "caption", pa.nulls(2), pa.array(["c", "d"]), pa.nulls(2))
    if readme:
        (tmp_path / "README.md").write_text(readme)
    images = open_images([str(tmp_path)])
    assert images.features == {"caption": datasets.Value("string")}
    assert [row.values["caption"] for row in images] == [None, None, "c", "d", None, None]


def test_a_column_that_is_empty_in_all_files_stays_empty(tmp_path):
    write_columns(tmp_path, "caption", pa.nulls(2), pa.nulls(2))
    assert [row.values["caption"] for row in open_images([str(tmp_path)])] == [None] * 4


def test_texts_may_be_stored_as_two_types(tmp_path):
    write_columns(tmp_path, "caption", pa.array(["a", "b"]), pa.array(["c", "d"], pa.large_string()))
    assert [row.values["caption"] for row in open_images([str(tmp_path)])] == ["a", "b", "c", "d"]


def test_a_file_that_does_not_fit_the_types_in_the_readme_is_named(tmp_path):
    write_columns(tmp_path, "caption", pa.array(["a", "b"]), pa.array([["c"], ["d"]]))
    (tmp_path / "README.md").write_text(README_WITH_TYPES)
    with pytest.raises(ValueError, match="`1.parquet` must have the types of the columns of its set: .* to string"):
        list(open_images([str(tmp_path)]))


CARD = """---
configs:
- config_name: default
  data_files: "*.parquet"
dataset_info:
  features:
  - {name: image, dtype: image}
  - {name: label, dtype: {class_label: {names: {'0': a, '1': b}}}}
---
"""


@pytest.mark.parametrize("suffix", ["parquet", "gpq", "geoparquet"])
def test_files_of_a_repository_with_other_classes_are_an_error(tmp_path, suffix):
    make_rows([0, 1]).to_parquet(tmp_path / f"0.{suffix}")
    make_rows([2, 3], ["b", "a"]).to_parquet(tmp_path / f"1.{suffix}")
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n  data_files: '*.{suffix}'\n---\n")
    with pytest.raises(ValueError, match=f"same classes in the same order, but `label` of `.*1.{suffix}` is Class"):
        list(open_images([str(tmp_path)]))


def test_suffixes_of_tables_are_read_in_any_case():
    assert is_table("train.parquet")
    assert is_table("TRAIN.PARQUET")
    assert is_table("train.Arrow")
    assert not is_table("train.jpg")


READ = """
import sys
from svqvae_hf.data.image_sets import open_images
try:
    list(open_images(["org/set"]))
except ValueError as error:
    sys.stdout.write(str(error))
"""


@pytest.mark.slow
def test_files_of_a_set_on_the_hub_with_other_classes_are_an_error(tmp_path):
    with serve_hub(tmp_path) as env:
        folder = tmp_path / "hub" / "org" / "set" / "main"
        folder.mkdir(parents=True)
        (folder.parent / "settings.json").write_text("{}")
        make_rows([0, 1]).to_parquet(folder / "0.parquet")
        make_rows([2, 3], ["b", "a"]).to_parquet(folder / "1.parquet")
        message = run_python(READ, env | {"HF_DATASETS_CACHE": str(tmp_path / "cache")})
    assert "same classes in the same order, but `label` of `hf://datasets/org/set@" in message


def test_the_card_of_a_repository_names_the_classes_of_numbers(tmp_path):
    (tmp_path / "README.md").write_text(CARD)
    rows = make_rows([0, 1])
    rows.cast_column("label", datasets.Value("int64")).to_parquet(tmp_path / "0.parquet")
    rows.to_parquet(tmp_path / "1.parquet")
    images = open_images([str(tmp_path)])
    assert images.features["label"].names == ["a", "b"]
    assert [row.values["label"] for row in images] == [0, 1, 0, 1]


@pytest.mark.parametrize("prefix", ["", "file://"])
@pytest.mark.parametrize("suffix", ["parquet", "tar"])
@pytest.mark.parametrize("form", ["folder", "files", "pattern"])
def test_brackets_in_names_lose_no_shard(tmp_path, prefix, suffix, form):
    folder = tmp_path / "set [1]"
    folder.mkdir()
    names = ["a[0..1].", "b[2].", "c."]
    for number, name in enumerate(names):
        if suffix == "parquet":
            make_rows([number]).to_parquet(folder / f"{name}parquet")
        else:
            write_tar(folder / f"{name}tar", [(f"{number}.png", encode(numbered(number)))])
    data = {
        "folder": [f"{prefix}{folder}"],
        "files": [f"{prefix}{folder}/{name}{suffix}" for name in names],
        "pattern": [f"{prefix}{tmp_path}/set*/*.{suffix}"],
    }
    if prefix and form == "files":
        pytest.skip("a URL with brackets is a pattern")
    assert reds(open_images(data[form])) == [0, 1, 2]


def test_arrow_files_of_both_formats(tmp_path):
    rows = make_rows(range(40))
    rows.save_to_disk(tmp_path / "saved")
    assert reds(open_images([f"{tmp_path}/saved/*.arrow"])) == list(range(40))
    table = rows.data.table
    with pa.OSFile(str(tmp_path / "file.arrow"), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    images = open_images([str(tmp_path / "file.arrow")])
    assert reds(images) == list(range(40))
    assert images.features["label"].names == ["a", "b"]


@pytest.mark.parametrize("form", ["{}/*.arrow", "{}", "file://{}", "file://{}/*.arrow"])
def test_arrow_files_that_a_saved_set_does_not_name_are_not_read(tmp_path, form):
    folder = tmp_path / "saved"
    make_rows(range(4)).save_to_disk(folder, num_shards=2)
    make_rows([7, 8]).save_to_disk(folder)  # leaves the shards of the first set
    saved = datasets.load_from_disk(folder)
    saved.map(lambda row: row, load_from_cache_file=False)
    saved.filter(lambda label: label == 0, input_columns="label")
    assert len(list(folder.glob("*.arrow"))) == 5
    assert reds(open_images([form.format(folder)])) == [7, 8]
    expanded = sorted(str(path) for path in folder.glob("*.arrow"))  # as by a shell
    assert reds(open_images(expanded)) == [7, 8]


def test_arrow_files_without_a_saved_set_are_an_error(tmp_path):
    make_rows([1, 2]).save_to_disk(tmp_path)
    shard = tmp_path / "data-00000-of-00001.arrow"
    (tmp_path / "state.json").write_text('{"epoch": 1}')  # of another program
    assert reds(open_images([str(tmp_path)])) == [1, 2]
    (tmp_path / "state.json").write_text('{"_data_files": [{"filename": "other.arrow"}]}')
    with pytest.raises(FileNotFoundError, match="has only Arrow files that `state.json` beside them does not name"):
        open_images([str(shard)])
    for content in ("{", '{"_data_files": [1]}', '{"_data_files": null}'):
        (tmp_path / "state.json").write_text(content)
        with pytest.raises(ValueError, match="state.json` must .*, but is damaged"):
            open_images([str(tmp_path)])


def test_a_damaged_page_is_one_unreadable_row_that_names_the_file(tmp_path):
    table = make_rows(range(8)).data.table
    pq.write_table(table, tmp_path / "0.parquet", **PLAIN)
    content = bytearray((tmp_path / "0.parquet").read_bytes())
    content[content.rindex(encode(numbered(5))[:40]) + 60] ^= 1
    (tmp_path / "0.parquet").write_bytes(content)
    rows = list(open_images([str(tmp_path)]))
    assert rows[-1].key == "0.parquet"
    with pytest.raises(ValueError, match="the rest of the file cannot be read: .*checksum"):
        read_image(rows[-1])


def test_columns_of_bytes_and_of_paths_hold_images(tmp_path):
    numbered(7).save(tmp_path / "7.png")
    pq.write_table(pa.table({"picture": [encode(numbered(3)), None]}), tmp_path / "bytes.parquet")
    first, empty = open_images([str(tmp_path / "bytes.parquet")])
    assert (first.key, np.asarray(read_image(first))[0, 0, 0]) == ("0-0", 3)
    with pytest.raises(ValueError, match="the row must hold an image"):
        read_image(empty)
    paths = datasets.Dataset.from_dict({"image": [str(tmp_path / "7.png")]}).cast_column("image", datasets.Image())
    paths.to_parquet(tmp_path / "paths.parquet")
    assert reds(open_images([str(tmp_path / "paths.parquet")])) == [7]


@pytest.mark.parametrize("readme", ["", README])
@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_images_that_rows_name_are_part_of_the_identity(tmp_path, suffix, readme):
    named = tmp_path / "7.png"
    numbered(7).save(named)
    unused = tmp_path / "8.png"
    numbered(8).save(unused)
    images = [
        {"bytes": None, "path": str(named)},
        {"bytes": encode(numbered(3)), "path": str(unused)},
        {"bytes": None, "path": "https://localhost/1.png"},
        None,
    ]
    table = pa.table({"image": images})
    folder = tmp_path / "set"
    folder.mkdir()
    if suffix == "parquet":
        pq.write_table(table, folder / "0.parquet")
    else:
        with pa.OSFile(str(folder / "0.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table)
    if readme:
        (folder / "README.md").write_text(readme.replace("parquet", suffix))
    before = open_images([str(folder)]).fingerprint
    os.utime(unused, ns=(0, 0))
    assert open_images([str(folder)]).fingerprint == before
    os.utime(named, ns=(0, 0))
    assert open_images([str(folder)]).fingerprint != before


@pytest.mark.parametrize("options", [{}, {"write_statistics": False}])
def test_the_identity_of_a_file_with_all_images_embedded_is_of_the_file_alone(tmp_path, options):
    pq.write_table(make_rows(range(3)).data.table, tmp_path / "0.parquet", **options)
    assert [file.name for file in open_images([str(tmp_path)]).files.inputs()] == ["0.parquet"]

import os
import zipfile

import pytest
from datasets import Dataset
from numbered_images import NUM_IMAGES, STREAMS, crop_loader, encode, numbered, numbers, write_sets

from svqvae_hf.trainer.data.image_loading import load_images


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    return write_sets(tmp_path_factory.mktemp("sets"))


def test_folder_is_searched_through_except_for_hidden_files(tmp_path):
    folder = tmp_path / "odd [1] *name?"
    for name in ("b.png", "test/train/a.PNG", "sub.jpg/c.png", ".hidden/d.png", ".e.png", "notes.txt"):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        numbered(len(name)).save(path, "png")
    for streaming in (False, True):
        images = load_images(None, None, [], str(folder), "image", "train", streaming)
        paths = [os.path.relpath(row["image"]["path"], folder) for row in images]
        assert paths == ["b.png", "sub.jpg", "sub.jpg/c.png", "test/train/a.PNG"]
        assert len(list(crop_loader(images))) == 12


def test_files_inside_archives_are_read(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for number in range(3):
            archive.writestr(f"{number}.png", encode(numbered(number)))
    images = load_images("imagefolder", None, [f"{tmp_path}/a.zip"], None, "image", "train", streaming=True)
    assert next(iter(images))["image"]["path"].startswith("zip://")
    assert {number for batch in crop_loader(images) for number in numbers(batch)} == {0, 1, 2}


def test_sets_are_copied_to_disk_unless_streamed(sets, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    for kind in STREAMS:
        images = load_images(kind, None, [f"{sets[kind, 'whole']}/*"], None, "png", "train", streaming=False)
        assert len(images) == NUM_IMAGES
        assert {number for batch in crop_loader(images) for number in numbers(batch)} == set(range(NUM_IMAGES))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_data_dir": "{root}/nowhere"}, "nowhere' must be a folder of images, but is not a folder"),
        ({"train_data_dir": "{root}/empty"}, r"empty' must hold images \(.bmp, .gif, .*\), but has none"),
        (
            {"train_data_dir": "{root}/images", "image_column": "photo"},
            r"must be one of \['image', 'label'\], but is 'photo'",
        ),
        ({"dataset_name": "parquet"}, "`--dataset_name parquet` needs `--data_files`"),
        ({"dataset_name": "webdataset", "data_files": ["{root}/no*.tar"]}, "must name files that exist, but .* match"),
        ({"dataset_name": "webdataset", "data_files": ["{root}/bad.tar"]}, "'webdataset' cannot be loaded: "),
        ({"dataset_name": "parquet", "data_files": ["{root}/bad.parquet"]}, "'parquet' cannot be loaded: Parquet mag"),
        ({"dataset_name": "{root}/nowhere"}, "nowhere' cannot be loaded: "),
        (
            {"dataset_name": "parquet", "data_files": ["{root}/a.parquet"]},
            r"`--image_column` must be one of \['number', 'text'\], but is 'image'",
        ),
        (
            {"dataset_name": "parquet", "data_files": ["{root}/a.parquet"], "image_column": "text"},
            r"must hold images, but 'text' holds Value\('string'\)",
        ),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_mistakes_are_one_sentence(tmp_path, monkeypatch, options, message, streaming):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    for name in ("empty", "images"):
        (tmp_path / name).mkdir()
    numbered(0).save(tmp_path / "images" / "a.png")
    for name in ("bad.tar", "bad.parquet"):
        (tmp_path / name).write_text("no shard" * 200)
    Dataset.from_dict({"number": [1], "text": ["a"]}).to_parquet(tmp_path / "a.parquet")
    arguments = {
        "dataset_name": None,
        "dataset_config_name": None,
        "data_files": [],
        "train_data_dir": None,
        "image_column": "image",
        "split": "train",
    }
    for name, value in options.items():
        values = [each.format(root=tmp_path) for each in (value if isinstance(value, list) else [value])]
        arguments[name] = values if isinstance(value, list) else values[0]
    with pytest.raises(ValueError, match=message) as raised:
        load_images(**arguments, streaming=streaming)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("streaming", [False, True])
def test_missing_split_is_an_error(sets, tmp_path, monkeypatch, streaming):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    with pytest.raises(ValueError, match="cannot be loaded: .*'train'"):
        load_images(str(sets["parquet", "whole"]), None, [], None, "png", "test", streaming)


def test_missing_label_column_is_an_error(tmp_path):
    numbered(0).save(tmp_path / "0.png")
    with pytest.raises(ValueError, match="`--label_column` must be one of .*'label'.*, but is 'caption'"):
        load_images(None, None, [], str(tmp_path), "image", "train", False, "caption")
    with pytest.raises(ValueError, match="must differ from `--image_column`, but both are 'image'"):
        load_images(None, None, [], str(tmp_path), "image", "train", False, "image")

import io

import datasets
import fsspec
import numpy as np
import pytest
from PIL import Image

from svqvae_hf.data import image_sets
from svqvae_hf.data.image_sets import image_name, open_images, open_rows, read_image


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache, and none on the Hub."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    return tmp_path / "cache"


@pytest.fixture
def photos(photo):
    return [photo.crop((20 * i, 0, 20 * i + 40, 30)) for i in range(3)]


@pytest.fixture
def parquet(photos, tmp_path):
    """Folder of a set with two splits, its images in a column `photo`."""
    encoded = []
    for i, image in enumerate(photos):
        file = io.BytesIO()
        image.save(file, "png")
        encoded.append({"bytes": file.getvalue(), "path": f"{i}.png"})
    features = datasets.Features({"photo": datasets.Image(), "label": datasets.Value("int64")})
    rows = datasets.Dataset.from_dict({"photo": encoded, "label": [0, 1, 2]}, features=features)
    folder = tmp_path / "set"
    folder.mkdir()
    for split, number in (("train", 3), ("test", 2)):
        rows.select(range(number)).to_parquet(folder / f"{split}.parquet")
    return str(folder)


def same(found, photos):
    return all(
        np.array_equal(np.array(read_image(each)), np.array(image)) for each, image in zip(found, photos, strict=True)
    )


def test_folder_and_files(photos, tmp_path):
    for i, image in enumerate(photos):
        image.save(tmp_path / f"{i}.png")
    found = open_images([str(tmp_path)])
    assert [image_name(each, i) for i, each in enumerate(found)] == ["0.png", "1.png", "2.png"]
    assert same(found, photos)
    assert open_images([str(tmp_path / "2.png"), str(tmp_path / "*.png")], max_images=2) == [found[2], found[0]]


def test_a_set_is_streamed(parquet, photos, cache):
    found = open_images([parquet], split="train", image_column="photo")
    rows = list(found)
    assert [image_name(row, i) for i, row in enumerate(rows)] == ["0.png", "1.png", "2.png"]
    assert same(rows, photos)
    assert len(list(open_images([parquet], split="test", image_column="photo"))) == 2
    assert len(list(open_images([parquet], split="train", image_column="photo", max_images=1))) == 1
    assert not list(cache.rglob("*.arrow"))


def test_a_folder_of_folders_is_a_set(photos, tmp_path):
    for i, image in enumerate(photos):
        (tmp_path / "photos" / str(i)).mkdir(parents=True)
        image.save(tmp_path / "photos" / str(i) / f"{i}.png")
    (tmp_path / "photos" / "1" / "1.png").write_bytes(b"broken")
    rows = list(open_images([str(tmp_path / "photos")]))
    assert same([rows[0], rows[2]], photos[::2])
    with pytest.raises(ValueError, match="is not a readable image"):
        read_image(rows[1])


def test_images_in_memory(photos):
    assert same(photos, photos)
    assert image_name(photos[0], 7) == "image 7"
    assert image_name({"bytes": b"", "path": None}, 7) == "image 7"


@pytest.mark.parametrize("row", [None, {"bytes": None, "path": None}])
def test_an_empty_row_raises(row):
    assert image_name(row, 3) == "image 3"
    with pytest.raises(ValueError, match="the row must hold an image, but is empty"):
        read_image(row)


def test_a_split_column_or_file_that_does_not_exist_raises(parquet, tmp_path):
    with pytest.raises(ValueError, match=r"has the splits train, test. Choose one with --split"):
        open_images([parquet], image_column="photo")
    with pytest.raises(ValueError, match="--image-column must be one of photo, label, got `image`"):
        open_images([parquet], split="train")
    with pytest.raises(ValueError, match="no file or folder matches"):
        open_images([str(tmp_path / "none" / "*.png")])
    with pytest.raises(ValueError, match="`max_images` must be at least 1, got 0"):
        open_images([parquet], max_images=0)
    with pytest.raises(OSError, match="org/none"):
        open_images(["org/none"], split="train")


REPO = "hf://datasets/org/set@1a2b/"


INSIDE = [
    f"{REPO}train/a.png",
    f"{REPO}train/../images/a.png",
    f"zip://train/a.png::{REPO}train.zip",
    *(f"{name}://a.png::{REPO}a" for name in ("gzip", "tar", "bz2", "xz", "zstd", "lz4")),
    f"{REPO}..odd.jpg",
]
OUTSIDE = [
    f"{REPO}..",
    f"{REPO}../a.png",
    "a.png",
    "/home/someone/private.png",
    "file:///home/someone/private.png",
    f"file:///home/someone/private.png::{REPO}train.zip",
    f"zip://a.png::/home/someone/private.zip::{REPO}train.zip",
    f"zip://private.png::/home/someone/{REPO}train.zip",
    f"simplecache::{REPO}a.png",
    "https://localhost/private.png",
    "hf://datasets/org/private@1a2b/a.png",
    "hf://datasets/org/set@1a2b/../../../private/resolve/main/a.png",
    "hf://org/set@1a2b/a.png",
]


def test_a_set_on_the_hub_can_only_name_its_own_images(monkeypatch, photos):
    """Otherwise the author of a set could have private images of its users encoded, and published with the ids."""
    encoded = io.BytesIO()
    photos[0].save(encoded, "png")
    embedded = {"bytes": encoded.getvalue(), "path": OUTSIDE[0]}
    rows = [{"image": embedded}, *({"image": {"bytes": None, "path": path}} for path in INSIDE + OUTSIDE)]
    features = datasets.Features({"image": datasets.Image(decode=False)})
    stream = datasets.Dataset.from_list(rows, features=features).to_iterable_dataset()
    origin = datasets.data_files.DataFilesList([f"{REPO}train.parquet"], [("org/set", "1a2b")])
    config = type("Config", (), {"data_files": {"train": origin}})
    builder = type(
        "Builder", (), {"repo_id": "org/set", "config": config, "as_streaming_dataset": lambda self, split: stream}
    )
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *_: builder())
    opened = []
    monkeypatch.setattr(fsspec, "open", lambda name, mode: opened.append(name) or io.BytesIO(encoded.getvalue()))
    for sources in (
        list(open_images(["org/set"], split="train")),
        [row.source for part in open_rows(["org/set"], split="train").parts for row in part],
    ):
        inside = sources[: 1 + len(INSIDE)]
        assert same(inside, photos[:1] * len(inside))
        for source in sources[len(inside) :]:
            message = r"the row must hold an image of its set, but names .* with its images embedded"
            with pytest.raises(ValueError, match=message):
                read_image(source)
    assert opened == INSIDE * 2


def test_names_on_the_hub_are_told_from_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    assert [image_sets.is_hub_set(name) for name in ("org/set", "set", "here", "*.png", "/a/b", "a/b/c")] == [
        *(True, True, False, False, False, False)
    ]
    Image.new("RGB", (1, 1)).save(tmp_path / "set", "png")
    assert not image_sets.is_hub_set("set")


def test_an_empty_folder_raises(tmp_path):
    with pytest.raises(FileNotFoundError, match="must hold images, but .* has none. Pass a folder of images"):
        image_sets.open_images([str(tmp_path)])

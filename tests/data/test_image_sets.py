import io
import os
import shutil
from types import SimpleNamespace

import datasets
import fsspec
import numpy as np
import pytest
from numbered_images import NUM_IMAGES, STREAMS, crop_loader, encode, numbered, numbers, write_tar

from svqvae_hf.data.image_rows import read_image
from svqvae_hf.data.image_sets import open_images

pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture
def photos(photo):
    return [photo.crop((20 * i, 0, 20 * i + 40, 30)) for i in range(3)]


@pytest.fixture
def parquet(photos, tmp_path):
    """Folder of a set with two splits, its images in a column `photo`."""
    encoded = [{"bytes": encode(image), "path": f"{i}.png"} for i, image in enumerate(photos)]
    features = datasets.Features({"photo": datasets.Image(), "label": datasets.Value("int64")})
    rows = datasets.Dataset.from_dict({"photo": encoded, "label": [0, 1, 2]}, features=features)
    folder = tmp_path / "set"
    folder.mkdir()
    for split, number in (("train", 3), ("test", 2)):
        rows.select(range(number)).to_parquet(folder / f"{split}.parquet")
    return str(folder)


def same(found, photos):
    return all(np.array_equal(read_image(each), image) for each, image in zip(found, photos, strict=True))


def keys(images):
    return [row.key for row in images]


def save(image, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, "png")


# Image files


def test_folder_and_files(photos, tmp_path):
    for i, image in enumerate(photos):
        image.save(tmp_path / f"{i}.png")
    found = open_images([str(tmp_path)])
    assert keys(found) == ["0.png", "1.png", "2.png"]
    assert same(found, photos)
    some = open_images([str(tmp_path / "2.png"), str(tmp_path / "*.png")], max_images=2)
    assert (keys(some), some.length) == (["2.png", "0.png"], 2)


def test_folder_is_searched_through_except_for_hidden_files_and_cycles(tmp_path):
    folder = tmp_path / "odd [1] *name?"
    for name in ("b.png", "test/train/a.PNG", "sub.jpg/c.png", ".hidden/d.png", ".e.png", "notes.txt"):
        save(numbered(len(name)), folder / name)
    (folder / "sub.jpg" / "cycle").symlink_to(folder)
    images = open_images([str(folder)])
    assert keys(images) == ["b.png", "sub.jpg/c.png", "test/train/a.PNG"]
    assert images.features["label"].names == [".", "sub.jpg", "test/train"]
    assert [row.values["label"] for row in images] == [0, 1, 2]


def test_a_folder_at_a_url_has_the_images_of_the_local_one(tmp_path):
    for name in ("train/cat/0.png", "train/dog/1.png", "val/cat/2.png", ".cache/3.png", "train/._0.png"):
        save(numbered(0), tmp_path / "photos" / name)
    local, remote = f"{tmp_path}/photos", f"file://{tmp_path}/photos"
    for split in ("train", "val"):
        expected, images = (open_images([name], split=split) for name in (local, remote))
        assert keys(images) == keys(expected)
        assert [row.values for row in images] == [row.values for row in expected]
        assert images.features == expected.features
    for name in (local, remote):
        with pytest.raises(ValueError, match=r"has the splits train, val. Choose one with --split"):
            open_images([name])


@pytest.mark.parametrize("prefix", ["", "file://"])
def test_zip_files_must_be_unpacked_first(tmp_path, prefix):
    save(numbered(0), tmp_path / "photos" / "0.png")
    shutil.make_archive(str(tmp_path / "packed"), "zip", tmp_path / "photos")
    for name in ("packed.zip", "*.zip"):
        with pytest.raises(ValueError, match=r"packed.zip` must be unpacked first, because zip files are not read"):
            open_images([f"{prefix}{tmp_path}/{name}"])


@pytest.mark.parametrize("kind", ["rar", "7z"])
def test_the_error_of_an_archive_names_its_kind(tmp_path, kind):
    archive = tmp_path / f"packed.{kind.upper()}"
    archive.touch()
    with pytest.raises(ValueError, match=rf"packed.{kind.upper()}` must be unpacked first, because {kind} files are"):
        open_images([str(archive)])


@pytest.mark.parametrize("prefix", ["", "file://"])
def test_results_must_lie_outside_the_set(tmp_path, prefix):
    save(numbered(0), tmp_path / "photos" / "0.png")
    folder = f"{prefix}{tmp_path}/photos"
    for name in (folder, f"{folder}/"):
        for results in (folder, f"{folder}/report"):
            with pytest.raises(ValueError, match=f"`{results}` must not be in `{name}`, which is searched"):
                open_images([f"{folder}/0.png", name], results=results)
    assert keys(open_images([folder], results=f"{folder}-report")) == ["0.png"]


def test_names_that_are_not_text_are_escaped(photo, tmp_path):
    os.mkdir(os.fsencode(tmp_path) + b"/caf\xe9")
    photo.save(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9/\xe8.png"))
    photo.save(tmp_path / "é.png")
    images = open_images([str(tmp_path)])
    assert keys(images) == ["caf\\xe9/\\xe8.png", "é.png"]
    assert images.features["label"].names == [".", "caf\\xe9"]
    assert same(images, [photo, photo])
    assert images.fingerprint == open_images([str(tmp_path)]).fingerprint


def test_fingerprint_changes_with_a_file(tmp_path):
    save(numbered(0), tmp_path / "0.png")
    before = open_images([str(tmp_path)]).fingerprint
    assert open_images([str(tmp_path)]).fingerprint == before
    save(numbered(0).resize((5, 5)), tmp_path / "0.png")
    assert open_images([str(tmp_path)]).fingerprint != before


def test_several_folders_have_the_classes_of_each(tmp_path):
    for name in ("a/cat/0.png", "a/dog/1.png", "b/cat/0.png", "b/fox/2.png"):
        save(numbered(0), tmp_path / name)
    images = open_images([str(tmp_path / "a"), str(tmp_path / "b")])
    assert images.features["label"].names == ["cat", "dog", "fox"]
    found = [(row.key, row.values["label"]) for row in images]
    assert found == [("a/cat/0.png", 0), ("a/dog/1.png", 1), ("b/cat/0.png", 0), ("b/fox/2.png", 2)]
    braces = open_images([f"{tmp_path}/{{a,b}}"])
    assert [(row.key, row.values["label"]) for row in braces] == found
    files = open_images([f"{tmp_path}/{key}" for key, _ in found])
    assert files.features["label"].names == ["a/cat", "a/dog", "b/cat", "b/fox"]


def test_images_of_formats_that_are_not_read_are_named(tmp_path, caplog):
    save(numbered(0), tmp_path / "0.png")
    for name in ("1.HEIC", "2.jfif"):
        (tmp_path / name).write_bytes(b"")
    assert keys(open_images([str(tmp_path)])) == ["0.png"]
    assert "has 2 images in formats that are not read, such as `" + str(tmp_path / "1.HEIC") in caplog.text
    (tmp_path / "0.png").unlink()
    with pytest.raises(FileNotFoundError, match="has none: .* has 2 images in formats that are not read, such as `"):
        open_images([str(tmp_path)])


def test_fingerprint_is_of_all_files_columns_and_classes(tmp_path):
    for number in range(40):
        save(numbered(number), tmp_path / "photos" / "cat" / f"{number}.png")
    folder = str(tmp_path / "photos")

    def fingerprint(**options):
        return open_images([folder], **options).fingerprint

    before = fingerprint()
    shutil.copytree(folder, tmp_path / "copy")  # with the times of change
    assert open_images([str(tmp_path / "copy")]).fingerprint == before
    (tmp_path / "photos" / "notes.md").write_text("no image")
    assert fingerprint() == before
    changed = tmp_path / "photos" / "cat" / "17.png"
    content, time = changed.read_bytes(), changed.stat().st_mtime_ns
    os.utime(changed, ns=(0, 0))  # older
    assert fingerprint() != before
    changed.write_bytes(content)
    os.utime(changed, ns=(time, time))
    assert fingerprint() == before
    assert fingerprint(max_images=3) != before
    os.rename(tmp_path / "photos" / "cat", tmp_path / "photos" / "dog")
    assert fingerprint() != before


# Tables and archives


def test_a_set_is_streamed(parquet, photos, cache):
    images = open_images([parquet], split="train")
    assert images.rows is None
    assert keys(images) == ["0.png", "1.png", "2.png"]
    assert [row.values for row in images] == [{"label": 0}, {"label": 1}, {"label": 2}]
    assert same(images, photos)
    assert len(list(open_images([parquet], split="test", image_column="photo"))) == 2
    assert len(list(open_images([parquet], split="train", max_images=1))) == 1
    assert not list(cache.rglob("*.arrow"))


@pytest.mark.parametrize(("suffix", "write"), [("jsonl", "to_json"), ("parquet", "to_parquet")])
def test_captions_in_metadata(tmp_path, suffix, write):
    for number in range(2):
        save(numbered(number), tmp_path / "photos" / f"{number}.png")
    save(numbered(2), tmp_path / "photos" / "test 2.png")  # a word that is not a split; it has no row
    rows = datasets.Dataset.from_list([{"file_name": f"{i}.png", "caption": f"photo {i}", "id": i} for i in (1, 0)])
    getattr(rows, write)(tmp_path / "photos" / f"metadata.{suffix}")
    for copy in (False, True):
        images = open_images([str(tmp_path / "photos")], copy=copy)
        assert [row.values for row in images] == [{"caption": "photo 1"}, {"caption": "photo 0"}]
    assert {number for batch in crop_loader(images) for number in numbers(batch)} == {0, 1}


def test_metadata_of_splits(tmp_path):
    for split in ("train", "test"):
        save(numbered(0), tmp_path / split / "0.png")
        rows = datasets.Dataset.from_list([{"file_name": "0.png", "caption": split}])
        rows.to_json(tmp_path / split / "metadata.jsonl")
    assert [row.values for row in open_images([str(tmp_path)], split="test")] == [{"caption": "test"}]
    for folders in ([tmp_path], [tmp_path, tmp_path / "train"]):
        with pytest.raises(ValueError, match="has the splits test, train. Choose one"):
            open_images([*map(str, folders)])
    for names in ([f"{tmp_path}/train", f"{tmp_path}/test"], [f"file://{tmp_path}/test"]):
        with pytest.raises(ValueError, match="has a metadata file, for images of one local folder"):
            open_images(names)
    rows.to_json(tmp_path / "metadata.jsonl")
    with pytest.raises(ValueError, match="must lie in the folders of its splits, not above them"):
        open_images([str(tmp_path)], split="test")


@pytest.mark.parametrize("kind", STREAMS)
def test_sets_are_copied_to_disk_if_asked_for(sets, kind, cache):
    images = open_images([f"{sets[kind, 'broken']}"], copy=True)
    assert (images.length, len(images.rows)) == (NUM_IMAGES, NUM_IMAGES)
    assert keys(images)[:2] == ["000.png", "001.png"]
    assert len({number for batch in crop_loader(images) for number in numbers(batch)}) == NUM_IMAGES - 2
    assert list(cache.rglob("*.arrow"))


def test_the_rest_of_a_broken_file_is_one_unreadable_row(sets, tmp_path):
    for number, name in enumerate(("a", "b", "c")):
        content = (sets["parquet", "whole"] / "000.parquet").read_bytes()
        (tmp_path / f"{name}.parquet").write_bytes(content if number != 1 else content[:-20])
    images = open_images([str(tmp_path)])
    assert keys(images)[6:8] == ["b.parquet", "000.png"]
    with pytest.raises(ValueError, match="the rest of the file cannot be read: .*Parquet magic bytes not found"):
        read_image(next(images.parts[1].read()))


# Repositories


def write_repository(folder, patterns):
    """Writes the README of a repository, with a pattern per split."""
    lines = ["---", "configs:", "- config_name: default", "  data_files:"]
    for split, pattern in patterns.items():
        lines.append(f"  - {{split: {split}, path: '{pattern}'}}")
    (folder / "README.md").write_text("\n".join([*lines, "---"]))


SPLITS = {"train": "train/**", "test": "test/**"}


@pytest.mark.parametrize(
    ("names", "labels"),
    [
        (["train/0.png", "test/1.png"], [[None], [None]]),
        (["train/all/0.png", "test/cat/1.png", "test/dog/2.png"], [[None], [0, 1]]),
        (["train/cat/0.png", "train/dog/1.png", "test/2.png"], [[0, 1], [None]]),
        (["train/cat/0.png", "train/dog/1.png", "test/dog/2.png"], [[0, 1], [1]]),
        (["train/cat/0.png", "train/dog/1.png", "test/a/cat/2.png", "test/a/dog/3.png"], [[0, 1], [0, 1]]),
        (["train/cat/0.png", "train/1.png", "test/2.png"], [[None, None], [None]]),
    ],
)
def test_folders_of_a_repository_are_classes_if_a_split_has_several(tmp_path, names, labels):
    for name in names:
        save(numbered(0), tmp_path / name)
    write_repository(tmp_path, SPLITS)
    for split, labels_of_split in zip(SPLITS, labels, strict=True):
        images = open_images([str(tmp_path)], split=split)
        assert [row.values.get("label") for row in images] == labels_of_split
        if labels_of_split[0] is None:
            assert images.features == {}
        else:
            assert images.features["label"].names == ["cat", "dog"]


def test_images_in_zip_files_of_a_repository_have_no_labels(tmp_path):
    for number, name in enumerate(("cat/0.png", "dog/1.png")):
        save(numbered(number), tmp_path / "photos" / name)
    folder = tmp_path / "repository"
    shutil.make_archive(str(folder / "photos"), "zip", tmp_path / "photos")
    write_repository(folder, {"train": "*.zip"})
    images = list(open_images([str(folder)]))
    assert [(row.key, row.values) for row in images] == [("cat/0.png", {}), ("dog/1.png", {})]
    assert same(images, [numbered(0), numbered(1)])


def test_the_readme_of_a_repository_may_say_that_folders_are_no_classes(tmp_path):
    for name in ("train/cat/0.png", "train/dog/1.png", "test/2.png"):
        save(numbered(0), tmp_path / name)
    write_repository(tmp_path, SPLITS)
    readme = tmp_path / "README.md"
    readme.write_text(readme.read_text().replace("  data_files:", "  drop_labels: true\n  data_files:"))
    assert [row.values for row in open_images([str(tmp_path)], split="train")] == [{}, {}]


@pytest.mark.parametrize("splits", [["train", "test"], ["test", "train"]])
def test_a_repository_with_metadata_in_one_split_keeps_the_images_of_others(tmp_path, splits):
    for name in ("train/cat/0.png", "train/dog/1.png", "test/2.png"):
        save(numbered(0), tmp_path / name)
    (tmp_path / "test" / "metadata.jsonl").write_text('{"file_name": "2.png", "caption": "two"}')
    write_repository(tmp_path, {split: SPLITS[split] for split in splits})
    assert [row.values for row in open_images([str(tmp_path)], split="train")] == [{"label": 0}, {"label": 1}]
    assert [row.values for row in open_images([str(tmp_path)], split="test")] == [{"caption": "two"}]


def test_the_configuration_of_a_repository_must_be_one_of_several(tmp_path):
    lines = ["---", "configs:"]
    for number, name in enumerate("ab"):
        save(numbered(number), tmp_path / f"{number}.png")
        lines += [f"- config_name: {name}", f"  data_files: {number}.png"]
    (tmp_path / "README.md").write_text("\n".join([*lines, "---"]))
    assert keys(open_images([str(tmp_path)], config="b")) == ["1.png"]
    with pytest.raises(ValueError, match="cannot be opened: it has the configurations a, b, choose one with --config"):
        open_images([str(tmp_path)])
    with pytest.raises(ValueError, match="cannot be opened: --config must be one of a, b, got `c`"):
        open_images([str(tmp_path)], config="c")


def test_the_copy_of_a_repository_that_was_moved_reads_its_new_folder(tmp_path):
    for number in range(2):
        save(numbered(number), tmp_path / "old" / f"{number}.png")
    write_repository(tmp_path / "old", {"train": "*.png"})
    images = open_images([str(tmp_path / "old")], copy=True)
    assert same(images, [numbered(0), numbered(1)])
    shutil.copytree(tmp_path / "old", tmp_path / "new")  # with the times of change
    for number in range(2):
        save(numbered(9), tmp_path / "old" / f"{number}.png")
    moved = open_images([str(tmp_path / "new")], copy=True)
    assert keys(moved) == ["0.png", "1.png"]
    assert same(moved, [numbered(0), numbered(1)])


def test_two_folders_whose_files_look_alike_do_not_share_a_copy(tmp_path, monkeypatch):
    for number, name in enumerate(["one", "other"]):
        (tmp_path / name).mkdir()
        write_tar(tmp_path / name / "shard.tar", [("a.png", encode(numbered(number)))])
        os.utime(tmp_path / name / "shard.tar", (0, 0))  # as tools for reproducible archives set it
        monkeypatch.chdir(tmp_path / name)
        images = open_images(["shard.tar"], copy=True)
        assert same(images, [numbered(number)])
    assert len({path.stat().st_size for path in tmp_path.glob("*/shard.tar")}) == 1


def test_the_fingerprint_of_a_repository_changes_with_the_size_of_a_file(tmp_path):
    for name in ("0.png", "1.png"):
        save(numbered(0), tmp_path / name)
    write_repository(tmp_path, {"train": "*.png"})
    images = open_images([str(tmp_path)])
    assert [file.name for file in images.files.inputs()] == ["0.png", "1.png"]
    before = images.fingerprint
    changed = tmp_path / "1.png"
    time = changed.stat().st_mtime_ns
    save(numbered(0).resize((50, 50)), changed)
    os.utime(changed, ns=(time, time))
    assert open_images([str(tmp_path)]).fingerprint != before


# Mistakes


@pytest.mark.parametrize("copy", [False, True])
@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        ("im*", {}, "a pattern must match files, but `im[*]` matches only folders. Pass the folders, or `im[*]/[*]`"),
        ("nowhere/*.png", {}, "no file or folder matches: `.*nowhere/.*.png`"),
        ("shards/s-{0..2}.tar", {}, "no file or folder matches: `.*s-2.tar`"),
        ("shards/s-{1..0}.tar", {}, "`{1..0}` in .* must count upwards"),
        ("empty", {}, "must hold images, but the folder has none: `.*empty`. Pass"),
        ("both", {}, "must be of one kind, but are .parquet files and images. Choose some by a pattern"),
        ("images", {"split": "test"}, "--split must be one of train in the set .*, got `test`"),
        ("images", {"max_images": 0}, "`max_images` must be at least 1, got 0"),
        ("a.parquet", {}, "--image-column must be one of the columns of images"),
        ("a.parquet", {"columns": ["size"]}, "The set has no column size, but only number, text"),
        ("two.parquet", {}, "--image-column must be one of left, right"),
        ("words", {}, "must be of its splits, validation, but `b.parquet` has no such word in its name. Rename it"),
        ("bad.parquet", {}, "bad.parquet` cannot be opened: Parquet magic bytes"),
        ("bad.tar", {}, "tar files must hold images, but `.*bad.tar` has none: .*"),
        ("nope://bucket/photos", {}, "Protocol not known: nope"),
        ("org/none", {}, "the image set `org/none` cannot be opened: "),
    ],
)
def test_mistakes_are_one_line(tmp_path, monkeypatch, data, options, message, copy):
    monkeypatch.chdir(tmp_path)
    for name in ("images/a.png", "both/a.png"):
        save(numbered(0), tmp_path / name)
    (tmp_path / "empty").mkdir()
    (tmp_path / "shards").mkdir()
    for name in ("bad.tar", "bad.parquet", "shards/s-0.tar", "shards/s-1.tar"):
        (tmp_path / name).write_text("no shard" * 200)
    datasets.Dataset.from_dict({"number": [1], "text": ["a"]}).to_parquet(tmp_path / "a.parquet")
    datasets.Dataset.from_dict({"left": [b""], "right": [b""]}).to_parquet(tmp_path / "two.parquet")
    (tmp_path / "words").mkdir()
    for name in ("both/a.parquet", "words/a-dev-1.parquet", "words/b.parquet"):
        (tmp_path / name).write_bytes((tmp_path / "a.parquet").read_bytes())
    with pytest.raises((ValueError, OSError), match=message) as raised:
        open_images([data], copy=copy, **options)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "nope:").exists()


@pytest.mark.parametrize("data", ["photos", []])
def test_a_set_must_be_a_list_of_names(data):
    with pytest.raises(ValueError, match="`data` must be a list of files, folders, URLs or names"):
        open_images(data)


def test_a_set_in_the_cache_alone_is_one_line(monkeypatch):
    builder = SimpleNamespace(config=SimpleNamespace(data_files=None))  # as offline, after it was loaded once
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *_, **__: builder)
    with pytest.raises(OSError, match="the image set `org/set` cannot be opened: the Hub cannot be reached"):
        open_images(["org/set"])


def test_a_name_without_a_slash_is_not_asked_for_on_the_hub(monkeypatch):
    monkeypatch.delattr(datasets, "load_dataset_builder")
    with pytest.raises(OSError, match="no file or folder matches: `map`. Pass .* set on the Hub, which is `org/name`"):
        open_images(["map"])


# Sets on the Hub


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


def stand_in_for_the_hub(monkeypatch, **methods):
    """Makes `datasets` find the set `org/set` with these methods of its builder."""
    origin = datasets.data_files.DataFilesList([f"{REPO}train.parquet"], [("org/set", "1a2b")])
    config = SimpleNamespace(data_files={"train": origin})
    builder = SimpleNamespace(name="parquet", repo_id="org/set", config=config, **methods)
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *_, **options: builder)


@pytest.mark.parametrize("copy", [False, True])
def test_a_set_on_the_hub_can_only_name_its_own_images(monkeypatch, photos, copy):
    """Otherwise the author of a set could have private images of its users encoded, and published with the ids."""
    encoded = encode(photos[0])
    embedded = {"bytes": encoded, "path": OUTSIDE[0]}
    rows = [{"image": embedded}, *({"image": {"bytes": None, "path": path}} for path in INSIDE + OUTSIDE)]
    features = datasets.Features({"image": datasets.Image(decode=False)})
    stream = datasets.Dataset.from_list(rows, features=features).to_iterable_dataset()
    stand_in_for_the_hub(monkeypatch, as_streaming_dataset=lambda split: stream)
    opened = []
    monkeypatch.setattr(fsspec, "open", lambda name, mode: opened.append(name) or io.BytesIO(encoded))
    rows = list(open_images(["org/set"], split="train", copy=copy))
    inside = rows[: 1 + len(INSIDE)]
    assert same(inside, photos[:1] * len(inside))
    for row in rows[len(inside) :]:
        message = r"the row must hold an image of its set, but names .* with its images embedded"
        with pytest.raises(ValueError, match=message):
            read_image(row)
    assert opened == [path for path in INSIDE if "://" in path]

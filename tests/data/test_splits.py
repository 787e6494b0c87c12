import datasets
import pytest
from numbered_images import encode, numbered, write_tar

from svqvae_hf.data.image_sets import open_images

pytestmark = pytest.mark.usefixtures("cache")


def save_all(folder, names):
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        numbered(number).save(folder / name)
    return str(folder)


def keys(images):
    return [row.key for row in images]


@pytest.mark.parametrize(
    ("names", "split", "expected"),
    [
        (["Train/cat/0.png", "Train/dog/1.png", "Test/cat/2.png"], "Train", ["cat/0.png", "dog/1.png"]),
        (["train2017/0.png", "val2017/1.png"], "val2017", ["1.png"]),
        (["images/train/cat/0.png", "images/val/cat/1.png"], "train", ["cat/0.png"]),
        (["train_images/0.png", "test images/1.png"], "test images", ["1.png"]),
        (["training/test tube/0.png", "evaluation/1.png"], "training", ["test tube/0.png"]),
        (["train/cat/0.png", "held_out/cat/1.png"], "train", ["cat/0.png"]),
        (["photos_train/0.png", "photos-Held-Out/1.png"], "photos-Held-Out", ["1.png"]),
        (["train/0.png", "car/1.png"], "train", ["car/1.png", "train/0.png"]),  # classes
        (["held_out/0.png", "car/1.png"], None, ["car/1.png", "held_out/0.png"]),  # classes
        (["train/0.png", "held_outputs/1.png"], None, ["held_outputs/1.png", "train/0.png"]),  # classes
        (["cat/train/0.png", "dog/train/1.png"], None, ["cat/train/0.png", "dog/train/1.png"]),
    ],
)
def test_folders_named_as_splits(tmp_path, names, split, expected):
    images = open_images([save_all(tmp_path, names)], split=split)
    assert keys(images) == expected


@pytest.mark.parametrize("prefix", ["", "file://"])
@pytest.mark.parametrize("stray", ["stray.png", "extra/stray.png"])
@pytest.mark.parametrize("split", [None, "train"])
def test_an_image_outside_the_splits_is_an_error(tmp_path, prefix, stray, split):
    """Otherwise a training with `--split train` would read the images of the test."""
    folder = prefix + save_all(tmp_path, ["train/cat/0.png", "test/cat/1.png", stray])
    message = f"all images of `{folder}` must lie in its splits, test, train, but `{stray}` does not. Move it, or pass"
    with pytest.raises(ValueError, match=message):
        open_images([folder], split=split)
    assert keys(open_images([f"{folder}/train"], split=split)) == ["cat/0.png"]


def test_splits_must_lie_side_by_side(tmp_path):
    folder = save_all(tmp_path, ["animals/train/0.png", "plants/test/1.png"])
    with pytest.raises(ValueError, match="must lie side by side, but are animals/train, plants/test. Pass"):
        open_images([folder])


def test_an_error_says_how_a_split_can_be_named_without_the_option(tmp_path):
    """As for `--mix_data_dir` and `--validation_data_dir`."""
    folder = save_all(tmp_path / "photos", ["train/0.png", "test/1.png"])
    with pytest.raises(ValueError, match=f"splits test, train. Choose one with --split, or pass `{folder}/test`"):
        open_images([folder])
    for split in ("train", "test"):
        (tmp_path / "shards" / split).mkdir(parents=True)
        write_tar(tmp_path / "shards" / split / "0.tar", [(f"{split}.png", encode(numbered(0)))])
    with pytest.raises(ValueError, match=f"or pass the shards of one by a pattern such as `{tmp_path}/shards/test/0"):
        open_images([str(tmp_path / "shards")])
    assert keys(open_images([str(tmp_path / "shards")], split="train")) == ["train.png"]


def test_splits_in_the_names_of_folders_count_for_shards(tmp_path):
    rows = datasets.Dataset.from_list([{"image": encode(numbered(0)), "label": 1}])
    for name in ("training/0.parquet", "val/0.parquet", "val/1.parquet"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        rows.to_parquet(tmp_path / name)
    assert len(open_images([str(tmp_path)], split="train").parts) == 1
    assert len(open_images([str(tmp_path)], split="validation").parts) == 2
    rows.to_parquet(tmp_path / "photos-held-out-0.parquet")
    assert len(open_images([str(tmp_path)], split="held_out").parts) == 1
    rows.to_parquet(tmp_path / "more.parquet")
    with pytest.raises(ValueError, match=r"splits, held_out, train, validation, but `more.parquet` has no such"):
        open_images([str(tmp_path)], split="train")


def test_several_folders_are_narrowed_to_one_split(tmp_path):
    folders = [save_all(tmp_path / name, ["train/cat/0.png", "test/cat/1.png"]) for name in ("a", "b")]
    assert keys(open_images(folders, split="test")) == ["a/test/cat/1.png", "b/test/cat/1.png"]

import io
import json
import os
import random
import signal
import tarfile
import zipfile
from collections import Counter

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image

from svqvae_hf.models.image_processing_svqvae import SVQVAEImageProcessor, load_image
from svqvae_hf.trainer.data.crop_loader import CropLoader
from svqvae_hf.trainer.data.crops import CropPolicy, centre_crops
from svqvae_hf.trainer.data.image_loading import load_images

SHARDS, SHARD_SIZE = 4, 6
NUM_IMAGES = SHARDS * SHARD_SIZE
BROKEN = {7: b"", 12: b"no image"}
STREAMS = ("webdataset", "parquet")
KINDS = ("folder", *STREAMS)


def encode(image, kind="png", **options):
    content = io.BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()


def numbered(number):
    """An image whose crops tell their image by their red, and their place by their green and blue."""
    rows, columns = np.mgrid[:20, :24]
    return Image.fromarray(np.stack([0 * rows + number, rows * 10, columns * 10], -1).astype(np.uint8))


def numbers(batch):
    """The images that crops were cut from."""
    return (batch.sample[:, 0, 0, 0] * 255).round().int().tolist()


def write_set(folder, kind, contents):
    """Encoded images as a folder, as tar shards or as Parquet shards."""
    folder.mkdir()
    for shard in range(0, len(contents), SHARD_SIZE):
        members = list(enumerate(contents))[shard : shard + SHARD_SIZE]
        if kind == "folder":
            for number, content in members:
                (folder / f"{number:03d}.png").write_bytes(content)
        elif kind == "webdataset":
            with tarfile.open(folder / f"{shard:03d}.tar", "w") as tar:
                for number, content in members:
                    member = tarfile.TarInfo(f"{number:03d}.png")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
        else:
            rows = [{"bytes": content, "path": f"{number:03d}.png"} for number, content in members]
            Dataset.from_dict({"png": rows}).to_parquet(folder / f"{shard:03d}.parquet", batch_size=4)


def open_set(folder, kind):
    if kind == "folder":
        return load_images(None, None, [], str(folder), "image", "train", streaming=False)
    return load_images(kind, None, [f"{folder}/*"], None, "png", "train", streaming=True)


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Numbered images in each kind of set, whole and with broken ones among them."""
    root = tmp_path_factory.mktemp("sets")
    whole = [encode(numbered(number)) for number in range(NUM_IMAGES)]
    for kind in KINDS:
        write_set(root / f"{kind}-whole", kind, whole)
        write_set(root / f"{kind}-broken", kind, [BROKEN.get(i, content) for i, content in enumerate(whole)])
    return {(kind, state): root / f"{kind}-{state}" for kind in KINDS for state in ("whole", "broken")}


def policy(**options):
    plain = {
        "sides": (16,),
        "batch_size": 2,
        "center_crop": False,
        "random_flip": False,
        "resize_range": (1.0, 1.0),
    }
    return CropPolicy(**(plain | options))


def crop_loader(images, crop_policy=None, pixel_range=(0, 1), **options):
    defaults = {"seed": 0, "num_workers": 0, "process_index": 0, "num_processes": 1, "num_batches": 12}
    options = defaults | {"shuffle_buffer": 7} | options
    return CropLoader(images, crop_policy or policy(), pixel_range, **options)


def assert_equal(batches, expected):
    assert len(batches) == len(expected)
    for batch, other in zip(batches, expected, strict=True):
        assert torch.equal(batch.sample, other.sample)
        assert (batch.unreadable, batch.num_read) == (other.unreadable, other.num_read)


# Order


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("num_processes", [1, 3])
def test_resumed_loader_goes_on_exactly(sets, kind, num_workers, num_processes):
    folder = sets[kind, "broken"]
    mixed = policy(sides=(16, 8), random_flip=True, resize_range=(0.5, 2))
    options = {"process_index": num_processes // 2, "num_processes": num_processes}
    loader = crop_loader(open_set(folder, kind), mixed, num_workers=num_workers, **options)
    batches, states = [], []
    for batch in loader:
        batches.append(batch)
        states.append(json.loads(json.dumps(loader.state_dict())))
    assert len(batches) == 12
    assert list(loader) == []
    for done in (1, 5, 12) if num_workers else (1, 4, 5, 8, 11):
        workers = 2 - num_workers if done == 5 else num_workers
        resumed = crop_loader(open_set(folder, kind), mixed, num_workers=workers, **options)
        resumed.load_state_dict(states[done - 1])
        assert_equal(list(resumed), batches[done:])
        assert resumed.state_dict() == states[-1]


def test_map_style_resume_reads_nothing_again(sets, monkeypatch):
    loader = crop_loader(open_set(sets["folder", "whole"], "folder"), num_batches=10_001)
    loader.load_state_dict(loader.state_dict() | {"batch": 10_000, "reader": {"position": 20_000}})
    read = []
    monkeypatch.setattr("svqvae_hf.data.image_sets.load_image", lambda file: read.append(file) or numbered(0))
    assert len(list(loader)) == 1
    assert len(read) == 2


@pytest.mark.parametrize("kind", KINDS)
def test_seed_decides(sets, kind):
    images = open_set(sets[kind, "whole"], kind)
    batches = list(crop_loader(images))
    assert_equal(list(crop_loader(images)), batches)
    assert [numbers(batch) for batch in crop_loader(images, seed=1)] != [numbers(batch) for batch in batches]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_workers", [0, 2])
def test_global_random_states_stay(sets, kind, num_workers):
    before = torch.get_rng_state(), random.getstate(), str(np.random.get_state())
    list(crop_loader(open_set(sets[kind, "broken"], kind), num_workers=num_workers))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), str(np.random.get_state())) == before[1:]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_processes", [1, 2, 3])
def test_each_pass_shows_each_image_to_one_process(sets, kind, num_processes):
    """Streams of 4 shards: shared by shards between 2 processes, by images between 3."""
    seen = []
    for process_index in range(num_processes):
        loader = crop_loader(
            open_set(sets[kind, "whole"], kind),
            policy(batch_size=4),
            process_index=process_index,
            num_processes=num_processes,
            num_batches=3 * NUM_IMAGES // num_processes // 4,
        )
        seen.append([number for batch in loader for number in numbers(batch)])
    share = NUM_IMAGES // num_processes
    passes = [[each[start : start + share] for each in seen] for start in range(0, 3 * share, share)]
    for shares in passes:
        assert sorted(sum(shares, [])) == list(range(NUM_IMAGES))
    assert passes[0] != passes[1] != passes[2]


def test_rows_of_a_set_are_seen_as_often_whatever_the_batch(sets):
    loader = crop_loader(open_set(sets["folder", "whole"], "folder"), policy(batch_size=5), num_batches=24)
    assert Counter(number for batch in loader for number in numbers(batch)) == dict.fromkeys(range(NUM_IMAGES), 5)


@pytest.mark.parametrize("kind", STREAMS)
def test_streams_are_shuffled_within_the_buffer(sets, kind):
    orders = []
    for shuffle_buffer in (1, 24):
        loader = crop_loader(open_set(sets[kind, "whole"], kind), shuffle_buffer=shuffle_buffer)
        orders.append([number for batch in loader for number in numbers(batch)])
    shards = [orders[0][start : start + SHARD_SIZE] for start in range(0, NUM_IMAGES, SHARD_SIZE)]
    assert all(shard == list(range(shard[0], shard[0] + SHARD_SIZE)) for shard in shards)
    assert shards != sorted(shards), "the order of shards is random, too"
    assert sum(np.diff(orders[1]) == 1) < 6


@pytest.mark.parametrize("kind", KINDS)
def test_fewer_images_than_a_batch_repeat(tmp_path, kind):
    write_set(tmp_path / "set", kind, [encode(numbered(number)) for number in range(3)])
    (batch,) = crop_loader(open_set(tmp_path / "set", kind), policy(batch_size=9), num_batches=1)
    assert Counter(numbers(batch)) == {0: 3, 1: 3, 2: 3}


@pytest.mark.parametrize("kind", STREAMS)
def test_loaders_share_a_stream(sets, kind):
    images = open_set(sets[kind, "whole"], kind)
    many = policy(batch_size=12)  # so that the images read ahead at first are used up
    loader = crop_loader(images, many)
    alone = [(batch, loader.state_dict()) for batch in loader]
    loader = crop_loader(images, many)
    for batch, (expected, state) in zip(loader, alone, strict=True):
        assert_equal([batch], [expected])
        assert loader.state_dict() == state
        next(iter(crop_loader(images, seed=1)))


def test_batches_have_one_side_on_all_processes_and_equal_pixels(sets):
    images = open_set(sets["folder", "whole"], "folder")
    sides = []
    for process_index in range(2):
        loader = crop_loader(images, policy(sides=(16, 8, 4)), process_index=process_index, num_processes=2)
        shapes = [batch.sample.shape for batch in loader]
        assert {np.prod(shape) for shape in shapes} == {2 * 3 * 16 * 16}
        sides.append([shape[-1] for shape in shapes])
    assert sides[0] == sides[1]
    assert set(sides[0]) == {16, 8, 4}


def test_two_processes_cut_what_one_would(sets):
    images = open_set(sets["folder", "whole"], "folder")
    options = {"random_flip": True, "resize_range": (0.5, 2)}
    whole = list(crop_loader(images, policy(batch_size=4, **options)))
    halves = [list(crop_loader(images, policy(**options), process_index=i, num_processes=2)) for i in range(2)]
    for batch, first, second in zip(whole, *halves, strict=True):
        assert torch.equal(batch.sample[::2], first.sample)
        assert torch.equal(batch.sample[1::2], second.sample)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"seed": 1}, "`seed` must be 0 as when the state was saved, but is 1"),
        ({"shuffle_buffer": 8}, "`shuffle_buffer` must be 7 as when"),
        ({"images": "folder"}, "`streaming` must be True as when"),
    ],
)
def test_states_of_another_order_are_refused(sets, other, message):
    state = crop_loader(open_set(sets["parquet", "whole"], "parquet")).state_dict()
    kind = other.pop("images", "parquet")
    with pytest.raises(ValueError, match=message):
        crop_loader(open_set(sets[kind, "whole"], kind), **other).load_state_dict(state)


@pytest.mark.parametrize(
    ("kind", "count"), [("folder", "`num_rows` must be 6"), ("parquet", "`num_shards` must be 1")]
)
def test_states_of_a_smaller_set_are_refused(tmp_path, kind, count):
    contents = [encode(numbered(number)) for number in range(SHARD_SIZE + 1)]
    write_set(tmp_path / "small", kind, contents[:SHARD_SIZE])
    write_set(tmp_path / "large", kind, contents)
    state = crop_loader(open_set(tmp_path / "small", kind)).state_dict()
    with pytest.raises(ValueError, match=f"{count} as when the state was saved"):
        crop_loader(open_set(tmp_path / "large", kind)).load_state_dict(state)


# Crops


@pytest.fixture
def ramp(tmp_path):
    """A folder with one image, in which each pixel has its own colour."""
    (tmp_path / "ramp").mkdir()
    values = np.arange(48 * 60).reshape(48, 60)
    image = np.stack([values // 256, values % 256, 0 * values], -1).astype(np.uint8)
    Image.fromarray(image).save(tmp_path / "ramp" / "ramp.png")
    return open_set(tmp_path / "ramp", "folder")


def test_crops_are_cut_from_the_image_at_random_places(ramp):
    corners, flips = set(), set()
    for batch in crop_loader(ramp, policy(random_flip=True, batch_size=400), num_batches=1):
        red, green, _ = (batch.sample * 255).round().long().unbind(1)
        for crop in red * 256 + green:
            steps = [np.unique(np.diff(crop.numpy(), axis=axis)).tolist() for axis in (0, 1)]
            assert steps in ([[60], [1]], [[60], [-1]])
            flips.add(steps[1][0])
            corners.add(divmod(crop.min().item(), 60))
    assert flips == {1, -1}
    tops, lefts = ({corner[axis] for corner in corners} for axis in (0, 1))
    assert tops == set(range(48 - 16 + 1))
    assert lefts == set(range(60 - 16 + 1))


def test_centre_without_flip(ramp):
    batches = list(crop_loader(ramp, policy(center_crop=True), num_batches=2))
    expected = centre_crops(ramp, 1, 16, (0, 1))
    red, green, _ = (expected[0] * 255).round().long()
    assert divmod((red * 256 + green).min().item(), 60) == ((48 - 16) // 2, (60 - 16) // 2)
    for batch in batches:
        assert torch.equal(batch.sample, expected.expand(2, -1, -1, -1))


def test_images_are_resized_within_the_range(tmp_path):
    gradient = np.broadcast_to(np.arange(200, dtype=np.uint8)[None, :, None], (160, 200, 3))
    (tmp_path / "set").mkdir()
    Image.fromarray(gradient).save(tmp_path / "set" / "gradient.png")
    wide = policy(sides=(64,), resize_range=(0.5, 2), batch_size=100)
    (batch,) = crop_loader(open_set(tmp_path / "set", "folder"), wide, num_batches=1)
    middle = batch.sample[:, 0, 32, 2:-2] * 255  # the filter is one-sided at the border of the image
    factors = (middle.shape[1] - 1) / (middle[:, -1] - middle[:, 0])
    assert 0.48 < factors.min() < 0.6
    assert 1.8 < factors.max() < 2.1


@pytest.mark.parametrize("size", [(20, 100), (3, 5), (1, 1), (16, 16), (17, 31)])
@pytest.mark.parametrize("resize_range", [(1.0, 1.0), (0.1, 0.9)])
def test_small_images_are_enlarged_until_they_hold_the_crop(tmp_path, size, resize_range):
    (tmp_path / "set").mkdir()
    Image.new("RGB", size, "white").save(tmp_path / "set" / "small.png")
    images = open_set(tmp_path / "set", "folder")
    for batch in crop_loader(images, policy(sides=(32,), resize_range=resize_range), num_batches=5):
        assert torch.equal(batch.sample, torch.ones(2, 3, 32, 32))


@pytest.mark.parametrize("pixel_range", [(0, 1), (-1, 1)])
def test_images_of_every_kind_are_read_as_the_processor_reads_them(tmp_path, photo, pixel_range):
    folder = tmp_path / "set"
    folder.mkdir()
    small = photo.resize((32, 32))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned
    small.convert("L").save(folder / "grey.JPG")
    small.convert("CMYK").save(folder / "cmyk.jpg")
    small.convert("RGBA").rotate(30).save(folder / "alpha.png")
    small.save(folder / "turned.jpg", exif=exif)
    small.save(folder / "next.avif")
    small.quantize(16).save(folder / "palette.gif")
    Image.fromarray(np.asarray(small.convert("L")).astype(np.uint16) * 257).save(folder / "deep.tif")
    images = open_set(folder, "folder")
    assert len(images) == 7
    (batch,) = crop_loader(images, policy(sides=(32,), batch_size=7), pixel_range, num_batches=1)
    assert pixel_range[0] <= batch.sample.min() < sum(pixel_range) / 2 < batch.sample.max() <= pixel_range[1]
    assert batch.sample.dtype == torch.float32
    paths = [row["path"] for row in images["image"]]
    expected = SVQVAEImageProcessor(pixel_range=pixel_range)([load_image(path) for path in paths])["pixel_values"]
    order = [next(i for i in range(7) if torch.equal(batch.sample[i], each)) for each in expected]
    assert sorted(order) == list(range(7))
    assert torch.equal(centre_crops(images, 7, 32, pixel_range), expected)


# Labels


@pytest.mark.parametrize(("streaming", "num_workers"), [(False, 2), (True, 0)])
def test_labels_are_those_of_the_images_also_where_broken_ones_are_replaced(tmp_path, streaming, num_workers):
    contents = [BROKEN.get(number, encode(numbered(number))) for number in range(NUM_IMAGES)]
    rows = [{"bytes": content, "path": None} for content in contents]
    Dataset.from_dict({"label": list(range(NUM_IMAGES)), "png": rows}).to_parquet(tmp_path / "set.parquet")
    images = load_images("parquet", None, [f"{tmp_path}/*.parquet"], None, "png", "train", streaming, "label")
    batches = list(crop_loader(images, num_workers=num_workers, num_batches=NUM_IMAGES // 2))
    assert any(batch.unreadable for batch in batches)
    assert all(batch.labels == numbers(batch) for batch in batches)


def test_labels_of_a_folder_are_the_folders_in_it(tmp_path):
    for number, name in enumerate(("b", "a/c", "b")):
        (tmp_path / name).mkdir(parents=True, exist_ok=True)
        numbered(number).save(tmp_path / name / f"{number}.png")
    images = load_images(None, None, [], str(tmp_path), "image", "train", False, "label")
    assert images.features["label"].names == ["a/c", "b"]
    for batch in crop_loader(images):
        assert batch.labels == [(1, 0, 1)[number] for number in numbers(batch)]


def test_label_columns_that_are_not_there_are_refused(tmp_path):
    numbered(0).save(tmp_path / "0.png")
    with pytest.raises(ValueError, match="`--label_column` must be one of .*'label'.*, but is 'caption'"):
        load_images(None, None, [], str(tmp_path), "image", "train", False, "caption")
    with pytest.raises(ValueError, match="must differ from `--image_column`, but both are 'image'"):
        load_images(None, None, [], str(tmp_path), "image", "train", False, "image")


# Unreadable images


@pytest.mark.parametrize("num_workers", [0, 2])
def test_folder_with_unreadable_files_gives_full_batches_and_names_them(tmp_path, photo, num_workers):
    for number in range(60):
        numbered(number).save(tmp_path / f"{number}.png")
    (tmp_path / "0.png").write_bytes(b"")
    (tmp_path / "21.png").write_bytes((tmp_path / "21.png").read_bytes()[:60])
    (tmp_path / "42.png").unlink()
    (tmp_path / "42.jpg").write_text("Dear diary, ...")
    images = load_images(None, None, [], str(tmp_path), "image", "train", streaming=False)
    batches = list(crop_loader(images, policy(batch_size=4), num_batches=15, num_workers=num_workers))
    named = [name for batch in batches for name in batch.unreadable]
    assert set(named) == {str(tmp_path / name) for name in ("0.png", "21.png", "42.jpg")}
    assert sum(batch.num_read for batch in batches) == 60 + len(named)
    seen = Counter(number for batch in batches for number in numbers(batch))
    assert seen.total() == 60
    assert set(range(60)) - set(seen) == {0, 21, 42}


@pytest.mark.parametrize("kind", STREAMS)
def test_streams_replace_and_name_unreadable_images(sets, kind):
    batches = list(crop_loader(open_set(sets[kind, "broken"], kind), shuffle_buffer=1))
    named = [name for batch in batches for name in batch.unreadable]
    assert set(named) == {f"{number:03d}.png" for number in BROKEN}
    seen = [number for batch in batches for number in numbers(batch)]
    assert len(seen) == NUM_IMAGES
    assert set(range(NUM_IMAGES)) - set(seen) == set(BROKEN)


@pytest.mark.parametrize(("streaming", "place"), [(True, "image {} of epoch 0"), (False, "row {}")])
def test_unreadable_images_without_a_file_are_named_by_their_place(tmp_path, monkeypatch, streaming, place):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    Dataset.from_dict({"png": [encode(numbered(0)), b"no image", None]}).to_parquet(tmp_path / "a.parquet")
    images = load_images("parquet", None, [f"{tmp_path}/*.parquet"], None, "png", "train", streaming)
    (batch,) = crop_loader(images, policy(batch_size=3), num_batches=1)
    assert numbers(batch) == [0, 0, 0]
    assert {place.format(1), place.format(2)} <= set(batch.unreadable)


@pytest.mark.parametrize("kind", KINDS)
def test_a_set_without_a_readable_image_is_given_up(tmp_path, kind):
    write_set(tmp_path / "set", kind, [b"no image", b""])
    images = open_set(tmp_path / "set", kind)
    with pytest.raises(
        ValueError, match=r"must hold readable images, but 1000 in a row are unreadable, .*00[01].png`"
    ):
        next(iter(crop_loader(images)))
    with pytest.raises(ValueError, match="validation images must hold at least one readable image, but hold none"):
        centre_crops(images, 1, 16, (0, 1))


@pytest.mark.parametrize("kind", KINDS)
def test_centre_crops_skip_unreadable_images(sets, kind):
    crops = centre_crops(open_set(sets[kind, "broken"], kind), 9, 16, (0, 1))
    assert (crops[:, 0, 0, 0] * 255).round().int().tolist() == [0, 1, 2, 3, 4, 5, 6, 8, 9]
    assert len(centre_crops(open_set(sets[kind, "broken"], kind), 99, 8, (0, 1))) == NUM_IMAGES - len(BROKEN)


# Workers


def test_workers_leave_signals_to_the_trainer(sets, monkeypatch):
    def signals_as_image(file):
        ignored = [signal.getsignal(each) == signal.SIG_IGN for each in (signal.SIGINT, signal.SIGTERM)]
        return numbered(10 * ignored[0] + ignored[1])

    monkeypatch.setattr("svqvae_hf.data.image_sets.load_image", signals_as_image)
    handler = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        images = open_set(sets["folder", "whole"], "folder")
        assert [numbers(batch) for batch in crop_loader(images, num_workers=2, num_batches=3)] == [[11, 11]] * 3
        assert [numbers(batch) for batch in crop_loader(images, num_batches=1)] == [[0, 0]], "this one keeps its own"
    finally:
        signal.signal(signal.SIGTERM, handler)


# Loading


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


def test_files_within_files_are_read(tmp_path):
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
def test_mistakes_are_told_in_a_sentence(tmp_path, monkeypatch, options, message, streaming):
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
def test_missing_splits_are_told(sets, tmp_path, monkeypatch, streaming):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    with pytest.raises(ValueError, match="cannot be loaded: .*'train'"):
        load_images(str(sets["parquet", "whole"]), None, [], None, "png", "test", streaming)


def test_more_processes_than_images_of_a_stream_are_refused(tmp_path):
    write_set(tmp_path / "set", "parquet", [encode(numbered(0))])
    images = open_set(tmp_path / "set", "parquet")
    with pytest.raises(ValueError, match="Each process must get images of the stream, but one got none"):
        next(iter(crop_loader(images, process_index=1, num_processes=2)))

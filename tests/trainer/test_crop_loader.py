import itertools
import json
import multiprocessing
import os
import pickle
import signal
import time
from collections import Counter

import datasets
import fsspec
import numbered_images
import pytest
import torch
from datasets import Dataset
from numbered_images import KINDS, NUM_IMAGES, crop_loader, encode, numbered, numbers, open_set, policy, write_set
from processes import running_after, start
from s3_server import make_bucket, s3_server

from svqvae_hf.data.image_sets import open_images
from svqvae_hf.trainer.data.crop_loader import CropRows
from svqvae_hf.trainer.data.crops import centre_crops

# Order


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("num_workers", "share"), [(0, (2, 1, 1, 3)), (2, (2,)), (0, (1, 2))])
def test_resumed_loader_continues_exactly(sets, kind, num_workers, share):
    mixed = policy(sides=(16, 8), random_flip=True, resize_range=(0.5, 2))

    def make_loader(num_workers):
        mixture = (open_set(sets["webdataset", "broken"]), 0.4)
        return crop_loader(open_set(sets[kind, "broken"]), mixed, share, num_workers=num_workers, mixture=mixture)

    loader = make_loader(num_workers)
    batches, states = [], []
    for batch in loader:
        batches.append(batch)
        if len(batches) % loader.share.batches == 0:
            states.append(json.loads(json.dumps(loader.state_dict())))
    assert len(states) == 12
    assert list(loader) == []
    for done in (1, 5, 12) if num_workers else (1, 4, 5, 8, 11):
        resumed = make_loader(2 - num_workers if done == 5 else num_workers)
        resumed.load_state_dict(states[done - 1])
        numbered_images.assert_equal(list(resumed), batches[done * loader.share.batches :])
        assert resumed.state_dict() == states[-1]


def crops_of_steps(images, shares, state=None):
    """Sorted crops of each step, from the loaders of some shares in it."""
    steps = [[] for _ in range(12)]
    for share in shares:
        options = {"sides": (16, 8, 4), "random_flip": True, "resize_range": (0.5, 2)}
        loader = crop_loader(images, policy(**options), share, mixture=(images, 0.4))
        if state is not None:
            loader.load_state_dict(state)
        for batch in loader:
            steps[(loader.batch - 1) // loader.share.batches] += [crop.numpy().tobytes() for crop in batch.sample]
    return [*map(sorted, steps)]


def test_a_mixture_takes_the_place_of_its_fraction_and_is_part_of_the_set(sets, tmp_path):
    images = open_set(sets["folder", "whole"])
    for number in (200, 201):
        write_set(tmp_path / str(number), "folder", [encode(numbered(number))])
    plain = crop_loader(images, num_steps=200, mixture=())
    mixed = crop_loader(images, num_steps=200, mixture=(open_set(tmp_path / "200"), 0.25))
    mixed_with_another = crop_loader(images, num_steps=200, mixture=(open_set(tmp_path / "201"), 0.25))
    num_crops = 0
    num_mixed = 0
    for plain_batch, mixed_batch in zip(plain, mixed, strict=True):
        for plain_number, mixed_number in zip(numbers(plain_batch), numbers(mixed_batch), strict=True):
            assert mixed_number in (plain_number, 200)
            num_crops += 1
            num_mixed += mixed_number == 200
    assert 0.18 < num_mixed / num_crops < 0.32
    with pytest.raises(ValueError, match="digest of the set must be"):
        mixed_with_another.load_state_dict(mixed.state_dict())


PROCESSES = {"batches": [(1, 4)], "two": [(1, 2, 0, 2), (1, 2, 1, 2)], "four": [(1, 1, i, 4) for i in range(4)]}


@pytest.mark.parametrize("shares", PROCESSES.values(), ids=PROCESSES)
def test_a_step_holds_the_same_crops_for_any_division_into_batches_and_processes(sets, shares):
    images = open_set(sets["folder", "broken"])
    whole = crops_of_steps(images, [(4,)])
    assert crops_of_steps(images, shares) == whole
    saved = crop_loader(images, None, (2, 1, 1, 2), mixture=(images, 0.4))
    list(itertools.islice(saved, 5))
    assert crops_of_steps(images, shares, saved.state_dict()) == [[]] * 5 + whole[5:]
    assert {sum(map(len, step)) for step in whole} == {4 * 4 * 3 * 16 * 16}, "float32 pixels of each step"
    assert len({len(step) for step in whole if len(set(map(len, step))) == 1}) == 3, "each step has one side"


@pytest.mark.parametrize("kind", KINDS)
def test_each_epoch_shows_each_image_once(sets, kind):
    loader = crop_loader(open_set(sets[kind, "whole"]), None, (4,), 3 * NUM_IMAGES // 4)
    order = []  # numbers of all images that are shown
    for batch in loader:
        order += numbers(batch)
    epochs = [order[start : start + NUM_IMAGES] for start in range(0, len(order), NUM_IMAGES)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(NUM_IMAGES))
    assert epochs[0] != epochs[1] != epochs[2]


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_in_another_process_cuts_the_same(sets, kind):
    loader = crop_loader(open_set(sets[kind, "whole"]))
    rows = CropRows(loader.rows, loader.cutter)
    assert torch.equal(pickle.loads(pickle.dumps(rows))[0].sample, rows[0].sample)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"seed": 1}, "The seed must be 0 as when the checkpoint was written, but is 1. Restore it, or"),
        ({"images": "small"}, "The number of images must be 24 as when .*, but is 1"),
        ({"images": "others"}, "The digest of the set must be .* as when .*, but is"),
        ({"share": (2, 1, 0, 2)}, "The product of .* process count must be 2 as when .*, but is 4. Restore"),
    ],
)
def test_states_of_another_order_are_refused(sets, tmp_path, other, message):
    write_set(tmp_path / "small", "parquet", [encode(numbered(0))])
    write_set(tmp_path / "others", "parquet", [encode(numbered(number + 1)) for number in range(24)])
    folders = sets | {"small": tmp_path / "small", "others": tmp_path / "others"}
    state = crop_loader(open_set(sets["parquet", "whole"])).state_dict()
    name = other.pop("images", ("parquet", "whole"))
    with pytest.raises(ValueError, match=message):
        crop_loader(open_set(folders[name]), **other).load_state_dict(state)


@pytest.mark.parametrize("copy", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_set_of_which_one_file_was_replaced_is_refused(tmp_path, kind, copy):
    """By an older one of the same size, which is no file that a sample of the set would meet."""
    write_set(tmp_path / "set", kind, [encode(numbered(number)) for number in range(NUM_IMAGES)])

    def make_loader():
        return crop_loader(open_images([str(tmp_path / "set")], copy=copy))

    state = make_loader().state_dict()
    make_loader().load_state_dict(state)
    file = sorted((tmp_path / "set").iterdir())[1]
    os.utime(file, ns=(1, 1))
    with pytest.raises(ValueError, match="The digest of the set must be .* as when the checkpoint was written"):
        make_loader().load_state_dict(state)


# Streams


@pytest.mark.parametrize("kind", numbered_images.STREAMS)
@pytest.mark.parametrize(("processes", "workers"), [(1, 0), (2, 2)])
def test_each_epoch_of_a_stream_has_each_image_once(sets, kind, processes, workers):
    images = open_images([str(sets[kind, "whole"])])
    steps = NUM_IMAGES // processes // 2  # of an epoch
    options = {"num_steps": 3 * steps, "num_workers": workers, "shuffle_buffer": 5}
    epochs = [[], [], []]  # numbers of the images of each epoch
    for process in range(processes):
        loader = crop_loader(images, None, (2, 1, process, processes), **options)
        for step, batch in enumerate(loader):
            epochs[step // steps] += numbers(batch)
    for epoch in epochs:
        assert sorted(epoch) == list(range(NUM_IMAGES))
    assert epochs[2] != epochs[0] != epochs[1] != list(range(NUM_IMAGES))


@pytest.mark.parametrize("kind", numbered_images.STREAMS)
def test_a_stream_of_a_bucket_leaves_nothing_in_the_cache(sets, kind, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    with s3_server() as (address, _):
        make_bucket("bucket", address, monkeypatch)
        fsspec.filesystem("s3").put(str(sets[kind, "whole"]), "bucket/set", recursive=True)
        loader = crop_loader(open_images(["s3://bucket/set"]), num_workers=2, shuffle_buffer=5)
        assert sorted(number for batch in loader for number in numbers(batch)) == list(range(NUM_IMAGES))
    assert sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) == 0, "a lock at most"


@pytest.mark.slow
@pytest.mark.parametrize("kind", numbered_images.STREAMS)
@pytest.mark.parametrize("workers", [0, 2])
def test_resumed_stream_continues_exactly(sets, kind, workers):
    def make_loader():
        images = open_images([str(sets[kind, "broken"])])
        options = {"num_workers": workers, "shuffle_buffer": 5}
        return crop_loader(images, policy(sides=(16, 8), random_flip=True), (2, 1, 1, 2), **options)

    loader = make_loader()
    batches, states = [], []
    for batch in loader:
        batches.append(batch)
        state = json.loads(json.dumps(loader.state_dict()))
        states.append(state | {"places": [None, loader.state_dict()["places"][0]]})
    assert any(batch.skipped for batch in batches)
    assert states[-1]["places"][1][0][0] > 0, "the readers must have come to another epoch"
    for done in range(1, 13, 5 if workers else 1):
        resumed = make_loader()
        resumed.load_state_dict(states[done - 1])
        numbered_images.assert_equal(list(resumed), batches[done:])


def test_streams_say_what_they_need(sets):
    images = open_images([str(sets["parquet", "whole"])])
    state = crop_loader(images, num_workers=2).state_dict()
    with pytest.raises(ValueError, match="The number of workers must be 2 as when the checkpoint .*, but is 1"):
        crop_loader(images).load_state_dict(state)
    tars = open_images([str(sets["webdataset", "whole"])])  # as many shards, with other names
    with pytest.raises(ValueError, match="The digest of the set must be .* as when the checkpoint was written, but"):
        crop_loader(tars, num_workers=2).load_state_dict(state)
    with pytest.raises(ValueError, match="must have a shard per worker, but has 4 for .* 3 x 2 processes"):
        crop_loader(images, share=(2, 1, 0, 2), num_workers=3)


# Labels


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("copy", [True, False])
def test_labels_belong_to_their_images_even_where_broken_ones_are_replaced(tmp_path, num_workers, copy):
    contents = [numbered_images.BROKEN.get(number, encode(numbered(number))) for number in range(NUM_IMAGES)]
    rows = [{"bytes": content, "path": None} for content in contents]
    for half in (slice(0, 12), slice(12, 24)):
        part = Dataset.from_dict({"label": list(range(NUM_IMAGES))[half], "png": rows[half]})
        part.to_parquet(tmp_path / f"{half.start}.parquet")
    images = open_images([f"{tmp_path}/*.parquet"], copy=copy)
    batches = list(crop_loader(images, num_steps=NUM_IMAGES // 2, num_workers=num_workers, label="label"))
    assert any(batch.skipped for batch in batches)
    assert all(batch.labels == numbers(batch) for batch in batches)


# Unreadable and small images


@pytest.mark.parametrize("num_workers", [0, 2])
def test_unreadable_files_of_a_folder_are_replaced_and_named(tmp_path, photo, num_workers):
    for number in range(60):
        numbered(number).save(tmp_path / f"{number}.png")
    (tmp_path / "0.png").write_bytes(b"")
    (tmp_path / "21.png").write_bytes((tmp_path / "21.png").read_bytes()[:60])
    (tmp_path / "42.png").unlink()
    (tmp_path / "42.jpg").write_text("Dear diary, ...")
    images = open_images([str(tmp_path)])
    batches = list(crop_loader(images, None, (4,), 15, num_workers=num_workers))
    named = [key for batch in batches for key, _ in batch.skipped]
    assert set(named) == {"0.png", "21.png", "42.jpg"}
    seen = Counter(number for batch in batches for number in numbers(batch))
    assert seen.total() == 60
    assert set(range(60)) - set(seen) == {0, 21, 42}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("copy", [True, False])
def test_a_set_without_a_readable_image_is_an_error(tmp_path, kind, copy):
    write_set(tmp_path / "set", kind, [b"no image", b""])
    images = open_images([str(tmp_path / "set")], copy=copy)
    with pytest.raises(ValueError, match=r"1000 images in a row are not readable, .*00[01].png`: the image"):
        next(iter(crop_loader(images)))
    crops = centre_crops(images, 1, 16, (0, 1))
    assert (len(crops.sample), len(crops.skipped)) == (0, 2)


def test_enlarged_images_are_counted(tmp_path):
    for number in range(4):
        numbered(number).resize((24, 20 if number else 15)).save(tmp_path / f"{number}.png")
    assert [batch.enlarged for batch in crop_loader(open_images([str(tmp_path)]), None, (4,), 2)] == [1, 1]


# Workers


def die_with_workers(folder, copy, note):
    """Reads crops until workers wait for room in their pipe, notes them and dies."""
    batches = iter(crop_loader(open_images([str(folder)], copy=copy), num_workers=2, num_steps=1000, label="text"))
    next(batches)
    time.sleep(1)
    note.write_text(" ".join(str(worker.pid) for worker in multiprocessing.active_children()))
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("copy", [True, False])
def test_workers_end_with_a_trainer_that_is_killed(tmp_path, copy):
    (tmp_path / "set").mkdir()
    rows = Dataset.from_dict({"text": ["long" * 50_000], "png": [encode(numbered(0))]})
    for name in ("a", "b"):
        rows.to_parquet(tmp_path / "set" / f"{name}.parquet")
    start(die_with_workers, tmp_path / "set", copy, tmp_path / "workers").join()
    pids = [int(pid) for pid in (tmp_path / "workers").read_text().split()]
    assert len(pids) == 2
    assert running_after(pids, seconds=10) == []

import json
import pickle
from collections import Counter

import numpy as np
import pytest
import torch
from datasets import Dataset
from numbered_images import (
    BROKEN,
    KINDS,
    NUM_IMAGES,
    assert_equal,
    crop_loader,
    encode,
    numbered,
    numbers,
    open_set,
    policy,
    write_set,
    write_sets,
)

from svqvae_hf.data.image_sets import open_images
from svqvae_hf.trainer.data.crops import centre_crops


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    return write_sets(tmp_path_factory.mktemp("sets"))


# Order


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("num_workers", "num_processes"), [(0, 3), (2, 1)])
def test_resumed_loader_continues_exactly(sets, kind, num_workers, num_processes):
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


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_processes", [2, 3])
def test_each_epoch_shows_each_image_to_one_process(sets, kind, num_processes):
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
    count = NUM_IMAGES // num_processes
    epochs = [[each[start : start + count] for each in seen] for start in range(0, 3 * count, count)]
    for images in epochs:
        assert sorted(sum(images, [])) == list(range(NUM_IMAGES))
    assert epochs[0] != epochs[1] != epochs[2]


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


def test_crops_grow_at_the_same_batch_after_a_resume(sets):
    images = open_set(sets["folder", "whole"], "folder")
    growing = policy(sides=(16, 8, 4), growth_batch=7)
    loader = crop_loader(images, growing)
    sides, state = [], {}
    for batch in loader:
        sides.append(batch.sample.shape[-1])
        if len(sides) == 5:
            state = loader.state_dict()
    assert set(sides[:7]) == {8, 4}
    assert set(sides[7:]) == {16}
    resumed = crop_loader(images, growing)
    resumed.load_state_dict(state)
    assert [batch.sample.shape[-1] for batch in resumed] == sides[5:]


def test_two_processes_cut_what_one_would(sets):
    images = open_set(sets["folder", "whole"], "folder")
    options = {"random_flip": True, "resize_range": (0.5, 2)}
    whole = list(crop_loader(images, policy(batch_size=4, **options)))
    halves = [list(crop_loader(images, policy(**options), process_index=i, num_processes=2)) for i in range(2)]
    for batch, first, second in zip(whole, *halves, strict=True):
        assert torch.equal(batch.sample[::2], first.sample)
        assert torch.equal(batch.sample[1::2], second.sample)


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_in_another_process_cuts_the_same(sets, kind):
    loader = crop_loader(open_set(sets[kind, "whole"], kind))
    assert torch.equal(pickle.loads(pickle.dumps(loader))[0, 0].sample, loader[0, 0].sample)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"seed": 1}, "The seed must be 0 as when the checkpoint was written, but is 1. Restore it, or"),
        ({"images": ("parquet", "small")}, "The number of images must be 24 as when .*, but is 1"),
    ],
)
def test_states_of_another_order_are_refused(sets, tmp_path, other, message):
    write_set(tmp_path / "small", "parquet", [encode(numbered(0))])
    folders = sets | {("parquet", "small"): tmp_path / "small"}
    state = crop_loader(open_set(sets["parquet", "whole"], "parquet")).state_dict()
    kind, name = other.pop("images", ("parquet", "whole"))
    with pytest.raises(ValueError, match=message):
        crop_loader(open_set(folders[kind, name], kind), **other).load_state_dict(state)


# Labels


@pytest.mark.parametrize("num_workers", [0, 2])
def test_labels_belong_to_their_images_even_where_broken_ones_are_replaced(tmp_path, num_workers):
    contents = [BROKEN.get(number, encode(numbered(number))) for number in range(NUM_IMAGES)]
    rows = [{"bytes": content, "path": None} for content in contents]
    Dataset.from_dict({"label": list(range(NUM_IMAGES)), "png": rows}).to_parquet(tmp_path / "set.parquet")
    images = open_images([f"{tmp_path}/*.parquet"], copy=True)
    options = {"num_workers": num_workers, "num_batches": NUM_IMAGES // 2, "label_column": "label"}
    batches = list(crop_loader(images, **options))
    assert any(batch.skipped for batch in batches)
    assert all(batch.labels == numbers(batch) for batch in batches)


# Unreadable images


@pytest.mark.parametrize("num_workers", [0, 2])
def test_unreadable_files_of_a_folder_are_replaced_and_named(tmp_path, photo, num_workers):
    for number in range(60):
        numbered(number).save(tmp_path / f"{number}.png")
    (tmp_path / "0.png").write_bytes(b"")
    (tmp_path / "21.png").write_bytes((tmp_path / "21.png").read_bytes()[:60])
    (tmp_path / "42.png").unlink()
    (tmp_path / "42.jpg").write_text("Dear diary, ...")
    images = open_images([str(tmp_path)])
    batches = list(crop_loader(images, policy(batch_size=4), num_batches=15, num_workers=num_workers))
    named = [image.key for batch in batches for image in batch.skipped]
    assert set(named) == {"0.png", "21.png", "42.jpg"}
    seen = Counter(number for batch in batches for number in numbers(batch))
    assert seen.total() == 60
    assert set(range(60)) - set(seen) == {0, 21, 42}


@pytest.mark.parametrize("kind", KINDS)
def test_a_set_without_a_readable_image_is_an_error(tmp_path, kind):
    write_set(tmp_path / "set", kind, [b"no image", b""])
    images = open_set(tmp_path / "set", kind)
    with pytest.raises(
        ValueError, match=r"must hold readable images, but 1000 in a row are not, .*00[01].png`: the image"
    ):
        next(iter(crop_loader(images)))
    with pytest.raises(ValueError, match="set must hold at least one readable image, but holds none"):
        centre_crops(images, 1, 16, (0, 1))


def test_a_stream_is_refused(sets):
    with pytest.raises(ValueError, match="must have random access. Open it with `copy=True`"):
        crop_loader(open_images([str(sets["parquet", "whole"])]))

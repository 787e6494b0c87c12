import itertools
import multiprocessing
import os
import signal
import time

import datasets
import numpy as np
import pytest
import torch
from conftest import make_tiny
from processes import running_after, start

from svqvae_hf.data.image_rows import ImageRow
from svqvae_hf.token_sets import crops, encoder
from svqvae_hf.token_sets.crops import CroppedImage, read_crops
from svqvae_hf.token_sets.encoder import RowEncoder
from svqvae_hf.token_sets.manifest import PartRecord
from svqvae_hf.token_sets.settings import TokenSettings
from svqvae_hf.tokens.encoding import encoding_of


@pytest.fixture
def settings():
    return TokenSettings(model="tiny", crops="whole", resolution=None, **encoding_of(make_tiny(), [1.0], "latents"))


def encode(model, settings, images, batch_size=None):
    counts = PartRecord(0, "", [])
    rows = RowEncoder(model, settings, datasets.Features(), batch_size).encode(images, counts, lambda: None)
    return [dict(row) for row in rows], counts  # each as it comes, because the writer writes it at once


def noise(*sizes):
    generator = torch.Generator().manual_seed(0)
    arrays = [torch.randint(256, (1, 3, *size), dtype=torch.uint8, generator=generator).numpy() for size in sizes]
    return [CroppedImage(str(key), {}, array) for key, array in enumerate(arrays)]


@pytest.mark.parametrize("waiting_pixels", [2**25, 600])
def test_sizes_are_batched_and_rows_stay_in_order(settings, monkeypatch, waiting_pixels):
    monkeypatch.setattr(encoder, "WAITING_PIXELS", waiting_pixels)
    model = make_tiny()
    encode_tokens = model.encode_tokens
    shapes = []  # of the batches

    def record(batch, *args):
        shapes.append(tuple(batch.shape))
        return encode_tokens(batch, *args)

    monkeypatch.setattr(model, "encode_tokens", record)
    images = noise(*[(8, 8), (8, 12), (8, 8), (20, 20), (8, 12)] * 4)
    images.insert(3, CroppedImage("broken", {}, None, "it is broken."))
    rows, counts = encode(model, settings, images, batch_size=4)
    assert [row["key"] for row in rows] == [str(number) for number in range(20)]
    assert (counts.images, counts.skipped) == (21, [{"key": "broken", "reason": "it is broken."}])
    assert max(shape[0] for shape in shapes) <= 4
    assert len(shapes) < 20
    assert len(set(shapes)) > 1
    rows_alone, _ = encode(make_tiny(), settings, images, batch_size=1)
    for row, row_alone in zip(rows, rows_alone, strict=True):
        assert (row["ids_0"] == row_alone["ids_0"]).all()


@pytest.mark.parametrize("num_workers", [0, 1])
def test_crops_are_read_in_order(photo, tmp_path, num_workers):
    for number in range(40):
        photo.crop((0, 0, 8 + number % 3, 9)).save(tmp_path / f"{number}.png")
    (tmp_path / "7.png").write_bytes(b"broken")
    names = [f"{number}.png" for number in range(40)]
    rows = [ImageRow(name, {"path": str(tmp_path / name), "bytes": None}, {}) for name in names]
    read = list(read_crops(rows, "whole-flip", None, num_workers))
    assert [image.key for image in read] == names
    assert [image.key for image in read if image.crops is None] == ["7.png"]
    assert tuple(read[5].crops.shape) == (2, 3, 9, 10)
    assert np.array_equal(read[5].crops[0], read[5].crops[1][..., ::-1])


def test_a_worker_ignores_ctrl_c_and_ends_when_its_parent_terminates_it(photo, tmp_path):
    """A command that is interrupted while workers start terminates those that its loader does not know."""
    photo.save(tmp_path / "a.png")
    images = read_crops(itertools.repeat(ImageRow("a", str(tmp_path / "a.png"), {})), "centre", 16, num_workers=1)
    next(images)
    (worker,) = multiprocessing.active_children()
    os.kill(worker.pid, signal.SIGINT)
    assert [next(images).key for _ in range(100)] == ["a"] * 100
    worker.terminate()
    worker.join(60)
    assert worker.exitcode == 0


def die_with_workers(image, note):
    """Reads crops until workers wait for room in their pipe, notes them and dies."""
    images = read_crops(itertools.repeat(ImageRow("a", str(image), {})), "centre", 64, num_workers=2)
    next(images)
    time.sleep(1)
    note.write_text(" ".join(str(worker.pid) for worker in multiprocessing.active_children()))
    os.kill(os.getpid(), signal.SIGKILL)


def test_workers_end_with_a_parent_that_is_killed(photo, tmp_path):
    photo.save(tmp_path / "a.png")
    start(die_with_workers, tmp_path / "a.png", tmp_path / "workers").join()
    pids = [int(pid) for pid in (tmp_path / "workers").read_text().split()]
    assert len(pids) == 2
    assert running_after(pids, seconds=10) == []


def test_an_image_that_cannot_be_fetched_ends_the_run(monkeypatch, settings):
    def fail(*args):
        raise OSError("no route to host.")

    monkeypatch.setattr(crops, "read_image", fail)
    row = ImageRow("a.png", {"path": "hf://datasets/org/set@main/a.png", "bytes": None}, {})
    with pytest.raises(OSError, match="`a.png` could not be fetched: no route to host. Run the same command to"):
        encode(make_tiny(), settings, read_crops([row], "whole", None, 0))


def test_an_image_that_needs_too_much_memory_is_named(monkeypatch, settings):
    monkeypatch.setattr("svqvae_hf.tokens.image_tokens.available_memory", lambda device: 1)
    with pytest.raises(ValueError, match=r"`0`: an image of 8 x 8 pixels .* would take about"):
        encode(make_tiny(), settings, noise((8, 8)))

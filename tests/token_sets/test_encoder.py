import pytest
import torch
from conftest import make_tiny

from svqvae_hf.data.image_rows import FileRows, ImageRow
from svqvae_hf.token_sets import encoder as shard_encoder
from svqvae_hf.token_sets.encoder import CroppedImage, ShardEncoder, ShardName, assigned_images, read_crops
from svqvae_hf.token_sets.settings import TokenSettings


@pytest.fixture
def settings():
    model = make_tiny()
    return TokenSettings("tiny", (1.0,), model.f, 64, model.codebook_fingerprint(), None, None, "whole", None)


class Part:
    """Rows that can be read once."""

    def __init__(self, rows):
        self.rows = iter(rows)

    def read(self, start=0):
        return self.rows


@pytest.mark.parametrize(("num_parts", "num_processes"), [(1, 1), (1, 3), (7, 2), (12, 3)])
def test_each_image_is_assigned_to_one_process_and_all_have_as_many(num_parts, num_processes):
    found = []
    for rank in range(num_processes):
        parts = [Part([(part, i) for i in range(24)]) for part in range(num_parts)]
        assigned = list(assigned_images(parts, 2, {"train-00000-00001.parquet"}, rank, num_processes))
        assert all(shard == ShardName(row[0], row[1] // 2) for shard, row in assigned)
        assert len(assigned) >= 24 * num_parts // num_processes - 4
        found += [row for _, row in assigned]
    rows = {(part, i) for part in range(num_parts) for i in range(24)}
    assert sorted(found) == sorted(rows - {(0, 2), (0, 3)})


def test_other_processes_do_not_read_a_part():
    parts = [Part([index]) for index in range(8)]
    assert [row for _, row in assigned_images(parts, 2, set(), 1, 2)] == [1, 3, 5, 7]
    assert [next(part.rows, None) for part in parts] == [0, None, 2, None, 4, None, 6, None]


def test_of_image_files_each_process_looks_only_at_its_own(monkeypatch):
    looked_at = []
    row = FileRows.row
    monkeypatch.setattr(FileRows, "row", lambda self, index: looked_at.append(index) or row(self, index))
    files = FileRows("/photos", [f"{index}.png" for index in range(10)])
    assigned = list(assigned_images([files], 2, {"train-00000-00001.parquet"}, 1, 2))
    assert [(shard.number, image.key) for shard, image in assigned] == [(3, "6.png"), (3, "7.png")]
    assert looked_at == [6, 7]


def test_an_image_that_cannot_be_fetched_ends_the_run(monkeypatch, settings):
    def fail(*args):
        raise OSError("no route to host.")

    monkeypatch.setattr(shard_encoder, "read_image", fail)
    encoder = ShardEncoder(make_tiny(), settings, None, 1)
    row = ImageRow("a.png", {"path": "hf://datasets/org/set@main/a.png", "bytes": None}, {})
    with pytest.raises(OSError, match="`a.png` could not be fetched: no route to host. Run the same command again"):
        encoder.encode(read_crops(iter([(ShardName(0, 0), row)]), settings, num_workers=0, min_side=None), int)


def test_an_image_that_needs_too_much_memory_is_named(monkeypatch, settings):
    monkeypatch.setattr("svqvae_hf.tokens.image_tokens.available_memory", lambda device: 1)
    image = CroppedImage(ShardName(0, 0), "a.png", {}, torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
    features = shard_encoder.datasets.Features()
    with pytest.raises(ValueError, match=r"`a.png`: an image of 8 x 8 pixels .* would take about"):
        ShardEncoder(make_tiny(), settings, features, 1).encode([image], int)

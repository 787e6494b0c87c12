"""Token sets as batches of sequences."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT, make_tiny
from PIL import Image

from svqvae_hf.data.image_sets import open_images
from svqvae_hf.token_sets.writer import tokenize_set
from svqvae_hf.trainer.data.sample_order import Share
from svqvae_hf.trainer.data.token_sequences import SequenceLoader, TokenSource

IMAGES = 6


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    """A token set of six photographs in two classes, at two scales that are not in the order of the sequence."""
    folder = tmp_path_factory.mktemp("tokens")
    with Image.open(ROOT / "docs" / "images" / "chelsea.png") as photo:
        for index in range(IMAGES):
            path = folder / "photos" / ("cat", "dog")[index % 2] / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            photo.convert("RGB").crop((60 * index, 0, 60 * index + 32, 32)).save(path)
    images, settings = open_images([str(folder / "photos")]), {"scales": (1.0, 0.5), "scale_from": "image"}
    tokenize_set(make_tiny(), images, folder / "tokens", model_name="vqvae", **settings)
    return folder / "tokens"


def test_batches_are_the_ids_of_the_images_coarse_to_fine(tokens):
    source = TokenSource(str(tokens), "label")
    assert source.grids == [(4, 4), (8, 8)]
    assert source.num_classes == 2
    assert source.class_names == ["cat", "dog"]
    order = [4, 0, 5]
    ids, labels, _ = source.batch(order)
    rows = pa.concat_tables([pq.read_table(path) for path in sorted(tokens.rglob("*.parquet"))])
    assert np.array_equal(labels.numpy(), np.array(rows["label"].to_pylist())[order])
    for column, grids in zip(("ids_1", "ids_0"), ids, strict=True):
        assert np.array_equal(grids.flatten(1).numpy(), np.array(rows[column].to_pylist())[order])


def test_every_epoch_has_each_row_once_for_any_number_of_processes(tokens, monkeypatch):
    source = TokenSource(str(tokens), None)
    monkeypatch.setattr(source, "batch", list)
    order = sum(SequenceLoader(source, Share(4), 3, 7), [])  # the second step goes over the end of an epoch
    assert sorted(order[:IMAGES]) == sorted(order[IMAGES:]) == list(range(IMAGES))
    halves = [SequenceLoader(source, Share(2, 1, process, 2), 3, 7) for process in range(2)]
    assert [row for pair in zip(*(sum(half, []) for half in halves), strict=True) for row in pair] == order
    resumed = SequenceLoader(source, Share(2, 2), 3, 7)
    resumed.load_state_dict(halves[1].state_dict() | {"step": 1})
    assert sum(resumed, []) == order[4:]
    with pytest.raises(ValueError, match="The product of .* must be 4 as when the checkpoint was written, but is 8"):
        SequenceLoader(source, Share(4, 1, 0, 2), 3, 7).load_state_dict(resumed.state_dict())

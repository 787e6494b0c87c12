"""Token sets as batches of sequences."""

import shutil
from itertools import chain

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT, make_tiny
from numbered_images import write_tar
from PIL import Image

from svqvae_hf.data.image_sets import open_images
from svqvae_hf.token_sets.manifest import TokenSet
from svqvae_hf.token_sets.writer import tokenize_set
from svqvae_hf.trainer.data.held_out import check_held_out_tokens
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


def test_labels_that_are_missing_in_all_rows_are_an_error(tmp_path):
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (32, 32)).save(tmp_path / "photos" / "0.png")
    labels = pa.table({"file_name": ["0.png"], "label": pa.array([None], pa.int64())})
    pq.write_table(labels, tmp_path / "photos" / "metadata.parquet")
    tokenize_set(make_tiny(), open_images([str(tmp_path / "photos")]), tmp_path / "tokens", model_name="vqvae")
    with pytest.raises(ValueError, match="must hold a class, or an integer .* 'label' holds .*, or has empty rows"):
        TokenSource(str(tmp_path / "tokens"), "label")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (("label", None), r"no column 'label'. Pass `--label_column cls`. The columns are ids_0, .*, cls"),
        ((None, "caption"), r"no column 'caption'. Pass `--caption_column txt`. The columns are ids_0, .*, txt"),
        ((None, "captions"), r"no column 'captions'. Pass `--caption_column txt`. The columns are"),
    ],
)
def test_an_absent_column_of_a_set_from_tar_files_is_an_error_that_proposes_another(tmp_path, columns, message):
    files = {"0.png": (ROOT / "docs" / "images" / "chelsea.png").read_bytes(), "0.cls": b"3", "0.txt": b"A cat."}
    write_tar(tmp_path / "photos.tar", files.items())
    tokens = tmp_path / "tokens"
    crops = {"crops": "centre", "resolution": 16}
    tokenize_set(make_tiny(), open_images([f"{tmp_path}/photos.tar"]), tokens, model_name="vqvae", **crops)
    with pytest.raises(ValueError, match=message):
        TokenSource(str(tokens), *columns)
    assert TokenSource(str(tokens), "cls").num_classes == 4
    assert TokenSource(str(tokens), None, "txt").captions() == [["A cat."]]


def test_a_set_without_labels_is_an_error_that_says_how_to_train_without(tmp_path):
    chelsea = str(ROOT / "docs" / "images" / "chelsea.png")
    tokenize_set(make_tiny(), open_images([chelsea]), tmp_path, model_name="vqvae", crops="centre", resolution=16)
    with pytest.raises(
        ValueError, match="no column 'label'. Without classes, pass `--label_column none`. The columns"
    ):
        TokenSource(str(tmp_path), "label")


def rows_of(loader):
    """Rows of all batches of a loader, in their order."""
    return list(chain.from_iterable(loader))


def test_every_epoch_has_each_row_once_for_any_number_of_processes(tokens, monkeypatch):
    source = TokenSource(str(tokens), None)
    monkeypatch.setattr(source, "batch", list)
    order = rows_of(SequenceLoader(source, Share(4), 3, 7))  # the second step goes over the end of an epoch
    assert sorted(order[:IMAGES]) == sorted(order[IMAGES:]) == list(range(IMAGES))
    first_process = SequenceLoader(source, Share(2, 1, 0, 2), 3, 7)
    second_process = SequenceLoader(source, Share(2, 1, 1, 2), 3, 7)
    assert rows_of(first_process) == order[0::2]
    assert rows_of(second_process) == order[1::2]
    resumed = SequenceLoader(source, Share(2, 2), 3, 7)
    resumed.load_state_dict(second_process.state_dict() | {"step": 1})
    assert rows_of(resumed) == order[4:]
    with pytest.raises(ValueError, match="The product of .* must be 4 as when the checkpoint was written, but is 8"):
        SequenceLoader(source, Share(4, 1, 0, 2), 3, 7).load_state_dict(resumed.state_dict())


def test_the_state_of_a_loader_is_of_the_whole_token_set(tokens, tmp_path):
    state = SequenceLoader(TokenSource(str(tokens), None), Share(4), 3, 7).state_dict()
    shutil.copytree(tokens, tmp_path / "copy")
    SequenceLoader(TokenSource(str(tmp_path / "copy"), None), Share(4), 3, 7).load_state_dict(state)
    images = open_images([str(tokens.parent / "photos")])
    tokenize_set(make_tiny(), images, tmp_path / "other", model_name="vqvae", scales=(0.5, 1.0))
    with pytest.raises(ValueError, match="The digest of the set must be .* as when the checkpoint was written"):
        SequenceLoader(TokenSource(str(tmp_path / "other"), None), Share(4), 3, 7).load_state_dict(state)


def test_other_crops_of_the_same_images_are_not_held_out(tokens, tmp_path):
    photos = tokens.parent / "photos"
    crops = {"model_name": "vqvae", "resolution": 16, "scales": (1.0,)}
    tokenize_set(make_tiny(), open_images([str(photos)]), tmp_path / "ten", crops="ten-crop", **crops)
    tokenize_set(make_tiny(), open_images([str(photos)], max_images=2), tmp_path / "centre", crops="centre", **crops)
    shutil.copytree(photos, tmp_path / "other" / "photos", copy_function=shutil.copyfile)
    for path in (tmp_path / "other").rglob("*.png"):
        Image.open(path).transpose(Image.Transpose.FLIP_TOP_BOTTOM).save(path)  # other images of the same names
    tokenize_set(make_tiny(), open_images([f"{tmp_path}/other/photos"]), tmp_path / "new", crops="centre", **crops)
    trained, centre, new = (TokenSet(tmp_path / name) for name in ("ten", "centre", "new"))
    with pytest.raises(ValueError, match="`--held_out` must hold images that are not .*, but `cat/0.png` of .*centre"):
        check_held_out_tokens(centre, trained, "--held_out")
    check_held_out_tokens(new, trained, "--held_out")
    with pytest.raises(ValueError, match="`cat/0.png` of .*new` is also in"):
        check_held_out_tokens(new, new, "--held_out")

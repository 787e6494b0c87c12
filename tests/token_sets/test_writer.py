import json
import re
import signal
from functools import partial

import datasets
import pytest
import torch
from cli_runner import fails, svqvae
from conftest import make_tiny
from PIL import Image
from token_set_parts import (
    SCALES,
    SIZES,
    content,
    load,
    make_other,
    make_tiled,
    save_parquet,
    save_photos,
    tokenize,
)
from tokenize_processes import free_port, processes, run_killed, run_rank

from svqvae_hf import SVQVAEImageProcessor
from svqvae_hf.data.image_sets import open_images
from svqvae_hf.token_sets.crops import CROPS, make_crops
from svqvae_hf.token_sets.partial import PartialTokenSet
from svqvae_hf.token_sets.settings import read_settings, row_tokens
from svqvae_hf.token_sets.writer import tokenize_set
from svqvae_hf.tokens.image_tokens import encode_image


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache, and no Hub."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


@pytest.fixture
def photos(tmp_path):
    return save_photos(tmp_path / "photos")


@pytest.fixture
def parquet(photos, tmp_path):
    return save_parquet(tmp_path / "set", photos)


@pytest.fixture
def tiled_model(few_windows):
    return make_tiled()


@pytest.mark.parametrize(
    "options",
    [{}, {"batch_size": 3, "num_workers": 1, "scale_from": "latents"}, {"scale_from": "image"}],
    ids=["one by one", "in batches", "from the image"],
)
def test_ids_equal_one_image_at_a_time(tiled_model, photos, tmp_path, no_grad, options):
    report = tokenize(tiled_model, photos, tmp_path / "out", **options)
    scale_from = options.get("scale_from", "latents")
    assert read_settings(tmp_path / "out").scale_from == scale_from
    assert f"| scales made from | the {scale_from} |" in (tmp_path / "out" / "README.md").read_text()
    assert (report.images, report.rows, report.shards) == (7, 6, 4)
    rows = load(tmp_path / "out")
    assert rows["key"] == [f"{i}.png" for i in range(6)]
    processor = SVQVAEImageProcessor()
    for row in rows:
        batch = processor(str(photos / row["key"]))
        assert (row["height"], row["width"]) == batch["image_sizes"][0]
        for index, ids in enumerate(tiled_model.encode_tokens(batch["pixel_values"], SCALES, scale_from)):
            assert row[f"ids_{index}"] == ids.flatten().tolist()
    assert not list(tmp_path.glob("out.partial*"))


def test_datasets_does_not_confuse_sets_of_one_name(photos, tmp_path):
    for folder, scales in (("here", (1.0,)), ("there", (0.5, 1.0))):
        tokenize(make_tiny(), photos, tmp_path / folder / "tokens", scales=scales)
        assert ("ids_1" in load(tmp_path / folder / "tokens").features) == (len(scales) == 2)


def test_unreadable_images_are_listed_without_paths_of_this_machine(photos, tmp_path):
    images = open_images([str(photos)])
    (photos / "4.png").unlink()
    report = tokenize_set(make_tiny(), images, tmp_path / "out", model_name="org/tiny")
    assert [image["key"] for image in report.skipped] == ["2b.png", "4.png"]
    assert json.loads((tmp_path / "out" / "skipped.json").read_text()) == report.skipped
    assert "(unreadable images: 2)" in str(report)
    assert str(tmp_path) not in "".join(map(str, content(tmp_path / "out").values()))


def test_small_images_are_skipped_if_asked_for(photos, tmp_path):
    report = tokenize(make_tiny(), photos, tmp_path / "out", min_side=16)
    assert report.rows == 5
    assert report.skipped[-1] == {"key": "3.png", "reason": "its sides must be at least 16 pixels, but are 7 x 1."}


def test_large_codebooks_take_32_bits(photos, tmp_path):
    model = make_tiny(codebook_size=2**16 + 1, codebook_embed_dim=1)
    tokenize(model, photos / "0.png", tmp_path / "out")
    assert load(tmp_path / "out").features["ids_0"] == datasets.List(datasets.Value("int32"))


def test_labels_of_folders_are_kept(photos, tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / "animals" / name).mkdir(parents=True)
    for i in range(4):
        (photos / f"{i}.png").rename(tmp_path / "animals" / ("cat", "dog")[i % 2] / f"{i}.png")
    tokenize(make_tiny(), tmp_path / "animals", tmp_path / "out")
    rows = load(tmp_path / "out")
    assert rows.features["label"] == datasets.ClassLabel(names=["cat", "dog"])
    assert rows["key"] == ["cat/0.png", "cat/2.png", "dog/1.png", "dog/3.png"]
    assert rows["label"] == [0, 0, 1, 1]


def test_captions_beside_images_are_kept(photos, tmp_path):
    lines = [json.dumps({"file_name": f"{i}.png", "caption": f"photo {i}", "id": i}) for i in (3, 1)]
    (photos / "metadata.jsonl").write_text("\n".join(lines))
    tokenize(make_tiny(), photos, tmp_path / "out")
    rows = load(tmp_path / "out")
    assert (rows["key"], rows["caption"]) == (["3.png", "1.png"], ["photo 3", "photo 1"])
    assert "id" not in rows.column_names
    images = open_images([str(photos)], columns=["id"])
    tokenize_set(make_tiny(), images, tmp_path / "ids", model_name="tiny")
    assert load(tmp_path / "ids")["id"] == [3, 1]


def test_each_file_of_a_set_is_a_part(parquet, tmp_path):
    tokenize(make_tiny(), parquet, tmp_path / "out")
    names = [f"train-{part:05}-{number:05}.parquet" for part, number in ((0, 0), (0, 1), (1, 0), (2, 0))]
    assert sorted(path.name for path in (tmp_path / "out" / "data").iterdir()) == names
    rows = load(tmp_path / "out")
    assert rows["key"] == ["0-0", "0-1", "0-2", "1-0", "2-0", "2-1"]
    assert rows["label"] == [0, 1, 2, 0, 0, 1]
    first = open_images([str(parquet)], max_images=4)
    assert (first.length, first.fingerprint == open_images([str(parquet)]).fingerprint) == (4, False)
    tokenize_set(make_tiny(), first, tmp_path / "first", model_name="tiny", scales=SCALES)
    assert load(tmp_path / "first")["ids_1"] == rows["ids_1"][:4]


def test_crops_are_rows(tiled_model, photos, tmp_path):
    tokenize(tiled_model, photos, tmp_path / "out", crops="ten-crop", resolution=16, batch_size=4)
    rows = load(tmp_path / "out")
    assert len(rows) == 10 * len(SIZES)
    assert rows["crop"][:10] == list(CROPS["ten-crop"])
    assert set(zip(rows["height"], rows["width"], strict=True)) == {(16, 16)}
    with Image.open(photos / "1.png") as image:
        crop = make_crops(image, "ten-crop", 16)[3]
    row = rows[13]
    assert (row["key"], row["crop"]) == ("1.png", "top-left-flipped")
    tokens = row_tokens(row, read_settings(tmp_path / "out"))
    assert torch.equal(tokens.ids[1], encode_image(tiled_model, crop, [1]).ids[0])


def test_killed_and_restarted_on_two_processes_the_set_equals_one_run(photos, tmp_path):
    make_tiny().save_pretrained(tmp_path / "tiny")
    options = [*("--model", str(tmp_path / "tiny"), "--tile-size", "32", "--overlap", "8"), "--shard-size", "1"]
    arguments = ["tokenize", str(photos), str(tmp_path / "out"), *options]
    start = processes().Process
    killed = start(target=run_killed, args=([*arguments, "--workers", "1"], 2))
    killed.start()
    killed.join()
    assert killed.exitcode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    before = content(tmp_path / "out.partial" / "data")
    assert len(before) == 2
    (tmp_path / "out.partial" / "data" / ".0a0a0a0a.tmp").write_bytes(b"left over")

    outputs, port = [tmp_path / f"{rank}.txt" for rank in range(2)], free_port()
    two = [
        start(target=run_rank, args=([*arguments, "--workers", "0"], rank, 2, port, output))
        for rank, output in enumerate(outputs)
    ]
    for process in two:
        process.start()
    for process in two:
        process.join()
    assert [process.exitcode for process in two] == [0, 0]
    assert "(images: 7, rows: 6, shards: 7)" in outputs[0].read_text()
    assert outputs[1].read_text() == ""
    assert svqvae("tokenize", photos, tmp_path / "unbroken", *options) == 1
    found, expected = content(tmp_path / "out"), content(tmp_path / "unbroken")
    assert before.items() <= content(tmp_path / "out" / "data").items()
    expected["README.md"] = expected["README.md"].replace(b"unbroken", b"out")
    assert found == expected
    assert not list(tmp_path.glob("out.partial*"))


def test_a_run_resumes_only_with_the_same_options(photos, tmp_path, monkeypatch):
    def fail(self, name, content):
        raise OSError("disk full")

    run = partial(tokenize, make_tiled(), photos, tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(PartialTokenSet, "write_shard", fail)
        with pytest.raises(OSError, match="disk full"):
            run()
    changes = ({"scales": [1.0]}, {"scale_from": "image"}, {"shard_size": 3}, {"min_side": 8})
    for options in changes:
        (name,) = options
        message = f"must resume with the same options, but in `.*out.partial` `{name}` was"
        with pytest.raises(ValueError, match=message):
            run(**options)
    with pytest.raises(ValueError, match="`codebook_fingerprint` was"):
        tokenize(make_other(), photos, tmp_path / "out")
    (photos / "7.png").write_bytes((photos / "0.png").read_bytes())
    with pytest.raises(ValueError, match="`image_set` was"):
        run()
    (photos / "7.png").unlink()
    (tmp_path / "out.partial.json").rename(tmp_path / "record.json")
    with pytest.raises(ValueError, match=r"`.*out.partial` must have its record `.*out.partial.json`, but has none"):
        run()
    (tmp_path / "record.json").rename(tmp_path / "out.partial.json")
    run()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"crops": "left"}, "`crops` must be one of whole, whole-flip, centre, centre-flip, ten-crop, got 'left'"),
        ({"crops": "centre"}, "must be the side of the crops in pixels, got None for `crops` 'centre'. Pass it"),
        ({"resolution": 16}, "got 16 for `crops` 'whole'. Leave it out"),
        ({"crops": "centre", "resolution": 0}, "`resolution` must be at least 1, got 0"),
        ({"batch_size": 0}, "`batch_size` must be at least 1, got 0"),
        ({"min_side": 0}, "`min_side` must be at least 1, got 0"),
        ({"num_workers": -1}, "`num_workers` must be at least 0, got -1"),
        ({"scales": [1, 1]}, "scales must differ within six digits"),
        ({"scales": []}, "`scales` of a token set is out of range"),
        ({"push_to_hub": "name"}, "`push_to_hub` must be `org/name`"),
        ({"private": True}, "`private` needs `push_to_hub`"),
    ],
)
def test_options_out_of_range_raise_before_the_work(tiny_model, photos, tmp_path, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        tokenize(tiny_model, photos, tmp_path / "out", **options)
    assert not list(tmp_path.glob("out*"))


def test_a_url_is_not_taken_for_a_folder(tiny_model, photos, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="`s3://bucket/out` must be a local path .* `s3://` is not supported"):
        tokenize(tiny_model, photos, "s3://bucket/out")
    assert "`s3://` is not supported" in fails(capsys, "tokenize", photos, "s3://bucket/out")
    assert "`gs://` is not supported" in fails(capsys, "tokenize", "gs://bucket/photos", "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["photos"]


def test_columns_must_exist_and_have_names_of_their_own(tiny_model, photos, parquet, tmp_path):
    with pytest.raises(ValueError, match="columns must be among image, label, got none"):
        open_images([str(parquet)], columns=["none"])
    with pytest.raises(ValueError, match="columns must be among image, got label"):
        open_images([str(photos)], columns=["label"])
    (photos / "metadata.jsonl").write_text(json.dumps({"file_name": "0.png", "key": "a"}))
    images = open_images([str(photos)], columns=["key"])
    with pytest.raises(ValueError, match="must not have names of columns of the token set, but key do"):
        tokenize_set(tiny_model, images, tmp_path / "out", model_name="tiny")


def test_the_folder_must_be_new_and_one_image_readable(tiny_model, photos, tmp_path):
    with pytest.raises(ValueError, match="must be a new or empty folder, but it is not empty"):
        tokenize(tiny_model, photos, photos)
    for path in photos.iterdir():
        path.write_bytes(b"broken")
    with pytest.raises(ValueError, match="at least one image must be readable, but none of 7 is. The first, `0.png`"):
        tokenize(tiny_model, photos, tmp_path / "out")


def test_commands_tokenize_and_detokenize(photos, tmp_path, capsys):
    make_tiny().save_pretrained(tmp_path / "models" / "tiny")
    out, images = tmp_path / "tokens", tmp_path / "images"
    model = ["--model", tmp_path / "models" / "tiny"]
    crops = ["--crops", "centre", "--resolution", "16", "--scales", "0.5", "1", "--max-images", "4"]
    assert svqvae("tokenize", photos, out, *crops, *model, "--tile-size", "32", "--overlap", "8") == 1
    written, error = capsys.readouterr()
    assert error == "svqvae: 1 of 4 inputs were skipped\n"
    assert written == f"written  {out} (images: 4, rows: 3, shards: 1)\n" + (
        f"skipped  {out / 'skipped.json'} (unreadable images: 1)\n"
    )
    settings = read_settings(out)
    assert (settings.model, settings.crops, settings.resolution) == ("tiny", "centre", 16)
    assert settings.scale_from == "image"
    assert svqvae("detokenize", out, "--output", images, *model) == 0
    assert len(list(images.iterdir())) == 6
    assert "it is not empty" in fails(capsys, "tokenize", photos, out, *model)
    assert "must be a folder with svqvae_tokens.json" in fails(capsys, "detokenize", photos, "--output", images)
    bundled = fails(capsys, "detokenize", out, "--output", images)  # the bundled model has another codebook
    assert "the ids must be of the model's codebook" in bundled

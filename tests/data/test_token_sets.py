import dataclasses
import json
import re
import signal
import subprocess
import sys
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from conftest import ROOT, make_tiny
from hub_server import run_python, serve_hub
from PIL import Image, ImageOps

from svqvae_cli import main
from svqvae_hf import SVQVAEImageProcessor
from svqvae_hf.data import token_set_writer, token_sets
from svqvae_hf.data.image_sets import ImageRow, open_rows
from svqvae_hf.data.token_set_writer import LABEL_COLUMNS, tokenize_set
from svqvae_hf.data.token_sets import (
    CROPS,
    TokenSettings,
    detokenize_set,
    make_crops,
    read_settings,
    row_tokens,
)
from svqvae_hf.tokens.image_tokens import check_same_codebook, decode_image, encode_image

SIZES = [(33, 20), (40, 30), (40, 30), (7, 1), (90, 50), (16, 16)]
TILES = (32, 8)
SCALES = [0.5, 1.0]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache, and no Hub."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


@pytest.fixture
def photos(photo, tmp_path):
    """A folder of images of mixed sizes, one of them broken."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for i, (width, height) in enumerate(SIZES):
        photo.crop((20 * i, 10, 20 * i + width, 10 + height)).save(folder / f"{i}.png")
    (folder / "2b.png").write_bytes((folder / "2.png").read_bytes()[:200])
    return folder


@pytest.fixture
def tiled_model(small_sample):
    model = make_tiny()
    model.enable_tiling(*TILES)
    return model


@pytest.fixture
def token_set(tiled_model, photos, tmp_path):
    tokenize(tiled_model, photos, tmp_path / "tokens")
    return tmp_path / "tokens"


def tokenize(model, folder, out, **options):
    images = open_rows([str(folder)], optional_columns=LABEL_COLUMNS)
    return tokenize_set(model, images, out, **{"model_name": "org/tiny", "scales": SCALES, "shard_size": 2} | options)


def load(folder):
    return datasets.load_dataset(str(folder), split="train")


def content(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(("batch_size", "num_workers"), [(1, 0), (3, 1)])
def test_ids_are_those_of_one_image_at_a_time(tiled_model, photos, tmp_path, no_grad, batch_size, num_workers):
    report = tokenize(tiled_model, photos, tmp_path / "out", batch_size=batch_size, num_workers=num_workers)
    assert (report.images, report.rows, report.shards) == (7, 6, 4)
    rows = load(tmp_path / "out")
    assert rows["key"] == [f"{i}.png" for i in range(6)]
    processor = SVQVAEImageProcessor()
    for row in rows:
        batch = processor(str(photos / row["key"]))
        assert (row["height"], row["width"]) == batch["image_sizes"][0]
        for index, ids in enumerate(tiled_model.encode_tokens(batch["pixel_values"], SCALES)):
            assert row[f"ids_{index}"] == ids.flatten().tolist()


def test_datasets_does_not_take_one_set_for_another_of_its_name(tiled_model, photos, tmp_path):
    for place, scales in (("here", (1.0,)), ("there", (0.5, 1.0))):
        tokenize(tiled_model, photos, tmp_path / place / "tokens", scales=scales)
        assert ("ids_1" in load(tmp_path / place / "tokens").features) == (len(scales) == 2)


def test_unreadable_images_are_listed_without_paths_of_this_machine(tiled_model, photos, tmp_path):
    images = open_rows([str(photos)])
    (photos / "4.png").unlink()
    report = tokenize_set(tiled_model, images, tmp_path / "out", model_name="org/tiny")
    assert [each["key"] for each in report.skipped] == ["2b.png", "4.png"]
    assert json.loads((tmp_path / "out" / "skipped.json").read_text()) == report.skipped
    assert "2 images that cannot be read" in str(report)
    assert str(tmp_path) not in "".join(str(each) for each in content(tmp_path / "out").values())


def test_settings_and_features(token_set, tiled_model, tmp_path):
    settings = read_settings(token_set)
    assert settings == TokenSettings(
        model="org/tiny",
        scales=(0.5, 1.0),
        f=4,
        codebook_size=64,
        codebook_fingerprint=tiled_model.codebook_fingerprint(),
        tile_size=32,
        overlap=8,
        crops="whole",
        resolution=None,
    )
    for shard in (token_set / "data").iterdir():
        assert read_settings(shard) == settings
    ids = datasets.List(datasets.Value("uint16"))
    numbers = {"height": datasets.Value("int32"), "width": datasets.Value("int32")}
    assert load(token_set).features == {"ids_0": ids, "ids_1": ids, **numbers, "key": datasets.Value("string")}
    for row in load(token_set):
        for index, scale in enumerate(settings.scales):
            rows, columns = settings.grid(scale, row["height"], row["width"])
            assert rows * columns == len(row[f"ids_{index}"])
    assert not list(tmp_path.glob("tokens.partial*"))


def test_large_codebooks_take_32_bits(photos, tmp_path):
    tokenize(make_tiny(codebook_size=2**16 + 1), photos, tmp_path / "out")
    assert load(tmp_path / "out").features["ids_0"] == datasets.List(datasets.Value("int32"))


def test_labels_of_folders_are_kept(photos, tiled_model, tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / "animals" / name).mkdir(parents=True)
    for i in range(4):
        (photos / f"{i}.png").rename(tmp_path / "animals" / ("cat", "dog")[i % 2] / f"{i}.png")
    tokenize(tiled_model, tmp_path / "animals", tmp_path / "out")
    rows = load(tmp_path / "out")
    assert rows.features["label"] == datasets.ClassLabel(names=["cat", "dog"])
    assert rows["key"] == ["cat/0.png", "cat/2.png", "dog/1.png", "dog/3.png"]
    assert rows["label"] == [0, 0, 1, 1]


def test_captions_beside_images_are_kept(photos, tiled_model, tmp_path):
    lines = [json.dumps({"file_name": f"{i}.png", "caption": f"photo {i}", "id": i}) for i in (3, 1)]
    (photos / "metadata.jsonl").write_text("\n".join(lines))
    tokenize(tiled_model, photos, tmp_path / "out")
    rows = load(tmp_path / "out")
    assert (rows["key"], rows["caption"]) == (["3.png", "1.png"], ["photo 3", "photo 1"])
    assert "id" not in rows.column_names
    images = open_rows([str(photos)], columns=["id"])
    tokenize_set(tiled_model, images, tmp_path / "ids", model_name="tiny")
    assert load(tmp_path / "ids")["id"] == [3, 1]


@pytest.fixture
def parquet(photos, tmp_path):
    """A set of three files, whose images have no names."""
    folder = tmp_path / "set"
    folder.mkdir()
    for part, count in enumerate((3, 1, 2)):
        images = [{"bytes": (photos / f"{i}.png").read_bytes(), "path": None} for i in range(count)]
        rows = {"image": images, "label": list(range(count))}
        features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
        datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / f"{part}.parquet")
    return folder


def test_each_file_of_a_set_is_a_part(parquet, tiled_model, tmp_path):
    tokenize(tiled_model, parquet, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out" / "data").iterdir()) == [
        *(
            "train-00000-00000.parquet",
            "train-00000-00001.parquet",
            "train-00001-00000.parquet",
            "train-00002-00000.parquet",
        )
    ]
    rows = load(tmp_path / "out")
    assert rows["key"] == ["0-0", "0-1", "0-2", "1-0", "2-0", "2-1"]
    assert rows["label"] == [0, 1, 2, 0, 0, 1]
    first = open_rows([str(parquet)], max_images=4)
    assert (first.length, first.fingerprint == open_rows([str(parquet)]).fingerprint) == (4, False)
    tokenize_set(tiled_model, first, tmp_path / "first", model_name="tiny", scales=SCALES)
    assert load(tmp_path / "first")["ids_1"] == rows["ids_1"][:4]


@pytest.mark.parametrize("num_processes", [1, 2, 3])
@pytest.mark.parametrize("num_parts", [1, 7, 12])
def test_each_image_is_one_process_s_and_all_have_as_many(monkeypatch, num_parts, num_processes):
    images = [[(part, i) for i in range(24)] for part in range(num_parts)]
    bar = SimpleNamespace(disable=True, update=int)
    found = []
    for index in range(num_processes):
        state = SimpleNamespace(num_processes=num_processes, process_index=index)
        monkeypatch.setattr(token_set_writer, "PartialState", lambda state=state: state)
        jobs = token_set_writer._jobs(SimpleNamespace(parts=images), {"train-00000-00001.parquet"}, 2, bar)
        rows = [row for _, row in jobs]
        assert len(rows) >= 24 * num_parts // num_processes - 4
        found += rows
    assert sorted(found) == sorted({row for part in images for row in part} - {(0, 2), (0, 3)})


def test_views(photo):
    size = (24, 24)
    centre, flipped = make_crops(photo, "centre-flip", 24)
    assert centre == ImageOps.fit(photo, size, Image.Resampling.BICUBIC)
    assert flipped == ImageOps.mirror(centre)
    assert make_crops(photo, "whole-flip", None) == [photo, ImageOps.mirror(photo)]
    ten = dict(zip(CROPS["ten-crop"], make_crops(photo, "ten-crop", 20), strict=True))
    square = ImageOps.fit(photo, (22, 22), Image.Resampling.BICUBIC)
    assert len(ten) == 10
    assert ten["centre"] == square.crop((1, 1, 21, 21))
    assert ten["bottom-right-flipped"] == ImageOps.mirror(square.crop((2, 2, 22, 22)))
    assert len({crop.tobytes() for crop in ten.values()}) == 10


def test_views_are_rows(tiled_model, photos, tmp_path):
    tokenize(tiled_model, photos, tmp_path / "out", crops="ten-crop", resolution=16, batch_size=4)
    rows = load(tmp_path / "out")
    assert len(rows) == 10 * len(SIZES)
    assert rows["crop"][:10] == list(CROPS["ten-crop"])
    assert set(zip(rows["height"], rows["width"], strict=True)) == {(16, 16)}
    with Image.open(photos / "1.png") as image:
        crop = make_crops(image, "ten-crop", 16)[3]
    row = rows[13]
    assert (row["key"], row["crop"]) == ("1.png", "top-left-flipped")
    assert torch.equal(
        row_tokens(row, read_settings(tmp_path / "out")).ids[1], encode_image(tiled_model, crop, [1]).ids[0]
    )


def test_detokenized_images_are_those_of_encoding_and_decoding(token_set, tiled_model, photos, tmp_path):
    model = make_tiny()
    detokenize_set(model, token_set, tmp_path / "images")
    assert len(list((tmp_path / "images").iterdir())) == 12
    for i in range(len(SIZES)):
        with Image.open(photos / f"{i}.png") as image:
            expected = decode_image(tiled_model, encode_image(tiled_model, image, SCALES))
        for scale, picture in zip(SCALES, expected, strict=True):
            with Image.open(tmp_path / "images" / f"{i:08}_x{scale:g}.png") as found:
                assert np.array_equal(found, picture)
    detokenize_set(model, token_set, tmp_path / "first", max_images=1)
    assert sorted(path.name for path in (tmp_path / "first").iterdir()) == ["00000000_x0.5.png", "00000000_x1.png"]


DIE_AFTER_TWO = """
import os, signal, sys
from svqvae_cli import main
from svqvae_hf.data.token_set_writer import _Shards

def write_or_die(self, shard, content, write=_Shards.write):
    if len(self.finished()) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    write(self, shard, content)

_Shards.write = write_or_die
main(sys.argv[1:])
"""


def test_killed_and_restarted_on_two_processes_the_set_is_that_of_one_run(photos, tmp_path):
    make_tiny().save_pretrained(tmp_path / "tiny")
    options = [*("--model", str(tmp_path / "tiny"), "--tile-size", "32", "--overlap", "8"), "--shard-size", "1"]
    first, two = [sys.executable, "-c", DIE_AFTER_TWO], [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    two += ["--nproc_per_node", "2", "-m", "svqvae_cli"]
    arguments = ["tokenize", str(photos), str(tmp_path / "out"), *options]
    killed = subprocess.run([*first, *arguments, "--workers", "1"], capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (tmp_path / "out").exists()
    before = content(tmp_path / "out.partial" / "data")
    assert len(before) == 2
    (tmp_path / "out.partial" / "data" / ".0a0a0a0a.tmp").write_bytes(b"left over")
    done = subprocess.run([*two, *arguments, "--workers", "0"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("6 rows of 7 images in 7 shards") == 1
    assert main(["tokenize", str(photos), str(tmp_path / "unbroken"), *options]) == 0
    found, expected = content(tmp_path / "out"), content(tmp_path / "unbroken")
    assert before.items() <= content(tmp_path / "out" / "data").items()
    expected["README.md"] = expected["README.md"].replace(b"unbroken", b"out")
    assert found == expected
    assert not list(tmp_path.glob("out.partial*"))


def test_changed_options_are_refused(tiled_model, photos, tmp_path, monkeypatch):
    def fail(self, shard, content):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(token_set_writer._Shards, "write", fail)
        with pytest.raises(OSError, match="disk full"):
            tokenize(tiled_model, photos, tmp_path / "out")
    for options, name in (({"scales": [1.0]}, "scales"), ({"shard_size": 3}, "shard_size")):
        message = f"must go on with the options that it began with, but in `.*out.partial` `{name}` was"
        with pytest.raises(ValueError, match=message):
            tokenize(tiled_model, photos, tmp_path / "out", **options)
    with pytest.raises(ValueError, match="`codebook_fingerprint` was"):
        tokenize(make_other(), photos, tmp_path / "out")
    (photos / "7.png").write_bytes((photos / "0.png").read_bytes())
    with pytest.raises(ValueError, match="`image_set` was"):
        tokenize(tiled_model, photos, tmp_path / "out")
    (photos / "7.png").unlink()
    tokenize(tiled_model, photos, tmp_path / "out")


def test_images_that_cannot_be_reached_end_the_run(tiled_model, photos, tmp_path, monkeypatch):
    def fail(source):
        raise OSError("no route to host.")

    monkeypatch.setattr(token_set_writer, "read_image", fail)
    row = ImageRow("a.png", {"path": "hf://datasets/org/set@main/a.png", "bytes": None}, {})
    images = dataclasses.replace(open_rows([str(photos)]), parts=[[row]])
    with pytest.raises(OSError, match="`a.png` cannot be reached: .* Go on later by the same command"):
        tokenize_set(tiled_model, images, tmp_path / "out", model_name="tiny")


def make_other():
    model = make_tiny()
    with torch.no_grad():
        model.quantize.embedding.weight.neg_()
    model.enable_tiling(*TILES)
    return model


def test_another_codebook_is_refused(token_set, tmp_path):
    with pytest.raises(ValueError, match="the ids must be of the model's codebook, with fingerprint"):
        detokenize_set(make_other(), token_set, tmp_path / "images")
    with pytest.raises(ValueError, match="the ids must be of the model's codebook, with fingerprint"):
        check_same_codebook(make_other(), read_settings(token_set))
    coarse = make_tiny(encoder_ch_mult=(1,) * 5, decoder_ch_mult=(1,) * 5)  # the set's tiles do not fit it either
    with pytest.raises(ValueError, match="the ids must be of the model's codebook, with fingerprint"):
        detokenize_set(coarse, token_set, tmp_path / "images")
    assert not (tmp_path / "images").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"crops": "left"}, "`crops` must be one of whole, whole-flip, centre, centre-flip, ten-crop, but is 'left'"),
        (
            {"crops": "centre"},
            "side of crops in pixels, but is None for `crops` 'centre'. Give it",
        ),
        ({"resolution": 16}, "but is 16 for `crops` 'whole'. Leave it out"),
        ({"crops": "centre", "resolution": 0}, "`resolution` must be at least 1, but is 0"),
        ({"batch_size": 0}, "`batch_size` must be at least 1, but is 0"),
        ({"shard_size": 0}, "`shard_size` must be at least 1, but is 0"),
        ({"num_workers": -1}, "`num_workers` must be at least 0, but is -1"),
        ({"scales": [1, 1]}, "scales must differ within six digits"),
        ({"scales": []}, "`scales` of a token set is out of its range"),
        ({"scales": [0]}, "`scales` of a token set is out of its range"),
        ({"push_to_hub": "name"}, "`push_to_hub` must be `org/name`"),
        ({"private": True}, "`private` needs `push_to_hub`"),
    ],
)
def test_options_that_do_not_fit(tiny_model, photos, tmp_path, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        tokenize(tiny_model, photos, tmp_path / "out", **options)
    assert not list(tmp_path.glob("out*"))


def test_what_cannot_be_made(tiny_model, photos, parquet, token_set, tmp_path):
    with pytest.raises(ValueError, match="must be a new or empty folder, but it is not empty"):
        tokenize(tiny_model, photos, token_set)
    with pytest.raises(ValueError, match="columns must be of image, label, but none are not"):
        open_rows([str(parquet)], columns=["none"])
    with pytest.raises(ValueError, match="image files have no columns, but label must be kept"):
        open_rows([str(photos)], columns=["label"])
    for path in photos.iterdir():
        path.write_bytes(b"broken")
    with pytest.raises(ValueError, match="at least one image must be readable, but none of 7 is. The first, `0.png`"):
        tokenize(tiny_model, photos, tmp_path / "out")


def test_columns_named_as_those_of_ids_are_refused(tiny_model, photos, tmp_path):
    (photos / "metadata.jsonl").write_text(json.dumps({"file_name": "0.png", "key": "a"}))
    images = open_rows([str(photos)], columns=["key"])
    with pytest.raises(ValueError, match="must not be named as those of ids, but key are"):
        tokenize_set(tiny_model, images, tmp_path / "out", model_name="tiny")


def test_what_is_no_token_set(token_set, photos, parquet, tmp_path):
    with pytest.raises(FileNotFoundError, match="a token set must be a folder with svqvae_tokens.json"):
        read_settings(photos)
    with pytest.raises(ValueError, match="its settings must be of format version 1, but are None"):
        read_settings(parquet / "0.parquet")
    (tmp_path / "cut.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="must be a Parquet file"):
        read_settings(tmp_path / "cut.parquet")
    file = token_set / "svqvae_tokens.json"
    good = json.loads(file.read_text())
    for change, message in (
        ({"format_version": 2}, "must be of format version 1"),
        ({"scales": [1e999]}, "`scales` of a token set is out of its range"),
        ({"scales": [1e308]}, "`scales` of a token set is out of its range"),
        ({"scales": "1"}, "`scales` of a token set is out of its range"),
        ({"codebook_size": 0}, "`codebook_size` of a token set is out of its range"),
        ({"crops": ["whole"]}, "`crops` of a token set is out of its range"),
        ({"overlap": None}, "`overlap` of a token set is out of its range"),
    ):
        file.write_text(json.dumps(good | change))
        with pytest.raises(ValueError, match=message):
            read_settings(token_set)
    file.write_text(json.dumps({"format_version": 1}))
    with pytest.raises(ValueError, match="its settings must also have codebook_fingerprint, codebook_size"):
        read_settings(token_set)
    file.write_text("[" * 100_000)
    with pytest.raises(ValueError, match="is not a token set that can be read"):
        read_settings(token_set)


def test_rows_that_do_not_fit(token_set):
    settings, row = read_settings(token_set), load(token_set)[0]
    with pytest.raises(ValueError, match="a row of 20 x 33 pixels must have 45 ids at scale 1, but has 44"):
        row_tokens({**row, "ids_1": row["ids_1"][1:]}, settings)
    with pytest.raises(ValueError, match=r"ids must be in \[0, 63\]"):
        row_tokens({**row, "ids_1": [64] * 45}, settings)
    rule = "a row must have integers as height, width, ids_0, ids_1, as the settings of the set say, but has "
    for name, value in (
        *(("ids_1", value) for value in (None, [0.5] * 45, [[1], [2, 3]], "1")),
        *(("height", value) for value in (None, 20.0, "20")),
    ):
        with pytest.raises(ValueError, match=rf"{rule}.*\b{name} = {re.escape(f'{value!r:.40}')}"):
            row_tokens({**row, name: value}, settings)
    del row["ids_0"]
    with pytest.raises(ValueError, match="but has height = 20, width = 33, ids_0 = None, ids_1 = "):
        row_tokens(row, settings)


def test_a_name_without_an_owner_is_not_looked_for_on_the_hub(monkeypatch):
    monkeypatch.setattr(token_sets, "hf_hub_download", None)
    for name in ("nope", "nope.parquet"):
        with pytest.raises(FileNotFoundError, match=name):
            read_settings(name)


def test_commands(photos, tiled_model, tmp_path, capsys):
    tiled_model.save_pretrained(tmp_path / "models" / "tiny")
    out, images = tmp_path / "tokens", tmp_path / "images"
    model = ["--model", str(tmp_path / "models" / "tiny")]
    crops = ["--crops", "centre", "--resolution", "16", "--scales", "0.5", "1", "--max-images", "4"]
    assert main(["tokenize", str(photos), str(out), *crops, *model, "--tile-size", "32", "--overlap", "8"]) == 0
    written = capsys.readouterr().out
    assert written == f"written  {out}: 3 rows of 4 images in 1 shards\n" + (
        f"skipped  1 images that cannot be read: {out / 'skipped.json'}\n"
    )
    settings = read_settings(out)
    assert (settings.model, settings.crops, settings.resolution) == ("tiny", "centre", 16)
    assert main(["detokenize", str(out), "--output", str(images), *model]) == 0
    assert len(list(images.iterdir())) == 6
    assert main(["tokenize", str(photos), str(out), *model]) == 2
    assert main(["detokenize", str(photos), "--output", str(images)]) == 2
    assert main(["detokenize", str(out), "--output", str(images)]) == 2  # the bundled model has another codebook
    errors = capsys.readouterr().err.splitlines()
    assert [len(errors), *("Traceback" in error for error in errors)] == [3, False, False, False]
    assert "the ids must be of the model's codebook" in errors[2]


def test_code_of_the_docs_runs(photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "token_sets.md").read_text(), re.DOTALL)
    names = {}
    exec(code, names)
    assert names["image"].size == (64, 64)


CLIENT = """
import sys
from pathlib import Path
import datasets
from huggingface_hub import HfApi
from svqvae_hf import SVQVAE
from svqvae_hf.data.image_sets import ImageRow, open_rows
from svqvae_hf.data.token_set_writer import LABEL_COLUMNS, tokenize_set
from svqvae_hf.data.token_sets import detokenize_set, read_settings

golden, work = Path(sys.argv[1]), Path(sys.argv[2])
model = SVQVAE.from_single_file(golden / "svqvae_tiny.safetensors").eval()
HfApi().create_repo("org/photos", repo_type="dataset")
HfApi().upload_folder(repo_id="org/photos", repo_type="dataset", folder_path=work / "photos")
images = open_rows(["org/photos"], optional_columns=LABEL_COLUMNS)
report = tokenize_set(
    model, images, work / "out", model_name="org/tiny", push_to_hub="org/tokens", private=True, source_set="org/photos"
)
assert read_settings("org/tokens") == read_settings(work / "out")
rows = datasets.load_dataset("org/tokens", split="train")
assert rows.to_list() == datasets.load_dataset(str(work / "out"), split="train").to_list()
detokenize_set(model, "org/tokens", work / "images", max_images=1)
try:
    read_settings("org/gone")
except OSError as error:
    print(error)
print(report.url)
print(list(rows["key"]), rows.features["label"].names)
"""


def test_from_the_hub_to_the_hub(photos, golden_dir, tmp_path):
    for i, name in ((0, "cat"), (1, "dog")):
        (photos / name).mkdir()
        (photos / f"{i}.png").rename(photos / name / f"{i}.png")
    for path in photos.glob("*.png"):
        path.unlink()
    with serve_hub(tmp_path) as env:
        gone, url, rows = run_python(CLIENT, env, golden_dir, tmp_path).splitlines()
    assert gone.startswith("the token set `org/gone` cannot be had from the Hub: the repository does not exist")
    assert "/org/tokens/commit/" in url
    assert rows == "['cat/0.png', 'dog/1.png'] ['cat', 'dog']"
    pushed = tmp_path / "hub" / "org" / "tokens"
    assert json.loads((pushed / "settings.json").read_text())["visibility"] == "private"
    assert content(pushed / "main") == content(tmp_path / "out")
    card = (pushed / "main" / "README.md").read_text()
    assert 'load_dataset("org/tokens", split="train")' in card
    assert "source_datasets:\n- org/photos" in card
    assert (tmp_path / "images" / "00000000_x1.png").exists()

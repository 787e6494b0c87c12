import json
import os
import re
import shutil
import subprocess

import datasets
import pytest
import torch
from accelerate import cpu_offload
from cli_runner import fails, svqvae
from conftest import make_tiny
from numbered_images import write_tar
from PIL import Image
from token_set_parts import SCALES, SIZES, content, load, make_other, make_tiled, save_parquet, save_photos, tokenize

from svqvae_files.folders import Folder
from svqvae_hf import SVQVAEImageProcessor
from svqvae_hf.data.image_parts import FileRows
from svqvae_hf.data.image_sets import open_images
from svqvae_hf.token_sets.crops import CROPS, make_crops
from svqvae_hf.token_sets.manifest import TokenSet
from svqvae_hf.token_sets.parts import describe_state, start_set
from svqvae_hf.token_sets.settings import read_settings, row_tokens
from svqvae_hf.token_sets.writer import encoder_digest, tokenize_set
from svqvae_hf.tokens.image_tokens import encode_image

pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture
def photos(tmp_path):
    return save_photos(tmp_path / "photos")


@pytest.fixture
def parquet(photos, tmp_path):
    return save_parquet(tmp_path / "set", photos)


def skipped(folder):
    return [json.loads(line) for line in (folder / "skipped.jsonl").read_text().splitlines()]


@pytest.fixture
def tiled_model(few_windows):
    return make_tiled()


@pytest.mark.parametrize("call", [{"batch_size": 1}, {"batch_size": 3, "num_workers": 1}, {"scale_from": "latents"}])
def test_ids_equal_one_image_at_a_time(tiled_model, photos, tmp_path, no_grad, call):
    report = tokenize(tiled_model, photos, tmp_path / "out", **call)
    scale_from = call.get("scale_from", "image")
    assert read_settings(tmp_path / "out").scale_from == scale_from
    assert f"| scales made from | the {scale_from} |" in (tmp_path / "out" / "README.md").read_text()
    assert (report.images, report.rows, report.files, report.complete) == (7, 6, 1, True)
    rows = load(tmp_path / "out")
    assert rows["key"] == [f"{i}.png" for i in range(6)]
    processor = SVQVAEImageProcessor()
    for row in rows:
        batch = processor(str(photos / row["key"]))
        assert (row["height"], row["width"]) == batch["image_sizes"][0]
        for index, ids in enumerate(tiled_model.encode_tokens(batch["pixel_values"], SCALES, scale_from)):
            assert row[f"ids_{index}"] == ids.flatten().tolist()
    assert not (tmp_path / "out" / "parts").exists()


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


def test_each_file_of_a_stream_is_a_part(parquet, tmp_path):
    tokenize(make_tiny(), parquet, tmp_path / "out")
    names = [f"train-{part:07}-00000.parquet" for part in range(3)]
    assert sorted(path.name for path in (tmp_path / "out" / "data").rglob("*.parquet")) == names
    rows = load(tmp_path / "out")
    assert rows["key"] == ["0-0", "0-1", "0-2", "1-0", "2-0", "2-1"]
    assert rows["label"] == [0, 1, 2, 0, 0, 1]
    first = open_images([str(parquet)], max_images=4)
    assert (first.length, first.fingerprint == open_images([str(parquet)]).fingerprint) == (4, False)
    tokenize_set(make_tiny(), first, tmp_path / "first", model_name="tiny", scales=SCALES)
    assert load(tmp_path / "first")["ids_1"] == rows["ids_1"][:4]


def test_crops_are_rows(tiled_model, photos, tmp_path):
    report = tokenize(tiled_model, photos, tmp_path / "out", crops="ten-crop", resolution=16, batch_size=4)
    assert "(images smaller than their crops: 1)" in str(report)
    rows = load(tmp_path / "out")
    assert (len(rows), rows["crop"][:10]) == (10 * len(SIZES), list(CROPS["ten-crop"]))
    assert set(zip(rows["height"], rows["width"], strict=True)) == {(16, 16)}
    with Image.open(photos / "1.png") as image:
        crop = make_crops(image, "ten-crop", 16)[3]
    row = rows[13]
    assert (row["key"], row["crop"]) == ("1.png", "top-left-flipped")
    tokens = row_tokens(row, read_settings(tmp_path / "out"))
    assert torch.equal(tokens.ids[1], encode_image(tiled_model, crop, [1]).ids[0])


def test_a_finished_part_is_never_read_again(photos, tmp_path, monkeypatch):
    read = []
    row = FileRows.__getitem__
    monkeypatch.setattr(FileRows, "__getitem__", lambda self, index: read.append(index) or row(self, index))
    for part in (2, 0, 2):
        report = tokenize(make_tiny(), photos, tmp_path / "out", parts=[part], num_parts=3)
        assert not report.complete
    assert read == [4, 5, 6, 0, 1]
    assert (report.images, report.rows, report.resumed) == (0, 0, 1)
    assert "missing  other parts of the set, see svqvae info" in str(report)
    report = tokenize(make_tiny(), photos, tmp_path / "out", num_parts=3)
    assert (report.complete, report.resumed) == (True, 2)
    assert "resumed: 2 of 3 parts were there" in str(report)
    assert tokenize(make_tiny(), photos, tmp_path / "out", num_parts=3).rows == 6
    assert tokenize(make_tiny(), photos, tmp_path / "out", parts=[1], num_parts=3).rows == 6
    assert read == [4, 5, 6, 0, 1, 2, 3]
    tokenize(make_tiny(), photos, tmp_path / "out", num_parts=1, overwrite=True)
    assert read[7:] == list(range(7))
    assert not (tmp_path / "out" / "parts").exists()


def test_workers_and_licence_may_change_between_runs(photos, tmp_path):
    tokenize(make_tiny(), photos, tmp_path / "out", parts=[0], num_parts=2)
    report = tokenize(make_tiny(), photos, tmp_path / "out", num_parts=2, num_workers=1, license="mit")
    assert (report.complete, report.resumed) == (True, 1)


def test_a_set_is_resumed_only_with_the_same_options(photos, tmp_path):
    def run(**options):
        return tokenize(options.pop("model", make_tiled()), photos, tmp_path / "out", **{"num_parts": 2} | options)

    def check_refused():
        before = content(tmp_path / "out")
        changes = ({"scales": [1.0]}, {"batch_size": 3}, {"num_parts": 3})
        for options in changes:
            ((name, value),) = options.items()
            name = "parts" if name == "num_parts" else name
            with pytest.raises(ValueError, match=rf"`{name}` was .* and is now {re.escape(repr(value))}\. Choose"):
                run(**options)
        for model, name in ((make_other(), "codebook_fingerprint"), (finetuned, "encoder")):
            with pytest.raises(ValueError, match=f"`{name}` was"):
                run(model=model)
        (photos / "7.png").write_bytes((photos / "0.png").read_bytes())
        with pytest.raises(ValueError, match="with the same images, but their number was 7 and is now 8"):
            run()
        (photos / "7.png").unlink()
        os.utime(photos / "1.png", (0, 0))
        message = "names, sizes or times of change .* `cp -p` and `rsync -t` restore .* docs/token_sets.md says"
        with pytest.raises(ValueError, match=message) as raised:
            run()
        command = re.search(r"`(find IMAGES -cnewer .*/options.json)` lists changed files", str(raised.value))
        is_complete = (tmp_path / "out" / "svqvae_tokens.json").exists()
        assert (command is None) == is_complete
        if command is not None:
            words = command[1].replace("IMAGES", str(photos)).split()
            found = subprocess.run(words, capture_output=True, text=True, check=True).stdout.splitlines()
            assert found == [str(photos), str(photos / "1.png")]  # the folder lost `7.png`
        os.utime(photos / "1.png", ns=(time, time))
        assert content(tmp_path / "out") == before

    time, finetuned = (photos / "1.png").stat().st_mtime_ns, make_tiled()
    finetuned.encoder.conv_out.bias.data += 1
    run(parts=[0])
    check_refused()
    run()
    check_refused()


def test_the_error_for_other_classes_names_them(photos, tmp_path):
    names = [f"class {number}" for number in range(9)]
    for name in names:
        (photos / name).mkdir()
        shutil.copy(photos / "0.png", photos / name)
    tokenize(make_tiny(), photos, tmp_path / "set", num_parts=2, parts=[0])
    (photos / "class 5").rename(photos / "new class")
    message = "with the same images, but new classes: `new class`; missing classes: `class 5`. `find"
    with pytest.raises(ValueError, match=message):
        tokenize(make_tiny(), photos, tmp_path / "set", num_parts=2)
    (photos / "class 5").mkdir()
    shutil.copy(photos / "0.png", photos / "class 5")
    message = "their number was 16 and is now 17; new classes: `new class`. .* Or pass --overwrite to delete the set"
    with pytest.raises(ValueError, match=message):
        tokenize(make_tiny(), photos, tmp_path / "set", num_parts=2)


def test_the_error_for_other_columns_shows_where_they_differ(tmp_path):
    columns = {f"column {number}": {"_type": "Value"} for number in range(9)}
    start_set(Folder(tmp_path), {"columns": columns})
    columns["new column"] = columns.pop("column 8")
    message = r"`columns` was \.\.\.[^.]*'column 8'.* and is now \.\.\.[^.]*'new column'"
    with pytest.raises(ValueError, match=message):
        start_set(Folder(tmp_path), {"columns": columns})


def test_offloaded_weights_are_in_the_digest_of_an_encoder():
    digests = set()
    for bias in (0, 1):
        model = make_tiled()
        model.encoder.conv_out.bias.data += bias
        digest = encoder_digest(model)
        cpu_offload(model)
        assert model.encoder.conv_out.weight.is_meta
        assert encoder_digest(model) == digest
        digests.add(digest)
    assert len(digests) == 2


def test_status_names_missing_parts(photos, tmp_path):
    tokenize(make_tiny(), photos, tmp_path / "out", parts=[0, 1, 5], num_parts=7)
    state = {"parts": "7 (not complete; finished: 3)", "missing": "2-4,6"}
    assert describe_state(tmp_path / "out") == state
    for read in (read_settings, TokenSet):
        with pytest.raises(ValueError, match="parts of `.*out` are missing. Run the same `svqvae tokenize` again"):
            read(tmp_path / "out")
    tokenize(make_tiny(), photos, tmp_path / "out", num_parts=7)
    assert describe_state(tmp_path / "out") == {"parts": "7 (complete; finished: 7)"}
    with pytest.raises(ValueError, match="must be a token set, but has no record of one"):
        describe_state(photos)


def test_a_log_has_a_line_for_each_finished_part(photos, tmp_path, caplog, capsys):
    tokenize(make_tiny(), photos, tmp_path / "out", parts=[1, 4], num_parts=7)
    caplog.set_level("INFO", "svqvae_hf.token_sets.writer")
    caplog.clear()
    tokenize(make_tiny(), photos, tmp_path / "out", parts=[1, 4, 5], num_parts=7)  # parts 1 and 4 are there
    (line,) = caplog.messages
    pattern = r"finished part 5, 3 of 3 in this run \(images: 1, rows: 1, images per second: \d+\.\d\)"
    assert re.fullmatch(pattern, line)
    assert capsys.readouterr().err == ""  # a library prints nothing by itself


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"crops": "left"}, "`crops` must be one of whole, whole-flip, centre, centre-flip, ten-crop, got 'left'"),
        ({"crops": "centre"}, "must be the side of the crops in pixels, got None for `crops` 'centre'. Pass it"),
        ({"resolution": 16}, "got 16 for `crops` 'whole'. Leave it out"),
        ({"num_parts": 8}, "`--num-parts` must be in [1, 7], the number of images, got 8"),
        (
            {"num_parts": 3, "parts": [0, 3]},
            "must be in [0, 2], because the set has 3 in all, got [0, 3]. For more",
        ),
        ({"batch_size": 0}, "`batch_size` must be at least 1, got 0"),
        ({"scales": [1, 1]}, "scales must differ within six digits"),
    ],
)
def test_options_out_of_range_raise_before_the_work(tiny_model, photos, tmp_path, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        tokenize(tiny_model, photos, tmp_path / "out", **options)
    assert not list(tmp_path.glob("out*"))


def test_more_parts_than_tar_files_are_an_error(tiny_model, photos, tmp_path):
    write_tar(tmp_path / "a.tar", [("0.png", (photos / "0.png").read_bytes())])
    message = "`--num-parts` must be in [1, 1], the number of files, got 2. A part reads whole files. Pass at most 1"
    with pytest.raises(ValueError, match=re.escape(message)):
        tokenize(tiny_model, tmp_path / "a.tar", tmp_path / "out", num_parts=2)


def test_a_broken_image_is_listed_with_its_file(tiny_model, photos, tmp_path):
    content_of_image = (photos / "0.png").read_bytes()
    for folder in ("a", "b"):
        (tmp_path / "tars" / folder).mkdir(parents=True)
        write_tar(tmp_path / "tars" / folder / "0.tar", [("0.png", content_of_image), ("1.png", b"broken")])
    (tmp_path / "tars" / "b" / "1.tar").write_bytes(b"damaged" * 100)
    tokenize(tiny_model, tmp_path / "tars", tmp_path / "out")
    entries = [(entry["key"], entry.get("file")) for entry in skipped(tmp_path / "out")]
    assert entries == [("1.png", "a/0.tar"), ("1.png", "b/0.tar"), ("b/1.tar", None)]

    rows = datasets.Dataset.from_dict({"image": [content_of_image, b"broken"]})
    rows.to_parquet(tmp_path / "c.parquet")
    tokenize(tiny_model, tmp_path / "c.parquet", tmp_path / "out_of_parquet")
    (entry,) = skipped(tmp_path / "out_of_parquet")
    assert (entry["key"], entry["file"]) == ("0-1", "c.parquet")


def test_the_folder_must_be_new_and_one_image_readable(tiny_model, photos, tmp_path):
    with pytest.raises(ValueError, match="must be a new or empty folder, but it is not empty"):
        tokenize(tiny_model, photos, photos)
    for path in photos.iterdir():
        path.write_bytes(b"broken")
    with pytest.raises(ValueError, match="at least one image must be readable, but none of 7 is. The first, `0.png`"):
        tokenize(tiny_model, photos, tmp_path / "out")


@pytest.mark.slow
def test_tokenize_and_decode(photos, tmp_path, capsys):
    make_tiny().save_pretrained(tmp_path / "models" / "tiny")
    out, images = tmp_path / "tokens", tmp_path / "images"
    model = ["--model", tmp_path / "models" / "tiny"]
    crops = ["--crops", "centre", "--resolution", "16", "--scales", "0.5", "1", "--max-images", "4"]
    tokenize = ["tokenize", photos, "--output", out, *model]
    assert svqvae(*tokenize, *crops, "--tile-size", "32", "--overlap", "8") == 1
    written, error = capsys.readouterr()
    line_of_part, summary = error.splitlines()
    assert " finished part 0, 1 of 1 in this run (images: 4, rows: 3, images per second: " in line_of_part
    assert summary == "svqvae: 1 of 4 inputs were skipped"
    skipped = f"skipped  {out / 'skipped.jsonl'} (unreadable images: 1)\n"
    assert written == f"written  {out} (images: 4, rows: 3, files: 1)\n{skipped}"
    assert svqvae("decode", out, "--output", images, *model) == 0
    assert capsys.readouterr().out == f"written  {images} (images: 6)\n"
    (images / "1_x0.5.png").write_bytes(b"cut")
    error = fails(capsys, "decode", out, "--output", images, *model)
    assert "1_x0.5.png` has changed since it was written" in error
    (images / "1_x0.5.png").unlink()
    assert svqvae("decode", out, "--output", images, *model) == 0
    written = f"resumed: 4 of 6 images were there\nwritten  {images} (images: 2)\n"
    assert capsys.readouterr().out == written
    assert svqvae("decode", out, "--output", images, *model, "--overwrite", "--max-images", "1") == 0
    assert capsys.readouterr().out == f"written  {images} (images: 2)\n"
    assert sorted(path.name for path in images.glob("*.png")) == ["0_x0.5.png", "0_x1.png"]
    assert "`scales` was [0.5, 1.0] and is now [1.0]" in fails(capsys, *tokenize)
    bundled = fails(capsys, "decode", out, "--output", tmp_path / "new")  # the bundled model has another codebook
    assert "the ids must be of the model's codebook" in bundled
    assert not (tmp_path / "new").exists()

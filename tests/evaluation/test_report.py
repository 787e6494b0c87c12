import copy
import json
import math

import numpy as np
import pytest
from cli_runner import fails, svqvae
from conftest import make_tiny
from PIL import Image

from svqvae_hf.evaluation.evaluate import evaluate
from svqvae_hf.evaluation.report import (
    METRICS,
    TABLES,
    markdown,
    write_report,
)

FILES = ["report.json", "report.md", "worst.png"]
COMMAND_LINE = {"model": "org/name", "data": ["org/photos"], "config": None, "split": "test"}


@pytest.fixture(scope="module")
def evaluated():
    generator = np.random.default_rng(0)
    noise = [generator.integers(256, size=(6, 8, 3), dtype=np.uint8) for _ in range(3)]
    images = [Image.fromarray(each).resize((40, 30)) for each in noise]
    images.append({"bytes": b"", "path": "broken.png"})
    return evaluate(make_tiny(), images, scales=[1.0, 0.5])


@pytest.fixture
def report(evaluated):
    report = copy.deepcopy(evaluated)
    report.settings |= COMMAND_LINE
    return report


def test_json_has_all_values(report, tmp_path):
    report.images[0]["results"][0]["psnr"] = report.results[0].values["psnr"] = math.inf
    write_report(report, tmp_path)
    document = json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)
    assert document["images"][0]["results"][0]["psnr"] == document["results"][0]["psnr"] == "inf"
    assert document["images"][1:] == report.images[1:]
    assert document["settings"] == report.settings
    assert document["versions"]["svqvae-hf"]
    assert document["results"][1]["lpips"] is None
    assert document["results"][1]["counts"] == report.results[1].counts.tolist()
    assert document["skipped"][0]["name"] == "broken.png"


def test_every_value_is_in_a_table(report):
    assert sorted(key for keys in TABLES.values() for key in keys) == sorted(METRICS)
    assert set(METRICS) == set(report.results[0].values)
    text = "\n".join(markdown(report))
    for result in report.results:
        assert f"{result.values['psnr']:.2f}" in text
    assert "On 3 images of `org/photos`, split `test`." in text
    assert "- LPIPS was not computed. Pass --lpips-weights" in text
    assert "- `broken.png` (index 3): the image (0 bytes) is not a readable image" in text
    tables = [block.splitlines() for block in text.split("\n\n") if block[0] == "|"]
    assert all(len({row.count("|") for row in table}) == 1 for table in tables)


# The command


@pytest.fixture
def photos(photo, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    photo.crop((100, 100, 157, 135)).save(folder / "a.png")
    photo.crop((200, 100, 240, 124)).save(folder / "b.jpg")
    (folder / "c.jpg").write_text("not an image")
    return str(folder)


def test_command_writes_the_report_once(saved_model, photos, tmp_path, capsys):
    out = tmp_path / "new" / "out"
    argv = ["evaluate", saved_model, photos, "--output", out, "--scales", "1", "0.5", "--max-images", "3"]
    argv += ["--device", "cpu", "--tile-size", "32", "--overlap", "8"]
    assert svqvae(*argv) == 1
    captured = capsys.readouterr()
    assert sorted(path.name for path in out.iterdir()) == FILES
    with Image.open(out / "worst.png") as image:
        assert min(image.size) >= 300
    document = json.loads((out / "report.json").read_text())
    assert [each["name"] for each in document["images"]] == ["a.png", "b.jpg"]
    assert document["settings"]["tile_size"] == 32
    assert document["settings"]["scale_from"] == "image"
    assert document["settings"]["data"] == [photos]
    assert f"{document['results'][0]['psnr']:.2f}" in captured.out
    assert "1 skipped: see the report." in captured.out
    assert captured.err == "svqvae: 1 of 3 inputs were skipped\n"
    assert f"`{out / 'report.json'}` already exists. Pass --overwrite" in fails(capsys, *argv)
    assert svqvae(*argv, "--overwrite") == 1


def test_errors_are_one_line(saved_model, photos, tmp_path, capsys):
    for words, message in (
        (["/no/model", photos], "there is no file or folder `/no/model`"),
        ([saved_model, photos, "--lpips-weights", "none.pth"], "there is no file `none.pth`"),
        ([saved_model, f"{photos}/c.jpg"], "none of 1 is"),
        ([photos, photos, "--generated", "--tile-size", 32], "--tile-size is not for generated images"),
    ):
        assert message in fails(capsys, "evaluate", *words, "--output", tmp_path / "out")
        assert not (tmp_path / "out").exists()

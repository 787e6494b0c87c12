import json
import math

import numpy as np
import pytest
from cli_runner import fails, svqvae
from conftest import make_tiny

from svqvae_hf.evaluation.evaluate import evaluate
from svqvae_hf.evaluation.reconstruction_table import ReconstructionFigures, table_row
from svqvae_hf.evaluation.report import METRICS, Report
from svqvae_hf.evaluation.report_files import write_report
from svqvae_hf.evaluation.tokenizers.diffusers_models import SVQVAETokenizer

FILES = ["report.json", "report.md"]


def test_report_has_all_values(photo, tmp_path):
    images = [photo.crop((9 * i, 0, 9 * i + 40, 30)) for i in range(3)] + [{"bytes": b"", "path": "broken.png"}]
    report = evaluate([SVQVAETokenizer("tiny", make_tiny(), 0.5)], images, own_size=True)
    report.settings |= {"data": ["org/photos"], "config": None, "split": "test"}
    report.images[0]["results"][0]["psnr"] = report.rows[0]["psnr"] = math.inf
    write_report(report, tmp_path)
    document = json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)
    assert document["images"][0]["results"][0]["psnr"] == document["rows"][0]["psnr"] == "inf"
    assert document["images"][1:] == report.images[1:]
    assert document["settings"] == report.settings
    assert document["versions"]["svqvae-hf"]
    assert document["rows"][0]["lpips"] is None
    text = (tmp_path / "report.md").read_text()
    shown = {key: value for key, value in report.rows[0].items() if key in METRICS and value is not None}
    assert len(shown) > 5
    assert all(f"{value:{METRICS[key].number_format}}" in text for key, value in shown.items())
    assert "- data: `org/photos`\n- split: `test`\n" in text
    assert "- LPIPS was not computed. Pass --lpips-weights" in text
    assert "- `broken.png` (index 3): the image (0 bytes) is not a readable image" in text
    assert len({line.count("|") for line in text.splitlines() if line.startswith("|")}) == 1


# The command


@pytest.fixture
def photos(photo, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    photo.crop((100, 100, 157, 135)).save(folder / "a.png")
    photo.crop((200, 100, 240, 124)).save(folder / "b.jpg")
    (folder / "c.jpg").write_text("not an image")
    return str(folder)


def test_command_writes_the_report_once(saved_model, photos, tmp_path, capsys, monkeypatch):
    out = tmp_path / "new" / "out"
    argv = ["evaluate", photos, "--model", saved_model, "--output", out, "--scales", "1", "0.5", "--max-images", "3"]
    argv += ["--device", "cpu", "--tile-size", "32", "--overlap", "8"]
    assert svqvae(*argv) == 1
    captured = capsys.readouterr()
    assert sorted(path.name for path in out.iterdir()) == FILES
    document = json.loads((out / "report.json").read_text())
    assert [each["name"] for each in document["images"]] == ["a.png", "b.jpg"]
    assert document["settings"]["tile_size"] == 32
    assert document["settings"]["scale_from"] == "image"
    assert document["settings"]["data"] == [photos]
    assert f"{document['rows'][0]['psnr']:.2f}" in captured.out
    assert "1 skipped: see the report." in captured.out
    assert captured.err == "svqvae: 1 of 3 inputs were skipped\n"
    assert f"`{out / 'report.json'}` already exists. Pass --overwrite" in fails(capsys, *argv)
    monkeypatch.setattr("svqvae_hf.evaluation.measuring.SECONDS_PER_LINE", 0.001)
    assert svqvae(*argv, "--overwrite") == 1
    assert " measured 0 of 3 images\n" in capsys.readouterr().err  # stderr is a log, not a terminal


def test_names_with_control_characters_stay_in_their_line(tmp_path):
    name = "a\x1b[2J\nb.png"
    skipped = [{"index": 0, "name": name, "reason": "broken"}]
    rows = [{"title": f"x|{name}", "psnr": 20.0}]
    report = Report(title="Evaluation", settings={}, rows=rows, images=[], skipped=skipped, notes=[])
    assert report.table()[-1] == r"| x\|a\x1b[2J\nb.png |    20.00 |"
    write_report(report, tmp_path)
    assert r"- `a\x1b[2J\nb.png` (index 0): broken" in (tmp_path / "report.md").read_text().splitlines()
    assert json.loads((tmp_path / "report.json").read_text())["skipped"] == skipped


def test_one_code_takes_no_bits(photo):
    """Ids of a codebook of one code take no bits, which must not be divided by."""
    figures = ReconstructionFigures(
        scale=1,
        width=photo.width,
        height=photo.height,
        tokens=12,
        codes=np.zeros(1, np.int64),
        original_pixels=photo.width * photo.height,
        bits_per_pixel=0.0,
        psnr=math.inf,
    )
    cells = table_row(9, "photo", [figures, figures], 1).split()
    assert cells == ["photo", "1", f"{photo.width}x{photo.height}", "24", "0.0000", "inf", "100.0%"]

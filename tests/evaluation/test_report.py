import copy
import json
import math
import sys

import numpy as np
import pytest
import torch
import yaml
from conftest import make_tiny
from huggingface_hub import ModelCard
from PIL import Image

from svqvae_cli import main
from svqvae_hf.evaluation.baselines.blocks import fit_block_baselines
from svqvae_hf.evaluation.evaluate import evaluate
from svqvae_hf.evaluation.report import (
    METRICS,
    TABLES,
    baselines_sheet,
    baselines_table,
    codebook_figure,
    eval_results,
    examples_sheet,
    markdown,
    rate_figure,
    summary,
    write_report,
)
from svqvae_hf.evaluation.results import TargetResult
from svqvae_hf.hub.model_cards import model_card

PICTURES = ["baselines.png", "best.png", "codebook.png", "rate_distortion.png", "worst.png"]
FILES = sorted([*PICTURES, "model-index.yaml", "report.json", "report.md"])
COMMAND_LINE = {"model": "org/name", "data": ["org/photos"], "config": None, "split": "test"}


@pytest.fixture(scope="module")
def evaluated():
    generator = np.random.default_rng(0)
    noise = [generator.integers(256, size=(6, 8, 3), dtype=np.uint8) for _ in range(3)]
    images = [Image.fromarray(each).resize((40, 30)) for each in noise]
    images.append({"bytes": b"", "path": "broken.png"})
    pixels = [torch.from_numpy(np.array(image)).movedim(-1, 0)[:, :28] for image in images[:3]]
    baselines = fit_block_baselines(pixels, side=4, size=64, count=8)
    options = {"scales": [1.0, 0.5], "half_precision": True, "block_baselines": baselines, "tile_size": 16}
    return evaluate(make_tiny(), images, **options)


@pytest.fixture
def report(evaluated):
    report = copy.deepcopy(evaluated)
    report.settings |= COMMAND_LINE
    return report


@pytest.fixture
def no_figures(monkeypatch):
    """Drawing them takes most of the time."""
    monkeypatch.setattr("svqvae_hf.evaluation.report.save_figure", lambda *_: None)


@pytest.mark.usefixtures("no_figures")
def test_json_has_all_values(report, tmp_path):
    report.images[0]["results"][0]["psnr"] = report.results[0].values["psnr"] = math.inf
    write_report(report, tmp_path)
    document = json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)
    assert document["images"][0]["results"][0]["psnr"] == document["results"][0]["psnr"] == "inf"
    assert document["images"][1:] == report.images[1:]
    assert document["settings"] == report.settings
    assert document["versions"]["svqvae-hf"]
    assert document["results"][2]["lpips"] is None
    assert document["results"][2]["counts"] == report.results[2].counts.tolist()
    assert document["skipped"][0]["name"] == "broken.png"
    assert document["baselines"] == report.baselines
    assert len({each["baseline"] for each in document["images"][0]["baselines"]}) == 6


def test_every_value_is_in_a_table(report):
    assert sorted(key for keys in TABLES.values() for key in keys) == sorted(METRICS)
    assert set(METRICS) == set(report.results[0].values)
    text = markdown(report)
    for result in report.results:
        assert f"{result.values['psnr']:.2f}" in text
        assert f"{result.values['ids_changed_bfloat16']:.1%}" in text
    assert "On 3 images of `org/photos`, split `test`." in text
    assert "- LPIPS was not computed. Pass --lpips-weights" in text
    assert "- `broken.png` (index 3): the image (0 bytes) is not a readable image" in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert sum("tiles of 16 pixels" in row for row in rows) == 3 * 2
    tables = [block.splitlines() for block in text.split("\n\n") if block[0] == "|"]
    assert all(len({row.count("|") for row in table}) == 1 for table in tables)


def test_tables_of_baselines(report):
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in baselines_table(report)]
    assert len(rows) == 2 + 2 * (1 + 6)
    assert rows[2][:4] == ["the model", "1", "0.4000", f"{report.results[0].values['psnr']:.2f}"]
    for row, each in zip(rows[3:9], report.baselines[:6], strict=True):
        assert (row[0], row[3]) == (each["baseline"], f"{each['psnr']:.2f}")
    assert rows[5][0:3] == ["8 principal components, not quantised", "1", "–"]
    assert rows[9][:2] == ["the model", "0.5"]
    assert "\n".join(baselines_table(report)) in markdown(report)
    (line,) = [line for line in summary(report).splitlines() if "linear" in line]
    assert [cell.strip() for cell in line.split("|")[2:-1]] == [f"{report.baselines[i]['psnr']:.2f}" for i in (1, 7)]


def test_no_column_for_half_precision_without_its_values(report):
    for result in report.results:
        del result.values["ids_changed_bfloat16"], result.values["ids_changed_float16"]
    text = markdown(report)
    assert "entropy, bits per id" in text
    assert "ids changed" not in text


@pytest.mark.usefixtures("no_figures")
def test_metadata_of_the_card(report, tmp_path):
    report.results[0].values["psnr"] = math.inf
    results = eval_results(report)
    assert {result.metric_args["mode"] for result in results} == {"plain"}
    assert [result.metric_name for result in results if result.metric_type == "psnr"] == ["PSNR at scale 0.5"]
    assert (results[0].dataset_type, results[0].dataset_split) == ("org/photos", "test")
    card = ModelCard(model_card(make_tiny().config, repo_id="org/name", eval_results=results))
    assert card.data.eval_results == results
    write_report(report, tmp_path)
    assert (tmp_path / "model-index.yaml").read_text().strip() in card.data.to_yaml()
    report.settings["data"] = [str(tmp_path)]
    (result, *_) = eval_results(report)
    assert (result.dataset_type, result.dataset_name) == ("imagefolder", tmp_path.name)


@pytest.mark.usefixtures("no_figures")
def test_dots_are_resolved_in_the_metadata(report, tmp_path, monkeypatch):
    (tmp_path / "model" / "photos").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "model" / "photos")
    report.settings |= {"model": "..", "data": ["."]}
    write_report(report, tmp_path / "out")
    (index,) = yaml.safe_load((tmp_path / "out" / "model-index.yaml").read_text())["model-index"]
    assert index["name"] == "model"
    assert {result["dataset"]["name"] for result in index["results"]} == {"photos"}


def test_plot_excludes_infinite_values(report):
    report.codecs[0]["psnr"] = math.inf
    psnr, ssim = rate_figure(report).axes
    assert [len(axes.get_lines()[0].get_xdata()) for axes in (psnr, ssim)] == [5, 6]


def test_plot_leaves_out_baselines_without_a_value(report):
    for each in report.baselines:
        each["ssim"] = None  # of images that are too small
    psnr, ssim = rate_figure(report).axes
    titles = {each["baseline"] for each in report.baselines[:3]}
    assert titles <= {line.get_label() for line in psnr.get_lines()}
    assert not titles & {line.get_label() for line in ssim.get_lines()}


def test_codecs_without_values_are_not_in_the_legend(report):
    report.codecs = [each for each in report.codecs if each["codec"] == "WebP"]
    for axes in rate_figure(report).axes:
        names = [text.get_text() for text in axes.get_legend().get_texts()]
        assert [name for name in names if name in ("JPEG", "WebP", "AVIF")] == ["WebP"]


def test_rate_figure_has_a_point_per_scale_and_quality(report):
    for axes, key in zip(rate_figure(report).axes, ("psnr", "ssim"), strict=True):
        lines = {line.get_label(): line for line in axes.get_lines()}
        assert list(lines) == [
            *("JPEG", "WebP", "AVIF"),
            *(each["baseline"] for each in report.baselines[:3]),
            *("ids, plain", "ids, entropy-coded"),
        ]
        for each in report.baselines[:2]:
            assert lines[each["baseline"]].get_xydata().tolist() == [[each["bits_per_pixel"], each[key]]]
        assert set(lines[report.baselines[2]["baseline"]].get_ydata()) == {report.baselines[2][key]}
        by_rate = report.results[1::-1]
        for label, rate in (("ids, plain", "bits_per_pixel"), ("ids, entropy-coded", "bits_per_pixel_entropy")):
            assert list(lines[label].get_xdata()) == [each.values[rate] for each in by_rate]
            assert list(lines[label].get_ydata()) == [each.values[f"{key}_full_size"] for each in by_rate]
        assert len(lines["JPEG"].get_xdata()) == 6
        assert axes.get_xlabel() == "bits per pixel of the image"
        assert key.upper() in axes.get_ylabel()


def test_targets_have_a_table_and_a_line(report):
    label = "smallest scale that reaches a PSNR"
    two = [TargetResult(25, 2, 26.5, 0.75, 40.4, 0.03906, 0.5, 64), TargetResult(26, 1, 28, None, 64, 0.0625, 1.0, 64)]
    for targets in ([], two):
        report.targets = targets
        psnr, ssim = rate_figure(report).axes
        lines = [line for line in psnr.lines if line.get_label() == label]
        assert [line.get_xydata().tolist() for line in lines] == [[[0.03906, 26.5], [0.0625, 28]]] * bool(targets)
        ssim_lines = [line.get_xydata().tolist() for line in ssim.lines if line.get_label() == label]
        assert ssim_lines == [[[0.03906, 0.75]]] * bool(targets)
        assert psnr.get_ylabel() == "PSNR, dB, at the image's size"
        assert ("## The smallest scale that reaches a PSNR" in markdown(report)) == bool(targets)
    row = next(line for line in markdown(report).splitlines() if "64 (scale 0.5)" in line)
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells == ["25", f"2 of {len(report.images)}", "26.50", "0.7500", "40", "0.0391", "64 (scale 0.5)"]


def test_codebook_figure_has_a_line_per_scale(report):
    (axes,) = codebook_figure(report).axes
    lines = [line for line in axes.get_lines() if line.get_label().startswith("scale")]
    for line, result in zip(lines, report.results[:2], strict=True):
        counts = line.get_ydata()
        assert (np.diff(counts) <= 0).all()
        assert counts.sum() == result.counts.sum()
    assert axes.get_yscale() == "log"


def test_examples_sheet_has_a_row_per_image(report):
    one = examples_sheet(report.worst[:1], [1.0, 0.5])
    assert examples_sheet(report.worst, [1.0, 0.5]).height == 3 * one.height
    assert one.width > 3 * 256
    beside = baselines_sheet(report.worst, 1.0)
    assert (beside.height, beside.width > 8 * 256) == (3 * one.height, True)


# The command


@pytest.fixture
def model(tmp_path):
    make_tiny(sample_size=32).save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.fixture
def photos(photo, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    photo.crop((100, 100, 157, 135)).save(folder / "a.png")
    photo.crop((200, 100, 240, 124)).save(folder / "b.jpg")
    (folder / "c.jpg").write_text("not an image")
    return str(folder)


def test_command_writes_the_report(model, photos, tmp_path, capsys):
    out = tmp_path / "new" / "out"
    options = ["--scales", "1", "0.5", "--modes", "tiled", "--max-images", "3", "--device", "cpu"]
    options += ["--half-precision", "--baselines", *(f"{photos}/{name}" for name in ("a.png", "b.jpg"))]
    options += ["--codecs", "jpeg"]
    assert main(["evaluate", model, photos, "--output", str(out), *options]) == 1
    captured = capsys.readouterr()
    assert sorted(path.name for path in out.iterdir()) == FILES
    for name in PICTURES:
        with Image.open(out / name) as image:
            assert min(image.size) >= 300
    document = json.loads((out / "report.json").read_text())
    assert [each["name"] for each in document["images"]] == ["a.png", "b.jpg"]
    assert document["settings"]["tile_size"] == 256  # not the model's `sample_size`
    assert document["settings"]["scale_from"] == "image"
    assert {each["codec"] for each in document["codecs"]} == {"JPEG"}
    assert document["results"][0]["ids_changed_float16"] is not None
    assert document["settings"]["data"] == [photos]
    assert document["settings"]["baselines"] == [f"{photos}/a.png", f"{photos}/b.jpg"]
    assert f"{document['baselines'][1]['psnr']:.2f}" in captured.out
    assert document["baselines"][1]["baseline"] == "k-means with a linear 3 x 3 decoder"
    assert f"{document['results'][0]['psnr']:.2f}" in captured.out
    assert "1 image was skipped; the report names it." in captured.out
    assert captured.err == "svqvae: 1 of 3 inputs were skipped\n"
    assert {each["codec"] for each in document["codecs"]} == {"JPEG"}


def fails(capsys, *argv):
    assert main([str(each) for each in argv]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return captured.err


def test_errors_are_one_line(model, photos, tmp_path, capsys):
    out = ["--output", tmp_path / "out"]
    assert "there is no file or folder `/no/model`" in fails(capsys, "evaluate", "/no/model", photos, *out)
    assert "no file or folder matches `/no/data`" in fails(capsys, "evaluate", model, "/no/data", *out)
    assert "must be a file, but" in fails(capsys, "evaluate", model, photos, *out, "--lpips-weights", "none.pth")
    assert "must be a file, but" in fails(capsys, "evaluate", model, photos, *out, "--inception-weights", "none.pth")
    assert "none of 1 is" in fails(capsys, "evaluate", model, f"{photos}/c.jpg", *out)
    assert "`tile_size` must be" in fails(capsys, "evaluate", model, photos, *out, "--tile-size", 33)
    assert "`/no/images`" in fails(capsys, "evaluate", model, photos, *out, "--baselines", "/no/images")
    assert "not a readable image" in fails(capsys, "evaluate", model, photos, *out, "--baselines", photos)
    few = fails(capsys, "evaluate", model, photos, *out, "--baselines", f"{photos}/b.jpg")
    assert "at least as many blocks as codes, 64, but the images to fit it on have 60" in few
    assert not (tmp_path / "out").exists()


def test_missing_extra_is_named(model, photos, tmp_path, capsys, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("svqvae_hf.evaluation.evaluate")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr("svqvae_hf.evaluation.evaluate")
    monkeypatch.setitem(sys.modules, "torchmetrics.image.fid", None)
    error = fails(capsys, "evaluate", model, photos, "--output", tmp_path / "out")
    assert "`evaluate` needs the package torchmetrics" in error
    assert "pip install 'svqvae-hf[eval]'" in error

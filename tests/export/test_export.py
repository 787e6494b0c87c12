import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import ROOT, make_tiny
from PIL import Image

import svqvae_cli
import svqvae_hf
from svqvae_hf import SVQVAEImageProcessor
from svqvae_hf.export import export, graph_files
from svqvae_hf.export.export import export_graphs
from svqvae_hf.export.graphs import trace_graphs
from svqvae_hf.models import quantizer

EXAMPLE = ROOT / "examples" / "onnx_tokenizer.py"
PIXEL_RANGE = (-1, 3)  # differs from `network_range`: the graphs map one to the other
SMALL = {"encoder_ch_mult": (1, 2), "decoder_ch_mult": (1, 2), "pixel_range": PIXEL_RANGE}  # f = 2
ONE_LEVEL = {"encoder_ch_mult": (1,), "decoder_ch_mult": (1,)}

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_grad")]


@pytest.fixture(scope="module")
def small():
    return make_tiny(**SMALL)


@pytest.fixture(scope="module")
def model_folder(small, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    small.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def exported(small, tmp_path_factory):
    """Report of exporting `small`, in training mode and tiled, and its graphs, traced once for all tests."""
    graphs = []

    def trace(model, dtype):
        graphs.append(trace_graphs(model, dtype))
        return graphs[0]

    small.train().enable_tiling(tile_size=4, overlap=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "trace_graphs", trace)
        report = export_graphs(small, tmp_path_factory.mktemp("onnx") / "graphs")
    assert small.training
    assert small.use_tiling
    small.eval().disable_tiling()
    return report, graphs[0]


@pytest.fixture(scope="module")
def report(exported):
    return exported[0]


@pytest.fixture
def traced(exported, monkeypatch):
    """Exports use the graphs that were traced before."""
    monkeypatch.setattr(export, "trace_graphs", lambda model, dtype: exported[1])


@pytest.fixture(scope="module")
def documented(exported, model_folder, tmp_path_factory):
    """Variables of the documented code, run for `small`: the sessions `encoder` and `decoder`, and their `folder`."""
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "export.md").read_text(), re.DOTALL)
    folder, names = tmp_path_factory.mktemp("documented"), {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "trace_graphs", lambda model, dtype: exported[1])
        patch.setattr(svqvae_hf, "DEFAULT_MODEL", str(model_folder))
        patch.chdir(folder)
        exec(code, names)
    return names | {"folder": folder / "graphs"}


@pytest.fixture(scope="module")
def half_model():
    return make_tiny(**ONE_LEVEL, codebook_l2_norm=False)


@pytest.fixture(scope="module")
def half_report(half_model, tmp_path_factory):
    return export_graphs(half_model, tmp_path_factory.mktemp("half") / "graphs", dtype="float16")


def image(grid, model):
    """A random sample for batch, rows and columns of ids."""
    batch, rows, columns = grid
    low, high = model.config["pixel_range"]
    unit = torch.rand(batch, 3, rows * model.f, columns * model.f, generator=torch.Generator().manual_seed(1))
    return low + unit * (high - low)


def run_onnx(path, value):
    return run_session(onnxruntime.InferenceSession(path), value)


def run_session(session, value):
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: value.numpy()})[0])


def is_close(pixels, expected, tolerance):
    return pixels.shape == expected.shape and (pixels - expected).abs().max() <= tolerance


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_onnx_equals_the_model(small, report, monkeypatch):
    monkeypatch.setattr(quantizer, "SEARCH_SCORES", 7 * 64)  # the model searches in chunks, the graph does not
    for grid, (top, left) in [((1, 1, 1), (0, 0)), ((3, 1, 1), (1, 1)), ((2, 9, 6), (0, 1)), ((1, 24, 30), (1, 0))]:
        sample = image(grid, small)[..., top:, left:]  # sides that are not multiples of f, too
        ids = run_onnx(report.out / "encoder.onnx", sample)
        assert ids.dtype == torch.int64
        assert (ids != small.encode_tokens(sample)).float().mean() < 0.01  # ties
        decoded = small.decode_tokens(ids)
        assert is_close(run_onnx(report.out / "decoder.onnx", ids), decoded, 4 * 2 / 255)


def test_decoder_clamps(small, documented):
    ids = torch.arange(64).view(1, 8, 8)
    assert small.decode(ids).sample.min() < PIXEL_RANGE[0]
    assert run_session(documented["decoder"], ids).min() == PIXEL_RANGE[0]


def test_documented_code_equals_the_model(small, documented):
    sample = image((2, 9, 6), small)[..., 1:]
    ids = run_session(documented["encoder"], sample)
    assert (ids != small.encode_tokens(sample)).float().mean() < 0.01  # ties
    assert is_close(run_session(documented["decoder"], ids), small.decode_tokens(ids), 4 * 2 / 255)


def test_float16_graphs_are_close_to_the_model(half_model, half_report):
    sample = image((2, 12, 10), half_model)
    ids = run_onnx(half_report.out / "encoder.onnx", sample.half())
    assert (ids != half_model.encode_tokens(sample)).float().mean() < 0.05
    decoded = run_onnx(half_report.out / "decoder.onnx", ids)
    assert decoded.dtype == torch.float16
    assert is_close(decoded.float(), half_model.decode_tokens(ids), 2 / 255)
    assert f"{half_report.changed} of {half_report.ids} ids differ" in str(half_report)


def test_metadata_of_onnx(small, report):
    shapes = {"sample": ["batch", 3, "height", "width"], "ids": ["batch", "rows", "columns"]}
    for name, source, target in (("encoder", "sample", "ids"), ("decoder", "ids", "sample")):
        path = report.out / f"{name}.onnx"
        onnx.checker.check_model(path, full_check=True)
        session = onnxruntime.InferenceSession(path)
        metadata = {key: json.loads(value) for key, value in session.get_modelmeta().custom_metadata_map.items()}
        assert metadata == {
            "f": 2,
            "pixel_range": list(PIXEL_RANGE),
            "codebook_size": 64,
            "codebook_fingerprint": small.codebook_fingerprint(),
        }
        (taken,), (returned,) = session.get_inputs(), session.get_outputs()
        assert (taken.name, taken.shape) == (source, shapes[source])
        assert (returned.name, returned.shape) == (target, shapes[target])


def test_no_paths_of_the_machine_are_in_files(report):
    contents = [path.read_bytes() for path in report.out.iterdir()]
    paths = {str(ROOT), str(Path(torch.__file__).parent), str(Path.home()), sys.prefix}
    assert not any(path.encode() in content for content in contents for path in paths)


def test_example_needs_only_onnxruntime_and_numpy(small, report, photo, tmp_path):
    photo.crop((100, 50, 191, 111)).save(tmp_path / "photo.png")  # 91 x 61, not multiples of f
    alone = (
        "import runpy, sys\n"
        "sys.modules |= dict.fromkeys(('torch', 'svqvae_hf', 'diffusers', 'transformers', 'onnx'))\n"
        "del sys.argv[0]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    argv = [sys.executable, "-c", alone, EXAMPLE, report.out, tmp_path / "photo.png", tmp_path / "back.png"]
    run = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    processor = SVQVAEImageProcessor(pixel_range=PIXEL_RANGE)
    batch = processor(tmp_path / "photo.png")
    ids = small.encode_tokens(batch["pixel_values"])
    assert f"91 x 61 pixels, {ids.numel()} ids, the first {ids.flatten()[:8].tolist()}" in run.stdout
    expected = processor.postprocess(small.decode_tokens(ids), batch["image_sizes"])[0]
    with Image.open(tmp_path / "back.png") as back:
        difference = np.abs(np.asarray(back, int) - np.asarray(expected, int))
    assert difference.shape == (61, 91, 3)
    assert difference.max() <= 2


@pytest.mark.usefixtures("traced")
def test_failed_check_leaves_no_files(small, tmp_path, monkeypatch):
    monkeypatch.setattr(graph_files, "load_graph", lambda path: lambda value: value.flip(0, 1))
    with pytest.raises(ValueError, match="encoder at 2 x 2 pixels"):
        export_graphs(small, tmp_path / "out")
    assert names(tmp_path) == []


def test_wrong_arguments_are_errors(small, tmp_path):
    with pytest.raises(ValueError, match="`dtype` must be one of float32, float16, got 'bfloat16'"):
        export_graphs(small, tmp_path / "out", dtype="bfloat16")
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="empty folder"):
        export_graphs(small, tmp_path)


@pytest.mark.usefixtures("traced")
def test_command_writes_both_graphs(model_folder, tmp_path, capsys):
    argv = ["export", str(model_folder), "--output", str(tmp_path / "a" / "out")]
    assert svqvae_cli.main(argv) == 0
    assert names(tmp_path / "a") == ["out"]
    assert names(tmp_path / "a" / "out") == ["decoder.onnx", "encoder.onnx"]
    assert capsys.readouterr().out.startswith("checked  10 sizes")
    assert svqvae_cli.main(argv) == 2
    assert "must be a new or empty folder, but it is not empty" in capsys.readouterr().err

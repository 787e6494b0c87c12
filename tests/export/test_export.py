import copy
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cli_runner import names
from conftest import ROOT, Lazy, make_tiny
from PIL import Image

import svqvae_cli
import svqvae_hf
from svqvae_hf import DEFAULT_MODEL, SVQVAE, SVQVAEImageProcessor
from svqvae_hf.export.graphs import TRACED_GRID, DecoderGraph
from svqvae_hf.export.norms import NestedMeanGroupNorm, with_nested_means
from svqvae_hf.models import quantizer
from svqvae_hf.models.layers import GroupNorm

export = Lazy("svqvae_hf.export.export")
comparison = Lazy("svqvae_hf.export.comparison")
onnx_graphs = Lazy("svqvae_hf.export.onnx_graphs")
exactness = Lazy("exactness")
EXAMPLE = ROOT / "examples" / "onnx_tokenizer.py"
PIXEL_RANGE = (-1, 3)  # differs from `network_range`: the graphs map one to the other
SMALL = {"encoder_ch_mult": (1, 2), "decoder_ch_mult": (1, 2), "pixel_range": PIXEL_RANGE}  # f = 2

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_grad")]


@pytest.fixture(scope="module")
def small():
    return make_tiny(**SMALL)


@pytest.fixture(scope="module")
def model_folder(small, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    small.save_pretrained(folder)
    return folder


def compare_on_few_images(patch):
    """Lets graphs be compared on noise of all sizes, but on small photographs, and on one colour."""
    patch.setattr("svqvae_hf.export.comparison.PHOTOGRAPH_GRIDS", [(12, 20)])
    patch.setattr("svqvae_hf.export.comparison.COLOURS", ["teal"])


@pytest.fixture
def few_images(monkeypatch):
    compare_on_few_images(monkeypatch)


@pytest.fixture(scope="module")
def graphs(small, tmp_path_factory):
    """Folder of the export of `small`, in training mode and tiled."""
    folder = tmp_path_factory.mktemp("onnx") / "graphs"
    small.train().enable_tiling(tile_size=4, overlap=0)
    with pytest.MonkeyPatch.context() as patch:
        compare_on_few_images(patch)
        export.export_graphs(small, folder)
    assert small.training
    assert small.use_tiling
    small.eval().disable_tiling()
    return folder


def save_again(patch, graphs):
    """Lets exports of `small` reuse its graphs, because tracing and conversion take ten seconds."""
    encoder = export.onnx.load(graphs / "encoder.onnx")
    decoder = export.onnx.load(graphs / "decoder.onnx")
    patch.setattr("svqvae_hf.export.export.encoder_graph", lambda model: encoder)
    patch.setattr("svqvae_hf.export.export.decoder_graph", lambda model: decoder)


@pytest.fixture
def saved(graphs, monkeypatch):
    save_again(monkeypatch, graphs)


@pytest.fixture(scope="module")
def documented(graphs, model_folder, tmp_path_factory):
    """Variables of the documented code, run for `small`: the sessions `encoder` and `decoder`, and their `folder`."""
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "export.md").read_text(), re.DOTALL)
    folder, names = tmp_path_factory.mktemp("documented"), {}
    with pytest.MonkeyPatch.context() as patch:
        save_again(patch, graphs)
        compare_on_few_images(patch)
        patch.setattr(svqvae_hf, "DEFAULT_MODEL", str(model_folder))
        patch.chdir(folder)
        exec(code, names)
    return names | {"folder": folder / "graphs"}


def image(grid, model):
    """A random sample for batch, rows and columns of ids."""
    batch, rows, columns = grid
    low, high = model.config["pixel_range"]
    unit = torch.rand(batch, 3, rows * model.f, columns * model.f, generator=torch.Generator().manual_seed(1))
    return low + unit * (high - low)


def run_onnx(path, value):
    return run_session(onnx_graphs.onnxruntime.InferenceSession(path), value)


def run_session(session, value):
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: value.numpy()})[0])


def is_close(pixels, expected, tolerance):
    return pixels.shape == expected.shape and (pixels - expected).abs().max() <= tolerance


def test_onnx_equals_the_model(small, graphs, monkeypatch):
    monkeypatch.setattr(quantizer, "SEARCH_SCORES", 7 * 64)  # the model searches in chunks, the graph does not
    for grid, (top, left) in [((1, 1, 1), (0, 0)), ((3, 1, 1), (1, 1)), ((2, 9, 6), (0, 1)), ((1, 24, 30), (1, 0))]:
        sample = image(grid, small)[..., top:, left:]  # sides that are not multiples of f, too
        ids = run_onnx(graphs / "encoder.onnx", sample)
        assert ids.dtype == torch.int64
        assert (ids != small.encode_tokens(sample)).float().mean() < 0.01  # ties
        decoded = small.decode_tokens(ids)
        assert is_close(run_onnx(graphs / "decoder.onnx", ids), decoded, 4 * 2 / 255)


def test_decoder_clamps(small, documented):
    ids = torch.arange(64).view(1, 8, 8)
    assert small.decode(ids).sample.min() < PIXEL_RANGE[0]
    assert run_session(documented["decoder"], ids).min() == PIXEL_RANGE[0]


def test_documented_code_equals_the_model(small, documented):
    sample = image((2, 9, 6), small)[..., 1:]
    ids = run_session(documented["encoder"], sample)
    assert (ids != small.encode_tokens(sample)).float().mean() < 0.01  # ties
    assert is_close(run_session(documented["decoder"], ids), small.decode_tokens(ids), 4 * 2 / 255)


def test_metadata_of_onnx(small, graphs):
    shapes = {"sample": ["batch", 3, "height", "width"], "ids": ["batch", "rows", "columns"]}
    expected = {"f": 2, "pixel_range": [*PIXEL_RANGE], "codebook_size": 64}
    expected["codebook_fingerprint"] = small.codebook_fingerprint()
    for name, source, target in (("encoder", "sample", "ids"), ("decoder", "ids", "sample")):
        path = graphs / f"{name}.onnx"
        export.onnx.checker.check_model(path, full_check=True)
        session = onnx_graphs.onnxruntime.InferenceSession(path)
        metadata = {key: json.loads(value) for key, value in session.get_modelmeta().custom_metadata_map.items()}
        assert metadata == expected
        (taken,), (returned,) = session.get_inputs(), session.get_outputs()
        assert (taken.name, taken.shape) == (source, shapes[source])
        assert (returned.name, returned.shape) == (target, shapes[target])


def test_no_paths_of_the_machine_are_in_files(graphs):
    contents = [path.read_bytes() for path in graphs.iterdir()]
    paths = {str(ROOT), str(Path(torch.__file__).parent), str(Path.home()), sys.prefix}
    assert not any(path.encode() in content for content in contents for path in paths)


def test_example_needs_only_onnxruntime_and_numpy(small, graphs, photo, tmp_path):
    photo.crop((100, 50, 191, 111)).save(tmp_path / "photo.png")  # 91 x 61, not multiples of f
    hidden = ("torch", "svqvae_hf", "diffusers", "transformers", "onnx")
    alone = f"import runpy, sys; sys.modules |= dict.fromkeys({hidden}); del sys.argv[0]; "
    alone += "runpy.run_path(sys.argv[0], run_name='__main__')"
    argv = [sys.executable, "-c", alone, EXAMPLE, graphs, tmp_path / "photo.png", tmp_path / "back.png"]
    run = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    Image.new("L", (9000, 9000)).save(tmp_path / "large.png")
    argv[-2] = tmp_path / "large.png"
    assert "GiB are free." in subprocess.run(argv, capture_output=True, text=True, check=False).stderr
    processor = SVQVAEImageProcessor(pixel_range=PIXEL_RANGE)
    batch = processor(tmp_path / "photo.png")
    ids = small.encode_tokens(batch["pixel_values"])
    assert f"91 x 61 pixels, {ids.numel()} ids, the first {ids.flatten()[:8].tolist()}" in run.stdout
    expected = processor.postprocess(small.decode_tokens(ids), batch["image_sizes"])[0]
    with Image.open(tmp_path / "back.png") as back:
        difference = np.abs(np.asarray(back, int) - np.asarray(expected, int))
    assert difference.shape == (61, 91, 3)
    assert difference.max() <= 2


@pytest.mark.usefixtures("few_images")
def test_encoder_without_normalised_codes_equals_the_model(tmp_path):
    model = make_tiny(**SMALL, codebook_l2_norm=False)
    export.onnx.save(onnx_graphs.encoder_graph(model), tmp_path / "encoder.onnx")
    encode = onnx_graphs.load_graph(tmp_path / "encoder.onnx")
    checked = comparison.compare_graphs(model, encode, DecoderGraph(model))
    assert " ids of photographs, " in checked


@pytest.mark.usefixtures("few_images")
def test_ids_are_compared_with_those_in_float64(small, monkeypatch):
    exact_model = copy.deepcopy(small).double()
    encode_tokens = SVQVAE.encode_tokens

    def encode_with_rounding(model, sample):
        ids = encode_tokens(model, sample)
        return ids if sample.dtype == torch.float64 else ids ^ 1

    monkeypatch.setattr(SVQVAE, "encode_tokens", encode_with_rounding)
    checked = comparison.compare_graphs(
        small, lambda sample: exact_model.encode_tokens(sample.double()), small.decode_tokens
    )
    assert checked.startswith("0 of 480 ids of photographs, 0 of 1,447 ids of noise, 0 of 400 ids of flat colours ")


@pytest.mark.usefixtures("few_images")
def test_models_of_one_channel_are_checked_too():
    model = make_tiny(**SMALL, in_channels=1, out_channels=1)
    checked = comparison.compare_graphs(model, model.encode_tokens, model.decode_tokens)
    assert checked.startswith("0 of ")


def test_norm_equals_the_models_and_is_closer_to_exact():
    torch.manual_seed(0)
    norm = GroupNorm(4, 8)
    norm.weight.normal_()
    norm.bias.normal_()
    hidden = 100 + torch.randn(2, 8, 60, 50)
    exact = GroupNorm(4, 8).double()
    exact.load_state_dict(norm.state_dict())
    exact = exact(hidden.double())
    nested = NestedMeanGroupNorm(norm)(hidden)
    assert (nested - exact).abs().max() < 1e-4
    single_pixel = hidden[:1, :, :1, :1]
    torch.testing.assert_close(NestedMeanGroupNorm(norm)(single_pixel), norm(single_pixel), atol=1e-3, rtol=0)


def test_the_network_that_is_exported_is_a_copy(small):
    before = [type(module) for module in small.encoder.modules()]
    copy = with_nested_means(small.encoder)
    assert [type(module) for module in small.encoder.modules()] == before
    assert not any(isinstance(module, GroupNorm) for module in copy.modules())


def test_sizes_of_the_check():
    assert len(set(comparison.NOISE_GRIDS)) == 10
    assert TRACED_GRID not in comparison.NOISE_GRIDS
    for axis in range(3):
        assert any(grid[axis] == 1 for grid in comparison.NOISE_GRIDS)
    most = max(rows * columns for _, rows, columns in comparison.NOISE_GRIDS)
    assert most * 16384 > 2 * quantizer.SEARCH_SCORES


def test_statistics_in_one_sum_are_refused(monkeypatch):
    monkeypatch.setattr("svqvae_hf.export.comparison.PHOTOGRAPH_GRIDS", [(45, 80)])
    monkeypatch.setattr("svqvae_hf.export.comparison.NOISE_GRIDS", [])
    monkeypatch.setattr("svqvae_hf.export.comparison.COLOURS", [])
    model = SVQVAE.from_pretrained(DEFAULT_MODEL).eval()
    encode = exactness.encode_by_graph(exactness.single_sum_graph(model))
    with pytest.raises(ValueError, match=r"at most 1 in 1,000 ids of photographs may differ .*, but \d\d of 7,200 do"):
        comparison.compare_graphs(model, encode, model.decode_tokens)


def pad_with_zeros(sample, model):
    """Encodes images with another padding than the model's."""
    height, width = sample.shape[-2:]
    return model.encode_tokens(F.pad(sample, (0, width % 2, 0, height % 2)))


def change_one(ids, place):
    """Changes the id at one place of the flattened grids, if they are as large."""
    places = torch.arange(ids.numel()).view_as(ids)
    return torch.where(places == place, ids ^ 1, ids)


def test_few_wrong_ids_are_counted(small, monkeypatch):
    monkeypatch.setattr("svqvae_hf.export.comparison.PHOTOGRAPHS", ["wren.webp"])
    monkeypatch.setattr("svqvae_hf.export.comparison.PHOTOGRAPH_GRIDS", [(45, 80)])

    def encode(sample):
        return change_one(small.encode_tokens(sample), 600)

    checked = comparison.compare_graphs(small, encode, small.decode_tokens)
    assert checked.startswith(
        "1 of 3,600 ids of photographs, 1 of 1,447 ids of noise, 0 of 2,400 ids of flat colours "
    )


@pytest.mark.usefixtures("few_images")
def test_wrong_padding_is_refused(small):
    with pytest.raises(ValueError, match=r"the encoder: at most 1 in 1,000 ids of noise may .*, but \d+ of 1,447 do"):
        comparison.compare_graphs(small, lambda sample: pad_with_zeros(sample, small), small.decode_tokens)


def test_wrong_ids_are_refused(small, monkeypatch):
    monkeypatch.setattr("svqvae_hf.export.comparison.PHOTOGRAPHS", [])

    def encode(sample):
        return change_one(small.encode_tokens(sample), 20)  # six sizes of noise have more than 20 ids

    with pytest.raises(ValueError, match=r"but 6 of 1,447 do"):
        comparison.compare_graphs(small, encode, small.decode_tokens)


@pytest.mark.parametrize("wrong", [PIXEL_RANGE[0] - 1, torch.nan])
def test_wrong_pixels_are_refused(small, wrong):
    def decode(ids):
        return small.decode_tokens(ids).fill_(wrong)

    with pytest.raises(ValueError, match=r"decoder at 160 x 90 .* within 2/255 of the model's, but differ by"):
        comparison.compare_graphs(small, small.encode_tokens, decode)


@pytest.mark.usefixtures("saved")
def test_failed_check_leaves_no_files(small, tmp_path, monkeypatch):
    monkeypatch.setattr("svqvae_hf.export.export.load_graph", lambda path: lambda value: value[..., 1:])
    with pytest.raises(ValueError, match="encoder at 160 x 90 pixels"):
        export.export_graphs(small, tmp_path / "out")
    assert names(tmp_path) == []


@pytest.mark.usefixtures("saved")
def test_command_writes_both_graphs(model_folder, tmp_path, capsys):
    argv = ["export", str(model_folder), "--output", str(tmp_path / "a" / "out")]
    assert svqvae_cli.main(argv) == 0
    assert names(tmp_path / "a") == ["out"]
    assert names(tmp_path / "a" / "out") == ["decoder.onnx", "encoder.onnx"]
    assert capsys.readouterr().out.startswith("checked  0 of 8,440 ids of photographs")
    assert svqvae_cli.main(argv) == 2
    assert "must be a new or empty folder, but it is not empty" in capsys.readouterr().err

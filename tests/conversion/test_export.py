import json
import re
import runpy
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, make_tiny
from PIL import Image

import svqvae_cli
import svqvae_hf
from svqvae_hf import SVQVAE, SVQVAEImageProcessor
from svqvae_hf.conversion import export
from svqvae_hf.conversion.export import CHECKED_GRIDS, TIE, TRACED_GRID, export_graphs
from svqvae_hf.models import modeling_svqvae
from svqvae_hf.models.image_processing_svqvae import load_image

EXAMPLE = ROOT / "examples" / "onnx_tokenizer.py"
PIXEL_RANGE = (-1, 3)  # no model's own
SMALL = {"encoder_ch_mult": (1, 2), "decoder_ch_mult": (1, 2)}  # f = 2

pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.fixture(scope="module")
def model():
    return SVQVAE.from_pretrained(svqvae_hf.DEFAULT_MODEL, pixel_range=PIXEL_RANGE).eval()


@pytest.fixture(scope="module")
def onnx_report(model, tmp_path_factory):
    return export_graphs(model, tmp_path_factory.mktemp("onnx") / "graphs")


@pytest.fixture(scope="module")
def small():
    return make_tiny(**SMALL, codebook_l2_norm=False)


@pytest.fixture(scope="module")
def torch_report(small, tmp_path_factory):
    return export_graphs(small, tmp_path_factory.mktemp("torch") / "graphs", format="torch")


@pytest.fixture(scope="module")
def programs(torch_report):
    """Encoder and decoder, loaded as a user does."""
    return [torch.export.load(torch_report.out / f"{name}.pt2").module() for name in ("encoder", "decoder")]


@pytest.fixture(scope="module")
def half_report(small, tmp_path_factory):
    return export_graphs(small, tmp_path_factory.mktemp("half") / "graphs", dtype="float16")


def image(grid, f, pixel_range=(0, 1)):
    """A random sample for batch, rows and columns of ids."""
    batch, rows, columns = grid
    unit = torch.rand(batch, 3, rows * f, columns * f, generator=torch.Generator().manual_seed(1))
    return pixel_range[0] + unit * (pixel_range[1] - pixel_range[0])


def run_onnx(path, value):
    session = onnxruntime.InferenceSession(path)
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: value.numpy()})[0])


def cut(sample, corner):
    """A sample without rows and columns at its top and left, so that its sides are no multiples of f."""
    return sample[..., corner[0] :, corner[1] :]


def close(pixels, expected, tolerance=2 / 255):
    return pixels.shape == expected.shape and (pixels - expected).abs().max() <= tolerance


def test_ten_sizes_are_checked():
    assert len(set(CHECKED_GRIDS)) == 10
    assert TRACED_GRID not in CHECKED_GRIDS
    assert all(any(grid[axis] == 1 for grid in CHECKED_GRIDS) for axis in range(3))
    assert max(rows * columns for _, rows, columns in CHECKED_GRIDS) * 16384 > 2 * modeling_svqvae.SEARCH_SCORES


@pytest.mark.parametrize(
    ("grid", "corner"),
    [((1, 1, 1), (0, 0)), ((3, 1, 1), (7, 7)), ((2, 9, 6), (0, 5)), ((1, 2, 13), (1, 2)), ((1, 24, 30), (0, 0))],
)
def test_onnx_gives_what_the_model_gives(grid, corner, model, onnx_report):
    assert tuple(model.config["network_range"]) != PIXEL_RANGE  # the graphs map one to the other
    sample = cut(image(grid, model.f, PIXEL_RANGE), corner)
    ids = run_onnx(onnx_report.out / "encoder.onnx", sample)
    assert ids.dtype == torch.int64
    assert (ids != model.encode_tokens(sample)).float().mean() < 0.01  # ties
    decoded = model.decode_tokens(ids)
    assert close(run_onnx(onnx_report.out / "decoder.onnx", ids), decoded, 4 * 2 / 255)


@pytest.mark.parametrize(
    ("grid", "corner"), [((1, 1, 1), (0, 0)), ((3, 1, 1), (1, 1)), ((2, 9, 6), (0, 1)), ((1, 24, 30), (1, 0))]
)
def test_exported_program_gives_what_the_model_gives(grid, corner, small, programs, monkeypatch):
    monkeypatch.setattr(modeling_svqvae, "SEARCH_SCORES", 7 * 64)  # the model's chunks are none of the graph's
    sample = cut(image(grid, small.f), corner)
    encode, decode = programs
    ids = encode(sample)
    assert torch.equal(ids, small.encode_tokens(sample))
    assert close(decode(ids), small.decode_tokens(ids))


def test_decoder_clamps(small, programs):
    ids = torch.arange(64).view(1, 8, 8)
    assert small.decode(ids).sample.min() < -1
    assert programs[1](ids).min() == 0


def test_float16(small, half_report):
    sample = image((2, 12, 10), small.f)
    ids = run_onnx(half_report.out / "encoder.onnx", sample.half())
    assert (ids != small.encode_tokens(sample)).float().mean() < 0.05
    decoded = run_onnx(half_report.out / "decoder.onnx", ids)
    assert decoded.dtype == torch.float16
    assert close(decoded.float(), small.decode_tokens(ids))
    assert f"{half_report.changed} of {half_report.ids} ids differ" in str(half_report)


def test_report(onnx_report, half_report):
    assert onnx_report.ids == half_report.ids == sum(np.prod(grid) for grid in CHECKED_GRIDS)
    assert onnx_report.pixels <= 2 / 255
    for report in (onnx_report, half_report):
        files = {path.name: path.stat().st_size for path in report.out.iterdir()}
        assert report.sizes == files
        assert sorted(files) == ["decoder.onnx", "encoder.onnx"]
        assert str(report).startswith("checked  10 sizes")
        assert str(report.out) in str(report)


def test_onnx_says_what_its_callers_need(model, onnx_report):
    for name, source, target in (("encoder", "sample", "ids"), ("decoder", "ids", "sample")):
        path = onnx_report.out / f"{name}.onnx"
        onnx.checker.check_model(path, full_check=True)
        session = onnxruntime.InferenceSession(path)
        facts = {key: json.loads(value) for key, value in session.get_modelmeta().custom_metadata_map.items()}
        assert facts == {
            "f": 8,
            "pixel_range": list(PIXEL_RANGE),
            "codebook_size": 16384,
            "codebook_fingerprint": model.codebook_fingerprint(),
        }
        shapes = {"sample": ["batch", 3, "height", "width"], "ids": ["batch", "rows", "columns"]}
        (given,), (got,) = session.get_inputs(), session.get_outputs()
        assert (given.name, given.shape) == (source, shapes[source])
        assert (got.name, got.shape) == (target, shapes[target])


def test_exported_program_says_what_its_callers_need(torch_report):
    for name in ("encoder", "decoder"):
        extra = {"svqvae.json": ""}
        torch.export.load(torch_report.out / f"{name}.pt2", extra_files=extra)
        assert json.loads(extra["svqvae.json"])["f"] == "2"


def test_no_file_names_this_machine(onnx_report, torch_report):
    contents = [path.read_bytes() for path in onnx_report.out.iterdir()]
    for path in torch_report.out.iterdir():
        with zipfile.ZipFile(path) as archive:
            contents += [archive.read(name) for name in archive.namelist()]
    machine = {str(ROOT), str(Path(torch.__file__).parent), str(Path.home()), sys.prefix}
    assert not any(place.encode() in content for content in contents for place in machine)


def test_example_needs_onnxruntime_and_numpy_alone(model, onnx_report, photo, tmp_path):
    photo.crop((100, 50, 191, 112)).save(tmp_path / "photo.png")  # 91 x 62, no multiples of 8
    alone = (
        "import runpy, sys\n"
        "sys.modules |= dict.fromkeys(('torch', 'svqvae_hf', 'diffusers', 'transformers', 'onnx'))\n"
        "del sys.argv[0]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    argv = [sys.executable, "-c", alone, EXAMPLE, onnx_report.out, tmp_path / "photo.png", tmp_path / "back.png"]
    run = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    processor = SVQVAEImageProcessor(pixel_range=PIXEL_RANGE)
    batch = processor(tmp_path / "photo.png")
    ids = model.encode_tokens(batch["pixel_values"])
    assert f"91 x 62 pixels, {ids.numel()} ids, the first {ids.flatten()[:8].tolist()}" in run.stdout
    expected = processor.postprocess(model.decode_tokens(ids), batch["image_sizes"])[0]
    with Image.open(tmp_path / "back.png") as back:
        difference = np.abs(np.asarray(back, int) - np.asarray(expected, int))
    assert difference.shape == (62, 91, 3)
    assert difference.max() <= 2


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "L", "P", "1", "CMYK", "I;16", "F"])
def test_example_reads_files_as_the_library_does(mode, photo, tmp_path):
    read_rgb = runpy.run_path(str(EXAMPLE))["read_rgb"]
    picture = photo.crop((100, 50, 132, 82)).convert("RGBA")
    picture.putalpha(Image.linear_gradient("L").resize(picture.size))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    path = tmp_path / ("photo.tif" if mode in ("CMYK", "F") else "photo.png")
    if mode == "I;16":
        Image.fromarray(np.arange(1024, dtype=np.uint16).reshape(32, 32) * 64).save(path)
    else:
        source = picture if "A" in mode else picture.convert("RGB")
        source = source.quantize(8) if mode == "P" else source.convert(mode)
        source.save(path, exif=exif, **({"transparency": 3} if mode == "P" else {}))
    if mode in ("I;16", "F"):
        with pytest.raises(ValueError, match=f"`{re.escape(str(path))}` must be an image of 8 bits, but is of mode"):
            read_rgb(path)
    else:
        assert np.array_equal(read_rgb(path), np.asarray(load_image(path)))


def test_documented_code_runs(tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "export.md").read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    found = {}
    exec(code, found)
    assert found["images"].shape == (2, 3, 64, 96)


class Fake:
    """Graphs that are the model itself, but for a change."""

    def __init__(self, vqvae, encode=None, decode=None):
        self.vqvae, self.change_ids, self.change_pixels = vqvae, encode, decode

    def encode(self, sample):
        ids = self.vqvae.encode_tokens(sample.float())
        return ids if self.change_ids is None else self.change_ids(ids)

    def decode(self, ids):
        pixels = self.vqvae.decode_tokens(ids)
        return pixels if self.change_pixels is None else self.change_pixels(pixels)

    def compare(self, dtype="float32"):
        return export._compare(self.vqvae, self.encode, self.decode, dtype)


def set_corner(tensor, value):
    """Changes one value of the images of 16 x 16 cells at f = 2."""
    if tensor.shape[-1] == 32:
        tensor[0, 0, 0, 0] = value
    return tensor


def test_sides_that_are_no_multiples_of_f_are_checked(small):
    fake = Fake(small)
    encode = fake.encode
    fake.encode = lambda sample: encode(F.pad(sample, (0, sample.shape[-1] % 2, 0, sample.shape[-2] % 2)))
    with pytest.raises(ValueError, match=r"encoder at \d*[13579] x .* are others and no ties"):  # zeros, no repetition
        fake.compare()


def test_a_wrong_id_fails(small):
    fake = Fake(small, encode=lambda ids: torch.where(torch.arange(ids.numel()).view_as(ids) == 20, ids ^ 1, ids))
    with pytest.raises(ValueError, match=r"encoder at 10 x 4 pixels .*, batch 3: .* 1 of 30 are others and no ties"):
        fake.compare()
    assert fake.compare("float16")[0] == 6  # one for each size that has so many


def test_wrong_pixels_fail(small):
    fake = Fake(small, decode=lambda pixels: set_corner(pixels, 0.5) if pixels[..., 0, 0].min() < 0.4 else pixels)
    with pytest.raises(ValueError, match=r"decoder at 32 x 32 .* within 2/255 of the model's, but differ by \d"):
        fake.compare()
    fake.compare("float16")


def test_pixels_that_are_no_numbers_fail(small):
    with pytest.raises(ValueError, match="decoder at 32 x 32 .* differ by nan/255"):
        Fake(small, decode=lambda pixels: set_corner(pixels, torch.nan)).compare("float16")


def test_a_graph_of_one_size_fails(small):
    with pytest.raises(ValueError, match=r"decoder at 6 x 2 .* must give the shape \(2, 3, 2, 6\), but gives \(1, 3,"):
        Fake(small, decode=lambda pixels: pixels[:1]).compare()

    def only_one(ids):
        raise RuntimeError(f"got {tuple(ids.shape)}")

    with pytest.raises(ValueError, match=r"encoder at 2 x 2 .* must run, but does not: got \(1, 1, 1\)"):
        Fake(small, encode=only_one).compare()


@pytest.mark.parametrize("l2_norm", [True, False])
@pytest.mark.parametrize(("distance", "is_tie"), [(0, True), (TIE / 100, True), (0.1, False)])
def test_ties_may_be_resolved_otherwise(l2_norm, distance, is_tie):
    vqvae = make_tiny(**SMALL, codebook_l2_norm=l2_norm)
    weight = vqvae.quantize.embedding.weight
    weight[32:] = weight[:32] + distance * F.normalize(weight[:32].flip(0), dim=-1)
    fake = Fake(vqvae, encode=lambda ids: (ids + 32) % 64)
    if is_tie:
        assert fake.compare()[0] == sum(np.prod(grid) for grid in CHECKED_GRIDS)
    else:
        with pytest.raises(ValueError, match="no ties"):
            fake.compare()


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_failed_check_leaves_nothing(tmp_path, monkeypatch):
    vqvae = make_tiny(**SMALL).train()
    vqvae.enable_tiling(tile_size=4, overlap=0)
    load = export._load_torch
    monkeypatch.setattr(export, "_load_torch", lambda path: lambda value: load(path)(value).flip(0, 1))
    with pytest.raises(ValueError, match="decoder at 2 x 2 pixels"):
        export_graphs(vqvae, tmp_path / "out", format="torch")
    assert names(tmp_path) == []
    assert vqvae.training
    assert vqvae.use_tiling


def test_weights_out_of_the_range_of_float16(tmp_path):
    vqvae = make_tiny(**SMALL)
    vqvae.decoder.conv_in.weight[0, 0, 0, 0] = 1e5
    with pytest.raises(ValueError, match=r"range of float16, but decoder\.conv_in\.weight do not\. Use float32"):
        export_graphs(vqvae, tmp_path / "out", dtype="float16")
    assert names(tmp_path) == []


def test_arguments(small, tmp_path):
    with pytest.raises(ValueError, match="`format` must be one of onnx, torch, but is 'tflite'"):
        export_graphs(small, tmp_path / "out", format="tflite")
    with pytest.raises(ValueError, match="`dtype` must be one of float32, float16, but is 'bfloat16'"):
        export_graphs(small, tmp_path / "out", dtype="bfloat16")
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="new or empty folder"):
        export_graphs(small, tmp_path)


@pytest.fixture
def folder(small, tmp_path):
    small.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def test_command(folder, tmp_path, capsys):
    argv = ["export", folder, "--output", str(tmp_path / "a" / "out"), "--format", "torch"]
    assert svqvae_cli.main(argv) == 0
    assert names(tmp_path / "a") == ["out"]
    assert names(tmp_path / "a" / "out") == ["decoder.pt2", "encoder.pt2"]
    assert capsys.readouterr().out.startswith("checked  10 sizes")
    assert svqvae_cli.main(argv) == 2
    assert "it is not empty" in capsys.readouterr().err


def test_command_without_the_extra(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert svqvae_cli.main(["export", folder, "--output", str(tmp_path / "out")]) == 2
    assert "needs the package onnxruntime. Install it with pip install" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()

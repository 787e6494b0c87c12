import importlib
import json
import math
import pickle
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, make_tiny
from llamagen_checkout import MODULES, make_checkout

from svqvae_hf import (
    SVQVAE,
    LlamaGenConfig,
    LlamaGenForCausalLM,
    NextScaleTransformer,
    SVQVAEAutoregressivePipeline,
    SVQVAEImageProcessor,
    SVQVAENextScalePipeline,
)
from svqvae_hf.data.image_sets import open_images
from svqvae_hf.evaluation.metrics import psnr
from svqvae_hf.models import tiling
from svqvae_hf.models.modeling_svqvae import SVQVAEOutput
from svqvae_hf.models.tiling import tile_axis
from svqvae_hf.pipelines.captions import load_text_encoder
from svqvae_hf.token_sets.crops import make_crops
from svqvae_hf.token_sets.writer import tokenize_set

pytestmark = pytest.mark.slow

BENCHMARKS = str(ROOT / "benchmarks")
# A stand-in for the original's checkout that runs our own model.
CHECKOUT = """
from functools import partial

from svqvae_hf import SVQVAE

Encoder = Decoder = ModelArgs = dict

class ScalableVQVAE:
    @staticmethod
    def load(path, args):
        model = SVQVAE.from_single_file(path)
        model.forward = partial(model.forward, return_dict=False)
        return model
"""
SMALL = ["--threads", "1", "--device", "cpu", "--rounds", "1"]


@pytest.fixture
def load(monkeypatch):
    """Imports a module of benchmarks/."""
    monkeypatch.setattr(sys, "path", [BENCHMARKS, *sys.path])
    yield importlib.import_module
    for module in ("svqvae", *MODULES):
        sys.modules.pop(module, None)


@pytest.fixture
def run(load, monkeypatch, tmp_path):
    """Runs a benchmark and returns its tables. Measures in this process, unless the benchmark is the search."""
    measuring = load("measuring")
    monkeypatch.setattr(load("contestants"), "MULTIPLIERS", (1, 1, 2, 2))  # narrow networks, with f = 8 as released

    def in_this_process(device: str, threads: int, *work: object):
        prepare, *arguments = pickle.loads(pickle.dumps(work))  # as another process would receive them
        return measuring._measure(device, threads, prepare, arguments)

    def run(name: str, *options: str | Path) -> list[list[dict]]:
        module, output = load(name), tmp_path / "results" / f"{name}.json"
        if name != "search":
            monkeypatch.setattr(module, "in_own_process", in_this_process, raising=False)
        arguments = [*map(str, options), *SMALL, "--output", str(output)]
        monkeypatch.setattr(sys, "argv", [f"{BENCHMARKS}/{name}.py", *arguments])
        module.main()
        content = json.loads(output.read_text())
        assert content["machine"]["torch"] == torch.__version__
        text = output.with_suffix(".md").read_text()
        assert text.startswith(f"`{content['command']}`\n")
        assert content["command"].startswith(f"python benchmarks/{name}.py ")
        assert str(tmp_path) not in text
        for title, rows in content["tables"].items():
            assert f"## {title}\n\n| {next(iter(rows[0]))} |" in text
        return list(content["tables"].values())

    return run


@pytest.fixture
def checkout(tmp_path) -> Path:
    folder = tmp_path / "original"
    folder.mkdir()
    (folder / "svqvae.py").write_text(CHECKOUT)
    return folder


def test_contestants_take_turns(load):
    calls = []

    def contestant(name, seconds):
        calls.append(name)
        time.sleep(seconds)

    runs = {"slow": lambda: contestant("slow", 0.05), "fast": lambda: contestant("fast", 0.01)}
    seconds = load("measuring").take_turns(runs, 3, "cpu")
    assert calls == ["slow", "fast"] * 3
    assert 0.05 <= min(seconds["slow"]) <= max(seconds["slow"]) < 0.05 + 1
    assert 0.01 <= min(seconds["fast"]) < 0.05


def test_operations_are_counted_on_the_same_network(load):
    contestants = load("contestants")
    with torch.device("meta"):
        theirs = contestants.make_diffusers_model(contestants.VQ_MODEL, 128)
        ours = contestants.SVQVAE(encoder_ch_mult=(1, 2, 2, 4), decoder_ch_mult=(1, 2, 2, 4), z_channels=32)
    count, same = (sum(weight.numel() for weight in model.parameters()) for model in (theirs, ours))
    assert count == same
    operations = contestants.count_operations(128, 256, 256)
    assert 0.69e12 < operations < 0.71e12
    attention = 7 * 4 * (256 // 8) ** 4 * 512  # grows with the square of the area
    assert contestants.count_operations(128, 512, 512) == 4 * operations + 12 * attention


def test_speed(run, load, checkout, monkeypatch):
    monkeypatch.setattr(load("speed"), "MATMUL_SIDE", 256)
    (rows,) = run("speed", "--original", checkout, "--base-channels", "32", "--sides", "32")
    assert [row["contestant"] for row in rows] == [
        f"{name}, {dtype}"
        for dtype in ("float32", "bfloat16")
        for name in ("svqvae-hf", "the original", "diffusers VQModel", "diffusers AutoencoderKL")
    ]
    original = rows[1]
    for row in rows:
        assert row["peak memory, MiB"] > 0.1
        assert row["rounds"] == [row["seconds"]]
        ratio = row["times as fast as the original, float32"]
        assert ratio * row["seconds"] == pytest.approx(original["seconds"])
    assert rows[0]["agreement, dB"] is None  # the stand-in is our own model, so there is no difference
    assert 5 < rows[4]["agreement, dB"] < 60
    operations = {row["fraction of the matmul rate"] * row["matmul, GFLOP/s"] * row["seconds"] for row in rows}
    assert max(operations) == pytest.approx(min(operations))


def test_layers(run, checkout):
    tables = run("speed", "--layers", "--original", checkout, "--base-channels", "32", "--sides", "32")
    assert len(tables) == 4
    for rows in tables:
        layers = {row["layer"]: row for row in rows}
        assert layers["encoder.conv_blocks.0.res"]["convolution"] > 0
        assert layers["decoder.mid"]["all"] > 0
        assert sum(row["all"] for row in rows[:-1]) == pytest.approx(rows[-1]["all"])
        assert layers["elsewhere"]["all"] < rows[-1]["all"] / 2
        for row in rows:
            assert sum(
                row[kind] for kind in ("convolution", "norm", "activation", "attention", "matmul", "copy", "other")
            ) == pytest.approx(row["all"])


def test_tiled(run, checkout):
    small = ["--side", "48", "--tile-size", "32", "--overlap", "8", "--patch-nums", "2", "4"]
    scales, *diffusers, ratio, ratio_bfloat16 = run("tiled", "--original", checkout, "--base-channels", "32", *small)
    assert [row["contestant"] for row in scales] == [
        "the original, float32",
        "svqvae-hf, float32",
        "svqvae-hf, bfloat16",
    ]
    assert [len(rows) for rows in diffusers] == [5, 5]
    assert [row["side"] for row in ratio] == [row["side"] for row in ratio_bfloat16] == [32, 37]
    for row in [*scales, *ratio, *(row for rows in diffusers for row in rows)]:
        assert row["microseconds per pixel"] * row["side"] ** 2 == pytest.approx(row["seconds"] * 1e6)
        assert row["peak memory, MiB"] > 0.1


def allocate_twice(mib: int):
    kept = torch.ones(mib << 18)  # float32

    def run():
        for _ in range(2):
            assert torch.ones(mib << 18).sum() == kept.sum()

    return run


def test_peak_memory_excludes_what_is_loaded(load):
    cost = load("measuring").in_own_process("cpu", 1, allocate_twice, 64)
    assert 64 <= cost.peak_mib < 72  # plus some code that is loaded at its first call
    assert 0 < cost.cpu_seconds < cost.seconds + 0.1


def test_growth(run):
    pytest.importorskip("tifffile", reason="the extra `large` is not installed")
    small = ["--tile-size", "64", "--overlap", "8"]
    (rows,) = run("growth", "--whole", "64x64", "--tiles", "96x64", "--files", "96x64", *small)
    assert [(row["method"], row["image"]) for row in rows] == [
        ("whole", "64 x 64"),
        ("tiles", "96 x 64"),
        ("tiles, TIFF to TIFF", "96 x 64"),
    ]
    assert all(row["peak memory, MiB"] > 0.1 for row in rows)
    assert rows[1]["microseconds per pixel"] == pytest.approx(rows[1]["seconds"] / (96 * 64) * 1e6)


def test_runtimes(run, load, monkeypatch):
    for package in ("onnxruntime", "openvino"):
        pytest.importorskip(package, reason="the extra `bench` is not installed")
    monkeypatch.setattr(load("contestants"), "MULTIPLIERS", (1, 2))  # because exporting takes a second per block
    (rows,) = run(
        "runtimes", "--base-channels", "32", "--sides", "32", "--runtimes", "eager", "ONNX Runtime", "OpenVINO"
    )
    values = {row["runtime"]: row for row in rows}
    assert list(values) == [
        "eager, float32",
        "eager, bfloat16",
        "ONNX Runtime, float32",
        "OpenVINO, float32",
        "OpenVINO, bfloat16",
    ]
    assert values["eager, float32"]["largest difference of a pixel, grey levels"] == 0
    for label in ("ONNX Runtime, float32", "OpenVINO, float32"):
        assert values[label]["ids equal"] == "100.000%"
        assert values[label]["largest difference of a pixel, grey levels"] < 0.1
    assert values["eager, bfloat16"]["largest difference of a pixel, grey levels"] > 0


def test_search(run, load, monkeypatch):
    pytest.importorskip("vector_quantize_pytorch", reason="the extra `bench` is not installed")
    (rows,) = run("search", "--latents", "4096", "--codes", "2048")
    ours, matrix, lucidrains = rows
    assert {row["ids equal to ours"] for row in rows} == {"100.000%"}
    assert matrix["peak memory, MiB"] == pytest.approx(4096 * 2048 * 12 / 2**20, rel=0.1)
    assert lucidrains["peak memory, MiB"] == pytest.approx(4096 * 2048 * 16 / 2**20, rel=0.1)
    assert ours["peak memory, MiB"] < matrix["peak memory, MiB"]
    monkeypatch.setattr(load("search"), "MEMORY_FRACTION", 0)
    (rows,) = run("search", "--latents", "65536", "--codes", "1024")
    assert rows[0]["peak memory, MiB"] < 64
    assert [row["note"] for row in rows] == [None, "not run: needs about 1 GiB", "not run: needs about 1 GiB"]


def test_tiles(run, photo, tmp_path, monkeypatch):
    monkeypatch.setattr(tiling, "CONTEXT_WINDOWS", 2)  # so that tiles change some ids
    folder = tmp_path / "images"
    folder.mkdir()
    photo.crop((100, 50, 260, 178)).save(folder / "cat.jpg")
    quality, cost = run("tiles", folder, "--tile-size", "64", "--overlap", "16")
    figures = {row["figure"]: row["mean"] for row in quality}
    assert figures["PSNR tiled, dB"] == pytest.approx(figures["PSNR whole, dB"], abs=1)
    assert 0.5 < figures["ids equal"] < figures["ids equal when the grid moves"] < 1
    assert figures["agreement, dB"] < figures["agreement when the grid moves, dB"] < 80
    assert [row["method"] for row in cost] == ["whole", "tiles"]
    (tiled,) = run("tiles", folder, "--tile-size", "64", "--overlap", "16", "--tiled-only")[1]
    assert tiled["method"] == "tiles"


@pytest.mark.parametrize(("length", "tile", "overlap"), [(11, 10, 2), (96, 32, 4), (97, 32, 0), (57, 16, 4)])
def test_moved_grid_has_other_borders_and_the_same_overlap(load, length, tile, overlap):
    moved = load("tiles").moved_axis(length, tile, overlap)
    borders = {each.core_stop for each in moved[:-1]}
    assert not borders & {each.core_stop for each in tile_axis(length, tile, overlap)}
    assert [each.core_start for each in moved[1:]] == [each.core_stop for each in moved[:-1]]
    assert (moved[0].core_start, moved[-1].core_stop) == (0, length)
    assert len({each.stop - each.start for each in moved}) == 1
    for each in moved:
        assert each.start <= max(0, each.core_start - overlap)
        assert each.stop >= min(length, each.core_stop + overlap)


def test_token_sets(run, photo, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    photo.crop((100, 50, 260, 178)).save(folder / "cat.jpg")
    sides = ["--sides", "16", "32", "--workers", "0"]
    (rows,) = run("token_sets", "speed", folder, "--count", "2", *sides)
    bare, tokenizing = rows[2:]
    assert (bare["side"], bare["images"], rows[0]["images"]) == (32, 2, 8)
    assert tokenizing["method"] == "tokenize_set, 0 workers"
    assert tokenizing["images per second"] * tokenizing["rounds"][0] == pytest.approx(2)


def test_image_sets(run):
    sizes = ["--files", "40", "--folders", "4", "--batches", "3", "--latency", "0.001", "--steps", "0.1", "0"]
    folder, stream = run("image_sets", *sizes, "--workers", "0")
    assert folder[0]["seconds"] > 0
    assert [row["over the step"] is None for row in stream] == [False, True]
    assert 1 <= stream[0]["over the step"] == pytest.approx(stream[0]["time per batch, s"] / 0.1)


def test_baselines(run, photo, tmp_path):
    for name, box in (("fit", (0, 0, 128, 96)), ("photos", (100, 50, 164, 98))):
        (tmp_path / name).mkdir()
        photo.crop(box).save(tmp_path / name / "cat.png")
    options = ["--fit", tmp_path / "fit", "--scales", "1", "0.5", "--side", "4", "--codes", "64"]
    (fit,), rows = run("baselines", tmp_path / "photos", *options)
    assert (fit["images"], fit["blocks"], fit["codes"]) == (1, 32 * 24, 64)
    values = {(row["coded by"], row["scale"]): row for row in rows}
    assert len(values) == len(rows) == 2 * 6
    kmeans, linear, components = (values[name, 1] for name in list(dict.fromkeys(row["coded by"] for row in rows))[:3])
    assert kmeans["bits per pixel"] == linear["bits per pixel"] == 6 / 16
    assert kmeans["PSNR, dB"] < linear["PSNR, dB"] < components["PSNR, dB"]
    assert values["k-means of blocks", 0.5]["bits per pixel"] == pytest.approx(6 / 64, abs=1e-4)
    assert values["JPEG", 1]["images of more bits"] == 1  # its headers alone need more


def test_next_scale(run):
    options = ["--side", "4", "--steps", "3", "--batch", "2", "--hidden-size", "64", "--layers", "1"]
    sampling, steps = run("next_scale", *options, "--guidance-scale", "2", "--temperature", "0")
    assert [(row["step"], row["steps"]) for row in sampling] == [("one scale", 3), ("one id", 16)]
    assert [row["tokens so far"] for row in steps] == [1, 5, 21]
    floats = 2 * 64  # keys and values
    assert [row["cache, MiB"] * 2**20 for row in steps] == [2 * 4 * floats * tokens for tokens in (1, 5, 21)]
    assert all(row["step over layers"] > 0 for row in steps)


def test_llamagen(run, tmp_path):
    sizes = ["--side", "2", "--hidden-size", "32", "--layers", "1", "--heads", "2"]
    options = ["--original", make_checkout(tmp_path / "original"), *sizes]
    rows, growth = run("llamagen", *options, "--batches", "2")
    assert [(row["sampling"], row["batch"]) for row in rows] == [("the original", 2), ("svqvae-hf", 2)]
    assert rows[0]["times as fast"] == 1
    assert all(len(row["all seconds"]) == 1 for row in rows)
    assert all(0 < row["in attention layers"] < row["milliseconds per id"] for row in growth)


def test_captions_by_heart(run, load, photo, tmp_path):
    """An untrained pipeline, to which no image comes back."""
    (tmp_path / "photos").mkdir()
    for index in range(128):
        photo.crop((index, 0, index + 16, 16)).save(tmp_path / "photos" / f"{index:03}.png")
    work = tmp_path / "work"
    load("captioned_photos").prepare(tmp_path / "photos", work)
    vqvae = SVQVAE.from_pretrained(work / "tokenizer")
    assert vqvae.config["codebook_size"] == 256
    images, crops = open_images([str(work / "first")]), {"crops": "centre", "resolution": 32}
    tokenize_set(vqvae, images, work / "tokens", model_name="tokenizer", **crops)
    config = LlamaGenConfig(
        256, 1, 4, 20, 32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1
    )
    text_encoder, tokenizer = load_text_encoder(str(work / "text_encoder"))
    pipeline = SVQVAEAutoregressivePipeline.from_llamagen(
        vqvae, LlamaGenForCausalLM(config), text_encoder=text_encoder, tokenizer=tokenizer
    )
    pipeline.save_pretrained(work / "pipeline")
    ((row,),) = run("captions_by_heart", work / "pipeline", work / "tokens")
    assert (row["images"], row["images with all ids"]) == (64, 0)


def test_by_heart(run, photo, tmp_path):
    """An untrained pipeline, to which no id comes back but the kept ones."""
    transformer = NextScaleTransformer(1, 1, 16, num_classes=2, codebook_size=64)
    pipeline = SVQVAENextScalePipeline(make_tiny(), transformer, schedule=[1, 2, 4], class_names=["cat", "dog"])
    pipeline.save_pretrained(tmp_path / "pipeline")
    for name in ("cat", "dog"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        photo.save(tmp_path / "photos" / name / "photo.png")
    rows, (seam,) = run("by_heart", tmp_path / "pipeline", tmp_path / "photos")
    assert [(row["images"], row["images with all ids"]) for row in rows] == [(2, 0)] * 3
    new, filled, refined = (row["fraction of equal ids"] for row in rows)
    assert new < 0.5 < filled
    assert refined >= 1 / 21
    assert rows[0]["PSNR, dB"] < rows[1]["PSNR, dB"]
    assert seam["canvas"] == "32 x 16"
    assert -1e-6 < seam["least"] <= seam["mean between other pairs"] <= seam["largest"] <= 2


def test_held_out_scales(run, photo, tmp_path):
    """Untrained pipelines, which know nothing but the ids of the photograph."""
    vqvae = make_tiny()
    for scale_from in ("latents", "image"):
        transformer = NextScaleTransformer(1, 1, 16, num_classes=0, codebook_size=64)
        SVQVAENextScalePipeline(vqvae, transformer, schedule=[1, 2, 4], scale_from=scale_from).save_pretrained(
            tmp_path / scale_from
        )
    (tmp_path / "photos").mkdir()
    photo.save(tmp_path / "photos" / "photo.png")
    (rows,) = run("held_out_scales", tmp_path / "photos", tmp_path / "latents", tmp_path / "image")
    assert [(row["scales from"], row["scale"]) for row in rows] == [
        (scale_from, f"{side} x {side}") for scale_from in ("latents", "image") for side in (1, 2, 4)
    ]
    image = make_crops(photo, "centre", 16)[0]
    pixels = SVQVAEImageProcessor()(image)["pixel_values"]
    with torch.no_grad():
        expected = psnr(vqvae.eval()(pixels).sample, pixels, 1.0).item()
    for _, before, last in (rows[:3], rows[3:]):
        this, final = (f"loss of {which} scale, nats per id" for which in ("this", "the last"))
        assert before[final] == last[final] == last[this] == pytest.approx(math.log(64), abs=0.2)
        assert last["PSNR, dB"] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("guidance_scale", ["1", "2"])
def test_generation(run, guidance_scale):
    sizes = ["--sides", "4", "--batch", "2", "--hidden-size", "64", "--layers", "1"]
    (rows,) = run("generation", *sizes, "--guidance-scale", guidance_scale)
    assert [row["cache"] for row in rows] == ["yes", "no"]
    assert all(row["fraction of equal ids"] == 1 for row in rows)
    assert all(row["different ids"] > 16 for row in rows)


def test_kinds_of_a_perfect_model_have_no_errors_and_worst_pictures_come_first(load):
    kinds = load("kinds")

    class Dark:
        """Enlarges as the measurement does, and makes bright images darker, by levels of 255."""

        def __init__(self, levels: float):
            self.levels = levels

        def __call__(self, sample, scales, scale_from):
            enlarged = torch.nn.functional.interpolate(sample, scale_factor=scales[0], mode="bicubic").clamp(0, 1)
            return SVQVAEOutput(sample=[enlarged - self.levels / 255 * enlarged.mean().ceil()], losses=[])

    images = [torch.full((1, 3, 16, 16), value) for value in (0.0, 1.0)]
    figures, pairs = kinds.measure_folder(Dark(5.0), images)
    assert figures["PSNR, dB"] == pytest.approx((100 + 20 * math.log10(255 / 5)) / 2, abs=0.01)
    assert figures["scale 2 over scale 1 enlarged, dB"] == pytest.approx(0, abs=0.01)
    assert [picture.mean().item() > 0.5 for picture in pairs] == [True, True, False, False]
    colours = kinds.measure_colours(Dark(5.0), seed=0)
    assert list(colours.values()) == pytest.approx([5, 5, 5], abs=0.6)
    assert kinds.measure_small(Dark(0.0), [torch.rand(1, 3, 520, 530)]) == {
        "32 pixels": 0,
        "64 pixels": 0,
        "96 pixels": 0,
    }

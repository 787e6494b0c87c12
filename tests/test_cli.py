import io
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, make_tiny
from huggingface_hub.errors import LocalEntryNotFoundError
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from svqvae_cli import commands, main
from svqvae_cli.parser import _parser
from svqvae_hf import SVQVAE, __version__
from svqvae_hf.tokens.image_tokens import encode_image
from svqvae_hf.tokens.token_files import load_tokens, save_tokens

pytestmark = pytest.mark.usefixtures("small_sample", "process")
GOLDEN = ROOT / "tests" / "golden" / "svqvae_tiny.safetensors"
COMMANDS = (
    "reconstruct",
    "encode",
    "decode",
    "tokenize",
    "detokenize",
    "evaluate",
    "convert",
    "export",
    "generate",
    "info",
    "demo",
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Folder of a saved model, f = 4."""
    folder = tmp_path_factory.mktemp("model")
    make_tiny().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def inputs(tmp_path, photo):
    """Folder of two images, `a.png` of 57 x 35 and `b.jpg` of 40 x 24 pixels, beside a text file."""
    folder = tmp_path / "inputs"
    folder.mkdir()
    photo.crop((100, 100, 157, 135)).save(folder / "a.png")
    photo.crop((200, 100, 240, 124)).save(folder / "b.jpg", quality=95)
    (folder / "notes.txt").write_text("not an image")
    return folder


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def fails(capsys, *argv):
    """The one line of a user's mistake, by which nothing was written on stdout."""
    assert main([str(each) for each in argv]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("svqvae: error: ")
    assert captured.err.count("\n") == 1
    assert captured.err.endswith("\n")
    assert captured.out == ""
    return captured.err


def test_reconstruct(inputs, out, model, capsys):
    argv = [
        "reconstruct",
        str(inputs / "a.png"),
        "--output",
        str(out / "new"),
        "--model",
        model,
        "--scales",
        "0.5",
        "1",
        "2",
    ]
    assert main(argv) == 0
    assert names(out / "new") == ["a_x0.5.png", "a_x1.png", "a_x2.png"]
    sizes = [Image.open(out / "new" / name).size for name in names(out / "new")]
    assert sizes == [(28, 18), (57, 35), (114, 70)]
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split() == ["image", "scale", "size", "tokens", "bits/pixel", "PSNR", "dB", "codes", "used"]
    original, image = (np.asarray(Image.open(path), float) for path in (inputs / "a.png", out / "new" / "a_x1.png"))
    psnr = 10 * np.log10(255**2 / np.mean((original - image) ** 2))
    name, scale, size, tokens, bits, decibels, used = rows[1].split()
    assert (name, scale, size, tokens) == ("a.png", "1", "57x35", str(15 * 9))
    assert float(bits) == pytest.approx(15 * 9 * 6 / (57 * 35), abs=1e-4)
    assert float(decibels) == pytest.approx(psnr, abs=0.01)
    assert 1 / 64 <= float(used.rstrip("%")) / 100 <= 1
    assert len({len(row) for row in (head, *rows)}) == 1


def test_side_by_side_holds_the_original(inputs, out, model):
    argv = ["reconstruct", str(inputs / "a.png"), "--output", str(out), "--model", model, "--side-by-side"]
    assert main(argv) == 0
    assert names(out) == ["a_side_by_side.png", "a_x1.png"]
    sheet = Image.open(out / "a_side_by_side.png")
    shown = sheet.crop((24, 24, 24 + 256, 24 + 157)).resize((57, 35), Image.Resampling.BOX)
    original = np.asarray(Image.open(inputs / "a.png"), float)
    assert np.abs(np.asarray(shown, float) - original).mean() < 8


def test_a_perfect_reconstruction_has_no_error(photo, monkeypatch, inputs, out, model, capsys):
    monkeypatch.setattr(commands, "decode_image", lambda model, tokens: [Image.open(inputs / "a.png")])
    assert main(["reconstruct", str(inputs / "a.png"), "--output", str(out), "--model", model]) == 0
    assert capsys.readouterr().out.split()[-2] == "inf"


def test_folders_globs_and_files_name_each_input_once(inputs, out, model, capsys):
    argv = [str(inputs), str(inputs / "*.jpg"), str(inputs / "a.png"), "--output", str(out), "--model", model]
    assert main(["reconstruct", *argv]) == 0
    assert names(out) == ["a_x1.png", "b_x1.png"]
    _, first, second, total = (line.split() for line in capsys.readouterr().out.splitlines())
    assert total[:4] == ["2", "images", "1", str(int(first[3]) + int(second[3]))]
    assert float(total[-2]) == pytest.approx((float(first[-2]) + float(second[-2])) / 2, abs=0.01)
    assert float(total[-1].rstrip("%")) >= max(float(row[-1].rstrip("%")) for row in (first, second))


def test_decoding_the_encoded_is_the_reconstruction(inputs, out, model):
    options = ["--model", model, "--tile-size", "32", "--overlap", "8"]
    scales = ["--scales", "1", "0.5"]
    assert main(["reconstruct", str(inputs), "--output", str(out / "images"), *options, *scales]) == 0
    assert main(["encode", str(inputs), "--output", str(out / "tokens"), *options, *scales]) == 0
    assert names(out / "tokens") == ["a.safetensors", "b.safetensors"]
    tokens = load_tokens(out / "tokens" / "a.safetensors")
    assert tokens.scales == (1.0, 0.5)
    assert (tokens.tile_size, tokens.overlap) == (32, 8)
    assert main(["decode", str(out / "tokens"), "--output", str(out / "decoded"), "--model", model]) == 0
    assert names(out / "decoded") == names(out / "images") == ["a_x0.5.png", "a_x1.png", "b_x0.5.png", "b_x1.png"]
    for name in names(out / "images"):
        assert (out / "decoded" / name).read_bytes() == (out / "images" / name).read_bytes()


def test_the_bundled_model_is_the_default(inputs, out, model, monkeypatch):
    assert commands.DEFAULT_MODEL == ROOT / "svqvae_hf" / "pretrained"
    monkeypatch.setattr(commands, "DEFAULT_MODEL", model)
    assert main(["encode", str(inputs / "a.png"), "--output", str(out)]) == 0
    assert load_tokens(out / "a.safetensors").f == 4


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_tokens_of_half_precision_decode_in_float32(inputs, out, model, dtype):
    assert main(["encode", str(inputs / "a.png"), "--output", str(out), "--model", model, "--dtype", dtype]) == 0
    assert main(["decode", str(out / "a.safetensors"), "--output", str(out), "--model", model]) == 0
    assert Image.open(out / "a_x1.png").size == (57, 35)


@pytest.mark.parametrize("size", [(1, 1), (200, 3), (65, 64)])
def test_sizes(tmp_path, out, model, size):
    Image.new("RGB", size, "teal").save(tmp_path / "a.png")
    argv = [str(tmp_path / "a.png"), "--output", str(out), "--model", model, "--scales", "0.1", "2", "--side-by-side"]
    assert main(["reconstruct", *argv]) == 0
    assert Image.open(out / "a_x2.png").size == (2 * size[0], 2 * size[1])


def test_convert_and_info(tmp_path, capsys):
    assert main(["convert", str(GOLDEN), str(tmp_path / "repo"), "--variant", "fp16", "--license", "mit"]) == 0
    assert "svqvae" in capsys.readouterr().out
    assert {"README.md", "config.json", "diffusion_pytorch_model.fp16.safetensors"} <= set(names(tmp_path / "repo"))
    assert main(["info", str(tmp_path / "repo")]) == 0
    facts = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines())
    assert facts["kind"] == "SVQVAE model"
    assert facts["f"] == "2"
    assert SVQVAE.from_pretrained(tmp_path / "repo").codebook_fingerprint() in facts["codebook"]
    assert main(["info", str(GOLDEN)]) == 0
    facts = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines())
    assert facts["kind"].startswith("original checkpoint, SVQVAE")
    assert facts["encoder_ch_mult"] == "(1, 2)"


def test_info_of_a_token_file(inputs, out, model, capsys):
    main(["encode", str(inputs / "a.png"), "--output", str(out), "--model", model, "--scales", "2", "1"])
    assert main(["info", str(out / "a.safetensors")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split(None, 1) == ["kind", "token file"]
    assert any("57 x 35 pixels" in line for line in lines)
    assert lines[-2].startswith("scale 2")
    assert "30 x 18 = 540 tokens" in lines[-2]
    assert f"{15 * 9 * 6 / (57 * 35):.4f} bits/pixel" in lines[-1]


def test_info_tells_tiles_only_where_there_are_some(inputs, out, model, capsys):
    for tile_size, tiles in (("60", "none"), ("56", "56 pixels, overlap 8")):
        argv = ["--model", model, "--tile-size", tile_size, "--overlap", "8"]
        main(["encode", str(inputs / "a.png"), "--output", str(out), *argv])
        assert main(["info", str(out / "a.safetensors")]) == 0
        assert f"tiles     {tiles}" in capsys.readouterr().out.splitlines()


@pytest.mark.parametrize(
    ("options", "tiles"),
    [
        ([], (32, 8)),
        (["--overlap", "4"], (32, 4)),
        (["--tile-size", "40"], (40, 8)),
        (["--tile-size", "64", "--overlap", "0"], (64, 0)),
    ],
)
def test_decode_takes_the_tiles_of_the_file_unless_told_otherwise(inputs, out, model, monkeypatch, options, tiles):
    argv = ["--output", str(out), "--model", model]
    main(["encode", str(inputs / "a.png"), *argv, "--tile-size", "32", "--overlap", "8"])
    used = []

    def spy(model, tokens):
        used.append((model.tile_size, model.overlap))
        return [Image.new("RGB", (1, 1))]

    monkeypatch.setattr(commands, "decode_image", spy)
    assert main(["decode", str(out / "a.safetensors"), *argv, *options]) == 0
    assert used == [tiles]


def test_tokens_encoded_without_tiles_are_decoded_without(inputs, out, model, monkeypatch):
    out.mkdir()
    plain = SVQVAE.from_pretrained(model).eval()
    save_tokens(out / "a.safetensors", encode_image(plain, Image.open(inputs / "a.png"), [1.0]))
    used = []
    monkeypatch.setattr(
        commands, "decode_image", lambda model, tokens: used.append(model.use_tiling) or [Image.new("RGB", (1, 1))]
    )
    assert main(["decode", str(out / "a.safetensors"), "--output", str(out), "--model", model]) == 0
    assert used == [False]


def test_convert_with_what_the_shapes_do_not_tell(tmp_path):
    argv = ["--network-range", "-1", "1", "--no-codebook-l2-norm"]
    assert main(["convert", str(GOLDEN), str(tmp_path / "repo"), *argv]) == 0
    config = SVQVAE.from_pretrained(tmp_path / "repo").config
    assert tuple(config["network_range"]) == (-1, 1)
    assert config["codebook_l2_norm"] is False


def test_version(capsys):
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"svqvae {__version__}\n"


@pytest.mark.parametrize("command", [None, *COMMANDS])
def test_help_fits_a_terminal(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        main([command, "--help"] if command else ["--help"])
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80


@pytest.mark.parametrize("command", [None, *COMMANDS])
def test_help_shows_an_example(command, capsys):
    with pytest.raises(SystemExit) as exit_code:
        main([command, "--help"] if command else ["--help"])
    assert exit_code.value.code == 0
    assert re.search(rf"\nexample:\n  svqvae {command or 'reconstruct'} \S", capsys.readouterr().out)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_example_of_the_help_is_a_command(command, capsys, monkeypatch):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    example = capsys.readouterr().out.split("example:\n  svqvae ")[1].split()
    assert _parser().parse_args(example).run == command


def test_progress_bars_over_images_and_tiles_on_a_terminal(inputs, out, model, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    bars = []

    class Bar(commands.tqdm):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            bars.append(self)

    monkeypatch.setattr(commands, "tqdm", Bar)
    monkeypatch.setattr(sys, "stderr", Terminal())
    options = ["--model", model, "--tile-size", "32", "--overlap", "8"]
    assert main(["encode", str(inputs), "--output", str(out), *options]) == 0
    images, tiles = bars
    assert (images.n, images.total) == (2, 2)
    assert tiles.n == tiles.total > 1
    assert "2/2" in sys.stderr.getvalue()


# Mistakes


@pytest.mark.parametrize("scale", ["0", "-1", "nan", "inf", "1e999", "half"])
def test_scales_that_cannot_be(inputs, out, model, capsys, scale):
    error = fails(capsys, "reconstruct", inputs, "--output", out, "--model", model, "--scales", "1", scale)
    assert f"argument --scales: a scale must be a finite number more than 0, but is '{scale}'" in error
    assert not out.exists()


@pytest.mark.parametrize("command", ["reconstruct", "encode"])
def test_scale_too_large_for_memory(inputs, out, model, capsys, command):
    error = fails(capsys, command, inputs / "a.png", "--output", out, "--model", model, "--scales", "100000")
    assert re.search(
        r"a.png`: an image of 57 x 35 pixels at scales 100000, .* would take about \S+ GiB of memory", error
    )
    assert not out.exists()


def test_scales_that_name_the_same_file(inputs, out, model, capsys):
    error = fails(capsys, "reconstruct", inputs, "--output", out, "--model", model, "--scales", "1", "1.0")
    assert "scales must differ" in error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--tile-size", "250"],
            "`tile_size` must be a positive multiple of f = 4, but is 250. The nearest that fits is 248",
        ),
        (
            ["--overlap", "30"],
            "`overlap` must be a multiple of f = 4 and less than half of `tile_size` = 256, but is 30",
        ),
        (["--tile-size", "32", "--overlap", "16"], "The nearest that fits is 12"),
        (["--tile-size", "0"], "`tile_size` must be a positive multiple of f = 4, but is 0"),
        (["--tile-size", "big"], "argument --tile-size: invalid int value: 'big'"),
        (["--dtype", "int8"], "argument --dtype: invalid choice"),
        (["--device", "abacus"], "--device must be one that torch finds here, "),
        (["--device", "meta"], "but is `meta`"),
        (["--device", "cuda:99"], "but is `cuda:99`"),
        (["--device", "cpu:0"], "but is `cpu:0`"),
        (["--model", "/no/such/folder"], "there is no file or folder `/no/such/folder`. On the Hub, a model is `org/"),
        (["--model", str(GOLDEN)], f"but `{GOLDEN}` is a file. Use `svqvae convert` first"),
        (["--model", str(GOLDEN.parent)], "no file named config.json"),
        (["--frobnicate"], "unrecognized arguments: --frobnicate (see `svqvae reconstruct --help`)"),
    ],
)
def test_options_that_do_not_fit(inputs, out, model, capsys, options, message):
    assert message in fails(capsys, "reconstruct", inputs, "--output", out, "--model", model, *options)
    assert not out.exists()


@pytest.mark.parametrize("content", [b"", b"Dear diary,", "cut"])
def test_a_file_that_is_no_image_stops_and_leaves_whole_what_came_before(inputs, out, model, capsys, content):
    whole = (inputs / "a.png").read_bytes()
    (inputs / "aa.png").write_bytes(whole[: len(whole) // 2] if content == "cut" else content)
    error = fails(capsys, "encode", inputs, "--output", out, "--model", model)
    assert "aa.png` " in error
    assert names(out) == ["a.safetensors"]
    load_tokens(out / "a.safetensors")


@pytest.mark.parametrize("command", ["reconstruct", "encode", "decode"])
def test_missing_input(tmp_path, out, model, capsys, command):
    for missing in (tmp_path / "none.png", tmp_path / "*.png"):
        error = fails(capsys, command, missing, "--output", out, "--model", model)
        assert f"no file or folder matches `{missing}`" in error
    (tmp_path / "empty").mkdir()
    assert "has no file that ends in" in fails(capsys, command, tmp_path / "empty", "--output", out, "--model", model)
    assert not out.exists()


def test_inputs_of_one_stem(inputs, out, model, capsys):
    Image.open(inputs / "a.png").save(inputs / "a.bmp")
    error = fails(capsys, "encode", inputs, "--output", out, "--model", model)
    assert f"`{inputs / 'a.bmp'}` and `{inputs / 'a.png'}` would write the same files" in error


def test_inputs_are_not_overwritten(inputs, model, capsys):
    Image.open(inputs / "a.png").save(inputs / "a_x1.png")
    before = (inputs / "a_x1.png").read_bytes()
    error = fails(capsys, "reconstruct", inputs, "--output", inputs, "--model", model)
    assert f"the input `{inputs / 'a_x1.png'}` would be overwritten" in error
    assert (inputs / "a_x1.png").read_bytes() == before


@pytest.mark.parametrize("command", ["reconstruct", "encode"])
def test_output_that_cannot_be_written(inputs, out, model, capsys, command):
    file = inputs / "notes.txt"
    for output in (file, file / "under"):
        error = fails(capsys, command, inputs, "--output", output, "--model", model)
        assert f"--output must be a writable folder, but `{file}` is not" in error
    ending = "_x1.png" if command == "reconstruct" else ".safetensors"
    (out / f"a{ending}").mkdir(parents=True)
    assert f"`{out / f'a{ending}'}` cannot be written: Is a directory." in fails(
        capsys, command, inputs, "--output", out, "--model", model
    )
    assert names(out) == [f"a{ending}"]
    assert names(inputs) == ["a.png", "b.jpg", "notes.txt"]


@pytest.fixture
def tokens(inputs, out, model):
    main(["encode", str(inputs / "a.png"), "--output", str(out), "--model", model])
    return out / "a.safetensors"


def test_tokens_cut_short(tokens, tmp_path, model, capsys):
    tokens.write_bytes(tokens.read_bytes()[:-7])
    error = fails(capsys, "decode", tokens, "--output", tmp_path / "images", "--model", model)
    assert "a.safetensors` must be a safetensors file, but is another kind or cut short" in error
    assert not (tmp_path / "images").exists()


def test_ids_out_of_range(tokens, tmp_path, model, capsys):
    with safe_open(tokens, framework="pt") as file:
        ids, metadata = file.get_tensor("ids_0"), file.metadata()
    save_file({"ids_0": torch.full_like(ids, 64)}, tokens, metadata)
    error = fails(capsys, "decode", tokens, "--output", tmp_path / "images", "--model", model)
    assert "a.safetensors` is not a token file that can be decoded: ids must be in [0, 63]" in error
    assert not (tmp_path / "images").exists()


def test_tokens_of_another_codebook(tokens, tmp_path, model, capsys):
    other = make_tiny()
    torch.nn.init.normal_(other.quantize.embedding.weight)
    other.save_pretrained(tmp_path / "other")
    error = fails(capsys, "decode", tokens, "--output", tmp_path / "images", "--model", tmp_path / "other")
    assert "a.safetensors`: the ids must be of the model's codebook" in error
    assert other.codebook_fingerprint() in error
    assert SVQVAE.from_pretrained(model).codebook_fingerprint() in error
    assert not (tmp_path / "images").exists()


class Code:
    def __reduce__(self):
        return os.system, ("touch HACKED",)


@pytest.mark.parametrize("command", ["convert", "info"])
def test_checkpoint_with_code_in_it(tmp_path, capsys, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.pt").write_bytes(pickle.dumps({"model": Code()}))
    torch.save({"model": Code()}, tmp_path / "worse.pt")
    for name in ("bad.pt", "worse.pt"):
        assert name in fails(capsys, command, name, *(["repo"] if command == "convert" else []))
    assert names(tmp_path) == ["bad.pt", "worse.pt"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: weights.pop("quantize.embedding.weight"), r"missing: .*quantize\.embedding\.weight"),
        (lambda weights: weights.update(extra=torch.zeros(1)), "unexpected: extra"),
        (
            lambda weights: weights.update({"quant_conv.bias": torch.zeros(3)}),
            r"misshapen: quant_conv\.bias \(3,\) instead of \(8,\)",
        ),
    ],
)
def test_checkpoint_whose_keys_do_not_fit(tmp_path, capsys, change, message):
    weights = load_file(GOLDEN)
    change(weights)
    save_file(weights, tmp_path / "changed.safetensors")
    assert re.search(message, fails(capsys, "convert", tmp_path / "changed.safetensors", tmp_path / "repo"))
    assert names(tmp_path) == ["changed.safetensors"]


@pytest.mark.parametrize("source", ["none.pt", "empty.pt", "text.pt", "cut.safetensors", "folder"])
def test_sources_that_are_no_checkpoints(tmp_path, capsys, source):
    (tmp_path / "empty.pt").touch()
    (tmp_path / "text.pt").write_text("Dear diary,")
    (tmp_path / "cut.safetensors").write_bytes(GOLDEN.read_bytes()[:1000])
    (tmp_path / "folder").mkdir()
    before = names(tmp_path)
    assert source in fails(capsys, "convert", tmp_path / source, tmp_path / "repo")
    assert source in fails(capsys, "info", tmp_path / source)
    assert names(tmp_path) == before


def test_convert_to_a_file(tmp_path, capsys):
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file" / "under"):
        fails(capsys, "convert", GOLDEN, out)
    assert names(tmp_path) == ["file"]


def test_ctrl_c_ends_in_one_line_and_leaves_nothing_half_written(inputs, out, model, capsys, monkeypatch):
    def interrupt(path, data):
        raise KeyboardInterrupt

    monkeypatch.setattr("pathlib.Path.replace", interrupt)
    assert main(["encode", str(inputs), "--output", str(out), "--model", model]) == 130
    assert capsys.readouterr().err == "svqvae: interrupted\n"
    assert names(out) == []


def test_sigterm_leaves_nothing_half_written(inputs, out, model, monkeypatch):
    monkeypatch.setattr("pathlib.Path.replace", lambda path, target: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit) as exit_code:
        main(["encode", str(inputs), "--output", str(out), "--model", model])
    assert exit_code.value.code == 143
    assert names(out) == []


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB."),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("MPS backend out of memory"),
    ],
)
def test_too_little_memory(inputs, out, model, capsys, monkeypatch, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(commands, "encode_image", fail)
    assert "there is not enough memory" in fails(capsys, "encode", inputs, "--output", out, "--model", model)


def test_other_errors_are_not_hidden(inputs, out, model, monkeypatch):
    def fail(*_):
        raise RuntimeError("a mistake of ours")

    monkeypatch.setattr(commands, "encode_image", fail)
    with pytest.raises(RuntimeError, match="a mistake of ours"):
        main(["encode", str(inputs), "--output", str(out), "--model", model])


@pytest.mark.parametrize("length", [0, 1000, -1000])
def test_weights_cut_short(inputs, out, model, tmp_path, capsys, length):
    shutil.copytree(model, tmp_path / "cut")
    weights = tmp_path / "cut" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:length])
    error = fails(capsys, "encode", inputs, "--output", out, "--model", tmp_path / "cut")
    assert "cannot be loaded: its weight file is empty, cut short or of another kind" in error


def test_a_model_when_the_hub_is_away(inputs, out, capsys, monkeypatch):
    def fail(*_, **__):
        try:
            raise LocalEntryNotFoundError("away")
        except LocalEntryNotFoundError:
            raise OSError("org/name does not appear to have a file named config.json.")  # noqa: B904 # as diffusers does

    monkeypatch.setattr(SVQVAE, "from_pretrained", fail)
    error = fails(capsys, "encode", inputs, "--output", out, "--model", "org/name")
    assert "the model `org/name` cannot be loaded: the Hub cannot be reached" in error


def test_empty_arguments(inputs, out, capsys, monkeypatch):
    monkeypatch.chdir(inputs)
    tokenize, convert = ["tokenize", inputs, out], ["convert", GOLDEN, out]
    advice = "it must not be empty. If it is a variable of the shell, set it"
    for argv in (
        ["encode", "", "--output", out],
        ["encode", inputs, "--output", ""],
        ["convert", GOLDEN, ""],
        ["convert", "", out],
        ["info", ""],
        ["encode", inputs, "--output", out, "--model", ""],
    ):
        assert f"{advice}; the folder that you are in is `.` (see" in fails(capsys, *argv)
    for argv in (
        ["encode", inputs, "--output", out, "--device", ""],
        *([*tokenize, name, ""] for name in ("--config", "--split", "--image-column", "--keep")),
        *([*command, name, ""] for command in (tokenize, convert) for name in ("--license", "--push-to-hub")),
        ["demo", "--host", ""],
    ):
        assert f"{advice} (see" in fails(capsys, *argv)
    assert not out.exists()


def test_a_folder_gives_every_format_that_is_read(tmp_path, out, model):
    for ending in (".ppm", ".bmp", ".webp"):
        Image.new("RGB", (8, 8), "red").save(tmp_path / f"{ending[1:]}{ending}")
    assert main(["encode", str(tmp_path), "--output", str(out), "--model", model]) == 0
    assert sorted(path.stem for path in out.iterdir()) == ["bmp", "ppm", "webp"]


def test_info_of_what_is_not_there(capsys):
    error = fails(capsys, "info", "none.pt")
    assert "there is no file or folder `none.pt`" in error
    assert "`org/repo:file`" in error
    assert "(see `svqvae info --help`)" in fails(capsys, "info")


def test_the_table_begins_with_its_first_row(inputs, out, model, capsys):
    (inputs / "a.png").write_bytes(b"")
    assert main(["reconstruct", str(inputs), "--output", str(out), "--model", model]) == 2
    assert capsys.readouterr().out == ""


def test_a_side_by_side_that_is_not_asked_for_is_in_nobodys_way(inputs, model):
    Image.open(inputs / "a.png").save(inputs / "a_side_by_side.png")
    argv = ["reconstruct", str(inputs / "a.png"), str(inputs / "a_side_by_side.png")]
    assert main([*argv, "--output", str(inputs), "--model", model]) == 0


def test_decode_does_not_overwrite_an_input(tokens, model, capsys):
    other = shutil.copy(tokens, tokens.parent / "a_x1.png")
    error = fails(capsys, "decode", tokens, other, "--output", tokens.parent, "--model", model)
    assert f"the input `{other}` would be overwritten" in error
    load_tokens(other)


def run_process(*argv, **options):
    argv = [sys.executable, "-m", "svqvae_cli", *map(os.fsencode, argv)]
    return subprocess.run(argv, check=False, stderr=subprocess.PIPE, **options)


def test_a_name_of_any_bytes(inputs, out, model):
    name = os.fsdecode(b"\xff.png")
    (inputs / "a.png").rename(inputs / name)
    argv = ["reconstruct", inputs / name, "--output", out, "--model", model]
    run = run_process(*argv, stdout=subprocess.PIPE, env={**os.environ, "PYTHONIOENCODING": "utf-8"})
    assert run.returncode == 0
    assert b"\\udcff.png" in run.stdout


def test_a_reader_who_has_left(tokens):
    read, write = os.pipe()
    os.close(read)
    run = run_process("info", tokens, stdout=write)
    os.close(write)
    assert (run.returncode, run.stderr) == (141, b"")


def test_errors_keep_to_one_line(out, model, capsys):
    assert "match `no such file`" in fails(capsys, "encode", "no\nsuch\n file", "--output", out, "--model", model)


def test_as_a_process_with_a_model_that_lacks_weights(inputs, out, model, tmp_path):
    config = Path(model, "config.json").read_text().replace('"num_res_blocks": 1', '"num_res_blocks": 2')
    shutil.copytree(model, tmp_path / "changed")
    (tmp_path / "changed" / "config.json").write_text(config)
    argv = ["encode", inputs, "--output", out, "--model", tmp_path / "changed"]
    run = subprocess.run([sys.executable, "-m", "svqvae_cli", *argv], capture_output=True, text=True, check=False)
    assert run.returncode == 2
    assert run.stdout == ""
    assert re.fullmatch("svqvae: error: .*missing: decoder.*\n", run.stderr)
    assert not out.exists()


def test_help_and_faults_of_the_command_line_import_nothing_slow():
    for argv in (["--help"], ["reconstruct", "--help"], ["reconstruct"]):
        code = f"""
import sys, svqvae_cli
try:
    svqvae_cli.main({argv!r})
except SystemExit:
    pass
assert "torch" not in sys.modules and "svqvae_hf" not in sys.modules
"""
        subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)


def test_every_command_has_its_work():
    for command in COMMANDS:
        assert callable(getattr(commands, command))

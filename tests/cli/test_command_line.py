"""Help, errors, exit codes, progress: what holds for all commands."""

import argparse
import importlib
import io
import os
import re
import subprocess
import sys

import pytest
import torch
from cli_runner import fails, names, svqvae
from conftest import ROOT, make_tiny
from huggingface_hub.errors import LocalEntryNotFoundError

from svqvae_cli import runs
from svqvae_cli.arguments import OVERLAP, TILE_SIZE
from svqvae_cli.command_line import COMMANDS, build_parser
from svqvae_hf import __version__
from svqvae_hf.conversion import convert
from svqvae_hf.evaluation import perceptual
from svqvae_hf.evaluation.baselines import codecs
from svqvae_hf.export import export
from svqvae_hf.models.tiling import OVERLAP_PX
from svqvae_hf.token_sets.crops import CROPS

pytestmark = pytest.mark.usefixtures("few_windows", "process")
COMMAND_NAMES = [command.__name__.removeprefix("svqvae_cli.").replace("_", "-") for command in COMMANDS]
GOLDEN = ROOT / "tests" / "golden" / "svqvae_tiny.safetensors"


def help_text(capsys, *command):
    with pytest.raises(SystemExit) as exit_code:
        svqvae(*command, "--help")
    assert exit_code.value.code == 0
    return capsys.readouterr().out


def test_every_command_has_a_file_of_its_name():
    shared = {
        "arguments",
        "command_line",
        "errors",
        "files",
        "large",
        "loading",
        "results",
        "runs",
        "__init__",
        "__main__",
    }
    modules = {name.replace("-", "_") for name in COMMAND_NAMES}
    assert {path.stem for path in (ROOT / "svqvae_cli").glob("*.py")} == {*modules, *shared}
    for name in modules:
        assert callable(importlib.import_module(f"svqvae_cli.{name}").run)


def test_help_fits_a_terminal_and_shows_an_example_that_parses(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    for name in COMMAND_NAMES:
        text = help_text(capsys, name)
        assert max(map(len, text.splitlines())) <= 80
        example = re.search(rf"\nexample:\n  svqvae ({name} \S.*)\n", text)[1].split()
        assert build_parser().parse_args(example).run.__module__ == f"svqvae_cli.{name}".replace("-", "_")
    text = help_text(capsys)
    assert max(map(len, text.splitlines())) <= 80
    assert "\nexample:\n  svqvae reconstruct photo.jpg" in text


def test_version(capsys):
    with pytest.raises(SystemExit):
        svqvae("--version")
    assert capsys.readouterr().out == f"svqvae {__version__}\n"


# Each of them in one process: 0.1 s, where the import of torch would take seconds.
INSTANT = """
import sys, svqvae_cli
*commands, images, made = sys.argv[1:]
helps = [["--help"], *([name, "--help"] for name in commands)]
for argv in (
    *helps,
    ["encode", "a", "--dtype", "x"],
    ["encode", images, "--scales", "0", "--output", "new"],
    ["reconstruct", images, "--scales", "1", "1", "--output", "new"],
    *([name, "nothere", "--output", "new"] for name in ("encode", "decode", "reconstruct")),
    ["encode", images, "--output", made],
    ["encode", images, "--output", "new", "--model", "./nothere"],
    ["evaluate", "./nothere", images, "--output", "new"],
    ["evaluate", ".", images, "--output", made],
    ["demo", "--model", "./nothere"],
    ["tokenize", "./nothere", "new"],
    ["tokenize", images, "new", "--model", "./nothere"],
    ["convert", "nothere.pt", "new"],
    ["export", ".", "--output", made],
    ["extend-lm", ".", made, "--vqvae", "."],
    ["generate", "./nothere", "--output", "new"],
    ["info", "./nothere"],
):
    try:
        assert svqvae_cli.main(argv) == 2, argv
    except SystemExit:
        pass
slow = {"torch", "numpy", "PIL", "diffusers", "svqvae_hf"} & set(sys.modules)
assert not slow, slow
"""


def test_help_and_wrong_names_and_options_import_nothing_slow(two_images, tmp_path):
    made = tmp_path / "made"
    made.mkdir()
    for name in ("a.safetensors", "report.json"):
        (made / name).touch()
    argv = [sys.executable, "-c", INSTANT, *COMMAND_NAMES, str(two_images), str(made)]
    run = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def test_closed_stdout_ends_silently_with_exit_code_141(saved_model, monkeypatch, capsys):
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert svqvae("info", saved_model) == 141
    assert capsys.readouterr().err == ""


def test_file_name_of_any_bytes_is_printed(two_images, saved_model, tmp_path, monkeypatch):
    stdout = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(stdout, encoding="utf-8"))
    path = two_images / os.fsdecode(b"\xff.png")
    (two_images / "a.png").rename(path)
    assert svqvae("reconstruct", path, "--output", tmp_path / "out", "--model", saved_model) == 0
    assert rb"\udcff.png" in stdout.getvalue()


def test_progress_bars_over_images_and_tiles_on_a_terminal(two_images, saved_model, tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    bars = []

    class Bar(runs.tqdm):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            bars.append(self)

    monkeypatch.setattr(runs, "tqdm", Bar)
    monkeypatch.setattr(sys, "stderr", Terminal())
    options = ["--model", saved_model, "--tile-size", "32", "--overlap", "8"]
    assert svqvae("encode", two_images, "--output", tmp_path / "out", *options) == 0
    images, tiles = bars
    assert (images.n, images.total) == (2, 2)
    assert tiles.n == tiles.total > 1
    assert "2/2" in sys.stderr.getvalue()


# Errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--tile-size", "250"],
            "`tile_size` must be a positive multiple of f = 4, got 250. The nearest is 248",
        ),
        (
            ["--overlap", "30"],
            "`overlap` must be a multiple of f = 4 and less than half of `tile_size` = 256, got 30",
        ),
        (["--tile-size", "big"], "argument --tile-size: invalid int value: 'big'"),
        (["--dtype", "int8"], "argument --dtype: invalid choice"),
        (["--device", "abacus"], "--device must be one that torch finds here, "),
        (["--device", "meta"], "got `meta`"),
        (["--device", "cuda:99"], "got `cuda:99`"),
        (["--device", "cpu:0"], "got `cpu:0`"),
        (["--model", "/no/such/folder"], "there is no file or folder `/no/such/folder`. On the Hub a model is `org/"),
        (["--model", GOLDEN], f"got the file `{GOLDEN}`. Convert it with `svqvae convert` first"),
        (["--model", GOLDEN.parent], "no file named config.json"),
        (["--frobnicate"], "unrecognized arguments: --frobnicate (see `svqvae reconstruct --help`)"),
    ],
)
def test_wrong_options_are_one_line(two_images, saved_model, tmp_path, capsys, options, message):
    out = tmp_path / "out"
    assert message in fails(capsys, "reconstruct", two_images, "--output", out, "--model", saved_model, *options)
    assert not out.exists()


def test_scale_must_be_a_finite_number_above_0(capsys):
    for scale in ("0", "-1", "nan", "1e999", "half"):
        error = fails(capsys, "reconstruct", "a.png", "--output", "out", "--scales", "1", scale)
        assert f"argument --scales: a scale must be a finite number above 0, got '{scale}'" in error


def test_empty_arguments_are_errors(capsys):
    tokenize, convert = ["tokenize", "in", "out"], ["convert", GOLDEN, "out"]
    advice = "must not be empty. If it is a shell variable, set it."
    for argv in (
        ["encode", "", "--output", "out"],
        ["encode", "in", "--output", ""],
        ["convert", GOLDEN, ""],
        ["convert", "", "out"],
        ["info", ""],
        ["encode", "in", "--output", "out", "--model", ""],
    ):
        assert f"{advice} The current folder is `.`. (see" in fails(capsys, *argv)
    for argv in (
        ["encode", "in", "--output", "out", "--device", ""],
        *([*tokenize, name, ""] for name in ("--config", "--split", "--image-column", "--keep")),
        *([*command, name, ""] for command in (tokenize, convert) for name in ("--license", "--push-to-hub")),
        ["demo", "--host", ""],
    ):
        assert f"{advice} (see" in fails(capsys, *argv)


def test_urls_are_refused_where_local_paths_are_needed(tmp_path, capsys, monkeypatch):
    """Otherwise `s3:` would be the name of a local folder."""
    monkeypatch.chdir(tmp_path)
    url = "s3://bucket/x"
    for argv in (
        *([name, url, "--output", "out"] for name in ("reconstruct", "encode", "decode", "export", "generate")),
        *([name, "in", "--output", url] for name in ("reconstruct", "encode", "decode", "export", "generate")),
        ["detokenize", "in", "--output", url],
        ["evaluate", "model", "in", "--output", url],
        ["convert", url, "out"],
        ["convert", GOLDEN, url],
        ["info", url],
        ["demo", "--model", url],
    ):
        assert f"`{url}` must be a local path or a name on the Hub, because URLs are not" in fails(capsys, *argv)
    assert names(tmp_path) == []


def test_line_breaks_in_errors_become_spaces(capsys):
    assert "matches `no such file`" in fails(capsys, "encode", "no\nsuch\n file", "--output", "out")


def test_weights_of_another_architecture_are_one_line(two_images, tmp_path, capfd):
    make_tiny(num_res_blocks=2).save_pretrained(tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    config.write_text(config.read_text().replace('"num_res_blocks": 2', '"num_res_blocks": 3'))
    error = fails(capfd, "encode", two_images, "--output", tmp_path / "out", "--model", tmp_path / "model")
    assert re.fullmatch("svqvae: error: .*missing: decoder.*\n", error)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("length", [0, -1000])
def test_weights_cut_short_are_named(tmp_path, capsys, length):
    make_tiny().save_pretrained(tmp_path)
    weights = tmp_path / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:length])
    error = fails(capsys, "info", tmp_path)
    assert "its weight file is empty, cut short or of another kind" in error


def test_unreachable_hub_is_named(capsys, monkeypatch):
    def fail(*_, **__):
        try:
            raise LocalEntryNotFoundError("away")
        except LocalEntryNotFoundError:
            raise OSError("org/name does not appear to have a file named config.json.")  # noqa: B904 # as diffusers does

    monkeypatch.setattr("svqvae_hf.SVQVAE.from_pretrained", fail)
    error = fails(capsys, "info", "org/name")
    assert "could not load the model `org/name`: the Hub cannot be reached" in error


@pytest.fixture
def failing_encoder(monkeypatch):
    """Returns a function that makes the encoder raise an error."""

    def fail_with(error):
        def fail(*_):
            raise error

        monkeypatch.setattr("svqvae_hf.tokens.image_tokens.encode_image", fail)

    return fail_with


def test_out_of_memory_is_one_line(two_images, saved_model, tmp_path, capsys, failing_encoder):
    for error in (
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB."),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("MPS backend out of memory"),
    ):
        failing_encoder(error)
        argv = ["encode", two_images / "a.png", "--output", tmp_path / "out", "--model", saved_model]
        assert "error: out of memory. Use smaller scales" in fails(capsys, *argv)


def test_other_errors_are_not_hidden(two_images, saved_model, tmp_path, failing_encoder):
    failing_encoder(RuntimeError("a mistake of ours"))
    with pytest.raises(RuntimeError, match="a mistake of ours"):
        svqvae("encode", two_images, "--output", tmp_path / "out", "--model", saved_model)


# Signals


def test_ctrl_c_is_one_line_and_leaves_no_partial_file(two_images, saved_model, tmp_path, capsys, monkeypatch):
    def interrupt(path, data):
        raise KeyboardInterrupt

    monkeypatch.setattr("pathlib.Path.replace", interrupt)
    assert svqvae("encode", two_images, "--output", tmp_path / "out", "--model", saved_model) == 130
    captured = capsys.readouterr()
    assert captured.err.splitlines()[-1] == "svqvae: interrupted"
    assert names(tmp_path / "out") == []


def test_ctrl_c_of_tokenize_says_how_to_resume(two_images, saved_model, tmp_path, capsys, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("svqvae_hf.token_sets.writer.tokenize_set", interrupt)
    assert svqvae("tokenize", two_images, tmp_path / "out", "--model", saved_model) == 130
    line, last = capsys.readouterr().err.splitlines()
    assert line == f"svqvae: `{tmp_path / 'out'}` is not complete. Run the same command again to resume."
    assert last == "svqvae: interrupted"


# The library, which the parser does not import


def choices(command, option):
    commands = next(action for action in build_parser()._actions if isinstance(action, argparse._SubParsersAction))
    actions = commands.choices[command]._actions
    return next(action.choices for action in actions if option in action.option_strings)


def test_choices_and_defaults_agree_with_the_library():
    model = make_tiny()
    model.enable_tiling()
    assert (TILE_SIZE, OVERLAP) == (model.tile_size, model.overlap) == (256, OVERLAP_PX)
    assert choices("tokenize", "--crops") == tuple(CROPS)
    assert choices("evaluate", "--codecs") == tuple(name.lower() for name in codecs.CODECS)
    assert set(choices("evaluate", "--lpips-net")) == perceptual.BACKBONES.keys()
    assert choices("convert", "--variant") == tuple(convert.VARIANTS)
    assert choices("export", "--format") == tuple(export.SUFFIXES)
    assert choices("export", "--dtype") == tuple(export.DTYPES)
    for name in choices("encode", "--dtype"):
        assert model.to(getattr(torch, name)).dtype == getattr(torch, name)

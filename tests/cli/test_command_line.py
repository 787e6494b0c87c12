"""Help, errors, exit codes, progress: what holds for all commands."""

import argparse
import os
import re
import subprocess
import sys

import pytest
import torch
from cli_runner import fails, names, svqvae, visible
from conftest import ROOT, make_tiny

from svqvae_cli import main
from svqvae_cli.arguments import TILES
from svqvae_cli.command_line import COMMANDS, build_parser, parse
from svqvae_files.folders import Folder
from svqvae_hf.conversion import convert
from svqvae_hf.evaluation import codecs, perceptual
from svqvae_hf.token_sets.crops import CROPS

pytestmark = pytest.mark.usefixtures("few_windows")
GOLDEN = ROOT / "tests" / "golden" / "svqvae_tiny.safetensors"


def help_text(capsys, *command):
    with pytest.raises(SystemExit) as exit_code:
        svqvae(*command, "--help")
    assert exit_code.value.code == 0
    return capsys.readouterr().out


def test_help_fits_a_terminal_and_shows_an_example_that_parses(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    for name in COMMANDS:
        text = help_text(capsys, name)
        assert max(map(len, text.splitlines())) <= 80
        example = re.search(rf"\n\n  svqvae ({name} \S.*)\n", text)[1].split()
        assert parse(example).run.__module__ == f"svqvae_cli.{name}".replace("-", "_")
    text = help_text(capsys)
    assert max(map(len, text.splitlines())) <= 80
    assert "\nexample:\n  svqvae reconstruct photo.jpg" in text


# Each of them in one process: 0.1 s, where the import of torch would take seconds.
INSTANT = """
import sys, svqvae_cli
*commands, images, made = sys.argv[1:]
helps = [["--help"], *([name, "--help"] for name in commands)]
for argv in (
    *helps,
    ["encode", "a", "--dtype", "x"],
    ["encod", images],
    ["encode", images, "--output", "new", "--tile-size", "100"],
    ["tokenize", images, "--output", "new", "--crops", "centre"],
    ["convert", ".", "--output", "new"],
    ["info", images],
    *(["encode", images, "--scales", scale, "--output", "new"] for scale in ("0", "nan", "1e9", "half")),
    ["reconstruct", images, "--scales", "1", "1", "--output", "new"],
    *([name, "nothere", "--output", "new"] for name in ("encode", "decode", "reconstruct")),
    ["encode", images, "--output", made],
    ["encode", images, "--output", "new", "--model", "./nothere"],
    ["evaluate", images, "--model", "./nothere", "--output", "new"],
    ["evaluate", images, "--model", ".", "--output", made],
    ["demo", "--model", "./nothere"],
    ["tokenize", "./nothere", "--output", "new"],
    ["tokenize", images, "--output", "new", "--model", "./nothere"],
    ["convert", "nothere.pt", "--output", "new"],
    ["export", ".", "--output", made],
    ["extend-lm", ".", "--output", made, "--vqvae", "."],
    ["generate", "--model", "./nothere", "--output", "new"],
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
    argv = [sys.executable, "-c", INSTANT, *COMMANDS, str(two_images), str(made)]
    run = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


# In a new process: which modules a command with the bundled models imports.
LOADED = """
import sys
from svqvae_cli.loading import load_generator, load_model
load_model(None, "cpu", "float32")
load_generator(None, "cpu", "float32")
slow = {"peft", "scipy.stats", "datasets", "diffusers.models.unets", "diffusers.pipelines.pipeline_utils"}
assert not slow & set(sys.modules), slow & set(sys.modules)
"""


@pytest.mark.slow
def test_bundled_models_load_without_diffusers_pipelines():
    """They would take 1.4 s of 6."""
    run = subprocess.run([sys.executable, "-c", LOADED], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def test_closed_stdout_ends_silently_with_exit_code_141(saved_model, monkeypatch, capsys):
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert svqvae("info", saved_model) == 141
    assert capsys.readouterr().err == ""


# Errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tile-size", "250"], "--tile-size must be a multiple of 4, got 250. Try 248."),
        (["--overlap", "30"], "`overlap` must be a multiple of f = 4 and less than half of `tile_size` = 256, got 30"),
        (["--dtype", "int8"], "argument --dtype: invalid choice"),
        (["--device", "abacus"], "--device must be one that torch finds here, "),
        (["--device", "cuda:99"], "got `cuda:99`"),
        (["--model", "/no/such/folder"], "there is no file or folder `/no/such/folder`. On the Hub a model is `org/"),
        (["--model", GOLDEN], f"got the file `{GOLDEN}`. Use `svqvae convert` on it"),
        (["--scalse", "1", "--frobnicate"], "`--scalse`. Did you mean `--scales`? There is no option `--frob"),
    ],
)
def test_wrong_options_are_one_line(two_images, saved_model, tmp_path, capsys, options, message):
    out = tmp_path / "out"
    assert message in fails(capsys, "reconstruct", two_images, "--output", out, "--model", saved_model, *options)
    assert not out.exists()


def test_empty_arguments_are_errors(capsys):
    for argv in (
        ["encode", "", "--output", "out"],
        ["encode", "in", "--output", ""],
        ["encode", "in", "--output", "out", "--model", ""],
        ["encode", "in", "--output", "out", "--device", ""],
        ["generate", "--prompt", "", "--output", "out"],
    ):
        assert "must not be empty. If it is a shell variable, set it. (see" in fails(capsys, *argv)


def test_urls_are_refused_where_local_paths_are_needed(tmp_path, capsys, monkeypatch):
    """Otherwise `s3:` would be the name of a local folder."""
    monkeypatch.chdir(tmp_path)
    url = "s3://bucket/x"
    for argv in (
        *([name, url, "--output", "out"] for name in ("reconstruct", "encode", "export")),
        ["generate", "--model", url, "--output", "out"],
        ["decode", "in", "--output", url],
        ["convert", GOLDEN, "--output", url],
        ["demo", "--model", url],
    ):
        assert f"`{url}` must be a local path or a name on the Hub, because URLs are not" in fails(capsys, *argv)
    assert names(tmp_path) == []


def test_urls_without_a_bucket_are_refused(two_images, tmp_path, capsys, monkeypatch):
    """As of an unset variable in `s3://$BUCKET`. It would be the name of a local folder otherwise."""
    monkeypatch.chdir(tmp_path)
    for argv in (
        ["tokenize", two_images, "--output", "s3://"],
        ["tokenize", "s3:///a", "--output", "out"],
        ["info", "gs://"],
    ):
        assert "must name a bucket or a server. If it is a shell variable, set it." in fails(capsys, *argv)
    with pytest.raises(ValueError, match="`s3://` must name a bucket"):
        Folder("s3://")
    assert names(tmp_path) == ["two_images"]


@pytest.mark.parametrize("environment", [{"RANK": "1"}, {"WORLD_SIZE": "2"}, {"RANK": "2", "WORLD_SIZE": "2"}])
def test_tokenize_needs_rank_and_world_size_together(environment, two_images, tmp_path, capsys, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    error = fails(capsys, "tokenize", two_images, "--output", tmp_path / "out")
    assert "RANK and WORLD_SIZE must be the number of this process and the number of processes" in error
    assert not (tmp_path / "out").exists()


def test_train_names_the_script(capsys):
    assert "no command `train`, because models are trained by scripts" in fails(capsys, "train", "photos")


def test_words_after_two_dashes_are_inputs(photo, tmp_path, saved_model, monkeypatch):
    monkeypatch.chdir(tmp_path)
    photo.crop((0, 0, 8, 8)).save("--weird.png")
    assert svqvae("encode", "--output", "out", "--model", saved_model, "--", "--weird.png") == 0
    assert visible(tmp_path / "out") == ["--weird.safetensors"]


@pytest.mark.slow
@pytest.mark.parametrize(("closed", "command", "code"), [(">&-", ["info", "bundled"], 0), ("2>&-", ["info", "no"], 2)])
def test_a_process_without_stdout_or_stderr_ends_without_a_traceback(closed, command, code, tmp_path):
    words = f'"{sys.executable}" -m svqvae_cli {" ".join(command)} {closed}'
    run = subprocess.run(["bash", "-c", words], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout, run.stderr) == (code, "", "")


@pytest.mark.parametrize("command", ["encode", "reconstruct"])
def test_names_that_are_not_utf_8(command, photo, tmp_path, saved_model, capsys):
    photos = tmp_path / "photos"
    photos.mkdir()
    name = os.fsdecode(b"gr\xfcn")
    photo.crop((0, 0, 8, 8)).save(photos / f"{name}.png")
    words = ["--output", tmp_path / "out", "--model", saved_model]
    if command == "encode":  # safetensors opens no such file
        error = fails(capsys, command, photos, *words)
        assert "gr\\xfcn.safetensors` must be a path in UTF-8" in error
        return
    for _ in range(2):
        assert main([command, os.fsdecode(photos), *map(str, words)]) == 0
    assert "resumed: 1 of 1" in capsys.readouterr().out


@pytest.mark.parametrize("content", ["", "[]", "null", '"a"', "{"])
def test_json_files_without_an_object_are_errors_that_name_the_file(content, two_images, tmp_path, capsys):
    (tmp_path / "model").mkdir()
    (tmp_path / "adapter").mkdir()
    for path in ("model/config.json", "adapter/adapter_config.json"):
        (tmp_path / path).write_text(content)
    for argv in (
        ["encode", two_images, "--output", tmp_path / "out", "--model", tmp_path / "model", "--tile-size", 64],
        ["encode", two_images, "--output", tmp_path / "out", "--model", tmp_path / "model"],
        ["info", tmp_path / "model"],
        ["info", tmp_path / "adapter"],
        ["generate", "--model", tmp_path / "adapter", "--output", tmp_path / "out"],
    ):
        assert f"`{tmp_path}/" in fails(capsys, *argv)


def test_no_error_but_out_of_memory_is_hidden(two_images, saved_model, tmp_path, capsys, monkeypatch):
    messages = ["a mistake of ours", "MPS backend out of memory"]

    def fail(*_):
        raise RuntimeError(messages.pop())

    monkeypatch.setattr("svqvae_hf.SVQVAE.encode_tokens", fail)
    argv = ["encode", two_images / "a.png", "--output", tmp_path / "out", "--model", saved_model]
    assert "error: out of memory. Use smaller scales" in fails(capsys, *argv)
    with pytest.raises(RuntimeError, match="a mistake of ours"):
        svqvae(*argv)


# Signals


def test_ctrl_c_is_one_line_and_leaves_no_partial_file(two_images, saved_model, tmp_path, capsys, monkeypatch):
    def interrupt(path, data):
        raise KeyboardInterrupt

    monkeypatch.setattr("pathlib.Path.replace", interrupt)
    assert svqvae("encode", two_images, "--output", tmp_path / "out", "--model", saved_model) == 130
    captured = capsys.readouterr()
    assert captured.err.splitlines()[-1] == "svqvae: interrupted"
    assert visible(tmp_path / "out") == []


# The library, which the parser does not import


def choices(command, option):
    parsers = next(each for each in build_parser(command)._actions if isinstance(each, argparse._SubParsersAction))
    actions = parsers.choices[command]._actions
    return next(action.choices for action in actions if option in action.option_strings)


def test_choices_and_defaults_agree_with_the_library(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    model = make_tiny()
    model.enable_tiling()
    assert model.tile_size == int(TILES.split()[0])
    assert f"pixels read beyond a tile's sides (default: {model.overlap})" in help_text(capsys, "encode")
    assert choices("tokenize", "--crops") == tuple(CROPS)
    assert choices("evaluate", "--codecs") == tuple(name.lower() for name in codecs.CODECS)
    assert set(choices("evaluate", "--lpips-net")) == perceptual.BACKBONES.keys()
    assert choices("convert", "--variant") == tuple(convert.VARIANTS)
    for name in choices("encode", "--dtype"):
        assert model.to(getattr(torch, name)).dtype == getattr(torch, name)

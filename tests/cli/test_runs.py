"""Runs over folders that are interrupted, resumed, or started anew."""

import os
import shutil
import signal
from pathlib import Path

import pytest
from cli_runner import fails, svqvae
from generators import make_autoregressive

from svqvae_cli import main

pytestmark = pytest.mark.usefixtures("few_windows")
COMMANDS = ("encode", "decode", "reconstruct")
GENERATE = ("--num-images", 5, "--batch-size", 2)
TOKENIZE = ("--num-parts", 5, "--workers", 0, "--crops", "centre", "--resolution", 16)


@pytest.fixture
def photos(tmp_path, photo):
    folder = tmp_path / "photos"
    folder.mkdir()
    for index in range(5):
        photo.crop((50 * index, 100, 50 * index + 24, 116)).save(folder / f"{index}.png")
    return folder


@pytest.fixture
def argv(photos, tmp_path, saved_model):
    """Returns the words of a command over the five images, or for five new ones."""

    def words(command, output, *options):
        if command == "tokenize":
            return [command, photos, output, "--model", saved_model, *TOKENIZE]
        if command == "generate":
            make_autoregressive().save_pretrained(tmp_path / "pipeline")
            return [command, tmp_path / "pipeline", "--output", output, *GENERATE]
        source = photos
        if command == "decode":
            source = tmp_path / "tokens"
            svqvae("encode", photos, "--output", source, "--model", saved_model, "--scales", "0.5", "1")
        scales = [] if command == "decode" else ["--scales", "0.5", "1"]
        return [command, source, "--output", output, "--model", saved_model, *scales, *options]

    return words


def contents(folder):
    """Content of each file, but of no record of a run."""
    files = (path for path in folder.rglob("[!.]*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.slow
@pytest.mark.parametrize("command", [*COMMANDS, "tokenize", "generate"])
def test_three_interrupted_runs_end_with_the_files_of_an_unbroken_one(command, argv, tmp_path, monkeypatch, capsys):
    whole, out = tmp_path / "whole" / "out", tmp_path / "out"
    assert svqvae(*argv(command, whole)) == 0
    words = argv(command, out)
    replace, left = Path.replace, []

    def interrupt(path, target):
        if not left.pop():
            os.kill(os.getpid(), signal.SIGTERM)
        return replace(path, target)

    done = []
    for writes in (2, 3, 2):  # the record, the first file and so on
        monkeypatch.setattr(Path, "replace", interrupt)
        left[:] = [False, *[True] * writes]
        capsys.readouterr()
        with pytest.raises(SystemExit):
            svqvae(*words)
        captured = capsys.readouterr()
        assert ("(not complete; finished: " if command == "tokenize" else f"written  {out} (") in captured.out
        assert "is not complete. Run the same command again to resume." in captured.err
        done.append(len(contents(out)))
    assert done == sorted(done)
    assert 0 < done[0] < done[-1] < len(contents(whole))
    monkeypatch.setattr(Path, "replace", replace)
    assert svqvae(*words) == 0
    assert "resumed: " in capsys.readouterr().out
    assert contents(out) == contents(whole)


@pytest.mark.parametrize("command", COMMANDS)
def test_files_of_other_runs_are_replaced_only_with_overwrite(command, argv, tmp_path, capsys):
    words = argv(command, tmp_path / "out")
    capsys.readouterr()
    (tmp_path / "out").mkdir()
    mine = tmp_path / "out" / ("0.safetensors" if command == "encode" else "0_x1.png")
    mine.write_bytes(b"mine")
    assert f"`{mine}` already exists. Pass --overwrite" in fails(capsys, *words)
    assert svqvae(*words, "--overwrite") == 0
    capsys.readouterr()
    error = fails(capsys, *words, "--dtype", "float16")
    assert "made with other options: `dtype` was float32, got float16. Pass --overwrite" in error
    assert mine.read_bytes() != b"mine"


def test_an_interrupted_overwrite_leaves_nothing_of_the_run_before(argv, tmp_path, monkeypatch):
    words = argv("encode", tmp_path / "out")
    assert svqvae(*words) == 0
    old, replace = contents(tmp_path / "out"), Path.replace
    targets = []

    def interrupt(path, target):
        targets.append(target)
        if len(targets) == 3:
            raise KeyboardInterrupt
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", interrupt)
    words[words.index("1")] = "2"
    assert svqvae(*words, "--overwrite") == 130
    (new,) = contents(tmp_path / "out").items()
    assert new not in old.items()


def test_only_an_input_that_changed_is_done_again(argv, photos, tmp_path, capsys):
    words = argv("encode", tmp_path / "out")
    assert svqvae(*words) == 0
    made = (tmp_path / "out" / "3.safetensors").stat().st_mtime_ns
    os.utime(photos / "3.png", ns=(made + 1, made + 1))
    assert svqvae(*words) == 0
    assert "resumed: 4 of 5 were there\n" in capsys.readouterr().out
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert svqvae(*words) == 0
    assert "resumed: 5 of 5 were there\n" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}


@pytest.mark.parametrize("command", ["encode", "decode"])
def test_what_other_inputs_or_another_model_made_is_not_kept(command, photos, tmp_path, saved_model, capsys):
    model, sources = shutil.copytree(saved_model, tmp_path / "model"), [photos, tmp_path / "others"]
    shutil.copytree(*sources)
    if command == "decode":
        images, sources = sources, [tmp_path / "set", tmp_path / "other_set"]
        for pair in zip(images, sources, strict=True):
            svqvae("tokenize", *pair, "--model", model, *TOKENIZE)
    words, others = ([command, each, "--output", tmp_path / "out", "--model", model] for each in sources)
    for is_resumed in (False, True, False):
        assert svqvae(*words) == 0
        assert ("resumed: 5 of 5 " in capsys.readouterr().out) == is_resumed
        if is_resumed:
            (model / "diffusion_pytorch_model.safetensors").touch()
    assert f"was made with other options: `input` was {sources[0]}" in fails(capsys, *others)


def test_inputs_are_not_overwritten_and_outputs_do_not_clash(photos, tmp_path, saved_model, capsys):
    (photos / "0.png").rename(photos / "1_x1.png")
    before = contents(photos)
    words = ["--output", photos, "--model", saved_model]
    inputs = [photos / "1.png", photos / "1_x1.png"]
    assert f"the input `{inputs[1]}` would be overwritten" in fails(capsys, "reconstruct", *inputs, *words)
    assert contents(photos) == before
    inputs = photos / "2.png", tmp_path / "2.png"
    shutil.copy(*inputs)
    error = fails(capsys, "encode", *inputs, "--output", tmp_path / "out", "--model", saved_model)
    clash = f"`{inputs[0]}` and `{inputs[1]}` would both write `{tmp_path / 'out' / '2.png.safetensors'}`."
    assert f"{clash} Rename one." in error


@pytest.mark.parametrize(("command", "ending"), [("encode", ".safetensors"), ("reconstruct", "_x1.png")])
def test_inputs_that_differ_in_the_suffix_alone_keep_it(command, ending, photos, tmp_path, saved_model):
    words = [command, photos, "--output", tmp_path / "out", "--model", saved_model]
    assert svqvae(*words) == 0
    before = contents(tmp_path / "out")
    shutil.copy(photos / "1.png", photos / "2.jpg")
    assert svqvae(*words) == 0
    made = contents(tmp_path / "out")
    assert made.keys() - before.keys() == {f"2.jpg{ending}", f"2.png{ending}"}
    assert made[f"2.jpg{ending}"] == before[f"1{ending}"]
    assert made[f"2.png{ending}"] == before[f"2{ending}"]


def test_control_characters_in_names_are_escaped(photos, tmp_path, saved_model, capsys):
    (photos / "0.png").rename(photos / "\x1b[31m\n.png")
    assert main(["reconstruct", str(photos), "--output", str(tmp_path / "out"), "--model", saved_model]) == 0
    assert "\n\\x1b[31m .png " in capsys.readouterr().out

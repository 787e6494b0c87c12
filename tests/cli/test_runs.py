"""Runs over folders that are interrupted, resumed, or started anew."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from cli_runner import fails, svqvae
from generators import make_autoregressive

from svqvae_cli import main
from svqvae_files.file_names import DEFAULT_MODEL
from svqvae_hf.tokens.token_files import load_tokens

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
            return [command, photos, "--model", saved_model, "--output", output, *TOKENIZE]
        if command == "generate":
            make_autoregressive().save_pretrained(tmp_path / "pipeline")
            return [command, "--model", tmp_path / "pipeline", "--output", output, *GENERATE]
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
    for writes in (1, 1, 1) if command in ("encode", "generate") else (1, 2, 1):
        monkeypatch.setattr(Path, "replace", interrupt)
        left[:] = [False, *[True] * (writes + (command == "tokenize"))]  # which also writes the options
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
def test_files_that_no_record_names_are_never_replaced(command, argv, tmp_path, capsys):
    words = argv(command, tmp_path / "out")
    capsys.readouterr()
    (tmp_path / "out").mkdir()
    mine = tmp_path / "out" / ("0.safetensors" if command == "encode" else "0_x1.png")
    mine.write_bytes(b"mine")
    for options in ([], ["--overwrite"]):
        error = fails(capsys, *words, *options)
        assert f"`{mine}` already exists, but no run of this command has written it. Move it" in error
    assert contents(tmp_path / "out") == {mine.name: b"mine"}


@pytest.mark.parametrize("command", COMMANDS)
def test_other_options_are_an_error_without_overwrite(command, argv, tmp_path, capsys):
    words = argv(command, tmp_path / "out")
    assert svqvae(*words) == 0
    capsys.readouterr()
    before = contents(tmp_path / "out")
    error = fails(capsys, *words, "--dtype", "bfloat16")
    assert (
        "made with other options: `dtype` was float32, got bfloat16. Use another --output, or pass --overwrite"
        in error
    )
    assert contents(tmp_path / "out") == before
    assert svqvae(*words, "--dtype", "bfloat16", "--overwrite") == 0
    assert contents(tmp_path / "out").keys() == before.keys()


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
    new = contents(tmp_path / "out").items()
    assert len(new) == 2
    assert not new & old.items()


def test_only_an_input_that_changed_is_done_again(argv, photos, tmp_path, capsys):
    words = argv("encode", tmp_path / "out")
    assert svqvae(*words) == 0
    os.utime(photos / "3.png", ns=(10**18, 10**18))  # older, as after `unzip` or `rsync --archive`
    assert svqvae(*words) == 0
    assert "resumed: 4 of 5 were there\n" in capsys.readouterr().out
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert svqvae(*words) == 0
    assert "resumed: 5 of 5 were there\n" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}


def test_an_input_that_was_replaced_by_an_older_one_is_done_again(photos, tmp_path, saved_model):
    words = ["encode", photos, "--output", tmp_path / "out", "--model", saved_model]
    os.utime(photos / "4.png", ns=(10**18, 10**18))
    assert svqvae(*words) == 0
    before = contents(tmp_path / "out")
    (photos / "4.png").replace(photos / "3.png")
    assert svqvae(*words) == 0
    after = contents(tmp_path / "out")
    assert after["3.safetensors"] == before["4.safetensors"]
    assert "4.safetensors" not in after


@pytest.mark.parametrize("command", ["encode", "decode"])
def test_what_other_inputs_made_is_not_replaced(command, photos, tmp_path, saved_model, capsys):
    sources = [photos, tmp_path / "others"]
    shutil.copytree(*sources)
    for path in sources[1].iterdir():
        path.touch()
    if command == "decode":
        images = sources
        sources = [tmp_path / "set", tmp_path / "other_set"]
        for folder, out, height in zip(images, sources, (16, 12), strict=True):
            svqvae("tokenize", folder, "--model", saved_model, "--output", out, *TOKENIZE[:-1], height)
    words, others = ([command, each, "--output", tmp_path / "out", "--model", saved_model] for each in sources)
    assert svqvae(*words) == 0
    before = contents(tmp_path / "out")
    capsys.readouterr()
    assert f"was made from another input, `{sources[0]}" in fails(capsys, *others)
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize("command", ["encode", "reconstruct"])
def test_images_of_equal_names_sizes_and_times_in_two_folders_are_other_inputs(
    command, photo, tmp_path, saved_model, capsys
):
    for folder, left in (("a", 0), ("b", 100)):
        (tmp_path / folder).mkdir()
        photo.crop((left, 100, left + 24, 116)).save(tmp_path / folder / "0.bmp")
        os.utime(tmp_path / folder / "0.bmp", (1_700_000_000, 1_700_000_000))  # as after `unzip`
    options = ["--output", tmp_path / "out", "--model", saved_model]
    assert svqvae(command, tmp_path / "a", *options) == 0
    before = contents(tmp_path / "out")
    capsys.readouterr()
    message = fails(capsys, command, tmp_path / "b", *options)
    assert f"was made from another input, `{tmp_path}/a/0.bmp`. Pass --overwrite to replace it" in message
    assert contents(tmp_path / "out") == before
    assert svqvae(command, tmp_path / "a", *options) == 0
    assert "resumed: 1 of 1 " in capsys.readouterr().out
    assert svqvae(command, tmp_path / "b", *options, "--overwrite") == 0
    assert contents(tmp_path / "out") != before


def test_a_copy_of_a_token_set_is_the_same_set(photos, tmp_path, saved_model, capsys):
    svqvae("tokenize", photos, "--model", saved_model, "--output", tmp_path / "set", *TOKENIZE)
    shutil.copytree(tmp_path / "set", tmp_path / "copy")
    options = ["--output", tmp_path / "out", "--model", saved_model]
    assert svqvae("decode", tmp_path / "set", *options) == 0
    assert svqvae("decode", tmp_path / "copy", *options) == 0
    assert "resumed: 5 of 5 " in capsys.readouterr().out


@pytest.mark.parametrize("command", ["encode", "decode"])
def test_outputs_of_another_model_are_not_kept(command, argv, tmp_path, saved_model, capsys):
    model = shutil.copytree(saved_model, tmp_path / "model")
    words = argv(command, tmp_path / "out")
    words[words.index("--model") + 1] = model
    assert svqvae(*words) == 0
    weights = model / "diffusion_pytorch_model.safetensors"
    weights.touch()
    assert svqvae(*words) == 0  # the same weights
    assert "resumed: 5 of 5 " in capsys.readouterr().out
    time = (model / "config.json").stat().st_mtime_ns
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"network_range": [-1, 1]}))
    os.utime(model / "config.json", ns=(time, time))
    assert "was made with other options: `model` was " in fails(capsys, *words)


def test_a_model_is_the_same_by_its_name_its_folder_and_as_the_default(photos, tmp_path, capsys):
    shutil.copytree(DEFAULT_MODEL, tmp_path / "copy")
    words = ["encode", photos, "--output", tmp_path / "out"]
    assert svqvae(*words) == 0
    for model in ("bundled", DEFAULT_MODEL, tmp_path / "copy"):
        capsys.readouterr()
        assert svqvae(*words, "--model", model) == 0
        assert "resumed: 5 of 5 " in capsys.readouterr().out


@pytest.mark.parametrize("output", ["project/out", "out"])
def test_a_renamed_project_is_resumed(photos, tmp_path, saved_model, capsys, output):
    project = tmp_path / "project"
    project.mkdir()
    photos.rename(project / "photos")
    words = ["--model", saved_model]
    assert svqvae("encode", project / "photos", "--output", tmp_path / output, *words) == 0
    project.rename(tmp_path / "renamed")
    output = output.replace("project", "renamed")
    capsys.readouterr()
    assert svqvae("encode", tmp_path / "renamed" / "photos", "--output", tmp_path / output, *words) == 0
    assert "resumed: 5 of 5 " in capsys.readouterr().out


def test_runs_with_the_same_options_add_to_each_other(photos, tmp_path, saved_model, capsys):
    others = tmp_path / "others"
    others.mkdir()
    for path in photos.iterdir():
        shutil.copy(path, others / f"b{path.name}")
    words = ["--output", tmp_path / "out", "--model", saved_model]
    assert svqvae("encode", photos, *words) == 0
    assert svqvae("encode", photos, others, *words) == 0
    assert "resumed: 5 of 10 " in capsys.readouterr().out
    assert svqvae("encode", photos, *words, "--overwrite") == 0
    assert len(contents(tmp_path / "out")) == 10
    capsys.readouterr()
    assert svqvae("encode", photos, others, *words) == 0
    assert "resumed: 10 of 10 " in capsys.readouterr().out


def test_overwrite_with_other_options_deletes_what_the_record_names_and_nothing_else(photos, tmp_path, saved_model):
    out = tmp_path / "out"
    words = ["--output", out, "--model", saved_model]
    assert svqvae("encode", photos, *words) == 0
    (out / "mine.safetensors").write_bytes(b"mine")
    assert svqvae("encode", photos / "1.png", *words, "--scales", "0.5", "--overwrite") == 0
    assert contents(out).keys() == {"1.safetensors", "mine.safetensors"}


def test_leftovers_of_inputs_that_are_gone_are_deleted(photos, tmp_path, saved_model, capsys):
    out = tmp_path / "out"
    words = ["encode", photos, "--output", out, "--model", saved_model]
    assert svqvae(*words) == 0
    (photos / "1.png").unlink()
    (photos / "2.png").unlink()
    (out / "2.safetensors").write_bytes(b"changed")
    assert svqvae(*words) == 0
    printed = capsys.readouterr().out
    assert f"deleted  1 outputs of earlier inputs, such as {out}/1.safetensors\n" in printed
    assert f"kept     1 outputs of earlier inputs that have changed, such as {out}/2.safetensors\n" in printed
    assert contents(out).keys() == {f"{name}.safetensors" for name in (0, 2, 3, 4)}


def test_outputs_of_a_folder_that_is_gone_stay(photos, tmp_path, saved_model):
    words = ["--output", tmp_path / "out", "--model", saved_model]
    assert svqvae("encode", photos, *words) == 0
    photos.rename(tmp_path / "moved")
    (tmp_path / "moved" / "1.png").rename(tmp_path / "new.png")
    assert svqvae("encode", tmp_path / "new.png", *words) == 0
    assert len(contents(tmp_path / "out")) == 6


def test_a_smaller_token_set_leaves_no_image_of_the_one_before(photos, tmp_path, saved_model):
    words = ["decode", tmp_path / "set", "--output", tmp_path / "out", "--model", saved_model]
    tokenize = ["tokenize", photos, "--model", saved_model, "--output", tmp_path / "set", "--workers", 0]
    assert svqvae(*tokenize) == 0
    assert svqvae(*words) == 0
    assert len(contents(tmp_path / "out")) == 5
    mine = tmp_path / "out" / "20231225_xmas.png"
    mine.write_bytes(b"mine")
    assert svqvae(*tokenize, "--max-images", 2, "--overwrite") == 0
    assert svqvae(*words) == 0
    assert contents(tmp_path / "out").keys() == {"0_x1.png", "1_x1.png", mine.name}
    assert svqvae(*words, "--overwrite") == 0
    assert mine.read_bytes() == b"mine"


@pytest.mark.slow
def test_of_two_runs_with_other_options_the_second_is_refused_before_it_writes(photos, tmp_path, saved_model):
    """They start together: each reads the record before the other one has written it."""
    options = [[], ["--scales", "0.5"]]
    words = [
        sys.executable,
        "-m",
        "svqvae_cli",
        "encode",
        photos,
        "--output",
        tmp_path / "out",
        "--model",
        saved_model,
    ]
    runs = [subprocess.Popen([*words, *each], stderr=subprocess.PIPE, text=True) for each in options]
    errors = [run.communicate()[1] for run in runs]
    assert sorted(run.returncode for run in runs) == [0, 2]
    (error,) = filter(None, errors)
    assert "made with other options: `scales` was" in error
    (first,) = (index for index, run in enumerate(runs) if run.returncode == 0)
    for path in (tmp_path / "out").glob("*.safetensors"):
        assert load_tokens(path).scales == ((1.0,), (0.5,))[first]


@pytest.mark.parametrize("content", [b"", b"[]\n", b"null\n", b'{"options": 1}\n', b'{"output": "a"}\n'])
def test_a_damaged_record_is_an_error_that_names_a_file(photos, tmp_path, saved_model, capsys, content):
    words = ["encode", photos, "--output", tmp_path / "out", "--model", saved_model]
    assert svqvae(*words) == 0
    capsys.readouterr()
    before = contents(tmp_path / "out")
    (tmp_path / "out" / ".svqvae-encode.jsonl").write_bytes(content)
    for options in ([], ["--overwrite"]):
        assert f"`{tmp_path / 'out'}/" in fails(capsys, *words, *options)
    assert contents(tmp_path / "out") == before


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
    assert f"2{ending}" not in made
    assert made[f"2.jpg{ending}"] == before[f"1{ending}"]
    assert made[f"2.png{ending}"] == before[f"2{ending}"]


def test_control_characters_in_names_are_escaped(photos, tmp_path, saved_model, capsys):
    (photos / "0.png").rename(photos / "\x1b[31m\n.png")
    assert main(["reconstruct", str(photos), "--output", str(tmp_path / "out"), "--model", saved_model]) == 0
    assert "\n\\x1b[31m .png " in capsys.readouterr().out


@pytest.mark.parametrize("is_used", [False, True])
def test_temporary_files_of_killed_runs_are_deleted_unless_another_run_writes(photos, tmp_path, saved_model, is_used):
    words = ["encode", photos, "--model", saved_model, "--output"]
    assert svqvae(*words, tmp_path / "first") == 0
    out = shutil.copytree(tmp_path / "first", tmp_path / "out")
    record = out / ".svqvae-encode.jsonl"
    lines = record.read_text().splitlines()
    record.write_text("\n".join(lines[:-1]) + "\n")  # the last output was begun, and not finished
    (out / ".01234567.tmp").write_bytes(b"half")
    (out / ".mine.tmp").write_bytes(b"mine")
    other_run = os.open(out, os.O_RDONLY)
    if is_used:
        fcntl.flock(other_run, fcntl.LOCK_SH)
    assert svqvae(*words, out) == 0
    os.close(other_run)
    assert (out / ".01234567.tmp").exists() == is_used
    assert (out / ".mine.tmp").exists()

"""Each command with two or more wrong inputs: one line that says what is wrong, exit code 2, and nothing is left."""

import shutil

import pytest
from cli_runner import fails, svqvae
from conftest import ROOT

from svqvae_cli.command_line import COMMANDS
from svqvae_hf import DEFAULT_GENERATOR

WRONG = {  # words on the command line, and a part of the message
    "reconstruct": [
        ("broken.png --output out --model {model}", "`broken.png` (5 bytes) is not a readable image"),
        ("two_images --outptu out", "There is no option `--outptu`. Did you mean `--output`?"),
        ("two_images --output two_images", "--output must not be an input folder, got `two_images`"),
    ],
    "encode": [
        ("nowhere.png --output out", "no file or folder matches `nowhere.png`"),
        ("photos.ZIP --output out", "`photos.ZIP` must be unpacked first"),
        ("two_images --output out --scales 1 1", "--scales must differ within six digits, got 1.0 1.0."),
    ],
    "decode": [
        ("two_images --output out", "`two_images`, subfolders included, has no file that ends in .safetens"),
        ("two_images/a.png --output out", "`two_images/a.png` must be a token file that can be decoded, but is not"),
        ("two_images/a.png --output out --max-images 1", "--max-images is for token sets. Leave it out"),
        ("hf://datasets/a/b --output out --tile-size 8", "--tile-size is not for token sets. Leave it out"),
        ("two_images a://b --output out", "a token set must be the only INPUT, got 2."),
        ("two_images/typo.safetensors --output out", "no file or folder matches `two_images/typo.safetensors`."),
    ],
    "tokenize": [
        ("two_images --output broken.png", "`broken.png` must be a new or empty folder, but `broken.png` is a file"),
        ("two_images --output out --part 3", "the set has 1 in all, got [3]. For more parts, pass `--num-parts`."),
        (
            "two_images --output out --sides 1 2",
            "--sides needs square crops of one size. Add --crops",
        ),
    ],
    "evaluate": [
        (
            "broken.png --model {model} --output out",
            "none of 1 is. The first, `broken.png`: the image (5 bytes)",
        ),
        ("two_images --output out --scale 1", "`--scales`, `--scale-from`. Did you mean `--scales`?"),
        ("two_images --model ./nowhere --output out", "there is no file or folder `./nowhere`"),
        (
            "nowhere --model {model} --output out",
            "no file or folder matches `nowhere`. On the Hub an image",
        ),
        ("two_images --model {model} --output out --lpips-weights none.pth", "there is no file `none.pth`"),
        ("two_images --output out --generated two_images --scales 0.5", "--scales is not for generated images"),
        (
            "two_images --model {model} --output out --beside two_images",
            "must be the folder of a model, but has no",
        ),
        (
            "two_images --model {model} --output out --beside broken.png",
            "a model must be a folder or a Hub id, got the",
        ),
        ("two_images --model {model} --output out --beside {model}", "with different titles"),
    ],
    "convert": [
        ("{golden} --output out --license foo", "`license` must be an identifier that the Hub knows"),
        ("broken.png --output out", "`broken.png` must be a whole PyTorch checkpoint"),
        ("{golden} --output two_images", "`two_images` must be a new or empty folder, but it is not empty"),
    ],
    "export": [
        ("broken.png --output out", "a model must be a folder or a Hub id, got the file `broken.png`"),
        ("{generator} --output out", "pretrained_scenes` is a generator. Pass `"),
    ],
    "extend-lm": [
        (
            "empty --output out --vqvae {model}",
            "`empty` must be a causal language model of transformers with its",
        ),
        ("empty --output", "argument --output: expected one argument"),
        (
            "bundled --output out",
            "LM must be a causal language model, but `bundled` is an image tokenizer. Pass it as",
        ),
    ],
    "generate": [
        (
            "--model empty --output out",
            "`empty` must be a pipeline or a language model with image tokens. It holds no model",
        ),
        ("--model adapter --output out", "image tokens. Pass its base as --model and it as --adapter."),
        ("--output out --model {model}", "` is a tokenizer, which can neither draw nor describe images."),
        ("--output out --model empty/lm", "the folder `empty` has no folder `lm`. Correct the name"),
        ("--output out --model bundled", "`bundled` is a tokenizer, which can neither draw nor describe images."),
        ("--output out --seed x", "argument --seed: must be an integer of at most"),
    ],
    "caption": [
        ("two_images --output out", "the following arguments are required: --model"),
        (
            "two_images/a.png --output out --model {model}",
            "can neither draw nor describe images. Pass a language model",
        ),
    ],
    "info": [
        (
            "tokens",
            "If `tokens` is a token set, no part of it has begun. If it is a model, there is no file or folder",
        ),
        ("two_images/a.png", "info describes models and tokens, got the image `two_images/a.png`"),
        ("", "the following arguments are required: PATH"),
    ],
    "demo": [
        ("--port 70000", "--port must be at most 65535, got 70000."),
        ("--dtype int8", "argument --dtype: invalid choice: 'int8'"),
    ],
}


@pytest.mark.parametrize(("command", "words", "message"), [(name, *case) for name in WRONG for case in WRONG[name]])
def test_wrong_inputs(two_images, tmp_path, saved_model, monkeypatch, capsys, command, words, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    for name in ("broken.png", "photos.ZIP"):
        (tmp_path / name).write_bytes(b"hello")
    before = sorted(tmp_path.rglob("*"))
    files = {"model": saved_model, "generator": DEFAULT_GENERATOR}
    files["golden"] = ROOT / "tests" / "golden" / "svqvae_tiny.safetensors"
    assert message in fails(capsys, command, *words.format(**files).split())
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "words", ["info", "caption two_images --output out --model", "evaluate two_images --output out --beside"]
)
def test_a_folder_named_like_a_bundled_model_makes_the_name_ambiguous(
    two_images, tmp_path, saved_model, monkeypatch, capsys, words
):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(saved_model, tmp_path / "scenes")
    message = (
        "`scenes` is both a bundled model and a file or folder here. Write `./scenes` for the folder, or run the "
        "command elsewhere for the bundled model."
    )
    assert message in fails(capsys, *words.split(), "scenes")


def test_a_folder_named_like_a_bundled_model_is_used_by_its_path(tmp_path, saved_model, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(saved_model, tmp_path / "scenes")
    assert svqvae("info", "./scenes") == 0
    assert "SVQVAE" in capsys.readouterr().out


def test_a_folder_of_pictures_leaves_the_name_of_a_bundled_model_alone(two_images, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "scenes").mkdir()
    shutil.copy(two_images / "a.png", tmp_path / "scenes" / "prompt_0_0.png")
    (tmp_path / "scenes" / ".svqvae-generate.jsonl").touch()
    assert svqvae("info", "scenes") == 0
    assert "ForCausalLM" in capsys.readouterr().out
    (tmp_path / "scenes" / "checkpoint-5").mkdir()
    assert "`scenes` is both a bundled model and a file or folder here." in fails(capsys, "info", "scenes")


def test_each_command_has_two_wrong_inputs():
    assert (list(WRONG), min(map(len, WRONG.values()))) == ([*COMMANDS], 2)

"""The bundled language model, on scenes that nobody drew."""

from pathlib import Path
from random import Random

import pytest
import torch
from cli_runner import fails, svqvae
from make_scenes import Scene
from transformers import AutoTokenizer

from svqvae_hf import DEFAULT_GENERATOR
from svqvae_hf.language.image_language_model import ImageLanguageModel
from svqvae_hf.pipelines.captions import keep_known_words


@pytest.mark.slow
def test_what_it_draws_of_new_captions_it_describes_by_the_same_scene():
    model = ImageLanguageModel.from_pretrained(DEFAULT_GENERATOR, dtype=torch.float32)
    assert model.sampling == {"guidance_scale": 1.5, "temperature": 0.1, "top_k": 20, "top_p": 1.0}
    seed = Random().randrange(10**9)
    print("seed", seed)  # noqa: T201
    scenes = [Scene.draw(Random(f"{seed} {number}"), held_out=True) for number in range(32)]
    asked = [scene.plain()[0] for scene in scenes]
    captions = model.caption(model.draw(asked))
    assert sum(map(str.__eq__, captions, asked)) >= 23
    assert sum(map(str.__eq__, captions, asked[1:] + asked[:1])) <= 2


def test_folder_is_as_large_as_documented():
    assert sum(file.stat().st_size for file in Path(DEFAULT_GENERATOR).rglob("*") if file.is_file()) <= 15e6


@pytest.mark.slow
def test_the_command_draws_without_a_model(tmp_path, capsys):
    assert svqvae("generate", "--prompt", "a whale above a guitar on pink", "--output", tmp_path / "out") == 0
    assert (tmp_path / "out" / "prompt_0_0.png").is_file()
    told = (
        "svqvae: the model's temperature is 0.1, so seeds hardly change an image. For others, pass --temperature 1.\n"
    )
    assert told in capsys.readouterr().err
    warm = ["--prompt", "a fox on pink", "--temperature", 1, "--num-images", 2, "--output", tmp_path / "warm"]
    assert svqvae("generate", *warm) == 0
    assert "temperature" not in capsys.readouterr().err
    first, second = sorted((tmp_path / "warm").glob("*.png"))
    assert first.read_bytes() != second.read_bytes()
    assert svqvae("generate", "--prompt", "a lovely fox on pink", "a fox on pink", "--output", tmp_path / "two") == 0
    assert "svqvae: unknown to the model and left out: lovely\n" in capsys.readouterr().err
    error = fails(capsys, "generate", "--prompt", "Unicorns!", "--output", tmp_path / "none")
    assert "a prompt must have a word that the model knows, got 'Unicorns!'. It knows 2, 3, 4, a, above, " in error
    assert not (tmp_path / "none").exists()


def test_capitals_and_punctuation_are_ignored_and_unknown_words_left_out_with_one_warning():
    tokenizer = AutoTokenizer.from_pretrained(DEFAULT_GENERATOR)
    assert keep_known_words(tokenizer, ["a fox on pink", ""]) == ["a fox on pink", ""]
    assert tokenizer("<s>A FOX on Pink!<|image_00003|>") == tokenizer("<s>a fox on pink<|image_00003|>")
    with pytest.warns(UserWarning, match="unknown to the model and left out: Unicorn's, nice$") as warned:
        kept = keep_known_words(tokenizer, ["A Unicorn's fox", "a nice fox on nice-blue", "a fox"])
    assert tokenizer(kept).input_ids == tokenizer(["a fox", "a fox on -blue", "a fox"]).input_ids
    assert len(warned) == 1
    with pytest.warns(UserWarning, match="unknown to the model and left out: 🙂, 👍🏽, \\+$"):
        assert keep_known_words(tokenizer, ["a fox 🙂 on pink!", "👍🏽 + a fox"]) == ["a fox  on pink!", "  a fox"]
    with pytest.raises(ValueError, match="must have a word that the model knows, got '🙂'"):
        keep_known_words(tokenizer, ["🙂"])
    with pytest.raises(ValueError, match="must have a word that the model knows, got 'lovely unicorns'"):
        keep_known_words(tokenizer, ["a fox", "lovely unicorns"])


@pytest.mark.parametrize("option", [["--class", "3"], ["--steps", "1"]])
def test_options_of_pipelines_are_refused(option, tmp_path, capsys):
    assert f"{option[0]} does not apply to the bundled model" in fails(
        capsys, "generate", *option, "--output", tmp_path / "out"
    )

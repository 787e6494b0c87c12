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


@pytest.mark.slow
def test_what_it_draws_of_new_captions_it_describes_by_the_same_scene():
    model = ImageLanguageModel.from_pretrained(DEFAULT_GENERATOR, dtype=torch.float32)
    assert model.sampling == {"guidance_scale": 1.5, "temperature": 0.1, "top_k": 20, "top_p": 1.0}
    assert model.rewrites
    seed = Random().randrange(10**9)
    print("seed", seed)  # noqa: T201
    scenes = [Scene.draw(Random(f"{seed} {number}"), held_out=True) for number in range(32)]
    asked = [scene.plain()[0] for scene in scenes]
    captions = model.caption(model.draw(asked))
    assert sum(map(str.__eq__, captions, asked)) >= 23
    assert sum(map(str.__eq__, captions, asked[1:] + asked[:1])) <= 2


def test_folder_is_as_large_as_documented():
    assert sum(file.stat().st_size for file in Path(DEFAULT_GENERATOR).rglob("*") if file.is_file()) <= 12e6


@pytest.mark.slow
def test_the_command_draws_without_a_model(tmp_path, capsys):
    assert svqvae("generate", "--prompt", "a whale above a guitar on pink", "--output", tmp_path / "out") == 0
    assert (tmp_path / "out" / "prompt_0_0.png").is_file()
    messages = capsys.readouterr().err
    told = (
        "svqvae: the model's temperature is 0.1, so seeds hardly change an image. For others, pass --temperature 1.\n"
    )
    assert told in messages
    assert "is drawn as" not in messages
    warm = ["--prompt", "please draw a nice fox on pink", "--temperature", 1, "--num-images", 2]
    assert svqvae("generate", *warm, "--output", tmp_path / "warm") == 0
    messages = capsys.readouterr().err
    assert "temperature" not in messages
    assert "svqvae: 'please draw a nice fox on pink' is drawn as 'a fox on pink'\n" in messages
    first, second = sorted((tmp_path / "warm").glob("*.png"))
    assert first.read_bytes() != second.read_bytes()


def test_every_text_has_tokens_and_capitals_are_ignored():
    tokenizer = AutoTokenizer.from_pretrained(DEFAULT_GENERATOR)
    assert tokenizer("<s>A FOX on Pink<|image_00003|>") == tokenizer("<s>a fox on pink<|image_00003|>")
    for prompt in ("a lovely fox", "Unicorn's 🙂 👍🏽 +", "Füchse & 狐"):
        assert len(tokenizer(prompt).input_ids) >= 3
    assert tokenizer.unk_token_id is None


@pytest.mark.parametrize("option", [["--class", "3"], ["--steps", "1"]])
def test_options_of_pipelines_are_refused(option, tmp_path, capsys):
    assert f"{option[0]} does not apply to the bundled model" in fails(
        capsys, "generate", *option, "--output", tmp_path / "out"
    )

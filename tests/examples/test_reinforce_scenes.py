import importlib
import sys
from types import SimpleNamespace

import pytest
import torch
from make_scenes import Scene
from PIL import Image

from svqvae_hf import DEFAULT_GENERATOR, SVQVAEProcessor
from svqvae_hf.language.image_language_model import ImageLanguageModel

FOX = Scene("blue", (("large", "fox"),))


@pytest.fixture
def example(monkeypatch):
    """The example, without TRL, which the development environment does not have."""
    monkeypatch.setitem(sys.modules, "trl", SimpleNamespace(GRPOConfig=None, GRPOTrainer=None))
    yield importlib.import_module("reinforce_scenes")
    del sys.modules["reinforce_scenes"]


@pytest.mark.parametrize(
    ("meaning", "reward"),
    [("a large fox on blue", 1.0), ("a large fox", 1.0), ("a large cat on blue", 2 / 6), ("three cats", 0.0)],
)
def test_the_reward_is_whole_for_the_meaning_and_less_for_a_part_of_it(meaning, reward, example):
    assert example.grade(FOX, meaning) == pytest.approx(reward)


def test_the_reward_reads_the_picture_of_the_tokens(example):
    processor = SVQVAEProcessor.from_pretrained(DEFAULT_GENERATOR)
    picture = Image.new("RGB", (96, 96), "navy")
    (ids,) = processor.encode_images([picture])
    tokens = (ids + processor.vocabulary.first_token).flatten().tolist()
    pictures = []

    def read(picture):
        pictures.append(picture)
        return FOX

    rewards = example.make_reward(processor, read)(completion_ids=[tokens], meaning=["a large fox"], prompts=[""])
    assert rewards == [1.0]
    (expected,) = processor.decode_images([ids])
    assert pictures[0].tobytes() == expected.tobytes()


def test_the_first_code_is_due_at_the_end_of_a_prompt(example):
    model = ImageLanguageModel.from_pretrained(DEFAULT_GENERATOR)
    processor = model.processor
    (prompt,) = example.prompts_of(model, ["a fox on blue"])
    tokens = torch.tensor(processor.tokenizer(prompt).input_ids)
    assert tokens[-2:].tolist() == processor.vocabulary.begin_image(processor.vocabulary.grids[0])

import importlib
import sys
from types import SimpleNamespace

import pytest
from make_scenes import Scene
from PIL import Image

from svqvae_hf import DEFAULT_GENERATOR, SVQVAEProcessor

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


@pytest.fixture(scope="module")
def processor():
    return SVQVAEProcessor.from_pretrained(DEFAULT_GENERATOR)


def test_the_reward_reads_the_picture_after_the_caption_of_an_answer(processor, example):
    picture = Image.new("RGB", (96, 96), "navy")
    (ids,) = processor.encode_images([picture])
    caption = processor.tokenizer("a fox on blue", add_special_tokens=False).input_ids
    answer = [*caption, *processor.vocabulary.encode(ids), processor.tokenizer.eos_token_id]
    pictures = []

    def read(picture):
        pictures.append(picture)
        return FOX

    reward = example.make_reward(processor, read)
    assert reward(completion_ids=[answer], meaning=["a large fox"], prompts=[""]) == [1.0]
    (expected,) = processor.decode_images([ids])
    assert pictures[0].tobytes() == expected.tobytes()


@pytest.mark.parametrize("wrong", ["without a picture", "cut", "a code too many"])
def test_an_answer_without_a_whole_picture_has_no_reward(wrong, processor, example):
    (ids,) = processor.encode_images([Image.new("RGB", (96, 96), "navy")])
    tokens = processor.vocabulary.encode(ids)
    first_code = processor.vocabulary.first_token
    answers = {
        "without a picture": processor.tokenizer("a fox on blue", add_special_tokens=False).input_ids,
        "cut": tokens[:-2],
        "a code too many": [*tokens[:-1], first_code, tokens[-1]],
    }
    reward = example.make_reward(processor, lambda _: FOX)
    assert reward(completion_ids=[answers[wrong]], meaning=["a large fox"], prompts=[""]) == [0.0]

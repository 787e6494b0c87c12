"""Things in prompts that the bundled model cannot draw."""

import make_scenes
import pytest
import torch
from cli_runner import svqvae
from conftest import ROOT
from tiny_language_models import load_extended

from svqvae_hf import DEFAULT_GENERATOR
from svqvae_hf.language.image_language_model import ImageLanguageModel
from svqvae_hf.pipelines.known_objects import KnownObjects, say_rewritten
from svqvae_hf.pipelines.known_objects_file import KNOWN_OBJECTS_FILE, read_known_objects, write_known_objects

OBJECTS = KnownObjects(
    names=frozenset(["a", "on", "bearded dragon", "dragon green", "fox", "soup bowl"]),
    things=frozenset(["dragon", "cherry", "scarf", "soup", "church"]),
    objects=("fox",),
    grounds=("green",),
)


@pytest.mark.parametrize(
    ("prompt", "things"),
    [
        ("", []),
        ("A Dragon on pink!", ["dragon"]),
        ("a bearded dragon", []),
        ("two bearded dragons and two dragons", ["dragons"]),
        ("a fox on dragon-green", []),
        ("three cherries, cherries", ["cherries"]),
        ("a church and two scarves", ["church", "scarves"]),
        ("a fox for my soup, red like a cherry", []),
        ("a soup bowl", []),
        ("the fox’s church", ["church"]),
    ],
)
def test_things_are_found_by_the_longest_name(prompt, things):
    assert OBJECTS.unknown(prompt) == things


@pytest.mark.parametrize(
    ("prompt", "thing"),
    [
        ("a toaster on blue", "toaster"),
        ("two kangaroos", "kangaroos"),
        ("a unicorn above a house", "unicorn"),
        ("four pairs of scissors on green", "scissors"),
        ("A SUBMARINE next to a whale", "submarine"),
    ],
)
def test_the_bundled_model_tells_what_it_cannot_draw(prompt, thing):
    assert read_known_objects(DEFAULT_GENERATOR).unknown(prompt) == [thing]


@pytest.mark.parametrize("prompt", ["please draw a tiny poodle on lilac", "my bearded dragon left of a steam train"])
def test_it_knows_kinds_of_its_objects(prompt):
    assert read_known_objects(DEFAULT_GENERATOR).unknown(prompt) == []


def test_the_bundled_model_lists_what_its_training_pictures_show():
    known_objects = read_known_objects(DEFAULT_GENERATOR)
    assert known_objects.objects == tuple(make_scenes.OBJECTS)
    assert known_objects.grounds == tuple(make_scenes.GROUNDS)
    assert known_objects.names.issuperset(known_objects.objects + known_objects.grounds)


def test_they_come_back_from_a_folder_and_a_damaged_file_is_one_error(tmp_path):
    assert read_known_objects(tmp_path) is None
    write_known_objects(OBJECTS, tmp_path)
    assert read_known_objects(tmp_path) == OBJECTS
    (tmp_path / KNOWN_OBJECTS_FILE).write_text('{"names": []}')
    with pytest.raises(ValueError, match="must have a list of `things`"):
        read_known_objects(tmp_path)


def test_each_thing_that_strangers_asked_for_in_vain_is_named():
    known_objects = read_known_objects(DEFAULT_GENERATOR)
    for line in (ROOT / "benchmarks" / "scene_prompts_unknown.tsv").read_text().splitlines():
        prompt, thing = line.split("\t")  # such as "cup of coffee": naming one of its words is enough
        assert any(word in thing for word in known_objects.unknown(prompt)), prompt


def test_a_model_without_them_does_not_leave_those_of_an_earlier_model(tmp_path):
    language_model, processor = load_extended("qwen")
    ImageLanguageModel(language_model, processor, OBJECTS).save_pretrained(tmp_path)
    assert ImageLanguageModel.from_pretrained(tmp_path).known_objects == OBJECTS
    ImageLanguageModel(language_model, processor).save_pretrained(tmp_path)
    assert ImageLanguageModel.from_pretrained(tmp_path).known_objects is None


@pytest.mark.filterwarnings("ignore:unknown to the model:UserWarning")
def test_drawing_warns_of_them_once():
    model = ImageLanguageModel.from_pretrained(DEFAULT_GENERATOR, dtype=torch.float32)
    with pytest.warns(UserWarning, match="the model cannot draw: toaster, kangaroo$"):
        model.draw(["a fox and a toaster", "a fox and a kangaroo"], temperature=0)


@pytest.mark.slow
def test_the_command_names_them(tmp_path, capsys):
    assert svqvae("generate", "--prompt", "a fox and a toaster", "--output", tmp_path / "out") == 0
    assert "svqvae: the model cannot draw: toaster\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("prompt", "caption", "note"),
    [
        ("shark left of penguin, black bg", "a shark left of a penguin on black", ""),
        ("Please draw three foxes on a white background!", "three foxes on white", ""),
        ("a shark left of a penguin", "a penguin left of a shark", "drawn as 'a penguin left of a shark'"),
        ("three foxes on white", "two foxes on white", "drawn as 'two foxes on white'"),
        ("a fox", "a fox on red", "drawn as 'a fox on red'"),
        ("a fox, a dog and a cat", "a fox above a dog", "drawn as 'a fox above a dog'"),
        ("a fox and a kitten", "a fox", "drawn as 'a fox'"),
        ("mon chat noir sur fond bleu", "a frog on blue", "hardly understood, and drawn as 'a frog on blue'"),
        ("ein Schloss am Meer", "a dog on blue", "hardly understood, and drawn as 'a dog on blue'"),
        ("old wooden lighthouse at sunset", "a house on red", "drawn as 'a house on red'"),
        ("my bearded dragon", "a lizard", "drawn as 'a lizard'"),
        ("🦊", "a fox", "drawn as 'a fox'"),
    ],
)
def test_a_caption_is_told_if_it_does_not_plainly_say_the_same(prompt, caption, note):
    assert say_rewritten(prompt, caption, read_known_objects(DEFAULT_GENERATOR)) == note


def test_captions_of_a_model_that_lists_its_objects_come_with_a_warning(tmp_path, capsys):
    photograph = ROOT / "docs" / "images" / "chelsea.png"
    assert svqvae("caption", photograph, "--model", DEFAULT_GENERATOR, "--output", tmp_path / "out") == 0
    assert "the model knows only pictures of 64 objects" in capsys.readouterr().err

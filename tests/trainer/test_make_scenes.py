import re
from itertools import cycle
from random import Random

import numpy as np
import pytest
from make_scenes import GROUNDS, HELD_OUT_PAIRS, OBJECTS, Scene, make_rows
from PIL import Image
from scene_captions import PLAIN, CaptionWriter, Recipe, plural
from scenes import LAYOUTS, PROMPTS, Grader, grade


@pytest.fixture(scope="module")
def objects():
    """A pattern of its own per object, in place of the font."""
    patterns = np.random.default_rng(0).integers(0, 256, (len(OBJECTS), 5, 5, 4)) | [0, 0, 0, 255]
    images = map(Image.fromarray, patterns.astype(np.uint8))
    return {name: each.resize((80, 80), Image.Resampling.NEAREST) for name, each in zip(OBJECTS, images, strict=True)}


def scenes(count, held_out):
    return [Scene.draw(Random(f"test {number}"), held_out) for number in range(count)]


def names_in(text):
    """Objects of a plain caption, in its order."""
    singular = {form: name for name in OBJECTS for form in (name, plural(name))}
    return [singular[word] for word in re.findall(r"\w+", text) if word in singular]


def test_captions_name_the_objects_and_the_ground_of_their_scene():
    own_words = {"names": 0, "wordnet_names": 0, "adjectives": 0, "colours": 0, "xkcd_colours": 0, "typos": 0}
    writer = CaptionWriter(Recipe(**own_words))
    random = Random(0)
    for scene in scenes(200, False) + scenes(50, True):
        for held_out in (False, True):
            caption = scene.caption(random, held_out, writer)
            assert set(names_in(caption.lower())) == set(scene.names), caption
            assert scene.ground in caption or not held_out
            assert not re.search(r"\ba [aeiou]|[{}]", caption)


def test_no_phrase_names_an_object_itself():
    for voice in CaptionWriter(Recipe()).voices:
        for kind in (*PLAIN, "frames", "leads"):
            for phrase in voice[kind]:
                assert not names_in(re.sub(r"{\w+}", "", phrase.lower())), phrase


def test_every_phrase_and_frame_of_every_writer_can_be_filled_in():
    writer = CaptionWriter(Recipe())
    for voice in writer.voices:
        for kind in PLAIN:
            names = 2 if " " in kind else 1
            for phrase in voice[kind]:
                slots = set(re.findall(r"{(\w+)}", phrase))
                assert slots <= {"0", "1", "many", "size", "g"}
                assert {"0", "many"} & slots, phrase
                assert ("1" in slots) == (names == 2), phrase
                assert "size" not in slots or kind in ("small", "large")
        assert all({*re.findall(r"{(\w+)}", frame)} == {"p", "g"} for frame in voice["frames"])
        assert all({*re.findall(r"{(\w+)}", lead)} == {"p"} for lead in voice["leads"])


def test_no_name_means_two_objects():
    owners = {}
    for wordings in (*CaptionWriter(Recipe()).voices, CaptionWriter(Recipe()).wordnet):
        for name, others in wordings["objects"].items():
            for other in others:
                assert other.lower() not in OBJECTS
                assert owners.setdefault(other.lower(), name) == name, other


@pytest.mark.parametrize(
    ("noun", "several"),
    [
        ("fox", "foxes"),
        ("key", "keys"),
        ("puppy", "puppies"),
        ("bear cub", "bear cubs"),
        ("slice of pizza", "slices of pizza"),
        ("elephant calf", "elephant calves"),
        ("aircraft", "aircraft"),
    ],
)
def test_plurals(noun, several):
    assert plural(noun) == several


def test_plain_captions_mean_their_own_scene_alone():
    scene_of_caption = {scene.plain()[0]: scene for scene in scenes(300, False) if len(scene.objects) > 1}
    for caption, scene in scene_of_caption.items():
        assert [other for other in scene_of_caption.values() if other.means(caption)] == [scene]
    scene = Scene("red", (("left", "fox"), ("right", "pear")))
    for caption in ("a fox beside a pear", "a pear beside a fox on red", "a fox left of a pear"):
        assert scene.means(caption)
    for caption in ("a fox and a pear on red", "a pear and a fox"):
        assert scene.means(caption)
    for caption in ("a pear left of a fox", "a fox beside a pear on blue", "a fox above a pear"):
        assert not scene.means(caption)


def test_every_everyday_prompt_can_be_fulfilled():
    meanings = {}
    for line in PROMPTS.read_text("utf-8").splitlines():
        prompt, meaning = line.split("\t")
        meanings[prompt] = meaning
    assert len(meanings) == 200
    for meaning in meanings.values():
        assert any(scene.means(meaning) for scene in scenes_with(names_in(meaning))), meaning


def scenes_with(names):
    """Scenes of all layouts on all grounds, which show some objects in turn."""
    names = list(dict.fromkeys(names))  # without repetition
    for slots in LAYOUTS:
        objects = tuple(zip(slots, cycle(names), strict=False))
        for ground in GROUNDS:
            yield Scene(ground, objects)


def test_training_shows_no_held_out_pair_or_wording(objects):
    for row in make_rows(0, 200, False, objects):
        assert set(names_in(row["short_caption"])) not in HELD_OUT_PAIRS
    for scene in scenes(50, True):
        assert scene.held_out
    writer = CaptionWriter(Recipe(noise=0, typos=0))  # noise can make one wording of two
    for scene in scenes(5, False):
        training_captions = {scene.caption(Random(number), False, writer) for number in range(500)}
        held_out_captions = {scene.caption(Random(number), True, writer) for number in range(500)}
        assert len(held_out_captions) > 300
        assert training_captions.isdisjoint(held_out_captions)


def test_the_grader_reads_shifted_scenes_and_sees_each_mistake(objects):
    grader, asked, random = Grader(objects), scenes(30, False) + scenes(10, True), Random(0)
    pictures = [scene.render(objects, random) for scene in asked]
    assert [*map(grader, pictures)] == asked
    wrong = grade("", [*map(grader, pictures[1:] + pictures[:1])], asked)
    assert all(float(wrong[name]) < 70 for name in ("scene", "objects", "places", "ground"))

from random import Random

import numpy as np
import pytest
from make_scenes import HELD_OUT_PAIRS, OBJECTS, Scene, make_rows
from PIL import Image
from scenes import Grader, grade


@pytest.fixture(scope="module")
def objects():
    """A pattern of its own per object, in place of the font."""
    random = np.random.default_rng(0)
    patterns = [random.integers(0, 256, (5, 5, 4), np.uint8) | [0, 0, 0, 255] for _ in OBJECTS]
    resize = [
        Image.fromarray(pattern.astype(np.uint8)).resize((80, 80), Image.Resampling.NEAREST) for pattern in patterns
    ]
    return dict(zip(OBJECTS, resize, strict=True))


def scenes(count, held_out):
    return [Scene.draw(Random(f"test {number}"), held_out) for number in range(count)]


def test_every_wording_means_its_scene():
    for scene in scenes(50, False) + scenes(50, True):
        for caption in scene.captions() + scene.captions(held_out=True):
            assert Scene.parse(caption) == scene


@pytest.mark.parametrize(
    "caption", ["a fox", "a fox on blue on blue", "two foxes left of a teapot on blue", "a unicorn on blue"]
)
def test_what_describes_no_scene_is_refused(caption):
    with pytest.raises(ValueError, match="must describe a scene"):
        Scene.parse(caption)


def test_training_shows_no_held_out_pair_or_wording(objects):
    rows = [*make_rows(0, 200, False, objects)]
    for row in rows:
        scene = Scene.parse(row["caption"][0])
        assert frozenset(name for _, name in scene.objects) not in HELD_OUT_PAIRS
        assert not set(row["caption"]) & set(scene.captions(held_out=True))
    assert all(scene.held_out for scene in scenes(50, True))


def test_the_grader_reads_shifted_scenes_and_sees_each_mistake(objects):
    grader, asked, random = Grader(objects), scenes(30, False) + scenes(10, True), Random(0)
    pictures = [scene.render(objects, random) for scene in asked]
    assert [*map(grader, pictures)] == asked
    wrong = grade("", [*map(grader, pictures[1:] + pictures[:1])], asked)
    assert all(float(wrong[name]) < 70 for name in ("scene", "objects", "places", "ground"))

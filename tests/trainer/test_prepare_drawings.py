"""Parts of the drawings that the bundled model is trained on."""

from random import Random

import numpy as np
import pytest
from PIL import Image
from prepare_drawings import Artist, alone, group_alike, on_ground, split_drawings, split_groups


@pytest.fixture(scope="module")
def vectors():
    """Families of vectors, each a random walk whose ends differ more than two families may."""
    rng = np.random.default_rng(0)
    starts = rng.uniform(0, 255, (60, 1, 12))
    return (starts + rng.uniform(0, 6, (60, 9, 12)).cumsum(1)).reshape(-1, 12).astype(np.float32)


def test_vectors_of_a_group_are_reached_by_small_steps_and_groups_are_apart(vectors):
    groups = group_alike(vectors, 8.0)
    assert sorted(index for group in groups for index in group) == list(range(len(vectors)))
    label = {index: number for number, group in enumerate(groups) for index in group}
    for index, vector in enumerate(vectors):
        differences = np.sqrt(((vectors - vector) ** 2).mean(1))
        for other in np.flatnonzero(differences < 7.99):
            assert label[index] == label[other]
    assert all(len({index // 9 for index in group}) < 60 for group in groups)
    assert any(len(group) > 1 for group in groups)


@pytest.mark.parametrize("seed", range(5))
def test_parts_share_no_group_and_hold_at_most_the_cap_of_each(seed):
    random = Random(seed)
    groups = [[10 * number + index for index in range(random.randrange(1, 9))] for number in range(200)]
    parts = split_groups(groups, every=20, cap=3)
    for group in groups:
        held = [len({*group} & {*part}) for part in parts.values()]
        assert sorted(held) == [0, 0, min(3, len(group))]
    assert [sum(10 * (index // 10) == index for index in part) for part in parts.values()] == [180, 10, 10]


def test_drawings_that_look_alike_stay_together_and_broken_ones_are_left_out():
    def plain(value, side):
        return Image.new("RGBA", (side, side), (value,) * 3)

    def broken(side):
        raise ValueError("no size")

    def empty(side):
        return Image.new("RGBA", (side, side))

    draws = [lambda side, value=value: plain(value, side) for value in (0, 3, 6, 100, 103, 200)]
    parts = split_drawings([broken, *draws, empty])
    assert parts == {"test": draws[:3], "choose": [], "train": draws[3:]}


def test_a_drawing_lies_at_the_centre():
    image = np.asarray(alone(lambda side: Image.new("RGBA", (side, side // 2), "black"), 8))
    assert (image[2:6] == 0).all()
    assert (image[:2] == 255).all()
    assert (image[6:] == 255).all()


def test_text_can_be_read_on_its_ground():
    artist = Artist([], [], seed=0)
    for value in (0, 60, 200, 255):
        ground = Image.new("L", (4, 4), value).convert("RGB")
        assert all(abs(np.mean(artist.ink(ground)) - value) > 50 for _ in range(50))


def test_sheets_hold_their_cells_row_by_row():
    artist = Artist([], [], seed=0)
    cells = [lambda side, value=value: Image.new("RGBA", (side, side), (value,) * 3) for value in range(4)]
    sheet = artist.sheet(cells, side=256, square=512)
    centres = [(128 + 256 * column, 128 + 256 * row) for row in range(2) for column in range(2)]
    assert [sheet.getpixel(centre)[0] for centre in centres] == [0, 1, 2, 3]


def test_part_of_a_ground_stays():
    ground = on_ground(Image.new("RGBA", (2, 2)), Image.new("RGB", (4, 4), "red"))
    assert ground.getcolors() == [(16, (255, 0, 0))]

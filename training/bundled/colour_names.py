"""Finds names of colours in the colour survey of xkcd: `colour_names.py OUT`.

OUT is `wordings/xkcd.json`: names of the grounds of scenes. matplotlib has the survey (CC0): 949 names that people
gave to colours, each with its most typical colour. A name means the ground that most of its neighbours are named
after.
"""

import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
from make_scenes import GROUNDS, OBJECTS
from matplotlib.colors import XKCD_COLORS, to_rgb
from scene_captions import VOICES, read_wordings, texts_of

from svqvae_hf.trainer.scripts import one_line_errors, script_parser

NUM_NEIGHBOURS = 12
MIN_NEIGHBOURS = 9  # that must agree on a name such as "emerald"
MIN_NEIGHBOURS_IF_NAMED = 6  # that must agree on a name such as "grass green"
OTHER_NAMES = {"gray": "grey", "violet": "purple", "brown": "brown", "teal": "teal"}  # two that are no ground
NOT_IN_NAMES = re.compile(
    "piss|poo|shit|vomit|snot|booger|barf|puke|diarrhea|pee|bile|sick|nasty|blood|baby|flesh|skin|camo"
)
# From linear red, green and blue to Oklab, where distances are what people see (Björn Ottosson, 2020).
LINEAR_TO_CONES = np.array(
    [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
)
CONES_TO_OKLAB = np.array(
    [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
)


def to_oklab(colour: str) -> np.ndarray:
    """Lightness and two hues of a colour such as `#a0bf16`."""
    rgb = np.array(to_rgb(colour))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    return CONES_TO_OKLAB @ np.cbrt(LINEAR_TO_CONES @ linear)


def colour_word(name: str) -> str | None:
    """The ground, brown or teal that the last word of a name says: "green" for "grass green", None for "emerald"."""
    last_word = name.split()[-1]
    if last_word in GROUNDS:
        return last_word
    return OTHER_NAMES.get(last_word)


def is_sure(name: str, ground: str, votes: int) -> bool:
    """Whether a name surely means a ground, and may stand in captions.

    Args:
        name (`str`): Name of a colour, such as "grass green" or "emerald".
        ground (`str`): The ground that most of its neighbours are named after.
        votes (`int`): How many of its `NUM_NEIGHBOURS` neighbours are.
    """
    other_words = {*GROUNDS, *OTHER_NAMES} - {ground}
    if NOT_IN_NAMES.search(name) or not other_words.isdisjoint(name.split()):
        return False
    if colour_word(name) is None:
        return votes >= MIN_NEIGHBOURS
    return votes >= MIN_NEIGHBOURS_IF_NAMED


def vote_of_neighbours(number: int, names: list[str], positions: np.ndarray) -> tuple[str, int]:
    """The most frequent word in the names of the nearest colours, and how many of these names have it.

    The words are those of [`colour_word`], such as "green". Colours whose names have no such word do not vote.

    Args:
        number (`int`): Number of the colour whose neighbours vote.
        names (`list[str]`): Names of all colours.
        positions (`np.ndarray`): Positions of all colours in Oklab, `(names, 3)`.
    """
    distances = np.square(positions - positions[number]).sum(1)
    words: list[str] = []
    for neighbour in np.argsort(distances, kind="stable"):
        word = colour_word(names[neighbour])
        if word is not None and neighbour != number:
            words.append(word)
    votes_of_words = Counter(words[:NUM_NEIGHBOURS])
    return votes_of_words.most_common(1)[0]


def names_of_objects() -> set[str]:
    """Names of the objects, by all writers."""
    names = set(OBJECTS)
    for voice in VOICES:
        names.update(texts_of(read_wordings(voice)["objects"]))
    return names


def main() -> None:
    """Reads the argument and writes the file."""
    parser = script_parser(__doc__)
    parser.add_argument("out", type=Path, help="JSON file to write")
    out = parser.parse_args().out
    names = [name.removeprefix("xkcd:").replace("/", " ") for name in XKCD_COLORS]
    positions = np.stack([to_oklab(colour) for colour in XKCD_COLORS.values()])  # (names, 3)
    excluded_words = names_of_objects()
    names_of_ground: dict[str, list[str]] = {ground: [] for ground in GROUNDS}
    for number, name in enumerate(names):
        names_an_object = not excluded_words.isdisjoint(name.split())
        word, votes = vote_of_neighbours(number, names, positions)
        is_ground = word in GROUNDS  # the word may also be "brown" or "teal"
        if is_ground and is_sure(name, word, votes) and not names_an_object:
            names_of_ground[word].append(name)
    out.write_text(json.dumps({"colours": names_of_ground}, indent=0) + "\n", encoding="utf-8")


if __name__ == "__main__":
    with one_line_errors():
        main()

"""Writes captions of scenes in the wordings of several writers.

`wordings/` has one JSON file per writer: phrases for each kind of scene, frames that name the ground, leads that stand
around a caption, and other names for objects, colours and sizes. Nobody read what another had written. Names of
`wordings/wordnet.json` are from WordNet; `wordnet.py` makes it.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random
from typing import Any
from zlib import crc32

FOLDER = Path(__file__).with_name("wordings")
VOICES = (
    "first",
    "terse",
    "chatty",
    "polite",
    "narrative",
    "observer",
    "child",
    "learner",
    "texter",
    "curator",
    "parent",
)
PLAIN = {
    "small": ["a small {0}", "a {0}"],
    "large": ["a {0}", "a large {0}"],
    "two": ["two {many}"],
    "three": ["three {many}"],
    "four": ["four {many}"],
    "left right": [
        "a {0} left of a {1}",
        "a {0} beside a {1}",
        "a {1} beside a {0}",
        "a {0} and a {1}",
        "a {1} and a {0}",
    ],
    "top bottom": ["a {0} above a {1}", "a {0} and a {1}", "a {1} and a {0}"],
}
SAME_PLURAL = ("aircraft", "spacecraft", "rotorcraft", "fish", "swine", "longlegs")
FILLERS = "just really simply actually um maybe now very nice also then well only kind sort".split()
LONGEST = 20  # words of a caption, so that batches need little padding
SIMILES = {"dinosaur", "dinosaurs"}  # in phrases, "as big as a dinosaur", but nothing that a scene shows
HELD_OUT_EVERY = 4  # one in so many pairs of a phrase and a frame is in no caption of the training set
PHRASE_SLOT = "{p}"  # in frames and leads, for the phrase
GROUND_SLOT = "{g}"  # in phrases and frames, for the colour of the ground
SIZE_SLOT = "{size}"  # in phrases, for an adjective


@dataclass(frozen=True)
class Recipe:
    """How captions are written. All but the voices are probabilities.

    Args:
        voices (`tuple[str, ...]`): Writers.
        names (`float`): That a writer's other name stands for an object.
        wordnet_names (`float`): That a name of WordNet does.
        adjectives (`float`): That an object has an adjective.
        colours (`float`): That a writer's other name stands for a colour.
        xkcd_colours (`float`): That a name of xkcd's survey does.
        grounds (`float`): That a frame names the ground.
        leads (`float`): That a lead stands around the caption.
        random_words (`float`): That words of a frame and of a lead are replaced by any others.
        noise (`float`): That articles or commas are left out, or that a filler is added.
        typos (`float`): That a word has a typing error.
    """

    voices: tuple[str, ...] = VOICES
    names: float = 0.35
    wordnet_names: float = 0.1
    adjectives: float = 0.08
    colours: float = 0.4
    xkcd_colours: float = 0.1
    grounds: float = 0.85
    leads: float = 0.4
    random_words: float = 0.12
    noise: float = 0.15
    typos: float = 0.03


class CaptionWriter:
    """Writes captions by a recipe.

    Args:
        recipe ([`Recipe`]): Writers and probabilities.
    """

    def __init__(self, recipe: Recipe):
        self.recipe = recipe
        self.voices = [read_wordings(voice) for voice in recipe.voices]
        self.wordnet = read_wordings("wordnet")
        self.xkcd = read_wordings("xkcd")

    def write(self, kind: str, names: Sequence[str], ground: str, random: Random, held_out: bool = False) -> str:
        """Writes a caption of a scene.

        Args:
            kind (`str`): A key of `PLAIN`.
            names (`Sequence[str]`): Objects, in the order of its slots.
            ground (`str`): Colour of the ground.
            random (`Random`): Source of all choices.
            held_out (`bool`, defaults to `False`): Pair a phrase with a frame as no caption of the training set does.
                Such a caption names the ground.
        """
        caption = self.draft(kind, names, ground, random, held_out)
        while len(caption.split()) > LONGEST:
            caption = self.draft(kind, names, ground, random, held_out)
        return caption

    def draft(self, kind: str, names: Sequence[str], ground: str, random: Random, held_out: bool) -> str:
        """Writes a caption of any length."""
        recipe = self.recipe
        voice = random.choice(self.voices)
        caption, frame = self.phrase_and_frame(voice, kind, random, held_out)
        surroundings = PHRASE_SLOT
        if frame is not None and (held_out or random.random() < recipe.grounds):
            surroundings = frame
        if random.random() < recipe.leads:
            surroundings = random.choice(voice["leads"]).replace(PHRASE_SLOT, surroundings)
        if random.random() < recipe.random_words:
            surroundings = self.replace_words(surroundings, random)
        caption = surroundings.replace(PHRASE_SLOT, caption)
        if random.random() < recipe.noise:
            caption = add_noise(caption, random)
        caption = caption.replace(GROUND_SLOT, self.colour(ground, random))
        if kind in ("small", "large"):
            caption = caption.replace(SIZE_SLOT, self.size(kind, random))
        caption = fill(caption, [self.name(name, random) for name in names])
        if random.random() < recipe.typos:
            caption = add_typo(caption, random)
        return caption

    def phrase_and_frame(
        self, voice: dict[str, Any], kind: str, random: Random, held_out: bool
    ) -> tuple[str, str | None]:
        """Chooses a phrase and the frame around it, which is None for a phrase that names the ground itself."""
        while True:
            phrase = random.choice(voice[kind])
            names_ground = GROUND_SLOT in phrase
            if names_ground and not held_out:
                return phrase, None
            frame = random.choice(voice["frames"])
            if not names_ground and _is_held_out(phrase, frame) == held_out:
                return phrase, frame

    def name(self, name: str, random: Random) -> str:
        """Chooses a name of an object. A name that more writers use is more frequent."""
        draw = random.random()
        options = []
        if draw < self.recipe.names:
            options = self.pool("objects", name)
        elif draw < self.recipe.names + self.recipe.wordnet_names:
            options = self.wordnet["objects"][name]
        text = name
        if options:
            text = random.choice(options)
        if random.random() < self.recipe.adjectives:
            return f"{random.choice(self.wordnet['adjectives'])} {text}"
        return text

    def colour(self, ground: str, random: Random) -> str:
        """Chooses a name of a colour."""
        draw = random.random()
        if draw < self.recipe.colours:
            return random.choice(self.pool("colours", ground))
        if draw < self.recipe.colours + self.recipe.xkcd_colours:
            return random.choice([ground, *self.xkcd["colours"][ground]])
        return ground

    def size(self, kind: str, random: Random) -> str:
        """Chooses an adjective of a size."""
        return random.choice(self.pool("sizes", kind))

    def pool(self, part: str, key: str) -> list[str]:
        """What all writers wrote for an object, a colour or a size, with repetitions."""
        options = []
        for voice in self.voices:
            options += voice[part].get(key, [])
        return options

    def replace_words(self, text: str, random: Random) -> str:
        """Replaces words by any others, so that a model learns to pass over words that it does not know."""
        share = random.choice((0.3, 0.6, 1.0))
        words = []
        for word in text.split():
            if word.isalpha() and random.random() < share:
                word = random.choice(self.wordnet["words"])
            words.append(word)
        return " ".join(words)


def _is_held_out(phrase: str, frame: str) -> bool:
    """Whether a pair is in no caption of the training set, by a digest of its words, whoever wrote them."""
    digest = crc32(f"{phrase} {frame}".lower().encode())
    return digest % HELD_OUT_EVERY == 0


@cache
def read_wordings(name: str) -> dict[str, Any]:
    """Reads a file of `wordings/`."""
    return json.loads(FOLDER.joinpath(f"{name}.json").read_text("utf-8"))


def plain_phrases(kind: str, names: Sequence[str]) -> list[str]:
    """Plain captions of a kind of scene without the ground, the shortest complete one first; none of another kind."""
    return [fill(phrase, names) for phrase in PLAIN.get(kind, [])]


def fill(text: str, names: Sequence[str]) -> str:
    """Fills in the names of the objects, with their articles."""
    text = text.replace("{many}", plural(names[0]))
    for number, name in enumerate(names):
        text = text.replace(f"{{{number}}}", name)
    return re.sub(r"\b([Aa]) (?=[aeiouAEIOU])", r"\1n ", text)


def plural(noun: str) -> str:
    """Plural of a noun, which may have words before or after it."""
    parts = re.fullmatch(r"(.+?)((?: of| with| on| in| and| for) .*)?", noun)
    if parts is None:
        return noun
    head = parts[1]  # "slice" of "slice of pizza"
    tail = parts[2] or ""
    if head.endswith(SAME_PLURAL):
        return noun
    if re.search(r"[^aeiou]y$", head):
        return f"{head[:-1]}ies{tail}"
    if re.search(r"\b(calf|wolf|half)$", head):
        return f"{head[:-1]}ves{tail}"
    if re.search(r"(s|x|ch|sh)$", head):
        return f"{head}es{tail}"
    return f"{head}s{tail}"


def add_noise(caption: str, random: Random) -> str:
    """Leaves out articles or punctuation, or adds a filler."""
    kind = random.randrange(4)
    if kind == 0:
        return re.sub(r"\b(a|an|the) ", "", caption)
    if kind == 1:
        return re.sub(r"\b(a|an) ", "the ", caption)
    if kind == 2:
        return re.sub(r"[,.:;!?]", "", caption)
    words = caption.split()
    words.insert(random.randrange(len(words) + 1), random.choice(FILLERS))
    return " ".join(words)


def add_typo(caption: str, random: Random) -> str:
    """Makes a typing error in a word of at least four letters."""
    words = caption.split()
    number = random.randrange(len(words))
    word = words[number]
    if len(word) < 4:
        return caption
    position = random.randrange(1, len(word) - 1)
    before = word[:position]
    letter = word[position]
    after = word[position + 1 :]
    without_letter = before + after
    swapped = before + after[:1] + letter + after[1:]
    doubled = before + letter + letter + after
    words[number] = random.choice([without_letter, swapped, doubled])
    return " ".join(words)


def caption_words() -> set[str]:
    """Words of all phrases, frames, leads and sizes, and whole names of objects and colours, in lower case."""
    words = set()
    for voice in VOICES:
        for part, wordings in read_wordings(voice).items():
            holds_names = part in ("objects", "colours")
            for text in texts_of(wordings):
                if holds_names:
                    words.add(text.lower().replace("-", " "))
                else:
                    words.update(re.findall(r"[a-z]+(?:'[a-z]+)?", text.lower()))
    return words - SIMILES


def known_names() -> set[str]:
    """Names of objects, colours and sizes by all writers, and their words."""
    names = set()
    for voice in VOICES:
        wordings = read_wordings(voice)
        for part in ("objects", "colours", "sizes"):
            for text in texts_of(wordings[part]):
                name = text.lower()
                names.add(name)
                names.update(name.split())
    return names


def texts_of(part: Any) -> list[str]:
    """All texts of wordings, which are a text, a list of wordings, or wordings by texts."""
    if isinstance(part, str):
        return [part]
    if isinstance(part, dict):
        return texts_of(list(part.values())) + list(part)
    texts = []
    for value in part:
        texts += texts_of(value)
    return texts

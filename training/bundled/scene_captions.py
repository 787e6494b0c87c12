"""Writes captions of scenes in the wordings of several writers.

`wordings/` has one JSON file per writer: phrases for each kind of scene, frames that name the ground, leads that stand
around a caption, and other names for objects, colours and sizes. Nobody read what another had written. Names of
`wordings/wordnet.json` are from WordNet; `wordnet.py` makes it.
"""

import json
import re
from collections import Counter
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
    "designer",
    "playful",
    "british",
    "naturalist",
    "prompter",
    "american",
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
NOISES = ("no articles", "definite articles", "no punctuation", "a filler")
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
        noise (`float`): That articles or punctuation are changed or left out, or that a filler is added.
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
        phrase, frame = self.phrase_and_frame(voice, kind, random, held_out)  # "a {size} {0}" and "{p} on {g}"
        surroundings = self.surroundings(voice, frame, random, held_out)  # "please draw {p} on {g}"
        caption = surroundings.replace(PHRASE_SLOT, phrase)  # "please draw a {size} {0} on {g}"
        if happens(recipe.noise, random):
            caption = add_noise(caption, random)
        caption = caption.replace(GROUND_SLOT, self.colour(ground, random))  # "please draw a {size} {0} on sky blue"
        if kind in ("small", "large"):
            caption = caption.replace(SIZE_SLOT, self.size(kind, random))  # "please draw a tiny {0} on sky blue"
        chosen_names = [self.name(name, random) for name in names]
        caption = fill(caption, chosen_names)  # "please draw a tiny fox on sky blue"
        if happens(recipe.typos, random):
            caption = add_typo(caption, random)
        return caption

    def phrase_and_frame(
        self, voice: dict[str, Any], kind: str, random: Random, held_out: bool
    ) -> tuple[str, str | None]:
        """Chooses a phrase such as "a {0} above a {1}" and a frame such as "{p} on a {g} background".

        A phrase that names the ground itself, such as "a {g} wall with a {0}", needs no frame: the frame is None.
        Only pairs of a phrase and a frame can be held out. So with `held_out`, such phrases are drawn again, as are
        pairs that captions of the training set may have. Without it, held-out pairs are drawn again.
        """
        while True:
            phrase = random.choice(voice[kind])
            needs_frame = GROUND_SLOT not in phrase
            if not needs_frame and not held_out:
                return phrase, None
            frame = random.choice(voice["frames"])
            if needs_frame and _is_held_out(phrase, frame) == held_out:
                return phrase, frame

    def surroundings(self, voice: dict[str, Any], frame: str | None, random: Random, held_out: bool) -> str:
        """Chooses the words around a phrase, such as "please draw {p} on {g}": a lead, the frame, both or neither.

        Args:
            voice (`dict[str, Any]`): Wordings of a writer.
            frame (`str`, *optional*): Frame of the phrase, such as "{p} on {g}", if it needs one to name the ground.
            random (`Random`): Source of all choices.
            held_out (`bool`): Whether the caption must have its frame, because it is held out for its pair of a phrase
                and a frame.

        Returns:
            `str`: Words with `PHRASE_SLOT`, "{p}", in place of the phrase.
        """
        text = PHRASE_SLOT
        if frame is not None and (held_out or happens(self.recipe.grounds, random)):
            text = frame  # "{p} on {g}"
        if happens(self.recipe.leads, random):
            lead = random.choice(voice["leads"])  # "please draw {p}"
            text = lead.replace(PHRASE_SLOT, text)  # "please draw {p} on {g}"
        if happens(self.recipe.random_words, random):
            text = self.replace_words(text, random)
        return text

    def name(self, name: str, random: Random) -> str:
        """Chooses a name of an object, sometimes with an adjective before it.

        The name is one that writers use, one of WordNet, or the plain one. A name that more writers use is more
        frequent. An object keeps its plain name where writers or WordNet have no other.
        """
        writers_share = self.recipe.names
        wordnet_share = self.recipe.wordnet_names
        other_names = []
        draw = random.random()
        if draw < writers_share:
            other_names = self.pool("objects", name)
        elif draw < writers_share + wordnet_share:
            other_names = self.wordnet["objects"][name]
        chosen_name = name
        if other_names:
            chosen_name = random.choice(other_names)
        if happens(self.recipe.adjectives, random):
            adjective = random.choice(self.wordnet["adjectives"])
            return f"{adjective} {chosen_name}"
        return chosen_name

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
        """What all writers wrote for an object, a colour or a size: a text is repeated if several wrote it.

        Args:
            part (`str`): "objects", "colours" or "sizes".
            key (`str`): The object, colour or size.
        """
        texts = []
        for voice in self.voices:
            texts += voice[part].get(key, [])
        return texts

    def replace_words(self, text: str, random: Random) -> str:
        """Replaces words by any others, so that a model learns to pass over words that it does not know."""
        share = random.choice((0.3, 0.6, 1.0))
        words = []
        for word in text.split():
            if word.isalpha() and happens(share, random):
                word = random.choice(self.wordnet["words"])
            words.append(word)
        return " ".join(words)


def happens(probability: float, random: Random) -> bool:
    """Draws whether something happens that has this probability."""
    return random.random() < probability


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
    """Changes a caption in one of the ways of `NOISES`."""
    noise = random.choice(NOISES)
    if noise == "no articles":
        return re.sub(r"\b(a|an|the) ", "", caption)
    if noise == "definite articles":
        return re.sub(r"\b(a|an) ", "the ", caption)
    if noise == "no punctuation":
        return re.sub(r"[,.:;!?]", "", caption)
    words = caption.split()
    position = random.randrange(len(words) + 1)
    filler = random.choice(FILLERS)
    words.insert(position, filler)
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
    """Words that at least two writers use, and whole names of objects and colours by any writer, in lower case.

    A word that only one writer uses may be a thing that no scene shows, as in "you can stand under my umbrella". Words
    of comparisons are left out for the same reason.
    """
    names = set()
    writers_of_words: Counter[str] = Counter()
    for voice in VOICES:
        words_of_writer = set()
        for part, wordings in read_wordings(voice).items():
            holds_names = part in ("objects", "colours")
            for text in texts_of(wordings):
                if holds_names:
                    names.add(text.lower().replace("-", " "))
                else:
                    words_of_writer.update(re.findall(r"[a-z]+(?:'[a-z]+)?", text.lower()))
        writers_of_words.update(words_of_writer)
    shared_words = {word for word, num_writers in writers_of_words.items() if num_writers >= 2}
    return (names | shared_words) - SIMILES


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
    """All texts in a part of a file of `wordings/`.

    Args:
        part (`Any`): A text, a list of parts, or a dictionary whose keys are texts and whose values are parts, such as
            `{"fox": ["fox cub", "vixen"]}`.
    """
    if isinstance(part, str):
        return [part]
    if isinstance(part, dict):
        keys = list(part)
        values = list(part.values())
        return texts_of(values) + keys
    texts = []
    for entry in part:
        texts += texts_of(entry)
    return texts

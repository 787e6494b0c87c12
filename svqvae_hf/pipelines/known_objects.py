"""Finds the things in a prompt that a model cannot draw."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

LONGEST_NAME = 4  # words
WORD = re.compile(r"[a-z]+(?:'[a-z]+)?")
PURPOSES = ("for", "like")  # "three carrots for the soup", "red like wine": what follows need not be drawn
DETERMINERS = ("a", "an", "the", "my", "our", "your", "his", "her", "their", "some")


@dataclass(frozen=True)
class KnownObjects:
    """Words by which a model tells what it cannot draw.

    Args:
        names (`frozenset[str]`): Words of the training captions, and whole names in them, in lower case.
        things (`frozenset[str]`): Nouns, in singular, for things that the model cannot draw.
        objects (`tuple[str, ...]`): Plain names of the objects that the model draws, to show to people.
        grounds (`tuple[str, ...]`): Plain names of the colours of its backgrounds.
    """

    names: frozenset[str]
    things: frozenset[str]
    objects: tuple[str, ...] = ()
    grounds: tuple[str, ...] = ()

    def unknown(self, prompt: str) -> list[str]:
        """Words of a prompt for things that the model cannot draw, in the order of the prompt."""
        straight_quotes = prompt.lower().replace("’", "'")
        words = WORD.findall(straight_quotes)
        unknown = []
        position = 0
        while position < len(words):
            length = self.known_length(words[position:])
            if length:
                position += length
                continue
            word = words[position]
            is_thing = any(form in self.things for form in singulars(word))
            if is_thing and not has_purpose(words[:position]) and word not in unknown:
                unknown.append(word)
            position += 1
        return unknown

    def known_length(self, words: list[str]) -> int:
        """Number of words of the longest known name with which words start, or 0."""
        for length in range(min(LONGEST_NAME, len(words)), 0, -1):
            start = " ".join(words[: length - 1])
            for form in singulars(words[length - 1]):
                if f"{start} {form}".strip() in self.names:
                    return length
        return 0


def say_undrawable(things: Sequence[str]) -> str:
    """Sentence about things that a model cannot draw."""
    return f"the model cannot draw: {', '.join(things)}"


def singulars(word: str) -> list[str]:
    """A word, and nouns of which it may be the plural."""
    forms = [word]
    if word.endswith("ies"):
        forms.append(f"{word[:-3]}y")
    if word.endswith("ves"):
        forms.append(f"{word[:-3]}f")
    if word.endswith("es"):
        forms.append(word[:-2])
    if word.endswith("s"):
        forms.append(word[:-1])
    return forms


def has_purpose(words: list[str]) -> bool:
    """Whether the words before a noun say that it is what the picture is for, or what something is like."""
    if words and words[-1] in DETERMINERS:
        words = words[:-1]
    return bool(words) and words[-1] in PURPOSES

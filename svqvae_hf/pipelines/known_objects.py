"""Finds the things in a prompt that a model cannot draw."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

LONGEST_NAME = 4  # words
WORD = re.compile(r"[a-z]+(?:'[a-z]+)?")
PURPOSES = ("for", "like")  # "three carrots for the soup", "red like wine": what follows need not be drawn
DETERMINERS = ("a", "an", "the", "my", "our", "your", "his", "her", "their", "some")
WORD_OF_ANY_LANGUAGE = re.compile(r"[^\W_]+(?:'[^\W_]+)?")
FILLERS = frozenset(  # words without which a prompt asks for the same objects, numbers, layout and ground
    "a an the and with of on to in at is are its it that there please draw show paint make me us background bg".split()
)


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
        with_straight_quotes = prompt.lower().replace("’", "'")
        words = WORD.findall(with_straight_quotes)
        undrawable: list[str] = []
        position = 0
        while position < len(words):
            num_known_words = self.length_of_name_at_start(words[position:])
            if num_known_words > 0:
                position += num_known_words
                continue
            word = words[position]
            need_not_be_drawn = names_purpose(words[:position])  # as "soup" in "carrots for the soup"
            if self.is_thing(word) and not need_not_be_drawn and word not in undrawable:
                undrawable.append(word)
            position += 1
        return undrawable

    def knows_few_words(self, prompt: str) -> bool:
        """Whether less than half of a prompt's words are names or things, as in a prompt in another language."""
        words = all_words(prompt)
        num_words_known = 0
        position = 0
        while position < len(words):
            length = self.length_of_name_at_start(words[position:])
            if length == 0 and self.is_thing(words[position]):
                length = 1
            num_words_known += length
            position += max(length, 1)
        return 2 * num_words_known < len(words)

    def is_thing(self, word: str) -> bool:
        """Whether a noun, in singular or plural, names a thing that the model cannot draw."""
        return any(form in self.things for form in singulars(word))

    def length_of_name_at_start(self, words: list[str]) -> int:
        """Number of words of the longest known name at the start of a text, or 0."""
        longest = min(LONGEST_NAME, len(words))
        for length in range(longest, 0, -1):
            words_before_last = words[: length - 1]
            last_word = words[length - 1]
            for form in singulars(last_word):
                name = " ".join([*words_before_last, form])
                if name in self.names:
                    return length
        return 0


def say_undrawable(things: Sequence[str]) -> str:
    """Sentence about things that a model cannot draw."""
    return f"the model cannot draw: {', '.join(things)}"


def say_rewritten(prompt: str, caption: str, objects: KnownObjects | None = None) -> str:
    """Text that says how a model understood a prompt, such as "drawn as 'a fox'"; empty if the caption says the same.

    Args:
        prompt (`str`): The prompt.
        caption (`str`): Caption into which the model rewrites the prompt, and which it draws.
        objects ([`KnownObjects`], *optional*): Words that the model knows, to tell if a prompt has few of them.
    """
    if words_with_content(prompt) == words_with_content(caption):
        return ""
    if objects is not None and objects.knows_few_words(prompt):
        return f"hardly understood, and drawn as {caption!r}"
    return f"drawn as {caption!r}"


def words_with_content(text: str) -> list[str]:
    """Words of a text that may name objects, numbers, layout or ground, in their order."""
    return [word for word in all_words(text) if word not in FILLERS]


def all_words(text: str) -> list[str]:
    """Words and numbers of a text in any language, in lower case."""
    with_straight_quotes = text.lower().replace("’", "'")
    return WORD_OF_ANY_LANGUAGE.findall(with_straight_quotes)


def singulars(word: str) -> list[str]:
    """A word, and nouns that it may be the plural of."""
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


def names_purpose(words_before: list[str]) -> bool:
    """Whether a noun after these words names a purpose or a likeness, as in "for the soup", and need not be drawn."""
    words = list(words_before)
    if words and words[-1] in DETERMINERS:
        words.pop()
    return bool(words) and words[-1] in PURPOSES

"""Hints for visitors who write prompts: examples to press, and a list of what the generator can draw."""

from dataclasses import dataclass


@dataclass(frozen=True)
class PromptHints:
    """Hints for the prompts of a generator.

    Args:
        examples (`tuple[str, ...]`): Prompts to press.
        objects (`tuple[str, ...]`): Names of what it can draw.
        backgrounds (`tuple[str, ...]`): Names of the colours of its backgrounds.
        advice (`str`): Sentences on how to combine them.
    """

    examples: tuple[str, ...]
    objects: tuple[str, ...]
    backgrounds: tuple[str, ...]
    advice: str


SCENES = PromptHints(  # of the bundled language model; a test compares them with its training data
    examples=(
        "a whale above a guitar on pink",
        "three lemons on blue",
        "a tiny fox on green",
        "there is a teapot next to a pear",
    ),
    objects=(
        *("airplane", "avocado", "balloon", "banana", "bear", "bell", "bicycle", "bus", "camera", "carrot", "cat"),
        *("cow", "crab", "croissant", "crown", "dog", "dolphin", "drum", "duck", "eagle", "elephant", "flamingo"),
        *("fox", "frog", "giraffe", "guitar", "hamburger", "hedgehog", "helicopter", "horse", "house", "key"),
        *("lemon", "lion", "lizard", "locomotive", "mushroom", "octopus", "owl", "panda", "parrot", "pear"),
        *("penguin", "pig", "pineapple", "pizza", "rabbit", "robot", "rocket", "rooster", "rose", "sailboat"),
        *("shark", "snail", "spider", "sunflower", "taxi", "teapot", "tiger", "tractor", "tulip", "turtle"),
        *("whale", "zebra"),
    ),
    backgrounds=("white", "yellow", "green", "blue", "pink", "grey", "orange", "purple", "red", "black"),
    advice=(
        "One object, small or large, two to four of a kind, or two objects beside, above or below one another. An "
        "object is easiest to see on a background of another colour."
    ),
)

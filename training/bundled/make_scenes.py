"""Makes an image set of scenes: emoji on plain grounds, with captions.

    python training/bundled/make_scenes.py OUT --count 60000

A scene shows one object in one of two sizes, two or three of a kind, or two objects beside or above one another,
each shifted by 4 pixels. The objects come from Noto Color Emoji (Debian: `apt install fonts-noto-color-emoji`;
SIL OFL 1.1). One in ten pairs of objects occurs only in the split `test`, and one in four wordings in no caption.
"""

import argparse
import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random

import datasets
from PIL import Image, ImageDraw, ImageFont

from svqvae_hf.trainer.scripts import one_line_errors

SIDE = 96  # pixels of a scene
FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
FONT_SIZE = 109  # the only size of the font
GROUNDS = {
    **{"white": (255, 255, 255), "yellow": (255, 230, 120), "green": (150, 210, 130), "blue": (140, 190, 240)},
    **{"pink": (250, 180, 200), "grey": (190, 190, 195), "orange": (250, 180, 110), "purple": (190, 160, 230)},
}
OBJECTS = dict(
    each.split(":")
    for each in (
        "airplane:✈ avocado:🥑 balloon:🎈 banana:🍌 bear:🐻 bell:🔔 bicycle:🚲 bus:🚌 camera:📷 carrot:🥕 "
        "cat:🐈 cow:🐄 crab:🦀 croissant:🥐 crown:👑 dog:🐕 dolphin:🐬 drum:🥁 duck:🦆 eagle:🦅 elephant:🐘 "
        "flamingo:🦩 fox:🦊 frog:🐸 giraffe:🦒 guitar:🎸 hamburger:🍔 hedgehog:🦔 helicopter:🚁 horse:🐎 "
        "house:🏠 key:🔑 lemon:🍋 lion:🦁 lizard:🦎 locomotive:🚂 mushroom:🍄 octopus:🐙 owl:🦉 panda:🐼 "
        "parrot:🦜 pear:🍐 penguin:🐧 pig:🐖 pineapple:🍍 pizza:🍕 rabbit:🐇 robot:🤖 rocket:🚀 rooster:🐓 "
        "rose:🌹 sailboat:⛵ shark:🦈 snail:🐌 spider:🕷 sunflower:🌻 taxi:🚕 teapot:🫖 tiger:🐅 "
        "tractor:🚜 tulip:🌷 turtle:🐢 whale:🐋 zebra:🦓"
    ).split()
)
SLOTS = {  # centre, and longer side of the object, in pixels
    "small": (48, 48, 40),
    "large": (48, 48, 60),
    "left": (24, 48, 40),
    "right": (72, 48, 40),
    "top": (48, 24, 40),
    "bottom": (48, 72, 40),
    "top left": (24, 24, 40),
    "top right": (72, 24, 40),
}
ONE, TWO, THREE = ("small", "large"), ("left", "right"), ("top left", "top right", "bottom")
RELATIONS = {  # wordings of "first relation second", then of "second relation first"
    ("left", "right"): (("left of", "to the left of"), ("right of", "to the right of")),
    ("top", "bottom"): (("above", "over"), ("below", "under")),
}
SHIFTS = (-4, 4)  # pixels; they differ by the 8 of an id, so ids repeat
PAIRS = [frozenset(pair) for pair in itertools.combinations(OBJECTS, 2)]
HELD_OUT_PAIRS = frozenset(Random(0).sample(PAIRS, len(PAIRS) // 10))


@dataclass(frozen=True)
class Scene:
    """A ground, and objects in their slots, in reading order."""

    ground: str
    objects: tuple[tuple[str, str], ...]

    @property
    def held_out(self) -> bool:
        """Whether the scene shows a held-out pair of objects."""
        return frozenset(name for _, name in self.objects) in HELD_OUT_PAIRS

    def captions(self, held_out: bool = False) -> list[str]:
        """Wordings of the scene, the shortest first, or those that are held out."""
        slots, names = zip(*self.objects, strict=True)
        if len(slots) == 1:
            phrases = [with_article(f"{slots[0]} {names[0]}")]
            if slots == ("large",):
                phrases.insert(0, with_article(names[0]))
        elif len(set(names)) == 1:
            phrases = [f"{'two' if len(slots) == 2 else 'three'} {plural(names[0])}"]
        else:
            first, second = map(with_article, names)
            direct, inverse = RELATIONS[slots]
            phrases = [f"{first} {word} {second}" for word in direct]
            phrases += [f"{second} {word} {first}" for word in inverse]
        short, long = f"on {self.ground}", f"on {with_article(self.ground)} ground"
        texts = []
        for row, phrase in enumerate(phrases):
            wordings = [f"{phrase} {short}", f"{phrase} {long}", f"{short}, {phrase}", f"{long}, {phrase}"]
            own = wordings.pop((row + 1) % 4)
            texts += [own] if held_out else wordings
        return texts

    @classmethod
    def parse(cls, caption: str) -> "Scene":
        """Reads a caption.

        Raises:
            ValueError: If it describes no scene.
        """
        words = re.findall(r"\w+", caption)
        singular = {plural(name): name for name in OBJECTS} | {name: name for name in OBJECTS}
        names = [singular[word] for word in words if word in singular]
        for scene in Scene.with_names(names, [word for word in words if word in GROUNDS]):
            if caption in scene.captions() + scene.captions(held_out=True):
                return scene
        raise ValueError(f"the caption must describe a scene, but is {caption!r}.")

    @classmethod
    def with_names(cls, names: list[str], grounds: list[str]) -> Iterator["Scene"]:
        """All scenes that show objects of these names, in any slots."""
        for ground in grounds:
            if len(names) == 1:
                for slots in (*zip(ONE), TWO, THREE):
                    yield cls(ground, tuple((slot, names[0]) for slot in slots))
            elif len(names) == 2:
                for slots, order in itertools.product(RELATIONS, itertools.permutations(names)):
                    yield cls(ground, tuple(zip(slots, order, strict=True)))

    @classmethod
    def draw(cls, random: Random, held_out: bool) -> "Scene":
        """Draws a scene; `held_out` ones show a held-out pair."""
        names, kind = random.sample(list(OBJECTS), 2), random.random()
        slots: tuple[str, ...] = random.choice(list(RELATIONS))
        if not held_out and kind < 0.3:
            names, slots = names[:1], tuple(random.choices(ONE, (1, 5)))  # only here are objects large
        elif not held_out and kind < 0.45:
            slots = random.choice((TWO, THREE))
            names = names[:1] * len(slots)
        scene = cls(random.choice(list(GROUNDS)), tuple(zip(slots, names, strict=True)))
        return scene if scene.held_out == held_out else cls.draw(random, held_out)

    def render(self, objects: Mapping[str, Image.Image], random: Random | None = None) -> Image.Image:
        """Draws the picture from objects in RGBA, shifted at random, or not at all."""
        picture = Image.new("RGB", (SIDE, SIDE), GROUNDS[self.ground])
        for slot, name in self.objects:
            x, y, side = SLOTS[slot]
            shape = objects[name].copy()
            shape.thumbnail((side, side), Image.Resampling.LANCZOS)
            dx, dy = (random.choice(SHIFTS) if random else 0 for _ in "xy")
            picture.paste(shape, (x + dx - shape.width // 2, y + dy - shape.height // 2), shape)
        return picture


def with_article(noun: str) -> str:
    """A noun with its indefinite article."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def plural(noun: str) -> str:
    """Plural of an object."""
    return noun + ("es" if noun[-1] in "sx" else "s")


def load_objects(font: Path = FONT) -> dict[str, Image.Image]:
    """Draws all objects, in RGBA and cropped to what is seen.

    Raises:
        FileNotFoundError: If the font is not there.
    """
    if not font.is_file():
        raise FileNotFoundError(
            f"`{font}` must be NotoColorEmoji.ttf. Install fonts-noto-color-emoji or pass `--font`."
        )
    face, shapes = ImageFont.truetype(font, FONT_SIZE), {}
    for name, character in OBJECTS.items():
        shape = Image.new("RGBA", (160, 160))
        ImageDraw.Draw(shape).text((12, 12), character, font=face, embedded_color=True)
        shapes[name] = shape.crop(shape.getbbox())
    return shapes


def make_rows(seed: int, count: int, held_out: bool, objects: Mapping[str, Image.Image]) -> Iterator[dict]:
    """Rows of a split."""
    for number in range(count):
        random = Random(f"{seed} {number}")
        scene = Scene.draw(random, held_out)
        captions = scene.captions()
        yield {"image": scene.render(objects, random), "caption": captions, "short_caption": captions[0]}


def main() -> None:
    """Reads the arguments and writes one Parquet file per split."""
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--count", type=int, default=60000, help="scenes in the split train")
    parser.add_argument("--font", type=Path, default=FONT, help="NotoColorEmoji.ttf (default: Debian's)")
    options = parser.parse_args()
    objects = load_objects(options.font)
    options.out.mkdir(parents=True)
    text = datasets.Value("string")
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.List(text), "short_caption": text})
    for seed, (split, count) in enumerate({"train": options.count, "validation": 1000, "test": 1000}.items()):
        arguments = {"seed": seed, "count": count, "held_out": split == "test", "objects": objects}
        rows = datasets.Dataset.from_generator(make_rows, features, gen_kwargs=arguments)
        rows.to_parquet(options.out / f"{split}.parquet")


if __name__ == "__main__":
    with one_line_errors():
        main()

"""Makes an image set of scenes: emoji on plain grounds, with captions.

    python training/bundled/make_scenes.py OUT --count 80000

A scene shows one object in one of two sizes, two to four of a kind, or two objects beside or above one another,
each shifted by 4 pixels. The objects come from Noto Color Emoji (Debian: `apt install fonts-noto-color-emoji`;
SIL OFL 1.1). `scene_captions.py` writes the captions. One in ten pairs of objects occurs only in the split `test`, and
one in four pairs of a phrase and a frame in no caption.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import datasets
from PIL import Image, ImageDraw, ImageFont
from scene_captions import CaptionWriter, Recipe, plain_phrases

from svqvae_hf.trainer.scripts import one_line_errors, script_parser

SIDE = 96  # pixels of a scene
FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
FONT_SIZE = 109  # the only size of the font
GROUNDS = {
    **{"white": (255, 255, 255), "yellow": (255, 230, 120), "green": (150, 210, 130), "blue": (140, 190, 240)},
    **{"pink": (250, 180, 200), "grey": (190, 190, 195), "orange": (250, 180, 110), "purple": (190, 160, 230)},
    **{"red": (225, 85, 80), "black": (45, 45, 50)},
}
OBJECTS = dict(  # emoji by the name of the object
    entry.split(":")
    for entry in (
        "airplane:✈ avocado:🥑 balloon:🎈 banana:🍌 bear:🐻 bell:🔔 bicycle:🚲 bus:🚌 camera:📷 carrot:🥕 "
        "cat:🐈 cow:🐄 crab:🦀 croissant:🥐 crown:👑 dog:🐕 dolphin:🐬 drum:🥁 duck:🦆 eagle:🦅 elephant:🐘 "
        "flamingo:🦩 fox:🦊 frog:🐸 giraffe:🦒 guitar:🎸 hamburger:🍔 hedgehog:🦔 helicopter:🚁 horse:🐎 "
        "house:🏠 key:🔑 lemon:🍋 lion:🦁 lizard:🦎 locomotive:🚂 mushroom:🍄 octopus:🐙 owl:🦉 panda:🐼 "
        "parrot:🦜 pear:🍐 penguin:🐧 pig:🐖 pineapple:🍍 pizza:🍕 rabbit:🐇 robot:🤖 rocket:🚀 rooster:🐓 "
        "rose:🌹 sailboat:⛵ shark:🦈 snail:🐌 spider:🕷 sunflower:🌻 taxi:🚕 teapot:🫖 tiger:🐅 "
        "tractor:🚜 tulip:🌷 turtle:🐢 whale:🐋 zebra:🦓"
    ).split()
)
SLOTS = {  # (x, y, side) in pixels: centre and longer side of the object
    "small": (48, 48, 40),
    "large": (48, 48, 60),
    "left": (24, 48, 40),
    "right": (72, 48, 40),
    "top": (48, 24, 40),
    "bottom": (48, 72, 40),
    "top left": (24, 24, 40),
    "top right": (72, 24, 40),
    "bottom left": (24, 72, 40),
    "bottom right": (72, 72, 40),
}
# Slots of one object, of two to four of a kind, and of two objects
ONE = ("small", "large")
ODDS_OF_ONE = (1, 4)  # of the slots in ONE
TWO = ("left", "right")
THREE = ("top left", "top right", "bottom")
FOUR = ("top left", "top right", "bottom left", "bottom right")
SIDE_BY_SIDE = TWO
ONE_ABOVE_THE_OTHER = ("top", "bottom")
RELATIONS = (SIDE_BY_SIDE, ONE_ABOVE_THE_OTHER)
SHARE_OF_ONE = 0.5  # scenes of one object
SHARE_OF_A_KIND = 0.15  # scenes of two to four of a kind
WRITER = CaptionWriter(Recipe())
NUMBERS = {2: "two", 3: "three", 4: "four"}
HELD_OUT_SCENES = 1000  # of each split besides train
CAPTIONS = 8  # of each scene, after the plain one
SHIFTS = (-4, 4)  # pixels; they differ by the 8 of an id, so ids repeat
PAIRS = [frozenset(pair) for pair in itertools.combinations(OBJECTS, 2)]
HELD_OUT_PAIRS = frozenset(Random(0).sample(PAIRS, len(PAIRS) // 10))


@dataclass(frozen=True)
class Scene:
    """A scene.

    Args:
        ground (`str`): Colour of the ground, a key of `GROUNDS`.
        objects (`tuple[tuple[str, str], ...]`): Slot and name of each object, in reading order.
    """

    ground: str
    objects: tuple[tuple[str, str], ...]

    @property
    def held_out(self) -> bool:
        """Whether the scene shows a held-out pair of objects."""
        return frozenset(self.names) in HELD_OUT_PAIRS

    @property
    def kind(self) -> str:
        """Kind of the scene, a key of the wordings: a size, a number of equal objects, or two slots.

        Examples are "small" for one object in the slot "small", "three" for three foxes, and "left right" for a fox
        and a teapot.
        """
        slots = [slot for slot, _ in self.objects]
        if len(slots) == 1:
            return slots[0]
        shows_equal_objects = len(set(self.names)) == 1
        if shows_equal_objects:
            return NUMBERS[len(slots)]
        return " ".join(slots)

    @property
    def names(self) -> list[str]:
        """Name of each object."""
        return [name for _, name in self.objects]

    def plain(self) -> list[str]:
        """Plain captions that the scene fulfils, with and without its ground.

        The first is the shortest that says all, such as "a fox above a pear on red".
        """
        captions = []
        for phrase in plain_phrases(self.kind, self.names):
            captions += [f"{phrase} on {self.ground}", phrase]
        return captions

    def means(self, plain: str) -> bool:
        """Whether the scene fulfils a plain caption."""
        return plain in self.plain()

    def caption(self, random: Random, held_out: bool = False, writer: CaptionWriter = WRITER) -> str:
        """A caption in English; see [`CaptionWriter.write`]."""
        return writer.write(self.kind, self.names, self.ground, random, held_out)

    @classmethod
    def draw(cls, random: Random, held_out: bool) -> "Scene":
        """Draws a scene that shows a held-out pair of objects, or one that does not."""
        scene = cls._draw_any(random, pairs_only=held_out)
        while scene.held_out != held_out:
            scene = cls._draw_any(random, pairs_only=held_out)
        return scene

    @classmethod
    def _draw_any(cls, random: Random, pairs_only: bool) -> "Scene":
        """Draws a scene of any objects.

        Args:
            random (`Random`): Source of all choices.
            pairs_only (`bool`): Draw two different objects. Otherwise the scene may also show one object, or two to
                four of a kind.
        """
        # Every scene draws two names and the slots of two objects, so that all use up the same random numbers. A scene
        # of one object or of a kind does not need all of them.
        first_name, second_name = random.sample(list(OBJECTS), 2)
        draw = random.random()
        slots_of_two = random.choice(RELATIONS)
        shows_one = not pairs_only and draw < SHARE_OF_ONE
        shows_a_kind = not pairs_only and SHARE_OF_ONE <= draw < SHARE_OF_ONE + SHARE_OF_A_KIND
        slots: Sequence[str]
        if shows_one:
            slots = random.choices(ONE, weights=ODDS_OF_ONE, k=1)  # of one element, such as ["large"]
            names = [first_name]
        elif shows_a_kind:
            slots = random.choice((TWO, THREE, FOUR))
            names = [first_name] * len(slots)
        else:
            slots = slots_of_two
            names = [first_name, second_name]
        ground = random.choice(list(GROUNDS))
        objects = tuple(zip(slots, names, strict=True))
        return cls(ground, objects)

    def render(self, objects: Mapping[str, Image.Image], random: Random | None = None) -> Image.Image:
        """Draws the picture.

        Args:
            objects (`Mapping[str, Image.Image]`): Picture of each object in RGBA, from [`load_objects`].
            random (`Random`, *optional*): Shifts each object. By default all are at the centres of their slots.
        """
        picture = Image.new("RGB", (SIDE, SIDE), GROUNDS[self.ground])
        for slot, name in self.objects:
            centre_x, centre_y, longer_side = SLOTS[slot]
            if random is not None:
                centre_x += random.choice(SHIFTS)
                centre_y += random.choice(SHIFTS)
            shape = objects[name].copy()
            shape.thumbnail((longer_side, longer_side), Image.Resampling.LANCZOS)
            x = centre_x - shape.width // 2
            y = centre_y - shape.height // 2
            picture.paste(shape, (x, y), mask=shape)
        return picture


def load_objects(font: Path = FONT) -> dict[str, Image.Image]:
    """Draws all objects, in RGBA and cropped to what is seen.

    Raises:
        FileNotFoundError: If the font is not there.
    """
    if not font.is_file():
        raise FileNotFoundError(
            f"`{font}` must be NotoColorEmoji.ttf. Install fonts-noto-color-emoji or pass `--font`."
        )
    face = ImageFont.truetype(font, FONT_SIZE)
    shapes = {}
    for name, character in OBJECTS.items():
        shape = Image.new("RGBA", (160, 160))
        ImageDraw.Draw(shape).text((12, 12), character, font=face, embedded_color=True)
        shapes[name] = shape.crop(shape.getbbox())
    return shapes


def make_rows(seed: int, count: int, held_out: bool, objects: Mapping[str, Image.Image]) -> Iterator[dict]:
    """Rows of a split: a picture, its captions, and the plain one of them.

    Args:
        seed (`int`): Seed of the split.
        count (`int`): Number of rows.
        held_out (`bool`): Whether all scenes show held-out pairs of objects. Otherwise none does.
        objects (`Mapping[str, Image.Image]`): Picture of each object, from [`load_objects`].
    """
    for number in range(count):
        random = Random(f"{seed} {number}")
        scene = Scene.draw(random, held_out)
        image = scene.render(objects, random)
        plain_captions = scene.plain()
        shortest_caption = plain_captions[0]
        captions = [shortest_caption]
        for _ in range(CAPTIONS):
            captions.append(scene.caption(random))
        yield {"image": image, "caption": captions, "short_caption": shortest_caption}


def main() -> None:
    """Reads the arguments and writes one Parquet file per split."""
    parser = script_parser(__doc__)
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--count", type=int, default=80000, help="scenes in the split train")
    parser.add_argument("--font", type=Path, default=FONT, help="NotoColorEmoji.ttf (default: Debian's)")
    options = parser.parse_args()
    objects = load_objects(options.font)
    options.out.mkdir(parents=True)
    text = datasets.Value("string")
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.List(text), "short_caption": text})
    counts = {"train": options.count, "validation": HELD_OUT_SCENES, "test": HELD_OUT_SCENES}
    for seed, (split, count) in enumerate(counts.items()):
        arguments = {"seed": seed, "count": count, "held_out": split == "test", "objects": objects}
        rows = datasets.Dataset.from_generator(make_rows, features, gen_kwargs=arguments)
        rows.to_parquet(options.out / f"{split}.parquet")


if __name__ == "__main__":
    with one_line_errors():
        main()

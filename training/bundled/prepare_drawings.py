"""Makes an image folder of drawings: clip art, emoji, text, screens and charts, in three parts.

    python training/bundled/prepare_drawings.py OUT --photos PHOTOS

Clip art, emoji and the fonts of the text come from Debian packages (`apt-get download`, no root needed). Clip art is
rendered by resvg, whose wheels need no system library. `OUT/train` has squares as large as those in PHOTOS, which
`prepare_photos.py` made, stored as BMP; in a fifth of them the background is a photograph. `OUT/choose/KIND` and
`OUT/test/KIND` are held out: the first for choosing a recipe, the second for measuring its result. Each part has fonts
of its own, and drawings that look alike are in one part.
"""

import io
import re
import shutil
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from random import Random

import matplotlib.pyplot as plt
import numpy as np
import resvg_py
from fontTools.ttLib import TTFont
from matplotlib import font_manager
from PIL import Image, ImageDraw, ImageFont
from prepare_photos import SQUARE, unpack
from tqdm import tqdm

from svqvae_hf.trainer.scripts import one_line_errors, script_parser

DRAWINGS = ("openclipart-svg", "fonts-noto-color-emoji")  # public domain; SIL OFL 1.1
FONTS = {  # SIL OFL 1.1, Apache-2.0, Bitstream Vera's licence, AGPL with an exception for fonts
    "train": "lato roboto-unhinted liberation inter ebgaramond montserrat cantarell comic-neue firacode vollkorn "
    "quicksand dancingscript lobster oldstandard urw-base35 jetbrains-mono atkinson-hyperlegible linuxlibertine go "
    "comfortaa bebas-neue",
    "choose": "cabin courier-prime b612",
    "test": "dejavu-core open-sans crosextra-caladea",
}
SYMBOLS = ("Symbols", "D050000L")  # fonts without letters
SHEETS = {"text": 400, "screens": 240, "charts": 140}  # squares of the training part
HELD_OUT = 48  # images per kind in each of the other parts
HELD_OUT_EVERY = 20  # groups of drawings that look alike
ALIKE, THUMBNAIL = 14.0, 8  # root mean square difference, of 255, of thumbnails of so many pixels a side
GROUP_CAP, FOLDER_CAP = 6, 120  # drawings that are kept of those that look alike, and of a folder
SMALL, LARGE = 128, 256  # sides of drawings in pixels
LETTERS = (11, 48)  # sizes of letters in pixels
EMOJI = 109  # the only size of the emoji font

Draw = Callable[[int], Image.Image]


def draw_clip_art(path: Path, side: int) -> Image.Image:
    """Renders an SVG whose longer side becomes `side`, in RGBA."""
    image = Image.open(io.BytesIO(resvg_py.svg_to_bytes(svg_path=str(path), width=side, dpi=96)))
    if image.height > side:
        image = Image.open(io.BytesIO(resvg_py.svg_to_bytes(svg_path=str(path), height=side, dpi=96)))
    return image


def draw_emoji(font: ImageFont.FreeTypeFont, character: str, side: int) -> Image.Image:
    """Draws an emoji whose longer side becomes `side`, in RGBA."""
    left, top, right, bottom = font.getbbox(character)
    image = Image.new("RGBA", (max(1, round(right - left)), max(1, round(bottom - top))))
    ImageDraw.Draw(image).text((-left, -top), character, font=font, embedded_color=True)
    return image.resize([max(1, side * length // max(image.size)) for length in image.size], Image.Resampling.LANCZOS)


def on_ground(drawing: Image.Image, ground: Image.Image) -> Image.Image:
    """Draws at the centre of a ground."""
    x, y = ((length - other) // 2 for length, other in zip(ground.size, drawing.size, strict=True))
    ground.paste(drawing, (x, y), drawing)
    return ground


def alone(draw: Draw, side: int) -> Image.Image:
    """Draws on white."""
    return on_ground(draw(side), Image.new("RGB", (side, side), "white"))


def group_alike(vectors: np.ndarray, distance: float) -> list[list[int]]:
    """Groups vectors, so that two whose root mean square difference is below `distance` are in one group."""
    labels, squares = np.arange(len(vectors)), (vectors**2).sum(1)
    for index, vector in enumerate(vectors):
        differences = (squares[:index] + squares[index] - 2 * vectors[:index] @ vector) / len(vector)
        alike = np.append(labels[:index][differences < distance**2], index)
        labels[np.isin(labels, alike)] = alike.min()
    return [np.flatnonzero(labels == label).tolist() for label in np.unique(labels)]


def split_groups(groups: Sequence[Sequence[int]], every: int, cap: int) -> dict[str, list[int]]:
    """Distributes whole groups over the parts, at most `cap` of each; of `every` groups, two are held out."""
    parts: dict[str, list[int]] = {"train": [], "choose": [], "test": []}
    for number, group in enumerate(groups):
        parts[{0: "test", every // 2: "choose"}.get(number % every, "train")] += group[:cap]
    return parts


class Artist:
    """Draws grounds, text, screens and charts.

    Args:
        fonts (`Sequence[Path]`): Font files.
        photographs (`Sequence[Path]`): Squares that serve as grounds; may be empty.
        seed (`int`): Seed of everything random.
    """

    def __init__(self, fonts: Sequence[Path], photographs: Sequence[Path], seed: int):
        self.fonts, self.photographs, self.random = fonts, photographs, Random(seed)
        pages = (Path(__file__).parents[2] / "docs").glob("*.md")
        self.words = sorted({word for page in pages for word in re.findall(r"[\w.,-]+", page.read_text())})

    def colour(self) -> tuple[int, ...]:
        """A colour of the whole cube."""
        return tuple(self.random.randrange(256) for _ in range(3))

    def ground(self, side: int) -> Image.Image:
        """A white, plain or photographic square."""
        kind = self.random.random()
        if kind < 0.2 and self.photographs:
            with Image.open(self.random.choice(self.photographs)) as photograph:
                cut = min(side, *photograph.size)
                return photograph.resize((side, side), box=(0, 0, cut, cut))
        return Image.new("RGB", (side, side), self.colour() if kind < 0.5 else "white")

    def ink(self, ground: Image.Image) -> tuple[int, ...]:
        """A colour that can be read on a ground: black or white in half of the cases."""
        is_light = np.asarray(ground.convert("L")).mean() > 128
        strength = self.random.choice((0, 0.4))
        return tuple(round(strength * value) if is_light else 255 - round(strength * value) for value in self.colour())

    def phrase(self, count: int) -> str:
        """Random words."""
        return " ".join(self.random.choices(self.words, k=count))

    def font(self, size: int) -> ImageFont.FreeTypeFont:
        """A random font."""
        return ImageFont.truetype(self.random.choice(self.fonts), size)

    def write(self, ground: Image.Image, font: ImageFont.FreeTypeFont, ink: tuple[int, ...]) -> Image.Image:
        """Fills a ground with lines of text."""
        left, spacing = self.random.randrange(ground.width // 8 + 1), self.random.uniform(1.1, 1.7)
        for y in range(0, ground.height, round(font.size * spacing)):
            line = self.phrase(2 + ground.width // round(3 * font.size))
            ImageDraw.Draw(ground).text((left, y), line, fill=ink, font=font)
        return ground

    def text(self, side: int) -> Image.Image:
        """A page of text in one font, size and colour; small letters are more frequent."""
        ground, size = self.ground(side), round(np.exp(self.random.uniform(*np.log(LETTERS))))
        return self.write(ground, self.font(size), self.ink(ground))

    def screen(self, icons: Sequence[Draw], side: int) -> Image.Image:
        """Windows with a title, text, icons and buttons."""
        screen, draw_random = self.ground(side), self.random.randrange
        draw = ImageDraw.Draw(screen)
        for _ in range(1 + draw_random(3)):
            x, y = (draw_random(side // 3) for _ in "xy")
            width, height = (draw_random(side // 3, side) for _ in "xy")
            page = Image.new("RGB", (width, height), self.random.choice(("white", "white", "#222222", self.colour())))
            ink, font = self.ink(page), self.font(draw_random(10, 17))
            screen.paste(self.write(page, font, ink), (x, y))
            bar = Image.new("RGB", (width, draw_random(18, 40)), self.colour())
            screen.paste(self.write(bar, font, self.ink(bar)), (x, y))
            for column in range(draw_random(6)):
                icon = self.random.choice(icons)(self.random.choice((16, 24, 32, 48, 64)))
                screen.paste(icon, (x + 8 + 72 * column, y + height // 2), icon)
            for column in range(draw_random(4)):
                left, top = x + 10 + 110 * column, y + height - 40
                draw.rounded_rectangle((left, top, left + 100, top + 30), draw_random(12), self.colour(), outline=ink)
                draw.text((left + 8, top + 15), self.phrase(1)[:12], fill=ink, font=font, anchor="lm")
            draw.rectangle((x, y, x + width, y + height), outline=ink)
        return screen

    def chart(self, side: int) -> Image.Image:
        """Curves, bars, points, a pie or a map of values."""
        random = np.random.default_rng(self.random.randrange(2**32))
        kind, font = self.random.randrange(5), self.font(8)
        font_manager.fontManager.addfont(str(font.path))
        style = {"font.family": font.getname()[0], "axes.unicode_minus": False}
        with plt.style.context([self.random.choice(plt.style.available), style]):
            figure, axes = plt.subplots(figsize=(side / 100, side / 100), dpi=100, layout="constrained")
            colours = random.random((6, 3))
            for number, colour in enumerate(colours[: random.integers(1, 5)]):
                if kind == 0:
                    axes.plot(random.normal(size=12).cumsum(), color=colour, linewidth=random.uniform(1, 4))
                elif kind == 1:
                    axes.bar(np.arange(12) + number / 5, random.uniform(size=12), 0.2, color=colour)
                elif kind == 2:
                    axes.scatter(*random.normal(size=(2, 60)), random.uniform(4, 60), color=colour)
            if kind == 3:
                axes.pie(random.uniform(1, 5, 6), colors=colours, labels=[self.phrase(1)[:12] for _ in colours])
            elif kind == 4:
                axes.imshow(random.normal(size=(12, 12)).cumsum(0), cmap=self.random.choice(plt.colormaps()))
            axes.set_title(self.phrase(3)[:40])
            figure.savefig(file := io.BytesIO(), format="png", dpi=100)
            plt.close(figure)
        return Image.open(file).convert("RGB").resize((side, side))

    def sheet(self, cells: Sequence[Draw], side: int, square: int) -> Image.Image:
        """Draws cells of some side on one square, row by row: pages, or drawings of different sizes on a ground."""
        sheet, columns = self.ground(square), square // side
        for number, draw in enumerate(cells):
            x, y = side * (number % columns), side * (number // columns)
            cell = draw(round(side * self.random.uniform(0.75, 1)) if draw != self.text else side)
            if cell.mode == "RGBA":
                is_shared = self.random.random() < 0.7
                cell = on_ground(cell, sheet.crop((x, y, x + side, y + side)) if is_shared else self.ground(side))
            sheet.paste(cell, (x, y))
        return sheet

    def draw_train(self, drawings: dict[str, list[Draw]], folder: Path) -> None:
        """Draws the training part: each drawing in two sizes or twice, text, screens and charts."""

        def sheets(draws: list[Draw], side: int) -> list[Draw]:
            count = (SQUARE // side) ** 2
            cut = [draws[start : start + count] for start in range(0, len(draws) - count + 1, count)]
            return [partial(self.sheet, cells, side) for cells in cut]

        clip_art, emoji = drawings["clip_art"], drawings["emoji"]
        kinds = {
            "clip_art": sheets(clip_art, LARGE) + sheets(clip_art, SMALL),
            "emoji": sheets(emoji, SMALL) + sheets(self.random.sample(emoji, len(emoji)), SMALL),
            "text": sheets([self.text] * (4 * SHEETS["text"]), LARGE),
            "screens": [partial(self.screen, clip_art + emoji)] * SHEETS["screens"],
            "charts": [self.chart] * SHEETS["charts"],
        }
        folder.mkdir(parents=True)
        for kind, draws in kinds.items():
            for number, draw in enumerate(tqdm(draws, desc=kind)):
                draw(SQUARE).save(folder / f"{kind}-{number:04d}.bmp")

    def draw_held_out(self, drawings: dict[str, list[Draw]], folder: Path) -> None:
        """Draws a held-out part: each drawing alone on white, text, screens and charts."""

        def letters(side: int) -> Image.Image:
            return self.write(Image.new("RGB", (side, side), "white"), self.font(14), (0, 0, 0))

        kinds: dict[str, tuple[int, list[Draw]]] = {
            kind: (SMALL, [partial(alone, draw) for draw in draws[:HELD_OUT]]) for kind, draws in drawings.items()
        }
        kinds["text"] = LARGE, [self.text] * (HELD_OUT // 2)
        kinds["text_14"] = SQUARE, [letters] * (HELD_OUT // 8)
        kinds["screens"] = SQUARE, [partial(self.screen, drawings["clip_art"])] * (HELD_OUT // 4)
        kinds["charts"] = SQUARE, [self.chart] * (HELD_OUT // 4)
        for kind, (side, draws) in kinds.items():
            (folder / kind).mkdir(parents=True)
            for number, draw in enumerate(draws):
                draw(side).save(folder / kind / f"{number:02d}.png")


def find_drawings(folder: Path, random: Random) -> dict[str, list[Draw]]:
    """Clip art and emoji of the unpacked packages, in a random order."""
    paths: list[Path] = []
    for parent in sorted({path.parent for path in folder.rglob("*.svg")}):
        files = sorted(parent.glob("*.svg"))
        paths += random.sample(files, min(len(files), FOLDER_CAP))
    emoji = next(folder.rglob("NotoColorEmoji.ttf"))
    font = ImageFont.truetype(emoji, EMOJI)
    characters = [chr(code) for code in TTFont(emoji).getBestCmap() if code > 0x2000 and font.getlength(chr(code))]
    return {
        "clip_art": [partial(draw_clip_art, path) for path in random.sample(paths, len(paths))],
        "emoji": [partial(draw_emoji, font, character) for character in random.sample(characters, len(characters))],
    }


def split_drawings(drawings: Sequence[Draw]) -> dict[str, list[Draw]]:
    """Splits drawings into parts by their thumbnails, without those that are broken or empty."""
    kept, thumbnails = [], []
    for draw in tqdm(drawings):
        with suppress(ValueError, OSError):  # broken
            if draw(SMALL).getbbox():
                thumbnail = alone(draw, 4 * THUMBNAIL).resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)
                thumbnails.append(np.asarray(thumbnail, np.float32).ravel())
                kept.append(draw)
    parts = split_groups(group_alike(np.stack(thumbnails), ALIKE), HELD_OUT_EVERY, GROUP_CAP)
    return {part: [kept[index] for index in indices] for part, indices in parts.items()}


def main() -> None:
    """Reads the arguments and writes the folder."""
    parser = script_parser(__doc__)
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--photos", type=Path, required=True, help="folder that prepare_photos.py wrote")
    options = parser.parse_args()
    photographs = sorted((options.photos / "train").glob("*.bmp"))
    if options.out.exists() or not photographs:
        raise ValueError(f"OUT must be a new folder, and `{options.photos / 'train'}` must hold photographs.")
    incomplete = options.out.with_name(options.out.name + ".partial")
    shutil.rmtree(incomplete, ignore_errors=True)
    with tempfile.TemporaryDirectory() as name:
        found = find_drawings(unpack(DRAWINGS, Path(name, "drawings")), Random(0))
        kinds = {kind: split_drawings(draws) for kind, draws in found.items()}
        for seed, (part, packages) in enumerate(FONTS.items()):
            folder = unpack([f"fonts-{package}" for package in packages.split()], Path(name, part))
            fonts = sorted(path for path in folder.rglob("*.[ot]tf") if not any(each in path.name for each in SYMBOLS))
            artist = Artist(fonts, photographs if part == "train" else [], seed)
            draw_part = artist.draw_train if part == "train" else artist.draw_held_out
            draw_part({kind: parts[part] for kind, parts in kinds.items()}, incomplete / part)
    incomplete.rename(options.out)


if __name__ == "__main__":
    with one_line_errors():
        main()

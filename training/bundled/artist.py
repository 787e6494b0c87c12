"""Draws the pictures of the folder of drawings: grounds, text, screens, charts, and sheets of drawings."""

import io
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random

import matplotlib.pyplot as plt
import numpy as np
from matplotlib import font_manager
from PIL import Image, ImageDraw, ImageFont

LETTERS = (11, 48)  # sizes of letters in pixels
ICON_SIDES = (16, 24, 32, 48, 64)
CHARTS = 5  # kinds of charts

Draw = Callable[[int], Image.Image]  # takes the side in pixels
Colour = tuple[int, int, int]


def on_ground(drawing: Image.Image, ground: Image.Image) -> Image.Image:
    """Draws at the centre of a ground."""
    left = (ground.width - drawing.width) // 2
    top = (ground.height - drawing.height) // 2
    ground.paste(drawing, (left, top), drawing)
    return ground


class Artist:
    """Draws grounds, text, screens and charts.

    Args:
        fonts (`Sequence[Path]`): Font files.
        photographs (`Sequence[Path]`): Squares that serve as grounds; may be empty.
        seed (`int`): Seed of everything random.
    """

    def __init__(self, fonts: Sequence[Path], photographs: Sequence[Path], seed: int):
        self.fonts = fonts
        self.photographs = photographs
        self.random = Random(seed)
        self.words = _words_of_the_docs()

    def colour(self) -> Colour:
        """A colour of the whole cube."""
        red = self.random.randrange(256)
        green = self.random.randrange(256)
        blue = self.random.randrange(256)
        return red, green, blue

    def ground(self, side: int) -> Image.Image:
        """A white, plain or photographic square."""
        draw = self.random.random()
        if draw < 0.2 and self.photographs:
            with Image.open(self.random.choice(self.photographs)) as photograph:
                cut_side = min(side, *photograph.size)
                return photograph.resize((side, side), box=(0, 0, cut_side, cut_side))
        if draw < 0.5:
            return Image.new("RGB", (side, side), self.colour())
        return Image.new("RGB", (side, side), "white")

    def ink(self, ground: Image.Image) -> Colour:
        """A colour that can be read on a ground: black or white in half of the cases."""
        strength = self.random.choice((0, 0.4))  # 0 makes black
        red, green, blue = self.colour()
        dark = (round(strength * red), round(strength * green), round(strength * blue))
        is_light_ground = np.asarray(ground.convert("L")).mean() > 128
        if is_light_ground:
            return dark
        red, green, blue = dark
        return 255 - red, 255 - green, 255 - blue

    def phrase(self, count: int) -> str:
        """Random words."""
        return " ".join(self.random.choices(self.words, k=count))

    def font(self, size: int) -> ImageFont.FreeTypeFont:
        """A random font."""
        return ImageFont.truetype(self.random.choice(self.fonts), size)

    def write(self, ground: Image.Image, font: ImageFont.FreeTypeFont, ink: Colour) -> Image.Image:
        """Fills a ground with lines of text."""
        left = self.random.randrange(ground.width // 8 + 1)
        spacing = self.random.uniform(1.1, 1.7)
        for y in range(0, ground.height, round(font.size * spacing)):
            line = self.phrase(2 + ground.width // round(3 * font.size))
            ImageDraw.Draw(ground).text((left, y), line, fill=ink, font=font)
        return ground

    def text(self, side: int) -> Image.Image:
        """A page of text in one font, size and colour; small letters are more frequent."""
        ground = self.ground(side)
        smallest, largest = np.log(LETTERS)
        size = round(np.exp(self.random.uniform(smallest, largest)))
        font = self.font(size)
        return self.write(ground, font, self.ink(ground))

    def screen(self, icons: Sequence[Draw], side: int) -> Image.Image:
        """Windows with a title, text, icons and buttons."""
        screen = self.ground(side)
        for _ in range(1 + self.random.randrange(3)):
            self._draw_window(screen, icons)
        return screen

    def _draw_window(self, screen: Image.Image, icons: Sequence[Draw]) -> None:
        """Draws a window at a random place: a page of text, a bar with the title, icons, buttons and a border."""
        side = screen.width
        x = self.random.randrange(side // 3)
        y = self.random.randrange(side // 3)
        width = self.random.randrange(side // 3, side)
        height = self.random.randrange(side // 3, side)
        paper = self.random.choice(("white", "white", "#222222", self.colour()))
        page = Image.new("RGB", (width, height), paper)
        ink = self.ink(page)
        font = self.font(self.random.randrange(10, 17))
        screen.paste(self.write(page, font, ink), (x, y))
        bar = Image.new("RGB", (width, self.random.randrange(18, 40)), self.colour())
        screen.paste(self.write(bar, font, self.ink(bar)), (x, y))
        self._draw_icons(screen, icons, x + 8, y + height // 2)
        draw = ImageDraw.Draw(screen)
        self._draw_buttons(draw, font, ink, x + 10, y + height - 40)
        draw.rectangle((x, y, x + width, y + height), outline=ink)

    def _draw_icons(self, screen: Image.Image, icons: Sequence[Draw], left: int, top: int) -> None:
        """Draws up to five icons side by side, of which the first is at `(left, top)`."""
        for column in range(self.random.randrange(6)):
            draw_icon = self.random.choice(icons)
            icon = draw_icon(self.random.choice(ICON_SIDES))
            screen.paste(icon, (left + 72 * column, top), icon)

    def _draw_buttons(
        self, draw: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont, ink: Colour, left: int, top: int
    ) -> None:
        """Draws up to three buttons side by side, of which the first is at `(left, top)`."""
        for column in range(self.random.randrange(4)):
            x = left + 110 * column
            button = (x, top, x + 100, top + 30)
            draw.rounded_rectangle(button, self.random.randrange(12), self.colour(), outline=ink)
            draw.text((x + 8, top + 15), self.phrase(1)[:12], fill=ink, font=font, anchor="lm")

    def chart(self, side: int) -> Image.Image:
        """Curves, bars, points, a pie or a map of values."""
        numbers = np.random.default_rng(self.random.randrange(2**32))
        kind = self.random.randrange(CHARTS)
        font = self.font(8)
        font_manager.fontManager.addfont(str(font.path))
        style = {"font.family": font.getname()[0], "axes.unicode_minus": False}
        content = io.BytesIO()
        with plt.style.context([self.random.choice(plt.style.available), style]):
            figure, axes = plt.subplots(figsize=(side / 100, side / 100), dpi=100, layout="constrained")
            self._draw_values(axes, kind, numbers)
            axes.set_title(self.phrase(3)[:40])
            figure.savefig(content, format="png", dpi=100)
            plt.close(figure)
        return Image.open(content).convert("RGB").resize((side, side))

    def _draw_values(self, axes: plt.Axes, kind: int, numbers: np.random.Generator) -> None:
        """Draws random values in a chart of a kind, below `CHARTS`."""
        colours = numbers.random((6, 3))
        num_series = numbers.integers(1, 5)
        if kind == 3:
            labels = [self.phrase(1)[:12] for _ in colours]
            axes.pie(numbers.uniform(1, 5, 6), colors=colours, labels=labels)
            return
        if kind == 4:
            axes.imshow(numbers.normal(size=(12, 12)).cumsum(0), cmap=self.random.choice(plt.colormaps()))
            return
        for number, colour in enumerate(colours[:num_series]):
            if kind == 0:
                axes.plot(numbers.normal(size=12).cumsum(), color=colour, linewidth=numbers.uniform(1, 4))
            elif kind == 1:
                axes.bar(np.arange(12) + number / 5, numbers.uniform(size=12), 0.2, color=colour)
            else:
                x, y = numbers.normal(size=(2, 60))
                axes.scatter(x, y, numbers.uniform(4, 60), color=colour)

    def sheet(self, cells: Sequence[Draw], side: int, square: int) -> Image.Image:
        """Draws cells of some side on one square, row by row: pages, or drawings of different sizes on a ground."""
        sheet = self.ground(square)
        columns = square // side
        for number, draw in enumerate(cells):
            x = side * (number % columns)
            y = side * (number // columns)
            ground = sheet.crop((x, y, x + side, y + side))
            sheet.paste(self._cell(draw, side, ground), (x, y))
        return sheet

    def _cell(self, draw: Draw, side: int, ground: Image.Image) -> Image.Image:
        """A page of text, or a drawing on this ground or on a ground of its own."""
        if draw == self.text:
            return draw(side)
        drawing = draw(round(side * self.random.uniform(0.75, 1)))
        if self.random.random() < 0.7:
            return on_ground(drawing, ground)
        return on_ground(drawing, self.ground(side))


def _words_of_the_docs() -> list[str]:
    """Words of all pages of the documentation, from which texts are drawn."""
    words: set[str] = set()
    for page in (Path(__file__).parents[2] / "docs").glob("*.md"):
        words.update(re.findall(r"[\w.,-]+", page.read_text()))
    return sorted(words)

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
CHARTS = ("curves", "bars", "points", "pie", "map")
SHARE_ON_SHEET = 0.7  # drawings of a sheet that stand on the ground of the sheet

Draw = Callable[[int], Image.Image]  # takes the side in pixels
Colour = tuple[int, int, int]


def on_ground(drawing: Image.Image, ground: Image.Image) -> Image.Image:
    """Puts a drawing in RGBA at the centre of a ground, and returns the ground."""
    x = (ground.width - drawing.width) // 2
    y = (ground.height - drawing.height) // 2
    ground.paste(drawing, (x, y), mask=drawing)
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
        """A square ground: white in half of the cases, a photograph in a fifth, otherwise of one colour.

        If there are no photographs, grounds that are not white have one colour.
        """
        draw = self.random.random()
        if draw < 0.2 and self.photographs:
            return self._photographic_ground(side)
        if draw < 0.5:
            return Image.new("RGB", (side, side), self.colour())
        return Image.new("RGB", (side, side), "white")

    def _photographic_ground(self, side: int) -> Image.Image:
        """The top left corner of a photograph. A photograph that is smaller than the ground is enlarged."""
        with Image.open(self.random.choice(self.photographs)) as photograph:
            cut_side = min(side, photograph.width, photograph.height)
            corner = (0, 0, cut_side, cut_side)
            return photograph.resize((side, side), box=corner)

    def ink(self, ground: Image.Image) -> Colour:
        """A colour that can be read on a ground: dark on a light one, and light on a dark one.

        Half of the dark colours are black, and half of the light ones are white.
        """
        strength = self.random.choice((0, 0.4))  # 0 makes black
        red, green, blue = self.colour()
        dark_red = round(strength * red)
        dark_green = round(strength * green)
        dark_blue = round(strength * blue)
        is_light_ground = np.asarray(ground.convert("L")).mean() > 128
        if is_light_ground:
            return dark_red, dark_green, dark_blue
        return 255 - dark_red, 255 - dark_green, 255 - dark_blue

    def phrase(self, count: int) -> str:
        """Random words."""
        return " ".join(self.random.choices(self.words, k=count))

    def font(self, size: int) -> ImageFont.FreeTypeFont:
        """A random font."""
        return ImageFont.truetype(self.random.choice(self.fonts), size)

    def write(self, ground: Image.Image, font: ImageFont.FreeTypeFont, ink: Colour) -> Image.Image:
        """Fills a ground with lines of text, and returns the ground."""
        margin = self.random.randrange(ground.width // 8 + 1)
        spacing = self.random.uniform(1.1, 1.7)  # in sizes of a letter
        line_height = round(font.size * spacing)
        words_per_line = 2 + ground.width // round(3 * font.size)
        for y in range(0, ground.height, line_height):
            line = self.phrase(words_per_line)
            ImageDraw.Draw(ground).text((margin, y), line, fill=ink, font=font)
        return ground

    def text(self, side: int) -> Image.Image:
        """A page of text in one font, size and colour; small letters are more frequent."""
        ground = self.ground(side)
        log_smallest, log_largest = np.log(LETTERS)
        log_size = self.random.uniform(log_smallest, log_largest)
        font = self.font(round(np.exp(log_size)))
        ink = self.ink(ground)
        return self.write(ground, font, ink)

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
        any_colour = self.colour()
        paper = self.random.choice(("white", "white", "#222222", any_colour))
        page = Image.new("RGB", (width, height), paper)
        ink = self.ink(page)
        font = self.font(self.random.randrange(10, 17))
        self.write(page, font, ink)
        screen.paste(page, (x, y))
        bar_height = self.random.randrange(18, 40)
        bar = Image.new("RGB", (width, bar_height), self.colour())
        bar_ink = self.ink(bar)
        self.write(bar, font, bar_ink)
        screen.paste(bar, (x, y))
        self._draw_icons(screen, icons, x + 8, y + height // 2)
        draw = ImageDraw.Draw(screen)
        self._draw_buttons(draw, font, ink, x + 10, y + height - 40)
        draw.rectangle((x, y, x + width, y + height), outline=ink)

    def _draw_icons(self, screen: Image.Image, icons: Sequence[Draw], left: int, top: int) -> None:
        """Draws up to five icons side by side, of which the first is at `(left, top)`."""
        for column in range(self.random.randrange(6)):
            draw_icon = self.random.choice(icons)
            icon = draw_icon(self.random.choice(ICON_SIDES))
            screen.paste(icon, (left + 72 * column, top), mask=icon)

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
        generator = np.random.default_rng(self.random.randrange(2**32))
        kind = self.random.choice(CHARTS)
        font = self.font(8)
        font_manager.fontManager.addfont(str(font.path))
        style = {"font.family": font.getname()[0], "axes.unicode_minus": False}
        content = io.BytesIO()
        with plt.style.context([self.random.choice(plt.style.available), style]):
            figure, axes = plt.subplots(figsize=(side / 100, side / 100), dpi=100, layout="constrained")
            self._draw_values(axes, kind, generator)
            axes.set_title(self.phrase(3)[:40])
            figure.savefig(content, format="png", dpi=100)
            plt.close(figure)
        return Image.open(content).convert("RGB").resize((side, side))

    def _draw_values(self, axes: plt.Axes, kind: str, generator: np.random.Generator) -> None:
        """Draws random values in a chart of a kind of `CHARTS`."""
        colours = generator.random((6, 3))  # six colours, of red, green and blue
        num_series = generator.integers(1, 5)
        if kind == "pie":
            labels = [self.phrase(1)[:12] for _ in colours]
            axes.pie(generator.uniform(1, 5, 6), colors=colours, labels=labels)
        elif kind == "map":
            values = generator.normal(size=(12, 12)).cumsum(0)
            axes.imshow(values, cmap=self.random.choice(plt.colormaps()))
        else:
            for number, colour in enumerate(colours[:num_series]):
                _draw_series(axes, kind, number, colour, generator)

    def sheet(self, draws: Sequence[Draw], cell_side: int, sheet_side: int) -> Image.Image:
        """Draws a square sheet of square cells, row by row, with a drawing or a page of text in each cell.

        Args:
            draws (`Sequence[Draw]`): Functions that draw the cells. `self.text` draws a page of text.
            cell_side (`int`): Side of a cell in pixels.
            sheet_side (`int`): Side of the sheet in pixels.
        """
        sheet = self.ground(sheet_side)
        num_columns = sheet_side // cell_side
        for number, draw in enumerate(draws):
            row, column = divmod(number, num_columns)
            left = cell_side * column
            top = cell_side * row
            is_page_of_text = draw == self.text
            if is_page_of_text:
                content = draw(cell_side)
            else:
                content = self._drawing_in_cell(draw, sheet, left, top, cell_side)
            sheet.paste(content, (left, top))
        return sheet

    def _drawing_in_cell(self, draw: Draw, sheet: Image.Image, left: int, top: int, cell_side: int) -> Image.Image:
        """Content of a cell of a sheet: a drawing that is a little smaller than the cell, on a ground.

        Args:
            draw (`Draw`): Draws the drawing.
            sheet (`PIL.Image.Image`): The sheet, whose ground shows behind most drawings. It is not changed.
            left (`int`): Left side of the cell on the sheet.
            top (`int`): Upper side of the cell on the sheet.
            cell_side (`int`): Side of the cell in pixels.
        """
        drawing_side = round(cell_side * self.random.uniform(0.75, 1))
        drawing = draw(drawing_side)
        stands_on_sheet = self.random.random() < SHARE_ON_SHEET
        if stands_on_sheet:
            ground = sheet.crop((left, top, left + cell_side, top + cell_side))
        else:
            ground = self.ground(cell_side)
        return on_ground(drawing, ground)


def _draw_series(axes: plt.Axes, kind: str, number: int, colour: np.ndarray, generator: np.random.Generator) -> None:
    """Draws one series of random values: curves, bars or points of one colour.

    Args:
        axes (`plt.Axes`): Where to draw.
        kind (`str`): "curves", "bars" or "points".
        number (`int`): Number of the series. It moves bars to the right, so that those of several series stand side by
            side.
        colour (`np.ndarray`): Red, green and blue, between 0 and 1.
        generator (`np.random.Generator`): Source of the values.
    """
    if kind == "curves":
        axes.plot(generator.normal(size=12).cumsum(), color=colour, linewidth=generator.uniform(1, 4))
    elif kind == "bars":
        positions = np.arange(12) + number / 5
        axes.bar(positions, generator.uniform(size=12), width=0.2, color=colour)
    else:
        x, y = generator.normal(size=(2, 60))
        axes.scatter(x, y, s=generator.uniform(4, 60), color=colour)


def _words_of_the_docs() -> list[str]:
    """Words of all pages of the documentation, from which texts are drawn."""
    words: set[str] = set()
    for page in (Path(__file__).parents[2] / "docs").glob("*.md"):
        words.update(re.findall(r"[\w.,-]+", page.read_text()))
    return sorted(words)

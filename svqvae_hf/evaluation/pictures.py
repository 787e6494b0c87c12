"""Draws sheets of images with titles and captions."""

from collections.abc import Sequence
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

SIDE_LIMITS = (256, 1024)  # smallest and largest longer side of a panel, in pixels
GAP = 24
TITLE_SIZE, CAPTION_SIZE = 20, 15
BACKGROUND, TITLE_COLOUR, CAPTION_COLOUR = "#ffffff", "#1a1a1a", "#6b6b6b"


class Panel(NamedTuple):
    """One image of a sheet, with the two lines of text below it."""

    image: Image.Image
    title: str
    caption: str


def contact_sheet(panels: Sequence[Panel]) -> Image.Image:
    """Draws images side by side, all in one size, with their titles and captions.

    Args:
        panels (`Sequence[Panel]`): At least one. All images are resized to the size of the first, scaled so that its
            longer side has 256 to 1024 pixels.

    Returns:
        `PIL.Image.Image`: Sheet, 8-bit RGB.
    """
    longest = max(panels[0].image.size)
    factor = min(max(longest, SIDE_LIMITS[0]), SIDE_LIMITS[1]) / longest
    width, height = (max(1, round(factor * side)) for side in panels[0].image.size)
    title_font, caption_font = (ImageFont.load_default(size) for size in (TITLE_SIZE, CAPTION_SIZE))
    lengths = [(title_font.getlength(panel.title), caption_font.getlength(panel.caption)) for panel in panels]
    columns = [round(max(width, *each)) for each in lengths]
    title_top = GAP + height + GAP // 2
    caption_top = title_top + TITLE_SIZE + GAP // 4
    sheet = Image.new("RGB", (sum(columns) + GAP * (len(panels) + 1), caption_top + CAPTION_SIZE + GAP), BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    left = GAP
    for panel, column in zip(panels, columns, strict=True):
        sheet.paste(panel.image.resize((width, height), Image.Resampling.LANCZOS), (left, GAP))
        draw.text((left, title_top), panel.title, TITLE_COLOUR, title_font)
        draw.text((left, caption_top), panel.caption, CAPTION_COLOUR, caption_font)
        left += column + GAP
    return sheet

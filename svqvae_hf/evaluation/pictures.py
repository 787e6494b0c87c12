"""Draws sheets of images with titles and captions."""

from collections.abc import Sequence
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

MIN_SIDE = 256  # of the longer side of a panel, in pixels
MAX_SIDE = 1024
GAP = 24
TITLE_SIZE = 20
CAPTION_SIZE = 15
BACKGROUND = "#ffffff"
TITLE_COLOUR = "#1a1a1a"
CAPTION_COLOUR = "#6b6b6b"


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
    width, height = _panel_size(panels[0].image)
    title_font = ImageFont.load_default(TITLE_SIZE)
    caption_font = ImageFont.load_default(CAPTION_SIZE)
    column_widths = []
    for panel in panels:
        title_width = title_font.getlength(panel.title)
        caption_width = caption_font.getlength(panel.caption)
        column_widths.append(round(max(width, title_width, caption_width)))
    title_top = GAP + height + GAP // 2
    caption_top = title_top + TITLE_SIZE + GAP // 4
    sheet_width = sum(column_widths) + GAP * (len(panels) + 1)
    sheet_height = caption_top + CAPTION_SIZE + GAP
    sheet = Image.new("RGB", (sheet_width, sheet_height), BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    panel_left = GAP
    for panel, column_width in zip(panels, column_widths, strict=True):
        resized = panel.image.resize((width, height), Image.Resampling.LANCZOS)
        sheet.paste(resized, (panel_left, GAP))
        draw.text((panel_left, title_top), panel.title, TITLE_COLOUR, title_font)
        draw.text((panel_left, caption_top), panel.caption, CAPTION_COLOUR, caption_font)
        panel_left += column_width + GAP
    return sheet


def _panel_size(image: Image.Image) -> tuple[int, int]:
    """Width and height of a panel that shows an image."""
    longer_side = max(image.size)
    longer_side_of_panel = min(max(longer_side, MIN_SIDE), MAX_SIDE)
    factor = longer_side_of_panel / longer_side
    width = max(1, round(factor * image.width))
    height = max(1, round(factor * image.height))
    return width, height

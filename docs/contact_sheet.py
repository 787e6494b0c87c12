"""Puts the pictures of a folder into one picture: `python docs/contact_sheet.py FOLDER OUT COLUMNS`."""

import re
import sys
from pathlib import Path

from PIL import Image

SIDE = 96  # pixels of a picture, enlarged
GAP = 4


def counting_order(path: Path) -> str:
    """Name of a picture with six digits per number, which sorts picture 2 before picture 10."""
    padded = ""
    for part in re.split(r"(\d+)", path.stem):
        if part.isdigit():
            part = part.zfill(6)
        padded += part
    return padded


def contact_sheet(paths: list[Path], columns: int) -> Image.Image:
    """Pictures in rows, on white."""
    rows = -(-len(paths) // columns)
    step = SIDE + GAP
    sheet = Image.new("RGB", (columns * step - GAP, rows * step - GAP), "white")
    for number, path in enumerate(paths):
        row, column = divmod(number, columns)
        with Image.open(path) as image:
            picture = image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.LANCZOS)
        sheet.paste(picture, (column * step, row * step))
    return sheet


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit("Usage: python docs/contact_sheet.py FOLDER OUT COLUMNS")
    files = sorted(Path(sys.argv[1]).glob("*.png"), key=counting_order)
    if not files:
        sys.exit(f"contact_sheet.py: error: `{sys.argv[1]}` must hold PNG files, but has none.")
    contact_sheet(files, int(sys.argv[3])).save(sys.argv[2], quality=85)

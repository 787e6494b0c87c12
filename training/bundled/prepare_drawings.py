"""Makes an image folder of drawings: clip art, emoji, text, screens and charts, in three parts.

    python training/bundled/prepare_drawings.py OUT --photos PHOTOS

Clip art, emoji and the fonts of the text come from Debian packages (`apt-get download`, no root needed). Clip art is
rendered by resvg, whose wheels need no system library. `OUT/train` has squares as large as those in PHOTOS, which
`prepare_photos.py` made, stored as BMP; in a fifth of them the background is a photograph. `OUT/choose/KIND` and
`OUT/test/KIND` are held out: the first for choosing a recipe, the second for measuring its result. Each part has fonts
of its own, and drawings that look alike are in one part.
"""

import io
import shutil
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from random import Random

import numpy as np
import resvg_py
from artist import Artist, Draw, on_ground
from fontTools.ttLib import TTFont
from PIL import Image, ImageDraw, ImageFont
from prepare_photos import SQUARE, fetch_debian_packages
from tqdm import tqdm

from svqvae_hf.trainer.scripts import one_line_errors, script_parser

DRAWINGS = ("openclipart-svg", "fonts-noto-color-emoji")  # public domain; SIL OFL 1.1
# Debian packages with fonts for each part: SIL OFL 1.1, Apache-2.0, Bitstream Vera's licence, AGPL with an exception
# for fonts. The names of the packages begin with `fonts-`.
FONTS_OF_PARTS = {
    "train": "lato roboto-unhinted liberation inter ebgaramond montserrat cantarell comic-neue firacode vollkorn "
    "quicksand dancingscript lobster oldstandard urw-base35 jetbrains-mono atkinson-hyperlegible linuxlibertine go "
    "comfortaa bebas-neue",
    "choose": "cabin courier-prime b612",
    "test": "dejavu-core open-sans crosextra-caladea",
}
SYMBOLS = ("Symbols", "D050000L")  # fonts without letters
SQUARES = {"text": 400, "screens": 240, "charts": 140}  # of the training part
HELD_OUT = 48  # images per kind in each of the other parts
HELD_OUT_EVERY = 20  # of so many groups of drawings that look alike, each held-out part has one
ALIKE = 14.0  # root mean square difference of thumbnails that look alike, whose values are in [0, 255]
THUMBNAIL = 8  # side of a thumbnail in pixels
GROUP_CAP = 6  # drawings that look alike, at most
FOLDER_CAP = 120  # drawings of a folder of clip art, at most
SMALL = 128  # side of a drawing in pixels; a square of the training part holds 4 x 4 of them
LARGE = 256  # side of a drawing in pixels; a square of the training part holds 2 x 2 of them
EMOJI_SIZE = 109  # the only size of the emoji font
HELD_OUT_LETTERS = 14  # size in pixels of the letters of a held-out kind
FIRST_SYMBOL = 0x2000  # code points before it are letters


def draw_clip_art(path: Path, side: int) -> Image.Image:
    """Renders an SVG whose longer side becomes `side`, in RGBA."""
    png = resvg_py.svg_to_bytes(svg_path=str(path), width=side, dpi=96)
    image = Image.open(io.BytesIO(png))
    is_taller_than_wide = image.height > side
    if is_taller_than_wide:
        png = resvg_py.svg_to_bytes(svg_path=str(path), height=side, dpi=96)
        image = Image.open(io.BytesIO(png))
    return image


def draw_emoji(font: ImageFont.FreeTypeFont, character: str, side: int) -> Image.Image:
    """Draws an emoji whose longer side becomes `side`, in RGBA."""
    # Box of the pixels of the emoji, relative to the position at which it is drawn
    min_x, min_y, max_x, max_y = font.getbbox(character)
    drawn_width = max(1, round(max_x - min_x))
    drawn_height = max(1, round(max_y - min_y))
    image = Image.new("RGBA", (drawn_width, drawn_height))
    position = (-min_x, -min_y)  # so that the box begins at (0, 0)
    ImageDraw.Draw(image).text(position, character, font=font, embedded_color=True)
    longer_side = max(image.size)
    width = max(1, side * image.width // longer_side)
    height = max(1, side * image.height // longer_side)
    return image.resize((width, height), Image.Resampling.LANCZOS)


def draw_on_white(draw: Draw, side: int) -> Image.Image:
    """Draws a drawing, as large as fits, at the centre of a white square of this side."""
    drawing = draw(side)
    square = Image.new("RGB", (side, side), "white")
    return on_ground(drawing, square)


def group_alike(vectors: np.ndarray, distance: float) -> list[list[int]]:
    """Groups vectors, so that two whose root mean square difference is below `distance` are in one group."""
    labels = np.arange(len(vectors))  # label of the group of each vector; at first each has a group of its own
    squared_lengths = (vectors**2).sum(1)
    for index, vector in enumerate(vectors):
        # Compares the vector with all earlier ones: |a - b|² = |a|² + |b|² - 2 ab.
        products = vectors[:index] @ vector
        squared_differences = squared_lengths[:index] + squared_lengths[index] - 2 * products
        is_alike = squared_differences / len(vector) < distance**2
        # Joins the groups of all vectors that are alike with the group of this one.
        labels_to_join = np.append(labels[:index][is_alike], index)
        is_joined = np.isin(labels, labels_to_join)
        labels[is_joined] = labels_to_join.min()
    groups = []
    for label in np.unique(labels):
        groups.append(np.flatnonzero(labels == label).tolist())
    return groups


def split_groups(groups: Sequence[Sequence[int]], every: int, cap: int) -> dict[str, list[int]]:
    """Distributes whole groups over the parts, at most `cap` members of each.

    Of `every` consecutive groups, the first is for `test`, the middle one for `choose`, and all others for `train`.
    """
    parts: dict[str, list[int]] = {"train": [], "choose": [], "test": []}
    for number, group in enumerate(groups):
        position = number % every
        if position == 0:
            part = "test"
        elif position == every // 2:
            part = "choose"
        else:
            part = "train"
        parts[part] += group[:cap]
    return parts


class Part:
    """A part of the folder, which an artist draws."""

    def __init__(self, artist: Artist, drawings: dict[str, list[Draw]], folder: Path):
        self.artist = artist
        self.drawings = drawings
        self.folder = folder

    def draw_train(self) -> None:
        """Draws the training part: squares with sheets of drawings and of pages of text, screens and charts.

        Clip art is drawn in two sizes. Emoji are drawn twice, beside others.
        """
        clip_art = self.drawings["clip_art"]
        emoji = self.drawings["emoji"]
        shuffled_emoji = shuffled(emoji, self.artist.random)
        pages_of_text: list[Draw] = [self.artist.text] * (4 * SQUARES["text"])  # four of them are on a sheet
        draw_screen = partial(self.artist.screen, clip_art + emoji)
        self.folder.mkdir(parents=True)
        self._save_squares("clip_art", self._sheets(clip_art, LARGE) + self._sheets(clip_art, SMALL))
        self._save_squares("emoji", self._sheets(emoji, SMALL) + self._sheets(shuffled_emoji, SMALL))
        self._save_squares("text", self._sheets(pages_of_text, LARGE))
        self._save_squares("screens", [draw_screen] * SQUARES["screens"])
        self._save_squares("charts", [self.artist.chart] * SQUARES["charts"])

    def _sheets(self, draws: list[Draw], side: int) -> list[Draw]:
        """Squares that are full of drawings of this side in pixels, without the last drawings that do not fill one."""
        cells_per_sheet = (SQUARE // side) ** 2
        num_sheets = len(draws) // cells_per_sheet
        sheets: list[Draw] = []
        for number in range(num_sheets):
            start = number * cells_per_sheet
            cells = draws[start : start + cells_per_sheet]
            sheets.append(partial(self.artist.sheet, cells, side))
        return sheets

    def _save_squares(self, kind: str, draws: Sequence[Draw]) -> None:
        """Draws and saves the squares of a kind of the training part."""
        for number, draw in enumerate(tqdm(draws, desc=kind)):
            draw(SQUARE).save(self.folder / f"{kind}-{number:04d}.bmp")

    def draw_held_out(self) -> None:
        """Draws a held-out part: `HELD_OUT` drawings of each kind alone on white, text, screens and charts.

        The larger the images of a kind are, the fewer there are.
        """
        for kind, draws in self.drawings.items():
            draws_on_white: list[Draw] = []
            for draw in draws[:HELD_OUT]:
                draws_on_white.append(partial(draw_on_white, draw))
            self._save(kind, SMALL, draws_on_white)
        draw_screen = partial(self.artist.screen, self.drawings["clip_art"])
        self._save("text", LARGE, [self.artist.text] * (HELD_OUT // 2))
        kind_of_letters = f"text_{HELD_OUT_LETTERS}"  # by the size of its letters in pixels
        self._save(kind_of_letters, SQUARE, [self._draw_black_letters] * (HELD_OUT // 8))
        self._save("screens", SQUARE, [draw_screen] * (HELD_OUT // 4))
        self._save("charts", SQUARE, [self.artist.chart] * (HELD_OUT // 4))

    def _draw_black_letters(self, side: int) -> Image.Image:
        """Draws a white page with black letters, all of one size."""
        page = Image.new("RGB", (side, side), "white")
        font = self.artist.font(HELD_OUT_LETTERS)
        return self.artist.write(page, font, ink=(0, 0, 0))

    def _save(self, kind: str, side: int, draws: Sequence[Draw]) -> None:
        """Draws and saves the images of a kind of a held-out part, `side` pixels wide and high."""
        (self.folder / kind).mkdir(parents=True)
        for number, draw in enumerate(draws):
            draw(side).save(self.folder / kind / f"{number:02d}.png")


def find_drawings(folder: Path, random: Random) -> dict[str, list[Draw]]:
    """Clip art and emoji of the unpacked packages, in a random order."""
    clip_art: list[Draw] = []
    for path in choose_clip_art(folder, random):
        clip_art.append(partial(draw_clip_art, path))
    font_file = next(folder.rglob("NotoColorEmoji.ttf"))
    font = ImageFont.truetype(font_file, EMOJI_SIZE)
    emoji: list[Draw] = []
    for code_point in TTFont(font_file).getBestCmap():
        character = chr(code_point)
        is_visible = font.getlength(character) > 0
        if code_point > FIRST_SYMBOL and is_visible:
            emoji.append(partial(draw_emoji, font, character))
    return {"clip_art": shuffled(clip_art, random), "emoji": shuffled(emoji, random)}


def choose_clip_art(folder: Path, random: Random) -> list[Path]:
    """SVG files below a folder, at most `FOLDER_CAP` of each folder that holds some."""
    clip_art_folders = {path.parent for path in folder.rglob("*.svg")}
    paths: list[Path] = []
    for clip_art_folder in sorted(clip_art_folders):
        files = sorted(clip_art_folder.glob("*.svg"))
        paths += random.sample(files, min(len(files), FOLDER_CAP))
    return paths


def shuffled(draws: Sequence[Draw], random: Random) -> list[Draw]:
    """All drawings in a random order."""
    return random.sample(draws, len(draws))


def split_drawings(drawings: Sequence[Draw]) -> dict[str, list[Draw]]:
    """Splits drawings into parts by their thumbnails, without those that are broken or empty."""
    drawable = []
    thumbnails = []
    for draw in tqdm(drawings):
        thumbnail = draw_thumbnail(draw)
        if thumbnail is not None:
            drawable.append(draw)
            thumbnails.append(thumbnail)
    groups = group_alike(np.stack(thumbnails), ALIKE)
    parts = {}
    for part, numbers in split_groups(groups, HELD_OUT_EVERY, GROUP_CAP).items():
        parts[part] = [drawable[number] for number in numbers]
    return parts


def draw_thumbnail(draw: Draw) -> np.ndarray | None:
    """Values in [0, 255] of a thumbnail, `(THUMBNAIL * THUMBNAIL * 3,)`; None for a broken or an empty drawing."""
    try:
        is_empty = draw(SMALL).getbbox() is None  # all pixels are transparent
        if is_empty:
            return None
        picture = draw_on_white(draw, 4 * THUMBNAIL)
    except (ValueError, OSError):  # the drawing is broken
        return None
    thumbnail = picture.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)  # means of 4 x 4 pixels
    return np.asarray(thumbnail, np.float32).ravel()


def find_fonts(packages: str, folder: Path) -> list[Path]:
    """Font files of some Debian packages, without those that hold no letters."""
    fetch_debian_packages([f"fonts-{package}" for package in packages.split()], folder)
    fonts = []
    for path in sorted(folder.rglob("*.[ot]tf")):
        has_letters = not any(name in path.name for name in SYMBOLS)
        if has_letters:
            fonts.append(path)
    return fonts


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
    with tempfile.TemporaryDirectory() as temporary:
        packages_folder = fetch_debian_packages(DRAWINGS, Path(temporary, "drawings"))
        drawings = find_drawings(packages_folder, Random(0))
        clip_art_of_part = split_drawings(drawings["clip_art"])
        emoji_of_part = split_drawings(drawings["emoji"])
        for seed, part_name in enumerate(FONTS_OF_PARTS):
            fonts = find_fonts(FONTS_OF_PARTS[part_name], Path(temporary, part_name))
            drawings_of_part = {"clip_art": clip_art_of_part[part_name], "emoji": emoji_of_part[part_name]}
            if part_name == "train":
                artist = Artist(fonts, photographs, seed)
                Part(artist, drawings_of_part, incomplete / part_name).draw_train()
            else:
                artist = Artist(fonts, [], seed)  # held-out parts show no photographs
                Part(artist, drawings_of_part, incomplete / part_name).draw_held_out()
    incomplete.rename(options.out)


if __name__ == "__main__":
    with one_line_errors():
        main()

"""Can it be read? Characters that an OCR engine reads wrongly, by the height of the letters and the scale.

    pip install rapidocr-onnxruntime
    python benchmarks/readable.py svqvae_hf/pretrained --latin FONT ... --han FONT ... --seed 1

Pages of random words, each in one font and size, go through the model at each scale, and through JPEG and AVIF in
files that are at most as large as its token file; a cell is empty if even the lowest quality takes more. Height is
that of a capital or of a Chinese character, in pixels. The OCR engine comes with its models, reads Latin
letters and Chinese, and is given one line at a time.
"""

import secrets
from collections import defaultdict
from collections.abc import Callable, Iterator
from random import Random
from typing import Any, NamedTuple

import torch
from baselines import save_within
from measuring import Row, make_parser, parse_options, report
from PIL import Image, ImageDraw, ImageFont
from torchmetrics.functional.text import char_error_rate

from svqvae_hf import SVQVAE
from svqvae_hf.evaluation.codecs import open_image
from svqvae_hf.tokens.context_model import ContextModel, find_context_model
from svqvae_hf.tokens.image_tokens import decode_image, encode_image
from svqvae_hf.tokens.token_files import token_file_content

SIDE = 384  # of a page, in pixels
MARGIN = 8  # of a page, in pixels
SPACING = 2.0  # heights from line to line
LETTERS = "abcdefghijkmnopqrstuvwxyz"  # without l, which some fonts draw like I
CODECS = ("JPEG", "AVIF")


class Line(NamedTuple):
    """A line of a page: its text, and its box in pixels."""

    text: str
    box: tuple[float, float, float, float]


def draw_word(script: str, random: Random) -> str:
    """A word of random characters."""
    if script == "Latin":
        return "".join(random.choices(LETTERS, k=random.randint(3, 9)))
    characters = []
    for _ in range(4):
        row = random.choice(range(0xB0, 0xD7))  # of the commonest 3,666 characters
        column = random.choice(range(0xA1, 0xFF))
        characters.append(bytes([row, column]).decode("gb2312"))
    return "".join(characters)


def draw_text(script: str, random: Random, fits: Callable[[str], bool]) -> str:
    """A line of at least one word, and as many words as fit."""
    text = draw_word(script, random)
    while True:
        longer = f"{text} {draw_word(script, random)}"
        if not fits(longer):
            return text
        text = longer


def draw_page(font_path: str, script: str, height: int, random: Random) -> tuple[Image.Image, list[Line]]:
    """A page of lines in one font, whose capitals or Chinese characters have a height."""
    sample = "H" if script == "Latin" else "国"
    _, top, _, bottom = ImageFont.truetype(font_path, 1000).getbbox(sample)
    font = ImageFont.truetype(font_path, 1000 * height / (bottom - top))
    page = Image.new("RGB", (SIDE, SIDE), "white")
    draw = ImageDraw.Draw(page)
    width = SIDE - 2 * MARGIN
    border = height / 4
    lines = []
    for row in range(int(width / (SPACING * height))):
        text = draw_text(script, random, lambda text: draw.textlength(text, font) < width)
        place = MARGIN, MARGIN + SPACING * height * (row + 0.75)
        draw.text(place, text, "black", font, anchor="ls")
        left, top, right, bottom = draw.textbbox(place, text, font, anchor="ls")
        box = max(0, left - border), max(0, top - border), right + border, bottom + border
        lines.append(Line(text, box))
    return page, lines


@torch.inference_mode()
def versions(
    model: SVQVAE, context: ContextModel | None, page: Image.Image, scales: list[float]
) -> Iterator[tuple[str, Image.Image | None]]:
    """A page, and its reconstructions by the model and the codecs, each with a title."""
    yield "page itself", page
    for scale in scales:
        tokens = encode_image(model, page, [scale], scale_from="image")
        (output,) = decode_image(model, tokens)
        yield f"ids, scale {scale:g}", output
        bits = 8 * len(token_file_content(tokens, context))
        for codec in CODECS:
            content = save_within(page, codec, bits)
            fits = 8 * len(content) <= bits
            yield f"{codec}, bits of scale {scale:g}", open_image(content) if fits else None


def wrong_characters(engine: Callable[..., Any], image: Image.Image, lines: list[Line]) -> float:
    """Fraction of characters that are read wrongly, without spaces; a line that is not read is wrong as a whole."""
    factor = image.width / SIDE
    texts_read = []
    texts = []
    for line in lines:
        box = tuple(round(factor * edge) for edge in line.box)
        results, _ = engine(image.crop(box), use_det=False, use_cls=False, use_rec=True)
        text_read = ""
        if results is not None:
            text_read = "".join(text for text, _ in results)
        texts_read.append(text_read.replace(" ", ""))
        texts.append(line.text.replace(" ", ""))
    return min(1.0, char_error_rate(texts_read, texts).item())


def mean_percent(fractions: list[float | None]) -> float | None:
    """Mean in percent; `None` if a value is missing."""
    if None in fractions:
        return None
    return round(100 * sum(fractions) / len(fractions), 1)


def main() -> None:
    """Reads the arguments, measures and reports."""
    parser = make_parser(__doc__, rounds=1)
    parser.add_argument("model", help="folder or Hub id")
    parser.add_argument("--latin", nargs="+", default=[], metavar="FONT", help="font files with Latin letters")
    parser.add_argument("--han", nargs="+", default=[], metavar="FONT", help="font files with Chinese characters")
    parser.add_argument("--heights", nargs="+", type=int, default=[8, 10, 12, 16, 24, 32], help="in pixels")
    parser.add_argument("--scales", nargs="+", type=float, default=[0.5, 1.0, 2.0], help="default: 0.5 1 2")
    parser.add_argument("--seed", type=int, default=secrets.randbelow(2**32), help="seed of the words")
    options, machine = parse_options(parser, "cpu")
    from rapidocr_onnxruntime import RapidOCR  # after the options, because no extra installs it

    model = SVQVAE.from_pretrained(options.model)
    engine = RapidOCR()
    random = Random(options.seed)
    context = find_context_model(options.model, model.codebook_fingerprint())
    tables: dict[str, list[Row]] = {}
    for script, fonts in (("Latin", options.latin), ("Han", options.han)):
        if not fonts:
            continue
        rows: list[Row] = []
        for height in options.heights:
            fractions = defaultdict(list)  # of wrong characters, by the title of a version
            for font in fonts:
                page, lines = draw_page(font, script, height, random)
                for title, image in versions(model, context, page, options.scales):
                    fraction = None if image is None else wrong_characters(engine, image, lines)
                    fractions[title].append(fraction)
            row: dict[str, Any] = {"height": height}
            for title, fractions_of_version in fractions.items():
                row[title] = mean_percent(fractions_of_version)
            rows.append(row)
        tables[f"{script}, {len(fonts)} fonts: wrong characters, %"] = rows
    report(options, {**machine, "seed": options.seed}, tables)


if __name__ == "__main__":
    main()

"""Writes the pictures that the first recipes learn from: `make_first_pictures.py training/first_pictures`.

They have 64 x 64 pixels and show one object on one of five grounds, labelled by the object. `all.parquet` has the 64
objects of the scenes, `few.parquet` eight of them. The objects come from Noto Color Emoji (Debian: `apt install
fonts-noto-color-emoji`; SIL OFL 1.1).
"""

import io
from collections.abc import Sequence
from pathlib import Path

import datasets
from make_scenes import FONT, GROUNDS, OBJECTS, load_objects
from PIL import Image

from svqvae_hf.trainer.scripts import one_line_errors, script_parser

SIDE = 64  # pixels of a picture
OBJECT_SIDE = 54  # of the longer side of the object
CHOSEN_GROUNDS = ("white", "yellow", "green", "blue", "pink")
FEW = ("crab", "fox", "guitar", "pineapple", "rocket", "teapot", "whale", "zebra")


def render(shape: Image.Image, ground: str) -> Image.Image:
    """Draws an object, which has an alpha channel, in the middle of a ground."""
    picture = Image.new("RGB", (SIDE, SIDE), GROUNDS[ground])
    shape = shape.copy()
    shape.thumbnail((OBJECT_SIDE, OBJECT_SIDE), Image.Resampling.LANCZOS)
    x = (SIDE - shape.width) // 2
    y = (SIDE - shape.height) // 2
    picture.paste(shape, (x, y), mask=shape)
    return picture


def encoded(picture: Image.Image) -> dict[str, bytes | None]:
    """The picture as a WebP file of about 1 KB."""
    file = io.BytesIO()
    picture.save(file, "WEBP", quality=90, method=6)
    return {"bytes": file.getvalue(), "path": None}


def make_pictures(names: Sequence[str], shapes: dict[str, Image.Image]) -> datasets.Dataset:
    """Pictures of objects, with their labels and captions."""
    rows = []
    for label, name in enumerate(names):
        for ground in CHOSEN_GROUNDS:
            image = encoded(render(shapes[name], ground))
            rows.append({"image": image, "label": label, "caption": f"{name} on {ground}"})
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "label": datasets.ClassLabel(names=list(names)),
            "caption": datasets.Value("string"),
        }
    )
    return datasets.Dataset.from_list(rows, features)


def main() -> None:
    """Reads the arguments and writes the files."""
    parser = script_parser(__doc__)
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--font", type=Path, default=FONT, help="NotoColorEmoji.ttf (default: Debian's)")
    options = parser.parse_args()
    shapes = load_objects(options.font)
    options.out.mkdir(parents=True, exist_ok=True)
    make_pictures(list(OBJECTS), shapes).to_parquet(options.out / "all.parquet")
    make_pictures(FEW, shapes).to_parquet(options.out / "few.parquet")


if __name__ == "__main__":
    with one_line_errors():
        main()

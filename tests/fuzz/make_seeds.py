"""Writes the inputs from which the fuzzer starts: `make_seeds.py FOLDER` creates one folder per reader."""

import argparse
import io
import json
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import tifffile
import torch
from PIL import Image
from readers import ZEROS

from svqvae_hf import SVQVAE
from svqvae_hf.loaders.checkpoint_formats import CHECKPOINT_FORMATS, CheckpointFormat
from svqvae_hf.token_sets.settings import TokenSettings
from svqvae_hf.tokens.token_files import ImageTokens, token_file_header

CONFIG = {
    "base_channels": 32,
    "encoder_ch_mult": (1,),
    "decoder_ch_mult": (1,),
    "num_res_blocks": 1,
    "z_channels": 4,
    "codebook_size": 16,
    "codebook_embed_dim": 4,
}
FINGERPRINT = 64 * "0"
IMAGES = {
    "BMP": ("1", "L", "P", "RGB"),
    "GIF": ("P", "L"),
    "JPEG": ("L", "RGB", "CMYK"),
    "MPO": ("RGB",),
    "PNG": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"),
    "PPM": ("1", "L", "RGB", "I;16"),
    "TIFF": ("1", "L", "P", "RGB", "RGBA", "CMYK", "LAB", "I;16", "F"),
    "WEBP": ("RGB", "RGBA"),
    "AVIF": ("RGB", "RGBA"),
}
LARGE_IMAGES = {
    "one_piece": {},
    "strips": {"rowsperstrip": 16, "compression": "packbits"},
    "tiles": {"tile": (16, 32)},
    "lzw": {"compression": "lzw", "rowsperstrip": 16},
    "deflate_predictor": {"compression": "zlib", "predictor": True, "tile": (16, 16)},
    "planes": {"planarconfig": "separate", "compression": "zlib"},
    "bigtiff": {"bigtiff": True, "compression": "zlib"},
    "grey_16": {"photometric": "minisblack", "byteorder": ">", "compression": "zlib"},
    "jpeg": {"compression": "jpeg"},
}


def checkpoints() -> dict[str, bytes]:
    with torch.device("meta"):
        shapes = {key: weight.shape for key, weight in SVQVAE(**CONFIG).state_dict().items()}
    seeds = {}
    for format in CHECKPOINT_FORMATS:
        names = {format.to_original(key, 1): shape for key, shape in shapes.items()}
        if format.container is None:
            seeds["svqvae"] = b"h" + header(names)
            continue
        file = io.BytesIO()
        torch.save(pickled(format, names), file)
        with zipfile.ZipFile(file) as archive:
            seeds[format.name] = b"p" + archive.read("archive/data.pkl")
    for form in ("zip", "legacy"):
        file = io.BytesIO()
        torch.save({"model": {"a": torch.zeros(2)}}, file, _use_new_zipfile_serialization=form == "zip")
        seeds[form] = b"z" + file.getvalue()
    return seeds


def header(names: dict[str, torch.Size]) -> bytes:
    entries, start = {}, 0
    for name, shape in names.items():
        stop = start + shape.numel() * 2
        entries[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [start, stop]}
        start = stop
    return json.dumps(entries, separators=(",", ":")).encode()


def pickled(format: CheckpointFormat, names: dict[str, torch.Size]) -> dict:
    zeros = torch.zeros(ZEROS // 4)
    weights = OrderedDict((name, zeros[: shape.numel()].view(shape)) for name, shape in names.items())
    beside = {"args": argparse.Namespace(codebook_size=16)} if format.sibling_keys else {}
    return {format.container: weights, **beside}


def tokens() -> dict[str, bytes]:
    seeds = {}
    for size in (300, 1 << 17):
        kept = ImageTokens([torch.zeros(3, 5, dtype=torch.int64)], 20, 40, (1.0,), 8, 256, 32, size, FINGERPRINT)
        seeds[f"tokens_{size}"] = b"h" + token_file_header(kept)[8:]
    return seeds


def images() -> dict[str, bytes]:
    pixels = np.random.default_rng(0).integers(0, 256, (12, 9, 3), dtype=np.uint8)
    seeds = {}
    for kind, modes in IMAGES.items():
        for mode in modes:
            image = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257) if mode == "I;16" else None
            image = image or Image.fromarray(pixels).convert("L" if mode == "F" else mode.replace("I;16", "I"))
            image = Image.fromarray(np.float32(pixels[..., 0]) / 255) if mode == "F" else image
            file = io.BytesIO()
            options = {"save_all": True, "append_images": [image]} if kind in ("GIF", "MPO") else {}
            image.save(file, kind, **options)
            seeds[f"{kind}_{mode.replace(';', '')}".lower()] = file.getvalue()
    for compression in ("tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg"):
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "TIFF", compression=compression)
        seeds[compression] = file.getvalue()
    return seeds


def large_images() -> dict[str, bytes]:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    seeds = {}
    for name, options in LARGE_IMAGES.items():
        values = pixels[..., 0].astype(np.uint16) * 257 if name == "grey_16" else pixels
        values = np.moveaxis(pixels, -1, 0) if name == "planes" else values
        file = io.BytesIO()
        tifffile.imwrite(file, values // 64 * 64, metadata=None, **{"photometric": "rgb"} | options)
        seeds[name] = file.getvalue()
    return seeds


def token_sets() -> dict[str, bytes]:
    settings = TokenSettings("model", (1.0, 0.5), 8, 300, FINGERPRINT, 256, 32, "centre", 64)
    return {"settings": b"j" + settings.to_json().encode()}


def main() -> None:
    seeds = {
        "checkpoint": checkpoints(),
        "tokens": tokens(),
        "image": images(),
        "large": large_images(),
        "token_set": token_sets(),
    }
    for reader, inputs in seeds.items():
        folder = Path(sys.argv[1], reader)
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in inputs.items():
            (folder / name).write_bytes(content)


main()

"""No picture ends a run: `python benchmarks/odd_files.py [--sample N] [--model FOLDER]`.

Writes some 300 broken and unusual pictures. Each is the first file of a folder, beside a good picture, and each
command that reads folders runs on it in a process that has decoded nothing before. A run is good if the good picture
is in its results, and if the odd one is either there, too, or skipped and counted, with exit code 1.
"""

import argparse
import contextlib
import io
import json
import multiprocessing
import random
import struct
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from PIL import Image, ImageFile

KINDS = {
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
CHANGES: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "whole": lambda content, chance: content,
    "header": lambda content, chance: content[:20],
    "half": lambda content, chance: content[: len(content) // 2],
    "end": lambda content, chance: content[:-3],
    "longer": lambda content, chance: content + content,
    "zeros": lambda content, chance: content[: len(content) // 3].ljust(len(content), b"\0"),
    **{f"bytes{number}": lambda content, chance: change_bytes(content, chance, 64) for number in range(2)},
    "start": lambda content, chance: change_bytes(content[:64], chance, 64) + content[64:],
}
# A bitmap of run lengths, for which Pillow has no limit.
RUN_LENGTHS = struct.pack("<2s3I", b"BM", 62, 0, 58) + struct.pack("<3I2H6I4x", 40, 4, 1, 1, 8, 1, 4, 0, 0, 1, 0)
OTHERS = {
    "run_lengths.bmp": RUN_LENGTHS + b"\4\0\0\1",
    "empty.png": b"",
    "text.jpg": b"Dear diary, ...",
    "bomb.ppm": b"P6 60000 60000 255 ",
    "page.png": b"<!DOCTYPE html><html></html>",
    "vector.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
}
RESULTS = {  # where a command names the pictures that it has made
    "encode": lambda out: {path.stem for path in out.glob("*.safetensors")},
    "reconstruct": lambda out: {path.stem.removesuffix("_x1") for path in out.glob("*.png")},
    "tokenize": lambda out: {Path(key).stem for key in keys_of(out)},
    "evaluate": lambda out: {
        Path(image["name"]).stem
        for file in out.glob("report.json")
        for image in json.loads(file.read_text())["images"]
    },
}
OPTIONS = {"tokenize": ["--workers", "0"], "evaluate": ["--codecs", "--scales", "1"]}
PRELOADED = ["svqvae_cli.loading", "svqvae_hf.evaluation.report", "svqvae_hf.token_sets.writer"]


def keys_of(out: Path) -> list[str]:
    """Keys of the rows of a token set."""
    import pyarrow.parquet as pq

    return [key for path in out.glob("data/*/*.parquet") for key in pq.read_table(path)["key"].to_pylist()]


def change_bytes(content: bytes, chance: random.Random, one_in: int) -> bytes:
    """Replaces at least one byte."""
    changed = bytearray(content)
    for _ in range(1 + len(content) // one_in):
        changed[chance.randrange(len(content))] = chance.randrange(256)
    return bytes(changed)


def odd_files() -> dict[str, bytes]:
    """Content of each odd file by its name. Always the same."""
    chance = random.Random(0)
    pixels = np.random.default_rng(0).integers(0, 256, (24, 20, 3), dtype=np.uint8)
    files = dict(OTHERS)
    for kind, modes in KINDS.items():
        for mode in modes:
            image = Image.fromarray(pixels).convert({"F": "L", "I;16": "I"}.get(mode, mode))
            image = Image.fromarray(pixels[..., 0] / np.float32(255)) if mode == "F" else image
            image = Image.fromarray(pixels[..., 0] * np.uint16(257)) if mode == "I;16" else image
            saved = io.BytesIO()
            options = {"save_all": True, "append_images": [image]} if kind in ("GIF", "MPO") else {}
            image.save(saved, kind, **options)
            suffix = "jpg" if kind == "MPO" else kind.lower()
            for name, change in CHANGES.items():
                files[f"{kind}_{mode.replace(';', '')}_{name}.{suffix}"] = change(saved.getvalue(), chance)
    return files


def run_command(argv: Sequence[str], output: Path) -> None:
    """Runs a command in this process, which must have decoded nothing, and writes what it prints to a file."""
    from svqvae_cli import main

    assert not Image._initialized, "a decoder has run before"
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    Image.MAX_IMAGE_PIXELS = 1 << 19  # so that no header that claims 100 megapixels takes minutes
    with output.open("w") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        code = main(argv)
    sys.exit(code)


def check(command: str, name: str, content: bytes, model: str, folder: Path) -> str:
    """Returns `"read"`, `"skipped"`, or what went wrong when a command was given an odd file."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    photos, out, output = folder / "photos", folder / "out", folder / "output.txt"
    photos.mkdir(parents=True)
    (photos / f"odd.{name.rpartition('.')[2]}").write_bytes(content)
    Image.new("RGB", (24, 24), "teal").save(photos / "photo.png")
    argv = [command, str(photos), "--model", model, "--output", str(out)]
    argv += OPTIONS.get(command, [])
    process = context.Process(target=run_command, args=(argv, output))
    process.start()
    process.join()
    made = RESULTS[command](out) if process.exitcode in (0, 1) else set()
    if (process.exitcode, made) == (0, {"odd", "photo"}):
        return "read"
    is_named = "1 of 2 inputs were skipped" in output.read_text()
    if (process.exitcode, made, is_named) == (1, {"photo"}, True):
        return "skipped"
    return f"exit code {process.exitcode}, made {sorted(made)}: {output.read_text()[-300:]}"


def main() -> None:
    """Runs all files through all commands, and prints a line per command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", type=int, help="take N files at random (default: all)")
    parser.add_argument(
        "--seed", type=int, default=random.randrange(10**6), help="seed of the sample (default: a new one)"
    )
    parser.add_argument("--model", default=str(Path(__file__).parents[1] / "svqvae_hf" / "pretrained"))
    parser.add_argument("--commands", nargs="+", choices=RESULTS, default=list(RESULTS))
    options = parser.parse_args()
    files = odd_files()
    if options.sample:
        print(f"seed {options.seed}")
        files = dict(random.Random(options.seed).sample(list(files.items()), options.sample))
    with TemporaryDirectory() as folder:
        for command in options.commands:
            found = {
                name: check(command, name, content, options.model, Path(folder, command, name))
                for name, content in files.items()
            }
            print(command, dict(Counter(each if each in ("read", "skipped") else "failed" for each in found.values())))
            for name, result in found.items():
                if result not in ("read", "skipped"):
                    print(f"  {name}: {result}")


if __name__ == "__main__":
    main()

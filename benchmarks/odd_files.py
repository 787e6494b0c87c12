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
    "bytes0": lambda content, chance: change_bytes(content, chance, 64),
    "bytes1": lambda content, chance: change_bytes(content, chance, 64),
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
OPTIONS = {"tokenize": ["--workers", "0"], "evaluate": ["--scales", "1"]}
PRELOADED = ["svqvae_cli.loading", "svqvae_hf.evaluation.report", "svqvae_hf.token_sets.writer"]


def encoded(out: Path) -> list[str]:
    """Names of the pictures that `encode` has read."""
    return [path.name for path in out.glob("*.safetensors")]


def reconstructed(out: Path) -> list[str]:
    """Names of the pictures that `reconstruct` has read."""
    return [path.name.replace("_x1", "") for path in out.glob("*.png")]


def tokenized(out: Path) -> list[str]:
    """Names of the pictures that `tokenize` has read."""
    import pyarrow.parquet as pq

    keys = []
    for path in out.glob("data/*/*.parquet"):
        keys += pq.read_table(path)["key"].to_pylist()
    return keys


def evaluated(out: Path) -> list[str]:
    """Names of the pictures that `evaluate` has read."""
    if not (out / "report.json").exists():
        return []
    report = json.loads((out / "report.json").read_text())
    return [image["name"] for image in report["images"]]


RESULTS = {"encode": encoded, "reconstruct": reconstructed, "tokenize": tokenized, "evaluate": evaluated}


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
            content = save(image_of_mode(pixels, mode), kind)
            suffix = "jpg" if kind == "MPO" else kind.lower()
            for name, change in CHANGES.items():
                files[f"{kind}_{mode.replace(';', '')}_{name}.{suffix}"] = change(content, chance)
    return files


def image_of_mode(pixels: np.ndarray, mode: str) -> Image.Image:
    """Image in a mode of Pillow, from pixels `(height, width, 3)` in uint8."""
    grey = pixels[..., 0]
    if mode == "F":
        return Image.fromarray(grey / np.float32(255))
    if mode == "I;16":
        return Image.fromarray(grey * np.uint16(257))
    return Image.fromarray(pixels).convert(mode)


def save(image: Image.Image, kind: str) -> bytes:
    """Content of an image file; of two equal pictures if the kind may hold several."""
    file = io.BytesIO()
    if kind in ("GIF", "MPO"):
        image.save(file, kind, save_all=True, append_images=[image])
    else:
        image.save(file, kind)
    return file.getvalue()


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
    photos = folder / "photos"
    out = folder / "out"
    output = folder / "output.txt"
    photos.mkdir(parents=True)
    (photos / f"odd.{name.rpartition('.')[2]}").write_bytes(content)
    Image.new("RGB", (24, 24), "teal").save(photos / "photo.png")
    argv = [command, str(photos), "--model", model, "--output", str(out)]
    argv += OPTIONS.get(command, [])
    process = context.Process(target=run_command, args=(argv, output))
    process.start()
    process.join()
    results = []
    if process.exitcode in (0, 1):
        results = sorted({Path(name).stem for name in RESULTS[command](out)})
    printed = output.read_text()
    if process.exitcode == 0 and results == ["odd", "photo"]:
        return "read"
    if process.exitcode == 1 and results == ["photo"] and "1 of 2 inputs were skipped" in printed:
        return "skipped"
    return f"exit code {process.exitcode}, made {results}: {printed[-300:]}"


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
            counts = Counter()
            failures = []
            for name, content in files.items():
                result = check(command, name, content, options.model, Path(folder, command, name))
                if result in ("read", "skipped"):
                    counts[result] += 1
                else:
                    counts["failed"] += 1
                    failures.append(f"  {name}: {result}")
            print(command, dict(counts))
            for failure in failures:
                print(failure)


if __name__ == "__main__":
    main()

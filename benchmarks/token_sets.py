"""Speed of `tokenize_set` against `encode_tokens`, at 32 to 256 pixels: `python benchmarks/token_sets.py IMAGES`.

The bare encoder is a loop over tensors in memory in batches of the same size, timed in the same turns.
"""

import argparse
import itertools
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from measuring import DTYPES, Row, make_parser, parse_options, report, take_turns
from PIL import Image, ImageOps

from svqvae_cli.files import find_inputs
from svqvae_files.file_names import IMAGE_SUFFIXES
from svqvae_hf import DEFAULT_MODEL, SVQVAE, SVQVAEImageProcessor
from svqvae_hf.data.image_sets import open_images
from svqvae_hf.models.image_files import load_image
from svqvae_hf.token_sets.writer import tokenize_set


def write_images(paths: Sequence[Path], folder: Path, side: int, count: int) -> None:
    """Writes a folder of squares, cut from the centres of the given images in turn."""
    folder.mkdir()
    images = [load_image(path) for path in paths]
    for index in range(count):
        image = ImageOps.fit(images[index % len(images)], (side, side), Image.Resampling.BOX)
        image.save(folder / f"{index:05}.jpg", quality=95)


@torch.inference_mode()
def measure_side(options: argparse.Namespace, folder: Path, side: int) -> list[Row]:
    """Measures images per second of one size, from files and from tensors in memory."""
    paths = [file.path for file in find_inputs([str(options.images)], IMAGE_SUFFIXES)]
    model = SVQVAE.from_pretrained(options.model, dtype=DTYPES[options.dtype]).to(options.device).eval()
    count = options.count * (options.sides[-1] // side) ** 2
    write_images(paths, folder, side, count)
    images = open_images([str(folder)])
    processor = SVQVAEImageProcessor.from_model(model)
    loaded_images = [load_image(path) for path in sorted(folder.iterdir())]
    sample = processor(loaded_images)["pixel_values"].to(options.device, model.dtype)

    def bare() -> None:
        for batch in sample.split(options.batch_size):
            model.encode_tokens(batch).cpu()

    numbers = itertools.count()
    settings = {"crops": "centre", "resolution": side, "batch_size": options.batch_size}

    def tokenize(workers: int) -> None:
        out = folder.with_name(f"tokens-{side}-{next(numbers)}")
        tokenize_set(model, images, out, model_name="bundled", num_workers=workers, **settings)

    in_memory = "encode_tokens of tensors in memory"
    runs = {in_memory: bare}
    for num_workers in options.workers:
        runs[f"tokenize_set, {num_workers} workers"] = partial(tokenize, num_workers)
    for run in runs.values():
        run()  # warms up
    seconds, medians = take_turns(runs, options.rounds, options.device)
    rows = []
    for name in runs:
        row = {
            "side": side,
            "images": count,
            "method": name,
            "images per second": count / medians[name],
            "ratio to tensors in memory": medians[in_memory] / medians[name],
            "rounds": seconds[name],
        }
        rows.append(row)
    return rows


def main() -> None:
    """Reads the arguments, runs the benchmark and reports."""
    parser = make_parser(__doc__, rounds=5)
    parser.add_argument("images", type=Path, metavar="IMAGES", help="folder of source images")
    parser.add_argument("--count", type=int, default=64, help="images of the last side, more of others (default: 64)")
    parser.add_argument("--sides", type=int, nargs="+", default=[32, 64, 128, 256], help="default: 32 64 128 256")
    parser.add_argument("--model", default=DEFAULT_MODEL, help="tokenizer (default: the bundled one)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the tokenizer (default: float32)")
    parser.add_argument("--batch-size", type=int, default=64, help="default: 64")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1], help="reading processes (default: 0 1)")
    options, machine = parse_options(parser)
    with tempfile.TemporaryDirectory() as folder:
        rows = []
        for side in options.sides:
            rows += measure_side(options, Path(folder, str(side)), side)
    report(options, machine, {"token sets": rows})


if __name__ == "__main__":
    main()

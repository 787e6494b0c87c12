"""Token sets: speed against the bare encoder, and memory as the set grows.

    python benchmarks/token_sets.py speed IMAGES      # `tokenize_set` against `encode_tokens`, at 32 to 256 pixels
    python benchmarks/token_sets.py memory IMAGES     # peak memory for 2,000 and 20,000 small images

The bare encoder is a loop over tensors in memory in batches of the same size, timed in the same turns. `speed` also
measures the time per image that `tokenize_set` spends in Python, with a model that returns at once.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from measuring import Row, describe_machine, in_own_process, make_parser, report, take_turns
from PIL import Image, ImageOps

from svqvae_cli.files import IMAGE_SUFFIXES, find_inputs
from svqvae_hf import DEFAULT_MODEL, SVQVAE, SVQVAEImageProcessor
from svqvae_hf.data.image_sets import open_images
from svqvae_hf.files.folders import Folder
from svqvae_hf.models.image_processing_svqvae import load_image
from svqvae_hf.token_sets.crops import read_crops
from svqvae_hf.token_sets.encoder import RowEncoder
from svqvae_hf.token_sets.parts import PartRecord
from svqvae_hf.token_sets.settings import TokenSettings
from svqvae_hf.token_sets.shards import row_features, write_shards
from svqvae_hf.token_sets.writer import tokenize_set
from svqvae_hf.tokens.encoding import encoding_of

SMALL = 32  # side in pixels of the images for `memory`


def load_model(device: str) -> SVQVAE:
    """Loads the bundled model, with tiling as on the command line."""
    model = SVQVAE.from_pretrained(DEFAULT_MODEL).to(device).eval()
    model.enable_tiling()
    return model


def write_images(paths: Sequence[Path], folder: Path, sizes: Sequence[tuple[int, int]]) -> None:
    """Writes a folder with one image per size, cut from the centres of the given images in turn."""
    folder.mkdir()
    images = [load_image(path) for path in paths]
    for index, size in enumerate(sizes):
        image = ImageOps.fit(images[index % len(images)], size, Image.Resampling.BOX)
        image.save(folder / f"{index:05}.jpg", quality=95)


def measure_speed(options: argparse.Namespace, folder: Path) -> list[Row]:
    """Measures images per second of each size, from files and from tensors in memory."""
    rows = []
    for side in options.sides:
        rows += measure_side(options, folder / str(side), side)
    return rows


def measure_side(options: argparse.Namespace, folder: Path, side: int) -> list[Row]:
    """Measures images per second of one size."""
    paths = [file.path for file in find_inputs([str(options.images)], IMAGE_SUFFIXES)]
    model = load_model(options.device)
    count = options.count * (options.sides[-1] // side) ** 2
    write_images(paths, folder, [(side, side)] * count)
    images = open_images([str(folder)])
    processor = SVQVAEImageProcessor(pixel_range=model.config["pixel_range"])

    processor = SVQVAEImageProcessor(pixel_range=model.config["pixel_range"])
    sample = processor([load_image(path) for path in sorted(folder.iterdir())])["pixel_values"].to(options.device)

    def bare() -> None:
        for batch in sample.split(options.batch_size):
            model.encode_tokens(batch, [1.0])[0].cpu()

    outputs = iter(range(sys.maxsize))

    def tokenize(workers: int) -> Callable[[], object]:
        return lambda: tokenize_set(
            model,
            images,
            folder.with_name(f"tokens-{side}-{next(outputs)}"),
            model_name="bundled",
            crops="centre",
            resolution=side,
            batch_size=options.batch_size,
            num_workers=workers,
        )

    first = "encode_tokens of tensors in memory"
    runs: dict[str, Callable[[], object]] = {first: bare}
    runs |= {f"tokenize_set, {number} workers": tokenize(number) for number in options.workers}
    with torch.inference_mode():
        for run in runs.values():
            run()
        seconds = take_turns(runs, options.rounds, options.device)
        python = python_milliseconds(model, folder, side)
    return [
        {
            "side": side,
            "images": count,
            "method": name,
            "images per second": count / statistics.median(times),
            "ratio to tensors in memory": statistics.median(seconds[first]) / statistics.median(times),
            "ms of Python per image": python if name.startswith("tokenize_set") else None,
            "rounds": times,
        }
        for name, times in seconds.items()
    ]


def python_milliseconds(model: SVQVAE, folder: Path, side: int) -> float:
    """CPU time per image beside reading and encoding: batches, rows and the Parquet file."""
    encoding = encoding_of(model, [1.0], "latents")
    settings = TokenSettings(model="bundled", crops="centre", resolution=side, **encoding)
    images = open_images([str(folder)])
    read = list(read_crops(images, "centre", side, 0))
    encoder = RowEncoder(model, settings, images.features, None)
    ids = torch.zeros(64, side // model.f, side // model.f, dtype=torch.int64)
    encode_tokens, model.encode_tokens = model.encode_tokens, lambda sample, *_: [ids[: len(sample)]]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # CPU time counts threads that wait
    begun = time.process_time()
    rows = encoder.encode(read, PartRecord(0, []), lambda: None)
    features = row_features(settings, images.features)
    for _ in write_shards(Folder(folder.with_name("python")), 0, rows, settings, features):
        pass
    spent = time.process_time() - begun
    torch.set_num_threads(threads)
    model.encode_tokens = encode_tokens
    return 1000 * spent / len(read)


def prepare_small(device: str, folder: Path, out: Path, workers: int) -> Callable[[], Any]:
    """Loads and warms up the model, and returns a run over a folder as a function."""
    model = load_model(device)
    images = open_images([str(folder)])
    with torch.inference_mode():
        model.encode_tokens(torch.zeros(1, 3, SMALL, SMALL, device=device), [1.0])
    return lambda: tokenize_set(model, images, out, model_name="bundled", num_workers=workers)


def measure_memory(options: argparse.Namespace, folder: Path) -> list[Row]:
    """Measures peak memory of the encoding process, without the loaded model."""
    paths = [file.path for file in find_inputs([str(options.images)], IMAGE_SUFFIXES)][:20]
    rows = []
    for count in options.counts:
        images = folder / f"images-{count}"
        write_images(paths, images, [(SMALL, SMALL)] * count)
        arguments = (options.device, images, folder / f"tokens-{count}", options.workers[-1])
        cost = in_own_process(options.device, options.threads, prepare_small, *arguments)
        rows.append({"images": count, "peak memory, MiB": cost.peak_mib, "seconds": cost.seconds})
    return rows


MODES = {"speed": measure_speed, "memory": measure_memory}


def main() -> None:
    """Reads the arguments, runs the benchmark and reports."""
    parser = make_parser(__doc__, rounds=5)
    parser.add_argument("mode", choices=tuple(MODES))
    parser.add_argument("images", type=Path, metavar="IMAGES", help="folder of source images")
    parser.add_argument(
        "--count",
        type=int,
        default=64,
        help="number of images for `speed` at the last side, and more at smaller ones (default: 64)",
    )
    parser.add_argument(
        "--counts",
        type=int,
        nargs="+",
        default=[2000, 20000],
        help="numbers of images for `memory` (default: 2000 20000)",
    )
    parser.add_argument(
        "--sides", type=int, nargs="+", default=[32, 64, 128, 256], help="sides for `speed` (default: 32 64 128 256)"
    )
    parser.add_argument("--batch-size", type=int, default=64, help="batch size for `speed` (default: 64)")
    parser.add_argument(
        "--workers", type=int, nargs="+", default=[0, 1], help="numbers of reading processes (default: 0 1)"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    machine = describe_machine(options.device, options.threads)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder, "work")
        work.mkdir()
        rows = MODES[options.mode](options, work)
    report(options, machine, {f"token sets, {options.mode}": rows})


if __name__ == "__main__":
    main()

"""What a large token set costs: `python benchmarks/plan.py PHOTOS --images 100e6 --gpu-rate 1000`.

Measures, on one core of this machine, how fast photographs are read, encoded, stored and loaded again, and how many
bytes they take. Then it multiplies. A GPU is not measured here: `--gpu-rate` and `--train-rate` are its images per
second, from `make gpu` or from the log of a run. Without them, the table has no lines about GPUs.
"""

import argparse
import math
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from measuring import Row, make_parser, parse_options, report

from svqvae_cli.files import find_inputs
from svqvae_files.file_names import IMAGE_SUFFIXES
from svqvae_files.folders import Folder
from svqvae_hf import DEFAULT_MODEL, SVQVAE, SVQVAEImageProcessor
from svqvae_hf.data.image_sets import ImageSet, open_images
from svqvae_hf.token_sets.crops import CROPS, read_crops
from svqvae_hf.token_sets.settings import TokenSettings, read_settings
from svqvae_hf.token_sets.shards import SHARD_BYTES, row_features, write_shards
from svqvae_hf.token_sets.writer import tokenize_set
from svqvae_hf.trainer.data.token_sequences import TokenSource

SECONDS_PER_HOUR = 3600
BATCH = 16  # rows of a batch that are encoded or loaded
LOADED_BATCHES = 200
CACHED_BYTES_PER_ID = 2  # 4 if the codebook has more than 65,536 codes
PARTS_PER_WORKER = 4  # at least, so that all workers end at about the same time
GIGABYTE = 10**9


@dataclass(frozen=True)
class Rates:
    """What one core does, and what an image takes.

    Args:
        photo_bytes (`float`): Bytes of a photograph's file.
        read (`float`): Photographs per second that are read, decoded and cropped.
        encode (`float`): Crops per second that are encoded on the CPU.
        store (`float`): Rows per second that are written.
        row_bytes (`float`): Bytes of a row on disk, if all codes are in use.
        load (`float`): Rows per second that a training run loads in random order.
        ids (`int`): Ids of a row.
    """

    photo_bytes: float
    read: float
    encode: float
    store: float
    row_bytes: float
    load: float
    ids: int

    @property
    def tokenize(self) -> float:
        """Crops per second of one core that does everything."""
        return 1 / (1 / self.read + 1 / self.encode + 1 / self.store)


class CpuClock:
    """Counts the CPU seconds of a `with` block."""

    seconds: float

    def __enter__(self) -> "CpuClock":
        self.begun = time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.process_time() - self.begun


@torch.inference_mode()
def measure_rates(options: argparse.Namespace, folder: Path) -> Rates:
    """Measures the rates of this machine. `folder` holds what is written for it."""
    images = open_images([str(options.photos)])
    model = SVQVAE.from_pretrained(options.model).eval()
    with CpuClock() as reading:
        crops = read_photos(images, options.side)

    batch = SVQVAEImageProcessor.from_model(model)(crops[:BATCH])["pixel_values"]
    model.encode_tokens(batch)  # warms up
    with CpuClock() as encoding:
        model.encode_tokens(batch)

    tokens = str(folder / "tokens")
    tokenize_set(model, images, tokens, model_name="model", crops="centre", resolution=options.side)
    settings = read_settings(tokens)
    num_ids = math.prod(settings.grid(1.0, height=options.side, width=options.side))
    rows = list(random_rows(settings, num_ids, options))
    with CpuClock() as storing:
        files = list(write_shards(Folder(folder), 0, rows, settings, features(settings)))

    source = TokenSource(tokens, label_column=None)
    with CpuClock() as loading:
        load_rows(source)

    return Rates(
        photo_bytes=mean_file_size(options.photos),
        read=len(crops) / reading.seconds,
        encode=len(batch) / encoding.seconds,
        store=len(rows) / storing.seconds,
        row_bytes=sum(written.file.size for written in files) / len(rows),
        load=BATCH * LOADED_BATCHES / loading.seconds,
        ids=num_ids,
    )


def mean_file_size(photos: Path) -> float:
    """Mean bytes of the image files of a folder."""
    files = find_inputs([str(photos)], IMAGE_SUFFIXES)
    return sum(file.path.stat().st_size for file in files) / len(files)


def read_photos(images: ImageSet, side: int) -> list[np.ndarray]:
    """Centre squares of all images, `(side, side, 3)`."""
    crops = []
    for image in read_crops(images, "centre", side, num_workers=0):
        if image.crops is not None:
            crops.append(image.crops[0].transpose(1, 2, 0))
    return crops


def random_rows(settings: TokenSettings, num_ids: int, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Rows that use all codes. Their ids take as many bytes as ids of a large set of photographs."""
    random = np.random.default_rng(0)
    for number in range(options.rows):
        row: dict[str, Any] = {"height": options.side, "width": options.side, "key": f"{number:010}.jpg"}
        row["ids_0"] = random.integers(settings.codebook_size, size=num_ids).astype(settings.id_dtype)
        yield row


def load_rows(source: TokenSource) -> None:
    """Loads `LOADED_BATCHES` batches of rows at random, as a training run does."""
    random = np.random.default_rng(0)
    for _ in range(LOADED_BATCHES):
        rows = random.integers(len(source.rows), size=BATCH)
        source.batch(rows.tolist())


def features(settings: TokenSettings) -> datasets.Features:
    """Columns of a set without labels and captions."""
    return row_features(settings, datasets.Features())


def rate_rows(rates: Rates, options: argparse.Namespace) -> list[Row]:
    """Table of what was measured, and of what was given."""
    lines = [
        ("photographs read, decoded and cropped", f"{rates.read:,.0f} per second of a core"),
        (f"crops of {options.side} pixels encoded on the CPU", f"{rates.encode:,.2g} per second of a core"),
        ("rows stored", f"{rates.store:,.0f} per second of a core"),
        ("rows loaded in a training run", f"{rates.load:,.0f} per second of a core"),
        ("a photograph's file", f"{rates.photo_bytes / 1000:,.0f} KB"),
        (
            f"a row of {rates.ids:,} ids on disk",
            f"{rates.row_bytes:,.0f} bytes",
        ),
    ]
    if options.gpu_rate is not None:
        lines.append(("crops that a GPU encodes (given)", f"{options.gpu_rate:,.0f} per second"))
    if options.train_rate is not None:
        lines.append(("images that a GPU trains on (given)", f"{options.train_rate:,.0f} per second"))
    return table(lines)


def set_rows(rates: Rates, options: argparse.Namespace) -> list[Row]:
    """Table of what the set holds and takes."""
    rows = count_rows(options)
    lines = [
        ("rows", f"{rows:,}"),
        ("ids", f"{rows * rates.ids:,}"),
        ("token set on disk", gigabytes(rows * rates.row_bytes)),
        ("photographs to read, once", gigabytes(options.images * rates.photo_bytes)),
    ]
    return table(lines)


def tokenizing_rows(rates: Rates, options: argparse.Namespace) -> list[Row]:
    """Table of hours to make the set."""
    rows = count_rows(options)
    core_hours = rows / rates.tokenize / SECONDS_PER_HOUR
    lines = [("on CPUs alone", f"{core_hours:,.0f} core hours")]
    if options.gpu_rate is not None:
        gpu_hours = rows / options.gpu_rate / SECONDS_PER_HOUR
        lines += [
            ("on GPUs", f"{gpu_hours:,.0f} GPU hours"),
            (f"with {options.workers} GPUs", f"{gpu_hours / options.workers:,.1f} hours"),
            ("cores that read and store for one GPU", f"{cores_per_gpu(rates, options.gpu_rate)}"),
            (
                "photographs read for one GPU",
                megabytes_per_second(options.gpu_rate * rates.photo_bytes),
            ),
        ]
    else:
        lines.append((f"with {options.workers} cores", f"{core_hours / options.workers:,.0f} hours"))
    return table(lines)


def part_rows(rates: Rates, options: argparse.Namespace) -> list[Row]:
    """Table of the parts that workers make."""
    num_parts = count_parts(rates, options)
    rows = math.ceil(count_rows(options) / num_parts)
    minutes = rows / worker_rate(rates, options) / 60
    files = math.ceil(rows * rates.ids * CACHED_BYTES_PER_ID / SHARD_BYTES)
    lines = [
        ("parts", f"{num_parts:,}"),
        ("images of a part", f"{math.ceil(options.images / num_parts):,}"),
        ("Parquet files of a part", f"{files}, {gigabytes(rows * rates.row_bytes)} in all"),
        ("time of a part, which is lost if its worker is killed", f"{minutes:,.0f} minutes"),
    ]
    return table(lines)


def training_rows(rates: Rates, options: argparse.Namespace) -> list[Row]:
    """Table of a training run on the set."""
    rows = count_rows(options)
    cached_bytes = rows * rates.ids * CACHED_BYTES_PER_ID
    lines = [
        ("copy of the set that `datasets` keeps on each machine", gigabytes(cached_bytes)),
        ("loading an epoch", f"{rows / rates.load / SECONDS_PER_HOUR:,.1f} core hours"),
    ]
    if options.train_rate is not None:
        gpu_hours = rows / options.train_rate / SECONDS_PER_HOUR
        lines += [
            ("training an epoch", f"{gpu_hours:,.0f} GPU hours"),
            ("cores that load for one GPU", f"{options.train_rate / rates.load:.2f}"),
            ("ids read for one GPU", megabytes_per_second(options.train_rate * rates.ids * CACHED_BYTES_PER_ID)),
        ]
    return table(lines)


def commands(rates: Rates, options: argparse.Namespace) -> str:
    """What to run where."""
    num_parts = count_parts(rates, options)
    tokenize = f"svqvae tokenize PHOTOS --output TOKENS --model MODEL --crops {options.crops}"
    tokenize += f" --resolution {options.side} --num-parts {num_parts}"
    minutes = 4 * options.part_minutes
    resources = "--cpus-per-task=1"
    if options.gpu_rate is not None:
        num_cores = cores_per_gpu(rates, options.gpu_rate)
        resources = f"--gres=gpu:1 --cpus-per-task={num_cores}"
        tokenize += f" --workers {num_cores}"
    lines = [
        "try one part, on one worker:",
        f"    {tokenize} --part 0",
        f"all parts, {options.workers} at a time, with Slurm:",
        f"    sbatch --array=0-{num_parts - 1}%{options.workers} {resources} --time={minutes} --requeue --wrap \\",
        f"        '{tokenize} --part $SLURM_ARRAY_TASK_ID'",
        "what is missing:",
        "    svqvae info TOKENS",
    ]
    return "\n".join(lines)


def count_rows(options: argparse.Namespace) -> int:
    """Rows of the set: crops of all images."""
    return int(options.images) * len(CROPS[options.crops])


def count_parts(rates: Rates, options: argparse.Namespace) -> int:
    """Parts that a worker makes in at most `--part-minutes` each, and enough of them to keep all workers busy."""
    rows_per_part = worker_rate(rates, options) * 60 * options.part_minutes
    return max(PARTS_PER_WORKER * options.workers, math.ceil(count_rows(options) / rows_per_part))


def cores_per_gpu(rates: Rates, gpu_rate: float) -> int:
    """Cores that read photographs, and store rows, as fast as one GPU encodes."""
    cores = gpu_rate / rates.read + gpu_rate / rates.store
    return math.ceil(cores)


def worker_rate(rates: Rates, options: argparse.Namespace) -> float:
    """Rows per second of a worker, which is a GPU or a core."""
    return options.gpu_rate or rates.tokenize


def table(lines: list[tuple[str, str]]) -> list[Row]:
    """Rows of a table with two columns."""
    return [{"what": name, "value": value} for name, value in lines]


def gigabytes(count: float) -> str:
    """Bytes in GB."""
    if count < 10 * GIGABYTE:
        return f"{count / GIGABYTE:.2f} GB"
    return f"{count / GIGABYTE:,.0f} GB"


def megabytes_per_second(count: float) -> str:
    """Bytes per second in MB/s."""
    return f"{count / 10**6:,.1f} MB/s"


def main() -> None:
    """Reads the arguments, measures, multiplies and reports."""
    parser = make_parser(__doc__, rounds=1)
    parser.set_defaults(threads=1)
    parser.add_argument("photos", type=Path, metavar="PHOTOS", help="folder of photographs like those of the set")
    parser.add_argument("--images", type=float, default=100e6, help="of the set (default: 100e6)")
    parser.add_argument("--model", default=DEFAULT_MODEL, help="tokenizer (default: the bundled one)")
    parser.add_argument("--side", type=int, default=256, metavar="PIXELS", help="of the crops (default: 256)")
    parser.add_argument("--crops", choices=[name for name in CROPS if name != "whole"], default="centre")
    parser.add_argument("--gpu-rate", type=float, help="crops per second that one GPU encodes")
    parser.add_argument("--train-rate", type=float, help="images per second of one GPU that trains on the set")
    parser.add_argument("--workers", type=int, default=64, help="GPUs, or cores without --gpu-rate (default: 64)")
    parser.add_argument("--part-minutes", type=int, default=30, help="longest time of a part (default: 30)")
    parser.add_argument("--rows", type=int, default=2048, help="rows that are stored for the measurement")
    options, machine = parse_options(parser, "cpu")
    with tempfile.TemporaryDirectory() as folder:
        rates = measure_rates(options, Path(folder))
    tables = {
        "Measured on one core, and given": rate_rows(rates, options),
        "The set": set_rows(rates, options),
        "Making it": tokenizing_rows(rates, options),
        "Parts": part_rows(rates, options),
        "Training on it": training_rows(rates, options),
    }
    report(options, machine, tables)
    print(commands(rates, options))


if __name__ == "__main__":
    main()

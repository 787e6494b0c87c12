"""What a large token set costs: `python benchmarks/plan.py PHOTOS --images 100e6 --gpu-rate 1000`.

Measures, on one core of this machine, how fast photographs are read, encoded, stored and loaded again, and how many
bytes they take. Then it multiplies. A GPU is not measured here: `--gpu-rate` and `--train-rate` are its images per
second, from `benchmarks/token_sets.py` and from the log of a run. Without them, the tables have no lines about GPUs.
A GPU waits if its cores read photographs more slowly than it encodes them. `--cores` is their number.
`--dtype` is the precision of the tokenizer: of the measurement, of `--gpu-rate`, and of the commands that are printed.
"""

import argparse
import math
import resource
import shlex
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from measuring import DTYPES, Row, make_parser, parse_options, report

from svqvae_cli.arguments import positive
from svqvae_cli.files import check_source
from svqvae_files.folders import Folder
from svqvae_files.inputs import find_bundled
from svqvae_hf import DEFAULT_MODEL, SVQVAE, SVQVAEImageProcessor
from svqvae_hf.data.image_rows import image_bytes
from svqvae_hf.data.image_sets import ImageSet, open_images
from svqvae_hf.token_sets.crops import CROPS, read_crops
from svqvae_hf.token_sets.settings import TokenSettings, read_settings
from svqvae_hf.token_sets.shards import SHARD_BYTES, row_features, write_shards
from svqvae_hf.token_sets.writer import tokenize_set
from svqvae_hf.trainer.data.token_sequences import TokenSource
from svqvae_hf.trainer.scripts import one_line_errors

SECONDS_PER_HOUR = 3600
BATCH = 16  # rows of a batch that are encoded or loaded
LOADED_BATCHES = 200
CACHED_BYTES_PER_ID = 2  # 4 if the codebook has more than 65,536 codes
MAX_WORKERS = 64  # by default
DEFAULT_HOURS = 8  # a night, in which the default number of workers makes the set, if it is at most `MAX_WORKERS`
PARTS_PER_WORKER = 4  # at least, so that all workers end at about the same time
GIGABYTE = 10**9
LEAST_JOB_MINUTES = 10  # time limit of a job, which also loads the model
MEASURED_IMAGES = 500  # of the set, from its start
ENOUGH_IMAGES = 20  # for an estimate of the size of photographs, and of the time to read them
DEFAULT_DTYPE = "float32"  # as of `svqvae tokenize`
SET_OPTIONS = ("config", "split", "image_column")  # as `svqvae tokenize` takes them


@dataclass(frozen=True)
class Rates:
    """What one core does, and what an image takes.

    Args:
        photos (`int`): Photographs that were measured.
        unreadable (`int`): Photographs that could not be read. `svqvae tokenize` would skip them.
        photo_bytes (`float`): Bytes of a photograph's file.
        read (`float`): Photographs per second that are read, decoded and cropped.
        encode (`float`): Crops per second that are encoded on the CPU.
        store (`float`): Rows per second that are written.
        row_bytes (`float`): Bytes of a row on disk, if all codes are in use.
        load (`float`): Rows per second that a training run loads in random order.
        ids (`int`): Ids of a row.
        crops_per_photo (`int`): Rows of a photograph.
        peak_memory (`int`): Most bytes of memory that the measurement took.
    """

    photos: int
    unreadable: int
    photo_bytes: float
    read: float
    encode: float
    store: float
    row_bytes: float
    load: float
    ids: int
    crops_per_photo: int
    peak_memory: int

    @property
    def feed(self) -> float:
        """Crops per second that one core reads and stores, while a GPU encodes them."""
        return 1 / (1 / (self.read * self.crops_per_photo) + 1 / self.store)

    @property
    def tokenize(self) -> float:
        """Crops per second of one core that does everything."""
        return 1 / (1 / self.feed + 1 / self.encode)


class CpuClock:
    """Counts the CPU seconds of a `with` block."""

    seconds: float

    def __enter__(self) -> "CpuClock":
        self.begun = time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.process_time() - self.begun


@torch.inference_mode()
def measure_rates(options: argparse.Namespace, images: ImageSet, folder: Path) -> Rates:
    """Measures the rates of this machine. `folder` holds what is written for it."""
    model = SVQVAE.from_pretrained(options.model, dtype=DTYPES[options.dtype]).eval()
    with CpuClock() as reading:
        crops, num_unreadable = read_photos(images, options.side)
    if not crops:
        raise ValueError(f"at least one image must be readable, but none of `{options.photos[0]}` is.")

    batch = SVQVAEImageProcessor.from_model(model)(crops[:BATCH])["pixel_values"].to(model.dtype)
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
        photos=len(crops),
        unreadable=num_unreadable,
        photo_bytes=mean_size(images),
        read=len(crops) / reading.seconds,
        encode=len(batch) / encoding.seconds,
        store=len(rows) / storing.seconds,
        row_bytes=sum(written.file.size for written in files) / len(rows),
        load=BATCH * LOADED_BATCHES / loading.seconds,
        ids=num_ids,
        crops_per_photo=len(CROPS[options.crops]),
        peak_memory=1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,  # Linux counts in KiB
    )


def mean_size(images: ImageSet) -> float:
    """Mean bytes of the images that can be opened."""
    sizes = []
    for image in images:
        try:
            sizes.append(len(image_bytes(image.source)))
        except (ValueError, OSError):  # as `svqvae tokenize` would skip it
            continue
    return sum(sizes) / len(sizes)


def read_photos(images: ImageSet, side: int) -> tuple[list[np.ndarray], int]:
    """Centre squares of all images, `(side, side, 3)`, and the number of images that could not be read."""
    crops = []
    num_unreadable = 0
    for image in read_crops(images, "centre", side, num_workers=0):
        if image.crops is None:
            num_unreadable += 1
        else:
            crops.append(image.crops[0].transpose(1, 2, 0))
    return crops, num_unreadable


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
    photos = f"{rates.photos:,}"
    if rates.photos < ENOUGH_IMAGES:
        photos += f", too few for a good plan: pass at least {ENOUGH_IMAGES}"
    lines = [
        ("photographs measured", photos),
        ("photographs that could not be read", f"{rates.unreadable:,}"),
        ("photographs read, decoded and cropped", f"{rates.read:,.0f} per second of a core"),
        (
            f"crops of {options.side} pixels encoded on the CPU, {options.dtype}",
            f"{rates.encode:,.2g} per second of a core",
        ),
        ("rows stored", f"{rates.store:,.0f} per second of a core"),
        ("rows loaded in a training run", f"{rates.load:,.0f} per second of a core"),
        ("a photograph's file", f"{rates.photo_bytes / 1000:,.0f} KB"),
        (
            f"a row of {rates.ids:,} ids on disk",
            f"{rates.row_bytes:,.0f} bytes",
        ),
    ]
    if options.gpu_rate is not None:
        lines.append((f"crops that a GPU encodes, {options.dtype} (given)", f"{options.gpu_rate:,.0f} per second"))
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
    lines = [("on CPUs alone", duration(core_hours, "core"))]
    if options.gpu_rate is not None:
        rate = worker_rate(rates, options)
        gpu_hours = rows / rate / SECONDS_PER_HOUR
        photos_per_second = rate / rates.crops_per_photo
        lines += [
            ("cores that keep one GPU busy", f"{cores_for_full_speed(rates, options)}"),
            (f"crops of one GPU with {cores_per_gpu(rates, options)} cores", f"{rate:,.0f} per second"),
            ("on GPUs", duration(gpu_hours, "GPU")),
            (workers_title(options.workers, "GPU"), duration(gpu_hours / options.workers)),
            ("photographs read for one GPU", megabytes_per_second(photos_per_second * rates.photo_bytes)),
        ]
    else:
        lines.append((workers_title(options.workers, "core"), duration(core_hours / options.workers)))
        lines.append(("memory of a worker, about", gigabytes(rates.peak_memory)))
    return table(lines)


def workers_title(num_workers: int, worker: str) -> str:
    """Title of the line about all workers, such as `with 5 cores`."""
    if num_workers == 1:
        return f"with 1 {worker}"
    return f"with {num_workers} {worker}s"


def part_rows(rates: Rates, images: ImageSet, options: argparse.Namespace) -> list[Row]:
    """Table of the parts that workers make."""
    num_parts = count_parts(rates, options)
    rows = math.ceil(count_rows(options) / num_parts)
    files = math.ceil(rows * rates.ids * CACHED_BYTES_PER_ID / SHARD_BYTES)
    lines = [
        ("parts", f"{num_parts:,}"),
        ("images of a part", f"{math.ceil(options.images / num_parts):,}"),
        ("Parquet files of a part", f"{files}, {gigabytes(rows * rates.row_bytes)} in all"),
        ("time of a part, which is lost if its worker is killed", duration(hours_of_part(rates, options))),
    ]
    if is_stream(images):
        lines.append(("largest number of parts of PHOTOS, one per file", f"{images.max_parts:,}"))
    return table(lines)


def training_rows(rates: Rates, options: argparse.Namespace) -> list[Row]:
    """Table of a training run on the set."""
    rows = count_rows(options)
    cached_bytes = rows * rates.ids * CACHED_BYTES_PER_ID
    lines = [
        ("copy of the set that `datasets` keeps on each machine", gigabytes(cached_bytes)),
        ("loading an epoch", duration(rows / rates.load / SECONDS_PER_HOUR, "core")),
    ]
    if options.train_rate is not None:
        gpu_hours = rows / options.train_rate / SECONDS_PER_HOUR
        lines += [
            ("training an epoch", duration(gpu_hours, "GPU")),
            ("cores that load for one GPU", f"{options.train_rate / rates.load:.2f}"),
            ("ids read for one GPU", megabytes_per_second(options.train_rate * rates.ids * CACHED_BYTES_PER_ID)),
        ]
    return table(lines)


def commands(rates: Rates, images: ImageSet, options: argparse.Namespace) -> str:
    """What to run where."""
    num_parts = count_parts(rates, options)
    tokenize = ["svqvae", "tokenize", *options.photos, "--output", "tokens"]
    for name in SET_OPTIONS:
        value = getattr(options, name)
        if value is not None:
            tokenize += [f"--{name.replace('_', '-')}", value]
    if options.model != DEFAULT_MODEL:
        tokenize += ["--model", options.model]
    if options.dtype != DEFAULT_DTYPE:
        tokenize += ["--dtype", options.dtype]
    tokenize += ["--crops", options.crops, "--resolution", str(options.side), "--num-parts", str(num_parts)]
    resources = "--cpus-per-task=1"
    if options.gpu_rate is not None:
        num_cores = cores_per_gpu(rates, options)
        resources = f"--gres=gpu:1 --cpus-per-task={num_cores}"
        tokenize += ["--workers", str(num_cores)]
    else:
        tokenize += ["--workers", "0"]  # a worker is one process on one core
    command = shlex.join(tokenize)
    minutes = max(LEAST_JOB_MINUTES, math.ceil(4 * 60 * hours_of_part(rates, options)))
    wrapped = shlex.quote(f"{command} --part $SLURM_ARRAY_TASK_ID")
    lines = []
    if is_stream(images) and num_parts > images.max_parts:
        lines += [
            f"first, because a part reads whole files and PHOTOS has {images.max_parts:,}:",
            f"    pack the images in at least {num_parts:,} files, or lower --num-parts",
        ]
    lines += [
        "try one part, on one worker:",
        f"    {command} --part 0",
        f"all parts, {options.workers} at a time, with Slurm:",
        f"    sbatch --array=0-{num_parts - 1}%{options.workers} {resources} --time={minutes} --requeue --wrap \\",
        f"        {wrapped}",
        *lines_of_machine(command, num_parts, options),
        "what is missing:",
        "    svqvae info tokens",
    ]
    return "\n".join(lines)


def lines_of_machine(command: str, num_parts: int, options: argparse.Namespace) -> list[str]:
    """Lines that say how a machine makes its share of the parts without a scheduler."""
    if options.gpu_rate is None:
        workers = "CORES"
        prefix = "OMP_NUM_THREADS=1 "
        slots = ""
    else:
        workers = "GPUS"
        prefix = ""
        slots = " --process-slot-var=CUDA_VISIBLE_DEVICES"  # each process has the number of its GPU there
    logged = shlex.quote(f"{command} --part {{}} > logs/{{}}.log 2>&1 || echo part {{}} failed")
    workers_per_machine = math.ceil(options.workers / options.machines)
    return [
        "or without Slurm, on each machine (of --machines), with its number from 0 as MACHINE:",
        f"    mkdir -p logs && MACHINE=0 MACHINES={options.machines} {workers}={workers_per_machine}",
        f"    seq $MACHINE $MACHINES {num_parts - 1} | {prefix}xargs -P ${workers}{slots} -I {{}} sh -c \\",
        f"        {logged}",
    ]


def is_stream(images: ImageSet) -> bool:
    """Whether a set is of files that hold many images, which parts cannot divide."""
    return images.rows is None


def hours_of_part(rates: Rates, options: argparse.Namespace) -> float:
    """Hours that a worker takes for a part."""
    rows = math.ceil(count_rows(options) / count_parts(rates, options))
    return rows / worker_rate(rates, options) / SECONDS_PER_HOUR


def count_rows(options: argparse.Namespace) -> int:
    """Rows of the set: crops of all images."""
    return int(options.images) * len(CROPS[options.crops])


def count_parts(rates: Rates, options: argparse.Namespace) -> int:
    """Parts that a worker makes in at most `--part-minutes` each, and enough of them to keep all workers busy."""
    rows_per_part = worker_rate(rates, options) * 60 * options.part_minutes
    return max(PARTS_PER_WORKER * options.workers, math.ceil(count_rows(options) / rows_per_part))


def default_workers(rates: Rates, options: argparse.Namespace) -> int:
    """Workers that make the set in `DEFAULT_HOURS`, or `MAX_WORKERS` if even these take longer."""
    hours_of_one_worker = count_rows(options) / worker_rate(rates, options) / SECONDS_PER_HOUR
    return min(MAX_WORKERS, math.ceil(hours_of_one_worker / DEFAULT_HOURS))


def cores_for_full_speed(rates: Rates, options: argparse.Namespace) -> int:
    """Cores that read photographs, and store rows, as fast as one GPU encodes."""
    return math.ceil(options.gpu_rate / rates.feed)


def cores_per_gpu(rates: Rates, options: argparse.Namespace) -> int:
    """Cores that read and store for one GPU, at most `--cores`."""
    cores = cores_for_full_speed(rates, options)
    if options.cores is None:
        return cores
    return min(cores, options.cores)


def worker_rate(rates: Rates, options: argparse.Namespace) -> float:
    """Rows per second of a worker, which is a core, or a GPU with its cores."""
    if options.gpu_rate is None:
        return rates.tokenize
    if options.cores is None:
        return options.gpu_rate
    return min(options.gpu_rate, options.cores * rates.feed)


def table(lines: list[tuple[str, str]]) -> list[Row]:
    """Rows of a table with two columns."""
    return [{"what": name, "value": value} for name, value in lines]


def duration(hours: float, worker: str = "") -> str:
    """Hours or minutes in words, such as `3,300 core hours`.

    Args:
        hours (`float`): Hours.
        worker (`str`, defaults to `""`): What works for so long, such as `core`.
    """
    prefix = f"{worker} " if worker else ""
    minutes = 60 * hours
    if hours >= 10:
        return f"{hours:,.0f} {prefix}hours"
    if hours >= 2:
        return f"{hours:.1f} {prefix}hours"
    if minutes >= 2:
        return f"{minutes:.0f} {prefix}minutes"
    return f"{60 * minutes:.2g} {prefix}seconds"


def gigabytes(count: float) -> str:
    """Bytes in GB, or in MB if they are few."""
    if count < GIGABYTE / 10:
        return f"{count / 10**6:.2g} MB"
    if count < 10 * GIGABYTE:
        return f"{count / GIGABYTE:.2f} GB"
    return f"{count / GIGABYTE:,.0f} GB"


def megabytes_per_second(count: float) -> str:
    """Bytes per second in MB/s."""
    return f"{count / 10**6:,.1f} MB/s"


def plan_parser() -> argparse.ArgumentParser:
    """Makes the parser of the arguments."""
    parser = make_parser(__doc__, rounds=1)
    parser.set_defaults(threads=1)
    help = "image set like the one to tokenize, named as `svqvae tokenize` takes it; its first 500 images are measured"
    parser.add_argument("photos", nargs="+", metavar="PHOTOS", help=help)
    for name in SET_OPTIONS:
        parser.add_argument(f"--{name.replace('_', '-')}", metavar="NAME", help="as of `svqvae tokenize`")
    parser.add_argument("--images", type=float, default=100e6, help="of the set (default: 100e6)")
    parser.add_argument("--model", default=DEFAULT_MODEL, help="tokenizer (default: the bundled one)")
    parser.add_argument(
        "--dtype", choices=DTYPES, default=DEFAULT_DTYPE, help="precision of the tokenizer (default: float32)"
    )
    parser.add_argument("--side", type=positive, default=256, metavar="PIXELS", help="of the crops (default: 256)")
    parser.add_argument("--crops", choices=[name for name in CROPS if name != "whole"], default="centre")
    parser.add_argument("--gpu-rate", type=float, help="crops per second that one GPU encodes in --dtype")
    help = "cores of each GPU, which bound its speed (default: as many as keep it busy)"
    parser.add_argument("--cores", type=positive, help=help)
    parser.add_argument("--train-rate", type=float, help="images per second of one GPU that trains on the set")
    help = "GPUs, or cores without --gpu-rate (default: as many as make the set in eight hours, at most 64)"
    parser.add_argument("--workers", type=positive, help=help)
    help = "machines that share the workers, in the commands without Slurm (default: 1)"
    parser.add_argument("--machines", type=positive, default=1, help=help)
    parser.add_argument("--part-minutes", type=positive, default=30, help="longest time of a part (default: 30)")
    parser.add_argument("--rows", type=positive, default=2048, help="rows that are stored for the measurement")
    return parser


def main() -> None:
    """Reads the arguments, measures, multiplies and reports."""
    options, machine = parse_options(plan_parser(), "cpu")
    if options.cores is not None and options.gpu_rate is None:
        raise ValueError("`--cores` are the cores of a GPU. Pass `--gpu-rate` as well, or leave `--cores` out.")
    options.model = find_bundled(options.model)
    check_source(options.model)
    set_options = {name: getattr(options, name) for name in SET_OPTIONS}
    images = open_images(options.photos, **set_options)  # a wrong set is an error before anything is measured
    with tempfile.TemporaryDirectory() as folder:
        rates = measure_rates(options, images.first(MEASURED_IMAGES), Path(folder))
    if options.workers is None:
        options.workers = default_workers(rates, options)
    tables = {
        "Measured on one core, and given": rate_rows(rates, options),
        "The set": set_rows(rates, options),
        "Making it": tokenizing_rows(rates, options),
        "Parts": part_rows(rates, images, options),
        "Training on it": training_rows(rates, options),
    }
    report(options, machine, tables)
    print(commands(rates, images, options))


if __name__ == "__main__":
    with one_line_errors():
        main()

"""Token sets: speed against the bare encoder, memory as the set grows, and killed runs.

    python benchmarks/token_sets.py IMAGES speed     # `tokenize_set` against `encode_tokens`, crops of 256 pixels
    python benchmarks/token_sets.py IMAGES memory    # peak memory for 200 and 2,000 small images
    python benchmarks/token_sets.py IMAGES killed    # 2,000 images of mixed sizes, one in fifty broken

The bare encoder is a loop over tensors in memory with the same batch size, timed in the same turns. `killed` kills the
command twice and finishes it on two processes. It then compares the files with the files of an uninterrupted run, and
the ids with `encode_tokens` of one image at a time.
"""

import argparse
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
from measuring import Row, describe_machine, in_own_process, make_parser, report, take_turns
from PIL import Image, ImageOps

from svqvae_hf import DEFAULT_MODEL, SVQVAE, SVQVAEImageProcessor
from svqvae_hf.data.image_sets import open_images
from svqvae_hf.models.image_processing_svqvae import IMAGE_SUFFIXES, load_image
from svqvae_hf.paths import find_files
from svqvae_hf.token_sets.settings import read_settings, row_tokens
from svqvae_hf.token_sets.writer import tokenize_set

SMALL = 64  # side in pixels of the images for `memory`
MIXED = (32, 160)  # range of sides in pixels of the images for `killed`
BROKEN_EVERY = 50
KILLED_AT = (0.2, 0.6)  # fractions of the shards that are finished


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
        ImageOps.fit(images[index % len(images)], size, Image.Resampling.BOX).save(folder / f"{index:05}.png")


def measure_speed(options: argparse.Namespace, folder: Path) -> list[Row]:
    """Measures images per second, from files and from tensors in memory."""
    paths = find_files([str(options.images)], IMAGE_SUFFIXES)
    model = load_model(options.device)
    images = [load_image(paths[index % len(paths)]) for index in range(options.count)]
    side = options.resolution
    for index, image in enumerate(images):
        image.save(folder / f"{index:05}.jpg", quality=95)
    crops = [ImageOps.fit(image, (side, side), Image.Resampling.BICUBIC) for image in images]
    del images
    sample = SVQVAEImageProcessor(pixel_range=model.config["pixel_range"])(crops)["pixel_values"].to(options.device)
    outputs = iter(range(sys.maxsize))

    def encode() -> None:
        with torch.inference_mode():
            for batch in sample.split(options.batch_size):
                model.encode_tokens(batch, [1.0])

    def tokenize(workers: int) -> Callable[[], None]:
        return lambda: tokenize_set(
            model,
            open_images([str(folder)]),
            folder.with_name(f"tokens-{next(outputs)}"),
            model_name="bundled",
            crops="centre",
            resolution=side,
            batch_size=options.batch_size,
            num_workers=workers,
        )

    bare = "bare encoder, tensors in memory"
    runs = {bare: encode} | {f"tokenize_set, {n} workers": tokenize(n) for n in options.workers}
    for run in runs.values():
        run()
    seconds = take_turns(runs, options.rounds, options.device)
    return [
        {
            "method": name,
            "images per second": options.count / statistics.median(times),
            "times as fast as the bare encoder": statistics.median(seconds[bare]) / statistics.median(times),
            "ratio of the fastest runs": min(seconds[bare]) / min(times),
            "rounds": times,
        }
        for name, times in seconds.items()
    ]


def prepare_small(device: str, folder: Path, out: Path, workers: int) -> Callable[[], Any]:
    """Loads and warms up the model, and returns a run over a folder as a function."""
    model = load_model(device)
    images = open_images([str(folder)])
    with torch.inference_mode():
        model.encode_tokens(torch.zeros(1, 3, SMALL, SMALL, device=device), [1.0])
    return lambda: tokenize_set(model, images, out, model_name="bundled", shard_size=100, num_workers=workers)


def measure_memory(options: argparse.Namespace, folder: Path) -> list[Row]:
    """Measures peak memory of the encoding process, without the loaded model."""
    paths = find_files([str(options.images)], IMAGE_SUFFIXES)[:20]
    rows = []
    for count in options.counts:
        images = folder / f"images-{count}"
        write_images(paths, images, [(SMALL, SMALL)] * count)
        arguments = (options.device, images, folder / f"tokens-{count}", options.workers[-1])
        cost = in_own_process(options.device, options.threads, prepare_small, *arguments)
        rows.append({"images": count, "peak memory, MiB": cost.peak_mib, "seconds": cost.seconds})
    return rows


def run_killed(options: argparse.Namespace, folder: Path) -> list[Row]:
    """Kills a run twice, finishes it on two processes, and checks the whole set."""
    paths = find_files([str(options.images)], IMAGE_SUFFIXES)[:20]
    choose = random.Random(0)
    write_images(
        paths, folder / "images", [(choose.randint(*MIXED), choose.randint(*MIXED)) for _ in range(options.count)]
    )
    broken = sorted((folder / "images").iterdir())[::BROKEN_EVERY]
    for path in broken:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    shard_size = max(1, options.count // 40)
    num_shards = -(-options.count // shard_size)
    command_options = ["--shard-size", str(shard_size), "--scales", "0.5", "1"]

    def command(out: str) -> list[str]:
        return ["-m", "svqvae_cli", "tokenize", str(folder / "images"), str(folder / out), *command_options]

    steps = []
    for fraction in KILLED_AT:
        run = subprocess.Popen([sys.executable, *command("killed")])
        while len(list((folder / "killed.partial" / "data").glob("*.parquet"))) < fraction * num_shards:
            time.sleep(0.05)
            if run.poll() is not None:
                raise RuntimeError("The run ended before it was killed. Raise --count.")
        run.send_signal(signal.SIGKILL)
        run.wait()
        steps.append(len(list((folder / "killed.partial" / "data").glob("*.parquet"))))
    two = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    subprocess.run([sys.executable, *two, *command("killed")], check=True)
    subprocess.run([sys.executable, *command("unbroken")], check=True)
    killed, unbroken = (
        {path.name: path.read_bytes() for path in (folder / name / "data").iterdir()}
        for name in ("killed", "unbroken")
    )
    rows = datasets.load_dataset(str(folder / "killed"), split="train", cache_dir=str(folder / "cache"))
    return [
        {
            "images": options.count,
            "broken": len(broken),
            "rows": len(rows),
            "duplicate rows": len(rows) - len(set(rows["key"])),
            "shards when killed": " and ".join(map(str, steps)),
            "shards": len(killed),
            "shards that differ from one run": sum(killed[name] != unbroken.get(name) for name in killed),
            "ids that differ from encode_tokens": count_differing(rows, folder),
        }
    ]


def count_differing(rows: datasets.Dataset, folder: Path) -> int:
    """Counts the ids of a set that differ from its images encoded one at a time."""
    model, settings = load_model("cpu"), read_settings(folder / "killed")
    processor = SVQVAEImageProcessor(pixel_range=model.config["pixel_range"])
    differing = 0
    with torch.inference_mode():
        for row in rows:
            expected = model.encode_tokens(
                processor(str(folder / "images" / row["key"]))["pixel_values"], settings.scales
            )
            found = row_tokens(row, settings).ids
            differing += sum(int((one[0] != other).sum()) for one, other in zip(expected, found, strict=True))
    return differing


MODES = {"speed": measure_speed, "memory": measure_memory, "killed": run_killed}
COUNTS = {"speed": 64, "memory": 0, "killed": 2000}


def main() -> None:
    """Reads the arguments, runs the benchmark and reports."""
    parser = make_parser(__doc__, rounds=5)
    parser.add_argument("images", type=Path, metavar="IMAGES", help="folder of source images")
    parser.add_argument("mode", choices=tuple(MODES))
    parser.add_argument(
        "--count", type=int, help="number of images for `speed` (default: 64) and `killed` (default: 2000)"
    )
    parser.add_argument(
        "--counts", type=int, nargs="+", default=[200, 2000], help="numbers of images for `memory` (default: 200 2000)"
    )
    parser.add_argument("--resolution", type=int, default=256, help="side of the crops for `speed` (default: 256)")
    parser.add_argument("--batch-size", type=int, default=1, help="batch size for `speed` (default: 1)")
    parser.add_argument(
        "--workers", type=int, nargs="+", default=[0, 2], help="numbers of reading processes (default: 0 2)"
    )
    options = parser.parse_args()
    options.count = options.count or COUNTS[options.mode]
    torch.set_num_threads(options.threads)
    machine = describe_machine(options.device, options.threads)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder, "work")
        work.mkdir()
        rows = MODES[options.mode](options, work)
    report(options, machine, {f"token sets, {options.mode}": rows})


if __name__ == "__main__":
    main()

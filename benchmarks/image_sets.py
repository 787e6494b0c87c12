"""Reading of image sets: `python benchmarks/image_sets.py [--output FILE.json]`.

Opens a folder of many files, and loads batches from a slow stream: shards with a latency per image. Each batch is
followed by a step that sleeps. The ideal is a batch per step, without waiting.
"""

import argparse
import io
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from measuring import MIB, describe_machine, in_own_process, make_parser, report
from PIL import Image

from svqvae_hf.data.image_rows import ImageRow
from svqvae_hf.data.image_sets import ImageSet, open_images
from svqvae_hf.trainer.data.crop_loader import CropLoader
from svqvae_hf.trainer.data.crops import CropPolicy

PHOTOGRAPH = Path(__file__).parent.parent / "docs" / "images" / "osprey.jpg"
BATCH = 8
SIDE = 256  # pixels
SHARDS = 8


class SlowPart:
    """A shard with a latency per image."""

    def __init__(self, number: int, count: int, latency: float, content: bytes):
        self.name = f"shard {number}"
        self.count = count
        self.latency = latency
        self.content = content

    def read(self, start: int = 0) -> Iterator[ImageRow]:
        """Yields the images from a row on."""
        for index in range(start, self.count):
            time.sleep(self.latency)
            key = f"{self.name}, {index}.jpg"
            yield ImageRow(key, {"path": key, "bytes": self.content}, {})


def make_folder(root: str, folders: int, files: int) -> None:
    """Makes folders of empty files, which are opened as a set and never read."""
    for number in range(folders):
        folder = Path(root, f"class_{number:03}")
        folder.mkdir()
        for index in range(number, files, folders):
            (folder / f"{index:06}.jpg").touch()


def prepare_opening(root: str) -> Callable[[], Any]:
    """Returns the opening of a folder."""
    kept = []
    return lambda: kept.append(open_images([root]))


def measure_stream(options: argparse.Namespace, step: float, content: bytes) -> dict[str, Any]:
    """Seconds to the first batch, and per batch after it, with a step of so many seconds."""
    parts = [SlowPart(number, options.batches, options.latency, content) for number in range(SHARDS)]
    policy = CropPolicy([SIDE], BATCH, center_crop=False, random_flip=True, resize_range=(0.5, 1.0))
    loader = CropLoader(
        ImageSet(parts, {}, lambda: None),
        policy,
        (0.0, 1.0),
        seed=0,
        num_workers=options.workers,
        process_index=0,
        num_processes=1,
        num_batches=options.batches,
    )
    start = time.perf_counter()
    times = []
    for _ in loader:
        times.append(time.perf_counter() - start)
        time.sleep(step)
    per_batch = (times[-1] - times[0]) / (len(times) - 1)
    return {
        "step, s": step,
        "first batch, s": times[0],
        "time per batch, s": per_batch,
        "over the step": per_batch / step if step else None,
    }


def main() -> None:
    """Measures and prints the tables."""
    parser = make_parser(__doc__, rounds=3)
    parser.add_argument("--files", type=int, default=40_000, help="files in the folder (default: %(default)s)")
    parser.add_argument("--folders", type=int, default=40, help="folders of them (default: %(default)s)")
    parser.add_argument("--batches", type=int, default=250, help="batches of the stream (default: %(default)s)")
    parser.add_argument("--latency", type=float, default=0.01, help="seconds per image (default: %(default)s)")
    parser.add_argument("--steps", type=float, nargs="+", default=[0.08, 0.0], help="seconds (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=4, help="processes that cut crops (default: %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    machine = describe_machine("cpu", options.threads)
    with TemporaryDirectory() as root:
        make_folder(root, options.folders, options.files)
        costs = [in_own_process("cpu", 1, prepare_opening, root) for _ in range(options.rounds)]
    opening = [{"seconds": cost.seconds, "kB per file": cost.peak_mib * MIB / 1000 / options.files} for cost in costs]
    content = io.BytesIO()
    Image.open(PHOTOGRAPH).crop((0, 0, 2 * SIDE, 2 * SIDE)).save(content, "JPEG")
    streams = [measure_stream(options, step, content.getvalue()) for step in options.steps]
    report(options, machine, {"A folder": opening, "A slow stream": streams})


if __name__ == "__main__":
    main()

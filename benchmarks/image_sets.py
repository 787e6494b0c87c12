"""Opening of a folder of many files as an image set: `python benchmarks/image_sets.py [--output FILE.json]`."""

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from measuring import MIB, describe_machine, in_own_process, make_parser, report

from svqvae_hf.data.image_sets import open_images


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


def main() -> None:
    """Measures and prints the tables."""
    parser = make_parser(__doc__, rounds=3)
    parser.add_argument("--files", type=int, default=40_000, help="files in the folder (default: %(default)s)")
    parser.add_argument("--folders", type=int, default=40, help="folders of them (default: %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    machine = describe_machine("cpu", options.threads)
    with TemporaryDirectory() as root:
        make_folder(root, options.folders, options.files)
        costs = [in_own_process("cpu", 1, prepare_opening, root) for _ in range(options.rounds)]
    opening = [{"seconds": cost.seconds, "kB per file": cost.peak_mib * MIB / 1000 / options.files} for cost in costs]
    report(options, machine, {"A folder": opening})


if __name__ == "__main__":
    main()

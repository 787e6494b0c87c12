"""Token sets made by workers that are killed at random, compared with the set of one process.

    python benchmarks/fleet.py part     # `svqvae tokenize --part`, four jobs at a time
    python benchmarks/fleet.py local    # four local executors of datatrove, each with a quarter of the parts
    python benchmarks/fleet.py ray      # datatrove's executor for Ray, on two nodes of this machine; `pip install ray`

The images are small, made on the spot, and one in fifty is broken. The model is tiny, because its speed does not
matter here. Killed jobs are started again, as a scheduler would start them; datatrove itself does so with Ray.
"""

import argparse
import io
import json
import multiprocessing
import random
import signal
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow.parquet as pq
import torch
from measuring import Row, describe_machine, make_parser, report
from PIL import Image

from svqvae_hf import SVQVAE
from svqvae_hf.data.image_sets import open_images
from svqvae_hf.token_sets.datatrove_step import TokenizeImages
from svqvae_hf.token_sets.writer import tokenize_set

SIDES = (8, 24)  # range in pixels
BROKEN_EVERY = 50
AT_ONCE = 4  # jobs
EXECUTORS = 4
KILL_CHANCE = 0.1  # per look
LOOK_SECONDS = 0.1
TINY = {"base_channels": 8, "encoder_ch_mult": (1, 2, 2), "decoder_ch_mult": (1, 2, 2), "num_res_blocks": 1}
TINY |= {"norm_num_groups": 2, "z_channels": 8, "codebook_size": 64, "codebook_embed_dim": 8}


def write_set(folder: Path, count: int) -> None:
    """Writes images of noise, one in fifty of them broken, and a tiny model."""
    (folder / "images").mkdir()
    generator = np.random.default_rng(0)
    for index in range(count):
        size = (*generator.integers(SIDES[0], SIDES[1] + 1, 2), 3)
        file = io.BytesIO()
        Image.fromarray(generator.integers(256, size=size, dtype=np.uint8)).save(file, "png")
        content = file.getvalue()
        content = content[: len(content) // 2] if index % BROKEN_EVERY == 0 else content
        (folder / "images" / f"{index:06}.png").write_bytes(content)
    torch.manual_seed(0)
    SVQVAE(**TINY).save_pretrained(folder / "tiny")


def run_part(folder: Path, out: str, parts: int, part: int) -> None:
    """Runs `svqvae tokenize` for one part in this process, and exits with its code."""
    from svqvae_cli import main

    arguments = ["tokenize", folder / "images", folder / out / "set", "--model", folder / "tiny", "--device", "cpu"]
    arguments += ["--num-parts", parts, "--part", part, "--workers", 0]
    sys.exit(main(list(map(str, arguments))))


def run_executor(folder: Path, out: str, parts: int, number: int) -> None:
    """Runs a local executor of datatrove with its share of the parts."""
    from datatrove.executor import LocalPipelineExecutor

    step = TokenizeImages([str(folder / "images")], str(folder / out / "set"), str(folder / "tiny"), device="cpu")
    first, end = (index * parts // EXECUTORS for index in (number, number + 1))
    LocalPipelineExecutor(
        pipeline=[step],
        tasks=parts,
        workers=1,
        local_tasks=end - first,
        local_rank_offset=first,
        logging_dir=str(folder / out / "logs"),
    ).run()


def run_jobs(target: Callable[..., None], jobs: int, kills: int, *arguments: Any) -> int:
    """Runs jobs, four at a time, kills some at random, and starts those again. Returns how many were killed."""
    chance, killed = random.Random(0), 0
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["svqvae_cli.tokenize", "svqvae_hf.token_sets.datatrove_step"])
    waiting, running = deque(range(jobs)), {}
    while waiting or running:
        while waiting and len(running) < AT_ONCE:
            job = waiting.popleft()
            running[job] = context.Process(target=target, args=(*arguments, job))
            running[job].start()
        time.sleep(LOOK_SECONDS)
        job = chance.choice(list(running))
        if killed < kills and chance.random() < KILL_CHANCE and running[job].is_alive():
            kill(psutil.Process(running[job].pid))
            running[job].join()
            killed += 1
        for job, process in list(running.items()):
            if process.is_alive():
                continue
            del running[job]
            if process.exitcode == -signal.SIGKILL:
                waiting.append(job)
            elif process.exitcode != 0:
                raise RuntimeError(f"job {job} ended with code {process.exitcode}.")
    return killed


def kill(process: psutil.Process) -> None:
    """Kills a process and its children, which would go on otherwise."""
    for each in [*process.children(), process]:
        each.kill()


def run_ray(parts: int, kills: int, folder: Path, out: str) -> int:
    """Runs datatrove's executor on two nodes of Ray, kills some workers, and returns how many."""
    import ray
    from datatrove.executor import RayPipelineExecutor
    from ray.cluster_utils import Cluster

    cluster = Cluster()
    for _ in range(2):
        cluster.add_node(num_cpus=AT_ONCE // 2, memory=AT_ONCE // 2 * 2**30, object_store_memory=2**27)
    ray.init(address=cluster.address)
    step = TokenizeImages([str(folder / "images")], str(folder / out / "set"), str(folder / "tiny"), device="cpu")
    executor = RayPipelineExecutor(
        pipeline=[step], tasks=parts, workers=AT_ONCE, mem_per_cpu_gb=1, logging_dir=str(folder / out / "logs")
    )
    running = threading.Thread(target=executor.run)
    running.start()
    chance, killed = random.Random(0), 0
    while running.is_alive():
        time.sleep(LOOK_SECONDS)
        with suppress(psutil.NoSuchProcess):  # it has ended in the meantime
            workers = [each for each in psutil.process_iter(["name"]) if each.info["name"].startswith("ray::RankWork")]
            busy = [each for each in workers if each.children()]  # each child runs a task
            if busy and killed < kills and chance.random() < KILL_CHANCE:
                kill(chance.choice(busy))
                killed += 1
    ray.shutdown()
    cluster.shutdown()
    return killed


def read_files(folder: Path) -> dict[str, bytes]:
    """Contents of all files by name."""
    names = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in names}


# What makes a set, by its number of parts, the number of kills, its folder and name; returns the number of kills
ENGINES: dict[str, Callable[[int, int, Path, str], int]] = {
    "part": lambda parts, kills, *folder: run_jobs(run_part, parts, kills, *folder, parts),
    "local": lambda parts, kills, *folder: run_jobs(run_executor, EXECUTORS, kills, *folder, parts),
    "ray": run_ray,
}


def measure(options: argparse.Namespace, folder: Path) -> Row:
    """Makes the set with killed workers, and once with one process, and compares them."""
    write_set(folder, options.count)
    for name in ("alone", "fleet"):
        (folder / name).mkdir()
    model = SVQVAE.from_pretrained(folder / "tiny").eval()
    images, alone = open_images([str(folder / "images")]), folder / "alone" / "set"
    tokenize_set(model, images, alone, model_name="tiny", num_parts=options.parts)
    begun = time.perf_counter()
    killed = ENGINES[options.engine](options.parts, options.kills, folder, "fleet")
    seconds = time.perf_counter() - begun
    expected, found = (read_files(folder / name / "set") for name in ("alone", "fleet"))
    records = [json.loads(line) for line in found["manifest.jsonl"].splitlines()]
    names = [file["name"] for record in records for file in record["files"]]
    keys = [key for name in names for key in pq.read_table(folder / "fleet" / "set" / name)["key"].to_pylist()]
    readable = [f"{index:06}.png" for index in range(options.count) if index % BROKEN_EVERY]
    return {
        "engine": options.engine,
        "images": options.count,
        "parts": options.parts,
        "killed": killed,
        "files that differ": sum(found.get(name) != expected.get(name) for name in {**found, **expected}),
        "rows missing, twice or out of order": "none" if keys == readable else "some",
        "seconds": seconds,
    }


def main() -> None:
    """Reads the arguments, runs the benchmark and reports."""
    parser = make_parser(__doc__, rounds=1)
    parser.add_argument("engine", choices=tuple(ENGINES))
    parser.add_argument("--count", type=int, default=20_000, help="number of images (default: 20000)")
    parser.add_argument("--parts", type=int, default=64, help="number of parts (default: 64)")
    parser.add_argument("--kills", type=int, default=20, help="number of workers to kill (default: 20)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        row = measure(options, Path(folder))
    report(options, describe_machine(options.device, options.threads), {"token sets by a fleet": [row]})


if __name__ == "__main__":
    main()

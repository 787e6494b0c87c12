"""Shared parts of the benchmarks: timing in turns, peak memory, description of the machine, JSON and Markdown."""

import argparse
import ctypes
import json
import multiprocessing
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import psutil
import torch

from svqvae_files.outputs import write_file

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
BFLOAT16_FLAGS = ("amx_bf16", "avx512_bf16")
MIB = 1 << 20
# Imported once, in the process from which the measured processes fork. It does not find modules of this folder.
PRELOADED = [
    "svqvae_hf.loaders.checkpoints",
    "diffusers.models.autoencoders.autoencoder_kl",
    "diffusers.models.autoencoders.vq_model",
]
RSS_PEAK_RESET = "5"  # see proc(5), /proc/pid/clear_refs

Row = Mapping[str, Any]


class Cost(NamedTuple):
    """Cost of one run.

    Args:
        seconds (`float`): Wall-clock time.
        cpu_seconds (`float`): CPU time of all threads together.
        peak_mib (`float`): Peak memory minus memory before the run, in MiB: resident memory of the process on a CPU,
            allocated memory on a GPU.
    """

    seconds: float
    cpu_seconds: float
    peak_mib: float


def median_cost(costs: Sequence[Cost]) -> Cost:
    """Median of each field."""
    return Cost(
        seconds=statistics.median([cost.seconds for cost in costs]),
        cpu_seconds=statistics.median([cost.cpu_seconds for cost in costs]),
        peak_mib=statistics.median([cost.peak_mib for cost in costs]),
    )


def make_parser(description: str, rounds: int) -> argparse.ArgumentParser:
    """Makes a parser with the options that all benchmarks share."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--rounds", type=int, default=rounds, help="timed runs of each contestant (default: %(default)s)"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: %(default)s")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=device, help="default: %(default)s")
    parser.add_argument(
        "--output", type=Path, metavar="FILE.json", help="write JSON to this file, and the tables as .md beside it"
    )
    return parser


def parse_options(parser: argparse.ArgumentParser, device: str | None = None) -> tuple[argparse.Namespace, Row]:
    """Reads the command line, sets the threads, and describes the machine before the run.

    Args:
        parser (`argparse.ArgumentParser`): Parser of [`make_parser`].
        device (`str`, *optional*): Device to describe if `--device` has no effect; by default that of `--device`.
    """
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    return options, describe_machine(device or options.device, options.threads)


def add_dtypes(parser: argparse.ArgumentParser) -> None:
    """Adds the option of the types to measure."""
    parser.add_argument(
        "--dtypes",
        nargs="+",
        choices=DTYPES,
        default=list(DTYPES),
        help="default: all; leave out bfloat16 on a CPU without instructions for it",
    )


def take_turns(
    contestants: Mapping[str, Callable[[], Any]], rounds: int, device: str
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Times contestants in turns, one run of each per round, so that the load of the machine affects all alike.

    Args:
        contestants (`Mapping[str, Callable]`): Functions to time, by name, warmed up.
        rounds (`int`): Runs per contestant.
        device (`str`): Device of the work.

    Returns:
        `tuple`: Seconds of all runs, and their median, by name.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, run in contestants.items():
            seconds[name].append(time_once(run, device))
    return seconds, {name: statistics.median(times) for name, times in seconds.items()}


def time_once(run: Callable[[], Any], device: str) -> float:
    """Times one run in seconds; on a GPU between two events on its stream."""
    if not is_gpu(device):
        begun = time.perf_counter()
        run()
        return time.perf_counter() - begun
    start = torch.cuda.Event(enable_timing=True)
    end = torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000


def is_gpu(device: str) -> bool:
    """Whether a device is a GPU of CUDA."""
    return torch.device(device).type == "cuda"


def in_own_process(device: str, threads: int, prepare: Callable[..., Callable[[], Any]], *arguments: Any) -> Cost:
    """Measures one run in a process of its own, so that no other contestant is in memory.

    Args:
        device (`str`): Device of the work.
        threads (`int`): Threads of PyTorch.
        prepare (`Callable`): Function of a module. The new process calls it to load the model and to warm up; it
            returns the run to measure.
        *arguments: Arguments of `prepare`.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_measure, device, threads, prepare, arguments).result()


def _measure(device: str, threads: int, prepare: Callable[..., Callable[[], Any]], arguments: Sequence[Any]) -> Cost:
    torch.set_num_threads(threads)
    use_device(device)
    run = prepare(*arguments)
    if is_gpu(device):
        return _measure_on_gpu(run)
    return _measure_on_cpu(run)


def _measure_on_gpu(run: Callable[[], Any]) -> Cost:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    begun = time.perf_counter()
    cpu_begun = time.process_time()
    run()
    torch.cuda.synchronize()
    seconds = time.perf_counter() - begun
    cpu_seconds = time.process_time() - cpu_begun
    return Cost(seconds, cpu_seconds, (torch.cuda.max_memory_allocated() - before) / MIB)


def _measure_on_cpu(run: Callable[[], Any]) -> Cost:
    ctypes.CDLL(None).malloc_trim(0)  # returns freed memory of loading to the system
    Path("/proc/self/clear_refs").write_text(RSS_PEAK_RESET)
    before = _resident_memory("VmRSS")
    begun = time.perf_counter()
    cpu_begun = time.process_time()
    run()
    seconds = time.perf_counter() - begun
    cpu_seconds = time.process_time() - cpu_begun
    return Cost(seconds, cpu_seconds, (_resident_memory("VmHWM") - before) / MIB)


def _resident_memory(name: str) -> int:
    """Resident memory of this process in bytes: the current (`VmRSS`) or the peak (`VmHWM`)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            _, kibibytes, _ = line.split()
            return int(kibibytes) << 10
    raise OSError(f"/proc/self/status must have `{name}`, but does not. Measure on Linux.")


def use_device(device: str) -> None:
    """Makes a numbered GPU the one whose events and memory are measured."""
    if is_gpu(device) and torch.device(device).index is not None:
        torch.cuda.set_device(device)


def describe_machine(device: str, threads: int) -> dict[str, Any]:
    """Describes the hardware and the versions that the figures depend on."""
    use_device(device)
    fields = {}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        fields[name.strip()] = value.strip()
    flags = fields.get("flags", fields.get("Features", ""))  # on x86, and on ARM
    instructions = [flag for flag in BFLOAT16_FLAGS if flag in flags.split()]
    return {
        "processor": fields.get("model name", platform.machine()),
        "cores": psutil.cpu_count(logical=False),
        "threads": threads,
        "bfloat16 instructions": ", ".join(instructions) or "none",
        "memory, GiB": round(psutil.virtual_memory().total / (1 << 30)),
        "GPU": torch.cuda.get_device_name(device) if is_gpu(device) else "none",
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "load at the start": round(os.getloadavg()[0], 1),
    }


def report(options: argparse.Namespace, machine: Row, tables: Mapping[str, Sequence[Row]]) -> None:
    """Prints the tables in Markdown; with `--output`, writes them as JSON, and the Markdown beside it.

    Args:
        options (`argparse.Namespace`): Options of [`make_parser`].
        machine (`Mapping`): Machine, from [`parse_options`].
        tables (`Mapping[str, Sequence[Mapping]]`): Rows by title, in full precision. A list, such as the seconds of
            all rounds, is only written to JSON.
    """
    arguments = [_without_folders(argument) for argument in sys.argv[1:]]
    command = shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *arguments])
    facts = [f"{name}: {value}" for name, value in machine.items()]
    parts = [f"`{command}`", ", ".join(facts)]
    for title, rows in tables.items():
        parts.append(f"## {title}\n\n{_markdown(rows)}")
    text = "\n\n".join(parts) + "\n"
    print(text)
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        content = {"command": command, "machine": machine, "tables": tables}
        write_file(options.output, (json.dumps(content, indent=2) + "\n").encode())
        write_file(options.output.with_suffix(".md"), text.encode())


def _without_folders(argument: str) -> str:
    """Cuts an absolute path to its last part, because folders of this machine mean nothing elsewhere."""
    if Path(argument).is_absolute():
        return Path(argument).name
    return argument


def _markdown(rows: Sequence[Row]) -> str:
    columns = [name for name in rows[0] if not isinstance(rows[0][name], list)]
    lines = [_line(columns), _line(["---"] * len(columns))]
    for row in rows:
        lines.append(_line([_cell(row[name]) for name in columns]))
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"

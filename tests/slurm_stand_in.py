"""A stand-in for SLURM. `sbatch` runs the tasks of a script's array at once, one after the other, as a node would.

    python slurm_stand_in.py FOLDER sbatch [OPTION ...] SCRIPT
    python slurm_stand_in.py FOLDER srun [OPTION ...] COMMAND
    python slurm_stand_in.py FOLDER scontrol show hostnames NODES

`FOLDER` keeps the exit codes of the jobs. The task whose number is in the environment variable `KILLED_TASK` is killed
as soon as it starts.
"""

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

COMMANDS = ("sbatch", "srun", "scontrol")
DIRECTIVES = ("cpus-per-task", "mem-per-cpu", "nodes", "partition", "job-name", "time", "output", "error", "array")
DIRECTIVES += ("qos", "gpus", "dependency", "export")
NODE = "node-0"


def install(folder: Path) -> None:
    """Writes the commands to `folder/bin`."""
    (folder / "bin").mkdir(parents=True)
    for command in COMMANDS:
        path = folder / "bin" / command
        path.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{__file__}" "{folder}" {command} "$@"\n')
        path.chmod(0o755)


def sbatch(folder: Path, arguments: list[str]) -> int:
    """Runs the tasks of a script, and prints the number of the job."""
    parser = argparse.ArgumentParser("sbatch", allow_abbrev=False)
    for directive in DIRECTIVES:
        parser.add_argument(f"--{directive}")
    parser.add_argument("--requeue", action="store_true")
    parser.add_argument("script", type=Path)
    script = Path(arguments[-1])
    head = re.match(r"#!/bin/bash\n((?:#SBATCH .*\n)+)", script.read_text())
    assert head is not None, "the directives must follow the first line"
    directives = re.findall("#SBATCH (.*)", head[1])
    options = parser.parse_args([*directives, *arguments])
    number = len(list(folder.glob("job-*"))) + 1
    kind, _, needed = (options.dependency or "").partition(":")
    is_ready = kind != "afterok" or set((folder / f"job-{needed}").read_text().split()) == {"0"}
    last = int(re.fullmatch(r"0-(\d+)(?:%\d+)?", options.array)[1])
    codes = []
    for task in range(last + 1 if is_ready else 0):
        output = Path(options.output.replace("%A", str(number)).replace("%a", str(task)))
        environment = os.environ | dict(each.split("=") for each in (options.export or "ALL").split(",")[1:])
        environment |= {"SLURM_JOB_ID": str(number), "SLURM_ARRAY_TASK_ID": str(task), "SLURM_NODELIST": NODE}
        with output.open("w") as file:
            run = subprocess.run(["bash", script], env=environment, stdout=file, stderr=file, check=False)
        codes.append(str(run.returncode))
    (folder / f"job-{number}").write_text(" ".join(codes))
    print(f"Submitted batch job {number}")  # noqa: T201
    return 0


def srun(folder: Path, arguments: list[str]) -> int:
    """Runs a command, and returns its exit code."""
    parser = argparse.ArgumentParser("srun", allow_abbrev=False)
    parser.add_argument("-l", action="store_true")
    parser.add_argument("-n", type=int)
    parser.add_argument("command", nargs=argparse.REMAINDER)
    options = parser.parse_args(arguments)
    assert options.n == 1
    if os.environ["SLURM_ARRAY_TASK_ID"] == os.environ.get("KILLED_TASK"):
        return 137
    return subprocess.run(options.command, check=False).returncode


def scontrol(folder: Path, arguments: list[str]) -> int:
    """Prints the nodes of a list of one."""
    assert arguments == ["show", "hostnames", NODE]
    print(NODE)  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(globals()[sys.argv[2]](Path(sys.argv[1]), sys.argv[3:]))

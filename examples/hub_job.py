# /// script
# requires-python = ">=3.11"
# dependencies = ["svqvae-hf[dev] @ file:///svqvae"]
#
# [tool.hf-jobs]
# image = "ghcr.io/astral-sh/uv:python3.12-bookworm"
# flavor = "l4x1"
# timeout = "6h"
# secrets = ["HF_TOKEN"]
# volumes = [".:/svqvae"]
# ///
"""Runs a training script, a command, or the tables of `make gpu` on a GPU of the Hub.

Start it in a new clone, because `hf jobs` uploads the folder. The job installs the clone, which it finds in /svqvae.

hf jobs uv run examples/hub_job.py train training/configs/train_photos.yaml --dataset_name ORG/IMAGES \
    --output_dir out --push_to_hub --hub_model_id ORG/MODEL
hf jobs uv run examples/hub_job.py tokenize hf://buckets/ORG/DATA/images --output hf://buckets/ORG/DATA/tokens
hf jobs uv run examples/hub_job.py gpu
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

CLONE = Path("/svqvae")  # read-only
WORK = Path("/tmp/svqvae")
RESULTS = Path("/data")  # the folder of the job in the bucket `jobs-artifacts`
OUTPUTS = "outputs"


def command_line(name: str, arguments: list[str]) -> list[str]:
    """Command of a job.

    Args:
        name (`str`): `gpu`, a script of `training/` without `.py`, or a command of `svqvae`.
        arguments (`list[str]`): Arguments of the script or the command.
    """
    if name == "gpu":
        return ["bash", "benchmarks/gpu.sh"]
    script = Path("training", f"{name}.py")
    if (WORK / script).is_file():
        return [sys.executable, str(script), *arguments]
    return [sys.executable, "-m", "svqvae_cli", name, *arguments]


def main() -> None:
    """Runs the command in a copy of the clone, and keeps what it writes below `outputs`."""
    name, *arguments = sys.argv[1:]
    shutil.copytree(CLONE, WORK, ignore=shutil.ignore_patterns(".git", ".venv*", OUTPUTS))
    os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # for `python` and `pytest`
    result = subprocess.run(command_line(name, arguments), cwd=WORK, check=False)
    if (WORK / OUTPUTS).is_dir():
        shutil.copytree(WORK / OUTPUTS, RESULTS / OUTPUTS, dirs_exist_ok=True)
    sys.exit(result.returncode)


if __name__ == "__main__":
    main()

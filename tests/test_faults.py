"""Faults injected at random: each ends in an error that names the file, or in the result of undamaged files.

    FAULTS=500 python -m pytest -s tests/test_faults.py

Weights and configs have no checksum. A changed bit in them may change results in silence, which is counted.
"""

import collections
import contextlib
import io
import os
import random
import shutil
import signal
import time
from functools import partial
from pathlib import Path

import pytest
import torch
import train
from cli_runner import svqvae
from conftest import ROOT, make_tiny
from context_models import make_context_model
from PIL import Image
from training_runs import forget_accelerate, run

from svqvae_hf import SVQVAE, ContextModel, load_tokens
from svqvae_hf.token_sets.manifest import load_rows
from svqvae_hf.token_sets.settings import read_settings, row_tokens
from svqvae_hf.trainer.train_options import TrainOptions

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("few_windows")]
COUNT, SEED = int(os.environ.get("FAULTS", "20")), int(os.environ.get("SEED", time.time()))
COMMANDS = {  # their folders of inputs and of outputs, and options
    "encode": ("images", "tokens", []),
    "encode --compress": ("images", "packed", ["--compress"]),
    "decode": ("tokens", "decoded", []),
    "tokenize": ("images", "set", ["--crops", "centre", "--resolution", "16", "--workers", "0", "--num-parts", "3"]),
}
TRAINING = {"resolution": 16, "scales": [1.0], "per_device_train_batch_size": 2, "dataloader_num_workers": 0}
TRAINING |= {"warmup_steps": 0, "logging_steps": 1, "save_total_limit": 1, "save_steps": 2}


def command(work: Path, name: str, out: Path) -> None:
    """Runs a command. Raises its error."""
    source, _, options = COMMANDS[name]
    with contextlib.redirect_stderr(io.StringIO()) as stderr, contextlib.redirect_stdout(io.StringIO()):
        code = svqvae(name.split()[0], work / source, "--output", out, "--model", work / "model", *options)
    if code:
        raise ValueError(stderr.getvalue())


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("[!.]*") if path.is_file()}


def train_to(work: Path, out: Path, steps: int) -> bytes:
    """Weights of a run that resumes if it can."""
    inputs = {"train_data_dir": str(work / "images"), "pretrained_model_name_or_path": str(work / "model")}
    options = {"output_dir": str(out), "max_steps": steps, "resume_from_checkpoint": "latest"}
    try:
        run(train.train, TrainOptions, **TRAINING, **inputs, **options)
    finally:
        forget_accelerate()
    return (out / "diffusion_pytorch_model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """Images, a model, the outputs of all commands, and a checkpoint."""
    work = tmp_path_factory.mktemp("work")
    (work / "images").mkdir()
    with Image.open(ROOT / "docs" / "images" / "chelsea.png") as photo:
        for index in range(4):
            photo.convert("RGB").crop((50 * index, 90, 50 * index + 24, 122)).save(work / "images" / f"{index}.png")
    model = make_tiny()
    model.save_pretrained(work / "model")
    make_context_model(model.codebook_fingerprint()).save_pretrained(work / "model")
    for name, (_, out, _) in COMMANDS.items():
        command(work, name, work / out)
    train_to(work, work / "run", 2)
    return work


def read_tokens(work: Path, folder: Path) -> list:
    context_model = ContextModel.from_pretrained(work / "model")
    loaded = [load_tokens(path, context_model) for path in sorted(folder.glob("[!.]*"))]
    return [(tokens.to_record(), [ids.tolist() for ids in tokens.ids]) for tokens in loaded]


def read_set(work: Path, folder: Path) -> list:
    settings = read_settings(folder)
    rows = load_rows(str(folder))
    return [(row["key"], row_tokens(row, settings).ids[0].tolist()) for row in rows]


def read_model(work: Path, folder: Path) -> list:
    model = SVQVAE.from_pretrained(folder).eval()
    with torch.no_grad():
        ids = model.encode_tokens(torch.linspace(0, 1, 3 * 24 * 24).view(1, 3, 24, 24))
        return [ids.tolist(), model.decode_tokens(ids).tolist(), ContextModel.from_pretrained(folder).fingerprint]


def again(name: str, work: Path, folder: Path) -> dict[str, bytes] | list:
    command(work, name, folder)
    return read_set(work, folder) if name == "tokenize" else contents(folder)


READERS = {  # what is damaged, and how it is read
    "token files": ("tokens", read_tokens),
    "compressed files": ("packed", read_tokens),
    "token set": ("set", read_set),
    "weights and configs": ("model", read_model),
    "checkpoint": ("run", lambda work, folder: train_to(work, folder, 3)),
    **{f"{name}, run again": (out, partial(again, name)) for name, (_, out, _) in COMMANDS.items()},
}
WEIGHTS = [0.2, 0.2, 0.15, 0.1, 0.05, 0.1, 0.1, 0.05, 0.05]


def damage(folder: Path, rng: random.Random) -> str:
    """Flips a bit of a file, zeroes or cuts it. Returns what was done."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)
    files = [path for path in files if "checkpoint" in str(path)] or files
    path = rng.choice(files)
    content = bytearray(path.read_bytes())
    at = rng.randrange(len(content))
    kind = rng.choice(["flip", "flip", "zero", "cut"])
    if kind == "flip":
        content[at] ^= 1 << rng.randrange(8)
    else:
        content[at:] = b"" if kind == "cut" else bytes(len(content) - at)
    path.write_bytes(content)
    return f"{kind} at {at} of {path.name}"


def test_damaged_files(work, tmp_path):
    rng, counts, wrong = random.Random(SEED), collections.Counter(), []
    expected = {}
    for number in range(COUNT):
        (kind,) = rng.choices([*READERS], WEIGHTS)
        source, read = READERS[kind]
        if kind not in expected:
            expected[kind] = read(work, shutil.copytree(work / source, tmp_path / kind / source))
        folder = shutil.copytree(work / source, tmp_path / f"case-{number}" / source)
        done = damage(folder, rng)
        try:
            outcome = "equal" if read(work, folder) == expected[kind] else "changed"
        except (ValueError, OSError) as error:
            outcome = "named" if str(folder) in str(error) else f"not named: {error}"
        except Exception as error:
            outcome = repr(error)
        counts[kind, outcome[:20]] += 1
        if outcome not in ("equal", "named") and (kind, outcome) != ("weights and configs", "changed"):
            wrong.append((kind, done, outcome))
    print(f"seed {SEED}:", *counts.items(), sep="\n")  # noqa: T201
    assert not wrong, f"seed {SEED}: {wrong}"


def test_kills_and_two_runs_in_one_folder(work, tmp_path):
    rng = random.Random(SEED)
    for number in range(max(2, COUNT // 5)):
        name = rng.choice([*COMMANDS])
        folder, whole = tmp_path / str(number) / COMMANDS[name][1], contents(work / COMMANDS[name][1])
        killed = rng.random() < 0.7
        children = [fork(partial(command, work, name, folder)) for _ in range(1 if killed else 2)]
        if killed:
            time.sleep(rng.uniform(0, 0.5))
            os.kill(children[0], signal.SIGKILL)
        codes = [os.waitpid(child, 0)[1] for child in children]
        assert killed or 0 in codes, (SEED, number, name)
        command(work, name, folder)
        assert contents(folder) == whole, (SEED, number, name)


def fork(target) -> int:
    """Process that calls a function in a copy of this one, and ends."""
    if child := os.fork():
        return child
    try:
        target()
        os._exit(0)
    finally:
        os._exit(1)


def test_full_disk(work, disk, tmp_path):
    rng = random.Random(SEED)
    for number in range(max(2, COUNT // 20)):
        name = rng.choice([*COMMANDS])
        free = rng.randrange(shutil.disk_usage(disk).free // 4096) * 64
        (disk / "ballast").write_bytes(bytes(max(0, shutil.disk_usage(disk).free - free - 4096)))
        with contextlib.suppress(ValueError):
            command(work, name, disk / COMMANDS[name][1])
        (disk / "ballast").unlink()
        command(work, name, disk / COMMANDS[name][1])
        assert contents(disk / COMMANDS[name][1]) == contents(work / COMMANDS[name][1]), (SEED, number, name)
        shutil.rmtree(disk / COMMANDS[name][1])

"""Scripts that are killed at random moments, and resumed: the same files in the end, and no process that goes on.

KILLS=30 SEED=1 python -m pytest -s tests/trainer/test_kills.py
"""

import os
import random
import runpy
import shutil
import sys
import time
from pathlib import Path

import psutil
import pytest
from cli_runner import svqvae
from conftest import ROOT, make_tiny
from PIL import Image
from processes import running_after, start
from tiny_language_models import extended

pytestmark = pytest.mark.slow
COUNT = int(os.environ.get("KILLS", "1"))
SEED = int(os.environ.get("SEED", time.time()))
TOKENIZER = {
    "resolution": 16,
    "scales": ["0.5", "1.0"],
    "per_device_train_batch_size": 2,
    "dataloader_num_workers": 1,
    "warmup_steps": 0,
    "max_steps": 5,
    "save_steps": 1,
    "save_total_limit": 2,
    "eval_steps": 2,
    "num_validation_images": 2,
}
LANGUAGE_MODEL = {
    "per_device_train_batch_size": 4,
    "max_steps": 6,
    "save_strategy": "steps",
    "save_steps": 1,
    "save_total_limit": 2,
    "report_to": "none",
    "disable_tqdm": True,
    "condition_dropout": 0,
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """Images with captions, a tokenizer, and a token set of the codebook of the language model."""
    folder = tmp_path_factory.mktemp("inputs")
    make_tiny().save_pretrained(folder / "model")
    (folder / "images").mkdir()
    rows = ["file_name,caption"]
    with Image.open(ROOT / "docs" / "images" / "chelsea.png") as image:
        photo = image.convert("RGB")
    for number in range(6):
        photo.crop((60 * number, 50, 60 * number + 60, 110)).save(folder / "images" / f"{number}.png")
        rows.append(f"{number}.png,a cat")
    (folder / "images" / "metadata.csv").write_text("\n".join(rows))
    crops = ["--crops", "centre", "--resolution", 16, "--workers", 0]
    vqvae = extended("qwen") / "vqvae"
    assert svqvae("tokenize", folder / "images", "--output", folder / "tokens", "--model", vqvae, *crops) == 0
    return folder


def words_of(script: str, inputs: Path, out: Path) -> list[str]:
    """Command line of a script."""
    if script == "train.py":
        options = TOKENIZER | {"train_data_dir": inputs / "images"}
        options["model_config_name_or_path"] = inputs / "model" / "config.json"
    else:
        options = LANGUAGE_MODEL | {"token_set": inputs / "tokens", "model_name_or_path": extended("qwen")}
    options |= {"output_dir": out, "resume_from_checkpoint": "latest"}
    words = [str(ROOT / "training" / script)]
    for name, value in options.items():
        words.append(f"--{name}")
        words += [str(element) for element in (value if isinstance(value, list) else [value])]
    return words


def run_script(words: list[str], log: Path) -> None:
    """Runs a script as a command does, with its output in a file."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    sys.argv = words
    runpy.run_path(words[0], run_name="__main__")


def run_to_end(words: list[str], log: Path) -> None:
    process = start(run_script, words, log)
    process.join()
    assert process.exitcode == 0, log.read_text()


def kill_after(seconds: float, words: list[str], log: Path) -> None:
    """Starts a script, kills it some time later, and checks that its workers end."""
    process = start(run_script, words, log)
    process.join(seconds)
    children = []
    if process.is_alive():
        children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.join()
    assert running_after([child.pid for child in children], seconds=10) == []


def files_of(folder: Path) -> dict[str, bytes]:
    """Files of a run, with the content of those that hold weights."""
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            content = path.read_bytes() if path.suffix == ".safetensors" else b""
            files[str(path.relative_to(folder))] = content
    return files


@pytest.mark.parametrize("script", ["train.py", "train_language_model.py"])
def test_killed_runs_end_with_the_same_files(script, inputs, tmp_path):
    rng = random.Random(SEED)
    whole = tmp_path / "whole"
    log = tmp_path / "log.txt"
    start_time = time.monotonic()
    run_to_end(words_of(script, inputs, whole), log)
    duration = time.monotonic() - start_time
    expected = files_of(whole)
    for number in range(COUNT):
        out = tmp_path / str(number)
        words = words_of(script, inputs, out)
        for _ in range(rng.randint(1, 2)):
            seconds = rng.uniform(0, duration)
            sys.stdout.write(f"{script}, SEED={SEED}, kill {number}: after {seconds:.2f} of {duration:.2f} s\n")
            kill_after(seconds, words, log)
        run_to_end(words, log)
        assert files_of(out) == expected, (SEED, number)
        shutil.rmtree(out)

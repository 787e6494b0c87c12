"""Changes of a run of `train.py` that must not change its result, and changes that must end it with one line.

CASES=50 SEED=1 python -m pytest -s tests/trainer/test_metamorphic_training.py
"""

import os
import random
import re
import shutil
import sys
import time
from pathlib import Path

import pytest
import train
from conftest import ROOT, make_tiny
from PIL import Image
from processes import start
from safetensors.torch import load_file
from training_runs import cpu

from svqvae_hf.trainer.run import run_training
from svqvae_hf.trainer.scripts import one_line_errors
from svqvae_hf.trainer.train_options import TrainOptions

pytestmark = pytest.mark.slow
COUNT, SEED = int(os.environ.get("CASES", "5")), int(os.environ.get("SEED", time.time()))
STEPS = 5
OPTIONS = {"resolution": 16, "scales": [0.5, 1.0], "per_device_train_batch_size": 2, "dataloader_num_workers": 0}
OPTIONS |= {"warmup_steps": 0, "max_steps": STEPS, "save_steps": 1, "save_total_limit": 2, "use_ema": True}
OPTIONS |= {"kmeans_steps": [2], "kmeans_batches": 4, "dead_code_reset_steps": 2, "eval_steps": 2}
OPTIONS |= {"resume_from_checkpoint": "latest", "num_validation_images": 2, "load_best_model_at_end": True}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    make_tiny().save_pretrained(folder / "model")
    with Image.open(ROOT / "docs" / "images" / "chelsea.png") as image:
        photo = image.convert("RGB")
    for name, top in (("images", 0), ("held_out", 150)):
        (folder / name).mkdir()
        for number in range(5):
            photo.crop((70 * number, top, 70 * number + 60, top + 60)).save(folder / name / f"{number}.png")
    return folder


def options_of(work: Path) -> dict:
    sources = {"model_config_name_or_path": f"{work}/model/config.json", "train_data_dir": f"{work}/images"}
    return OPTIONS | sources | {"validation_data_dir": [f"{work}/held_out"], "output_dir": f"{work}/out"}


def train_as_a_command(options, log):
    """Trains in a process of its own, with its errors in a file."""
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    code = 0
    try:
        with cpu(), one_line_errors():
            run_training(train.train, TrainOptions(**options))
    except SystemExit as stop:
        code = stop.code
    sys.exit(code)


def run_to_end(work: Path, options: dict) -> tuple[int, str]:
    """Exit code and errors of a run."""
    log = work / "log.txt"
    process = start(train_as_a_command, options, log)
    process.join()
    return process.exitcode, log.read_text()


def kill_at_random(work: Path, options: dict, rng: random.Random) -> None:
    """Starts a run, and kills it some time after its first line."""
    log = work / "killed.txt"
    process = start(train_as_a_command, options, log)
    while process.is_alive() and not (log.exists() and "Training on" in log.read_text()):
        time.sleep(0.01)
    time.sleep(rng.uniform(0, 1.0))
    process.kill()
    process.join()


def assert_one_line(code: int, text: str, message: str) -> None:
    assert code == 2, text
    assert "Traceback" not in text
    assert re.search(message, text.splitlines()[-1]), text


# Cases that change nothing. Each returns the options of the last run.


def killed(work, rng):
    options = options_of(work)
    for _ in range(rng.randint(1, 2)):
        kill_at_random(work, options, rng)
    return options


def killed_and_moved(work, rng):
    options = options_of(work)
    kill_at_random(work, options, rng)
    shutil.move(work / "images", work / "moved")
    return options | {"train_data_dir": f"{work}/moved"}


def other_workers(work, rng):
    return options_of(work) | {"dataloader_num_workers": rng.randint(1, 3)}


def stray_files(work, rng):
    (work / "images" / "notes.txt").write_text("no image")
    (work / "images" / ".hidden.png").write_bytes(b"no image")
    (work / "out" / "checkpoint-3.partial").mkdir(parents=True)
    (work / "out" / "mine.txt").write_text("mine")
    return options_of(work)


def a_run_beside(work, rng):
    options = options_of(work)
    other = start(train_as_a_command, options, work / "other.txt")
    time.sleep(rng.uniform(0, 0.5))
    code, text = run_to_end(work, options)
    other.join()
    assert {code, other.exitcode} <= {0, 2}, text
    for exit_code, log in ((code, text), (other.exitcode, (work / "other.txt").read_text())):
        if exit_code == 2:
            assert_one_line(exit_code, log, "one is writing to it|Another run has (saved|deleted) ")
    return options


SAME = (killed, killed_and_moved, other_workers, stray_files, a_run_beside)


def test_changes_that_do_not_change_the_result(inputs, tmp_path):
    rng = random.Random(SEED)
    whole = shutil.copytree(inputs, tmp_path / "whole")
    assert run_to_end(whole, options_of(whole))[0] == 0
    expected = load_file(whole / "out" / "diffusion_pytorch_model.safetensors")
    names = {path.name for path in (whole / "out").iterdir()}
    for number in range(COUNT):
        case = SAME[number % len(SAME)]
        work = shutil.copytree(inputs, tmp_path / str(number))
        code, text = run_to_end(work, case(work, rng))
        assert code == 0, (SEED, number, case, text)
        weights = load_file(work / "out" / "diffusion_pytorch_model.safetensors")
        for name, value in expected.items():
            assert value.equal(weights[name]), (SEED, number, case, name)
        left_over = {path.name for path in (work / "out").iterdir()} - names
        assert left_over == ({"mine.txt"} if case is stray_files else set()), (SEED, number, case)
        shutil.rmtree(work)


# Cases that end the next run with one line


def image_replaced_by_an_older_one(work):
    path = work / "images" / "3.png"
    with Image.open(path) as image:
        image.transpose(Image.Transpose.ROTATE_180).save(path)
    os.utime(path, (1, 1))
    return {}


def image_added(work):
    shutil.copy(work / "images" / "3.png", work / "images" / "more.png")
    return {}


def model_of_the_same_name(work):
    (work / "elsewhere").mkdir()
    make_tiny(commit_loss_beta=0.5).save_pretrained(work / "elsewhere" / "model")
    return {"model_config_name_or_path": f"{work}/elsewhere/model/config.json"}


def other_seed(work):
    return {"seed": 1}


def more_images_per_step(work):
    return {"per_device_train_batch_size": 4}


OTHER = {
    image_replaced_by_an_older_one: "`--train_data_dir` must name what .*times of change of its files .`cp -p` and",
    image_added: "`--train_data_dir` must name what",
    model_of_the_same_name: "`--model_config_name_or_path` must name what",
    other_seed: "The seed must be 0 as when the checkpoint was written",
    more_images_per_step: "must be 2 as when the checkpoint was written",
}


def test_changes_that_end_a_resumed_run_with_one_line(inputs, tmp_path):
    half = shutil.copytree(inputs, tmp_path / "half")
    code, text = run_to_end(half, options_of(half) | {"max_steps": 3})
    assert code == 0, text
    for number, (change, message) in enumerate(OTHER.items()):
        work = shutil.copytree(half, tmp_path / str(number))
        before = sorted(work.rglob("*"))
        code, text = run_to_end(work, options_of(work) | change(work))
        (work / "log.txt").unlink()
        assert_one_line(code, text, message)
        assert {path for path in work.rglob("*") if path.is_relative_to(work / "out")} <= set(before)

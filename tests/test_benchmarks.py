"""Each benchmark runs at a small size and writes its tables; docs/benchmarks.md has the commands of the figures."""

import importlib
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from checkouts import checkout
from conftest import ROOT, make_tiny
from numbered_images import write_tar

from svqvae_cli.command_line import parse

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("few_windows")]

BENCHMARKS = str(ROOT / "benchmarks")
FORWARD = "from functools import partial; model.forward = partial(model.forward, return_dict=False); return model"
SMALL = ["--threads", "1", "--device", "cpu", "--rounds", "1"]


@pytest.fixture
def load(monkeypatch):
    """Imports a module of benchmarks/."""
    monkeypatch.setattr(sys, "path", [BENCHMARKS, *sys.path])
    yield importlib.import_module
    sys.modules.pop("svqvae", None)


@pytest.fixture
def run(load, monkeypatch, tmp_path) -> Callable[..., list[list[dict]]]:
    """Runs a benchmark, which measures in this process, and returns its tables."""
    measuring = load("measuring")
    monkeypatch.setattr(load("contestants"), "MULTIPLIERS", (1, 1, 2, 2))  # narrow networks, with f = 8 as released

    def in_this_process(device: str, threads: int, *work: object):
        prepare, *arguments = pickle.loads(pickle.dumps(work))  # as another process would receive them
        return measuring._measure(device, threads, prepare, arguments)

    def run(name: str, *options: str) -> list[list[dict]]:
        module = load(name)
        output = tmp_path / "results" / f"{name}.json"
        monkeypatch.setattr(module, "in_own_process", in_this_process, raising=False)
        monkeypatch.setattr(module, "TEXTS", 500, raising=False)  # from which read_captions makes a tokenizer
        arguments = [*options, *SMALL, "--output", str(output)]
        monkeypatch.setattr(sys, "argv", [f"{BENCHMARKS}/{name}.py", *arguments])
        module.main()
        content = json.loads(output.read_text())
        assert content["machine"]["torch"] == torch.__version__
        text = output.with_suffix(".md").read_text()
        assert text.startswith(f"`{content['command']}`\n")
        assert content["command"].startswith(f"python benchmarks/{name}.py ")
        assert str(tmp_path) not in text
        for title, rows in content["tables"].items():
            assert f"## {title}\n\n| {next(iter(rows[0]))} |" in text
        return list(content["tables"].values())

    return run


@pytest.fixture
def inputs(tmp_path, photo) -> Path:
    """Folder of a stand-in for the original code and of a photograph."""
    (tmp_path / "svqvae").mkdir()
    checkout(tmp_path / "svqvae", FORWARD)
    (tmp_path / "photos").mkdir()
    photo.crop((100, 50, 228, 146)).save(tmp_path / "photos" / "cat.png")
    return tmp_path


SMALL_TILES = "--tile-size 32 --overlap 8"
COMMANDS = [  # options that shrink the work
    "speed --original svqvae --base-channels 32 --sides 32 --tiled-side 48 --dtypes float32 --patch-nums 2 4"
    f" {SMALL_TILES}",
    "growth --whole 64x64 --tiles 96x64 --files 96x64 --tile-size 64 --overlap 8",
    f"tiles photos {SMALL_TILES}",
    "token_sets photos --count 2 --sides 16 --workers 0 --dtype bfloat16",
    "plan photos --side 16 --rows 4 --gpu-rate 10 --train-rate 10",
    "plan photos --side 16 --rows 4 --crops ten-crop --workers 2 --part-minutes 1",
    "baselines photos --fit photos --scales 1 0.5 --side 4 --codes 64",
    "training --side 64 --crops 1",
    "llamagen --side 4 --batches 2 --hidden-size 64 --layers 1 --heads 2",
    "text_encoders --sizes google/flan-t5-small --batch 1 --side 4 --hidden-size 64 --layers 1",
    "quantized_llamagen --precisions float32 bfloat16 --rows 1 --hidden-size 64 --layers 1",
    f"learnable {ROOT}/svqvae_hf/pretrained_scenes/vqvae {ROOT}/docs/images --side 32 --steps 1 2 --held-out 4",
    f"read_captions {ROOT}/benchmarks/scene_prompts.tsv --examples 64 --voices first terse",
]


def test_exactness_counts_ids_that_differ(run, load, inputs, monkeypatch):
    exactness = load("exactness")
    model = make_tiny()
    model.save_pretrained(inputs / "model")
    monkeypatch.setattr(exactness, "encoder_graph", lambda model: None)  # tests/export converts graphs
    monkeypatch.setattr(exactness, "single_sum_graph", lambda model: None)
    monkeypatch.setattr(exactness, "encode_by_graph", lambda graph: lambda sample: model.encode_tokens(sample) ^ 1)
    (rows,) = run("exactness", str(inputs / "photos"), "--model", str(inputs / "model"), "--side", "32")
    changed = {row["encoder"]: row["changed"] for row in rows}
    assert {row["ids"] for row in rows} == {8 * 8}
    assert changed["PyTorch, threads: 1"] < 4
    assert changed["exported graph"] > 60


@pytest.mark.parametrize("command", COMMANDS)
def test_benchmark_runs(run, inputs, monkeypatch, command):
    monkeypatch.chdir(inputs)
    tables = run(*command.split())
    assert all(rows for rows in tables)


def test_plan_of_tar_files_prints_their_commands(run, inputs, monkeypatch, capsys):
    image = (inputs / "photos" / "cat.png").read_bytes()
    for name in ("a b.tar", "c.tar"):
        write_tar(inputs / name, [("cat.png", image)])
    monkeypatch.chdir(inputs)
    options = "--side 16 --rows 4 --images 1000 --workers 2 --dtype bfloat16"
    run("plan", "a b.tar", "c.tar", *options.split())
    text = capsys.readouterr().out
    assert f"| a photograph's file | {len(image) / 1000:,.0f} KB |" in text
    assert "| largest number of parts of PHOTOS, one per file | 2 |" in text
    assert "because a part reads whole files and PHOTOS has 2:\n    pack the images in at least 8 files" in text
    images = "svqvae tokenize 'a b.tar' c.tar --output tokens"
    assert f"{images} --dtype bfloat16 --crops centre --resolution 16 --num-parts 8 --workers 0 --part 0" in text
    assert "encoded on the CPU, bfloat16 |" in text
    assert " 0 core hours" not in text
    assert "--time=10 " in text


@pytest.mark.parametrize(("gpu_rate", "workers"), [("", "CORES"), ("--gpu-rate 10", "GPUS")])
def test_plan_counts_unreadable_photographs_and_prints_a_loop(run, inputs, monkeypatch, capsys, gpu_rate, workers):
    (inputs / "photos" / "broken.png").write_bytes(b"broken")
    monkeypatch.chdir(inputs)
    size = "--side 16 --rows 4 --images 1000 --workers 6 --machines 2"
    run("plan", "photos", *size.split(), *gpu_rate.split())
    text = capsys.readouterr().out
    assert "| photographs measured | 1, too few for a good plan: pass at least 20 |" in text
    assert "| photographs that could not be read | 1 |" in text
    assert "0.00 GB" not in text
    _, loop = text.split("with its number from 0 as MACHINE:\n")
    loop, _ = loop.split("what is missing:")
    assert f"MACHINES=2 {workers}=3\n" in loop
    check_machines_share(loop, 24, inputs)


@pytest.mark.parametrize(("cores", "crops_per_second", "workers"), [(None, 990, 50), (16, 320, 16), (64, 990, 50)])
def test_plan_gives_a_gpu_no_more_crops_than_its_cores_read(load, cores, crops_per_second, workers):
    plan = load("plan")
    rates = plan.Rates(
        photos=20,
        unreadable=0,
        photo_bytes=3e6,
        read=10,  # photographs of two crops
        encode=1,
        store=1e12,
        row_bytes=500,
        load=1000,
        ids=256,
        crops_per_photo=2,
        peak_memory=1,
    )
    options = SimpleNamespace(gpu_rate=990, cores=cores)
    assert plan.worker_rate(rates, options) == pytest.approx(crops_per_second)
    assert plan.cores_per_gpu(rates, options) == workers


@pytest.mark.parametrize(("images", "workers"), [(1e4, 1), (1e6, 5), (1e8, 64)])
def test_plan_has_by_default_as_many_cores_as_make_the_set_in_a_night(load, images, workers):
    plan = load("plan")
    rates = SimpleNamespace(tokenize=8.4)  # crops per second of a core: a million take 33 hours
    options = SimpleNamespace(images=images, crops="centre", gpu_rate=None)
    assert plan.default_workers(rates, options) == workers


@pytest.mark.parametrize(("page", "num_parts"), [("token_sets.md", 256), ("large_sets.md", 1722)])
def test_machines_of_the_loop_in_the_docs_share_the_parts(tmp_path, page, num_parts):
    text = (ROOT / "docs" / page).read_text()
    loop = re.search(r"^ *mkdir -p logs .*?(?=```)", text, re.DOTALL | re.MULTILINE).group()
    for number, fewer in ((num_parts, 42), (num_parts - 1, 41)):  # fewer processes to start
        assert f" {number} " in loop
        loop = loop.replace(f" {number} ", f" {fewer} ")
    check_machines_share(loop, 42, tmp_path)
    assert "part 0 failed" in run_block(loop, "exit 1", tmp_path).splitlines()  # parts end in any order


def test_parts_that_are_missing_are_listed_and_shared_as_the_page_says(tmp_path):
    text = (ROOT / "docs" / "token_sets.md").read_text()
    list_parts = re.search(r"^missing=.* > missing.txt$", text, re.DOTALL | re.MULTILINE).group()
    run_block(list_parts, "echo 'parts    256 (not complete; finished: 243)'; echo 'missing  3,17-27,200'", tmp_path)
    parts = [3, *range(17, 28), 200]
    assert (tmp_path / "missing.txt").read_text().split() == [str(part) for part in parts]
    shares = [run_block(f"split -n r/{machine}/3 missing.txt", "", tmp_path).split() for machine in (1, 2, 3)]
    assert "`split -n r/1/3 missing.txt`" in text
    assert shares[0] == ["3", "19", "22", "25", "200"]
    assert len(shares[1]) == len(shares[2]) == 4
    run_block(list_parts, "echo 'parts    256 (complete; finished: 256)'", tmp_path)
    assert (tmp_path / "missing.txt").read_text() == ""


def check_machines_share(loop, num_parts, folder):
    """Runs the loop of each of four machines, and checks that together they make each part once."""
    parts = []
    for machine in range(4):
        loop_of_machine = re.sub(r"MACHINE=0 MACHINES=\d", f"MACHINE={machine} MACHINES=4", loop)
        parts += run_loop(loop_of_machine, folder)
    assert sorted(parts) == list(range(num_parts))


def run_block(block, svqvae, folder):
    """Runs a block of the shell in a folder, with a command `svqvae` that runs these commands. Returns its output."""
    commands = folder / "commands"
    commands.mkdir(exist_ok=True)
    command = commands / "svqvae"
    command.write_text(f"#!/bin/sh\n{svqvae}\n")
    command.chmod(0o755)
    env = os.environ | {"PATH": f"{commands}:{os.environ['PATH']}"}
    result = subprocess.run(["bash", "-c", block], capture_output=True, text=True, check=True, env=env, cwd=folder)
    return result.stdout


def run_loop(loop, folder):
    """Runs a loop of the shell, with a command `svqvae` that only prints its arguments. Returns the parts."""
    shutil.rmtree(folder / "logs", ignore_errors=True)
    run_block(loop, 'echo "$CUDA_VISIBLE_DEVICES $*"', folder)
    parts = []
    for log in (folder / "logs").iterdir():
        device, _, arguments = log.read_text().partition(" ")
        args = parse(arguments.split())
        assert log.name == f"{args.part}.log"
        if "CUDA_VISIBLE_DEVICES" in loop:
            assert device in ("0", "1", "2")
        assert args.num_parts > args.part
        parts.append(args.part)
    return parts


def test_plan_of_a_wrong_set_is_one_line(tmp_path):
    command = [sys.executable, f"{BENCHMARKS}/plan.py", tmp_path]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.startswith("plan.py: error: a set must hold images, but the folder has none: ")
    assert result.stderr.count("\n") == 1


def test_plan_of_an_ambiguous_model_is_an_error(load, tmp_path, monkeypatch):
    (tmp_path / "bundled").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["plan.py", "photos", "--model", "bundled"])
    with pytest.raises(ValueError, match="^`bundled` is both a bundled model and a file or folder here. "):
        load("plan").main()


@pytest.mark.parametrize(
    ("hours", "text"),
    [(3300, "3,300 core hours"), (2.25, "2.2 core hours"), (0.5, "30 core minutes"), (0.001, "3.6 core seconds")],
)
def test_durations_are_sensible(load, hours, text):
    assert load("plan").duration(hours, "core") == text


def test_make_gpu_says_in_one_line_that_there_is_no_gpu():
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    result = subprocess.run(
        ["bash", ROOT / "benchmarks" / "gpu.sh"], env=env, capture_output=True, text=True, check=True
    )
    assert (result.stdout, result.stderr) == ("There is no GPU that PyTorch can use, so nothing was run.\n", "")


def test_gpu_script_runs_benchmarks_that_take_its_options():
    (names,) = re.findall(r"^for name in (.*); do$", (ROOT / "benchmarks" / "gpu.sh").read_text(), re.MULTILINE)
    assert set(names.split()) <= {command.split()[0] for command in COMMANDS}


def allocate_twice(mib: int):
    kept = torch.ones(mib << 18)  # float32

    def run():
        for _ in range(2):
            assert torch.ones(mib << 18).sum() == kept.sum()

    return run


def test_peak_memory_excludes_what_is_loaded(load):
    cost = load("measuring").in_own_process("cpu", 1, allocate_twice, 64)
    assert 64 <= cost.peak_mib < 72  # plus some code that is loaded at its first call
    assert 0 < cost.cpu_seconds < cost.seconds + 0.1


def test_learner_sees_only_earlier_ids_and_learns_what_can_be_predicted(load):
    learnable = load("learnable")
    torch.manual_seed(0)
    learner, ids = learnable.Learner(8, 3, 4).eval(), torch.randint(8, (1, 3, 4))
    changed = ids.clone()
    changed[0, 1, 2] = (ids[0, 1, 2] + 1) % 8
    bits, other_bits = learner(ids).flatten(), learner(changed).flatten()
    assert torch.equal(bits[:6], other_bits[:6])
    assert (bits[6:] != other_bits[6:]).all()

    random = torch.randint(8, (640, 3, 4))
    columns = random[:, :1].expand(-1, 3, -1)  # each id repeats the one above it
    for grids, least, most in ((random, 2.9, 3.2), (columns, 0.9, 1.6)):
        (measured,) = learnable.learn(grids, grids[:32], 8, [40], seed=0)
        assert least < measured.mean() < most

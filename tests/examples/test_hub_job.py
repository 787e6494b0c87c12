import re
import tomllib

import hub_job
import pytest
from conftest import ROOT
from huggingface_hub import SpaceHardware

HEADER = re.search(r"^# /// script\n(.*?)^# ///$", (ROOT / "examples" / "hub_job.py").read_text(), re.M | re.S)


def test_the_header_names_an_extra_and_hardware_that_exist():
    lines = [line.removeprefix("#").removeprefix(" ") for line in HEADER[1].splitlines()]
    header = tomllib.loads("\n".join(lines))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (dependency,) = header["dependencies"]
    name, extra, folder = re.fullmatch(r"(.*)\[(.*)\] @ file://(.*)", dependency).groups()
    assert name == project["name"]
    assert extra in project["optional-dependencies"]
    assert header["requires-python"] == project["requires-python"]
    job = header["tool"]["hf-jobs"]
    assert job["volumes"] == [f".:{folder}"]
    assert folder == str(hub_job.CLONE)
    assert job["flavor"] in [hardware.value for hardware in SpaceHardware]


@pytest.mark.parametrize(
    ("name", "end"),
    [
        ("gpu", ["benchmarks/gpu.sh"]),
        ("train", ["training/train.py", "--seed", "1"]),
        ("tokenize", ["-m", "svqvae_cli", "tokenize", "--seed", "1"]),
    ],
)
def test_a_job_runs_the_tables_a_script_or_a_command(name, end, monkeypatch):
    monkeypatch.setattr(hub_job, "WORK", ROOT)
    command = hub_job.command_line(name, ["--seed", "1"])
    assert command[-len(end) :] == end


def test_a_job_runs_in_a_copy_and_keeps_its_outputs(tmp_path, monkeypatch):
    clone = tmp_path / "clone"
    (clone / "training").mkdir(parents=True)
    script = (
        "from pathlib import Path; Path('outputs').mkdir(); Path('outputs/a.txt').write_text('a'); raise SystemExit(3)"
    )
    (clone / "training" / "train.py").write_text(script)
    for name, folder in (("CLONE", clone), ("WORK", tmp_path / "work"), ("RESULTS", tmp_path / "data")):
        monkeypatch.setattr(hub_job, name, folder)
    monkeypatch.setattr("sys.argv", ["hub_job.py", "train"])
    with pytest.raises(SystemExit, match="3"):
        hub_job.main()
    assert (tmp_path / "data" / "outputs" / "a.txt").read_text() == "a"
    assert not (clone / "outputs").exists()

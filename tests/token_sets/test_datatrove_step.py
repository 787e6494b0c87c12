import os
import re
import sys
from pathlib import Path

import datasets
import fsspec
import pytest
import slurm_stand_in
from cli_runner import svqvae
from conftest import ROOT, make_tiny
from datatrove.executor import LocalPipelineExecutor
from numbered_images import write_tar
from s3_server import make_bucket, s3_server
from token_set_parts import content, save_photos

from svqvae_hf.files.folders import Folder
from svqvae_hf.token_sets.datatrove_step import TokenizeImages
from svqvae_hf.token_sets.parts import read_status

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")


def test_tasks_of_datatrove_make_the_files_of_the_command_by_default(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    photos = save_photos(tmp_path / "photos")
    make_tiny().save_pretrained(tmp_path / "tiny")
    step = TokenizeImages([str(photos)], str(tmp_path / "fleet" / "out"), str(tmp_path / "tiny"))
    for _ in range(2):  # the second run finds all tasks done
        LocalPipelineExecutor([step], tasks=3, workers=1, logging_dir=str(tmp_path / "logs")).run()
    assert len(list((tmp_path / "logs" / "completions").iterdir())) == 3
    command = ["tokenize", photos, tmp_path / "alone" / "out", "--model", tmp_path / "tiny", "--num-parts", "3"]
    assert svqvae(*command) == 1  # skips an image
    assert content(tmp_path / "fleet" / "out") == content(tmp_path / "alone" / "out")


def run_block(section, changes):
    """Runs the Python block of a section of docs/fleet.md with some words changed."""
    page = (ROOT / "docs" / "fleet.md").read_text()
    code = re.search(rf"^## {section}\n.*?```py\n(.*?)```", page, re.MULTILINE | re.DOTALL)[1]
    for word, changed in changes.items():
        assert word in code
        code = code.replace(word, str(changed))
    exec(code, {"__name__": "__main__"})


def test_the_slurm_script_of_the_page_makes_the_set_of_one_process(tmp_path, monkeypatch):
    slurm_stand_in.install(tmp_path / "slurm")
    folders = [tmp_path / "slurm" / "bin", Path(sys.executable).parent, os.environ["PATH"]]
    monkeypatch.setenv("PATH", os.pathsep.join(map(str, folders)))
    photos = sorted(save_photos(tmp_path / "photos").iterdir())
    make_tiny().save_pretrained(tmp_path / "tiny")
    logs = tmp_path / "logs"
    changes = {"{00000..00999}": "{0..1}", "org/svqvae": tmp_path / "tiny", "resolution=256": "resolution=16"}
    changes |= {"tasks=1000": "tasks=2", "/shared/logs/tokens": logs}
    with s3_server() as (address, _):
        make_bucket("bucket", address, monkeypatch)
        for part in range(2):
            members = [(path.name, path.read_bytes()) for path in photos[part::2]]
            tar = write_tar(tmp_path / f"{part}.tar", members)
            fsspec.filesystem("s3").put(str(tar), f"bucket/photos/shard-{part}.tar")
        monkeypatch.setenv("KILLED_TASK", "1")
        run_block("SLURM", changes)
        script = (logs / "launch_script.slurm").read_text()
        directives = {"array=0-1%64", "cpus-per-task=4", "mem-per-cpu=4G", "gpus=1", "partition=gpu", "time=04:00:00"}
        assert directives <= set(re.findall("^#SBATCH --(.*)", script, re.MULTILINE))
        assert read_status("s3://bucket/tokens").missing == [1]
        assert not (logs / "stats.json").exists()
        monkeypatch.delenv("KILLED_TASK")
        run_block("SLURM", changes)  # starts the task again that was killed
        assert (logs / "ranks_to_run.json").read_text() == "[1]"
        assert (logs / "stats.json").exists()
        options = ["--crops", "centre", "--resolution", "16", "--workers", "0", "--model", tmp_path / "tiny"]
        data = "s3://bucket/photos/shard-{0..1}.tar"
        assert svqvae("tokenize", data, "s3://bucket/alone/tokens", *options) == 1  # skips an image
        assert files_of("s3://bucket/tokens") == files_of("s3://bucket/alone/tokens")


def files_of(url):
    folder = Folder(url)
    return {name: folder.read(name) for name in folder.all_files("")}


def test_the_step_must_be_the_first():
    with pytest.raises(ValueError, match="`TokenizeImages` must be the first step"):
        TokenizeImages(["photos"], "out", "tiny").run(iter([]))

"""A release: wheel, source archive, citation, and the workflow that checks it."""

import importlib.metadata
import json
import os
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

import svqvae_hf
from svqvae_cli import main
from svqvae_hf.evaluation.report_files import library_versions
from svqvae_hf.hub.model_cards import model_card
from svqvae_hf.trainer.publishing import provenance

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PACKAGES = ("svqvae_hf", "svqvae_cli", "svqvae_files")
SCRIPTS = "Scripts" if os.name == "nt" else "bin"


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """Folder of the wheel and the source archive."""
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-d", folder], cwd=ROOT, check=True)
    return folder


@pytest.mark.slow
def test_wheel_holds_the_packages_alone(built):
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        files = {name for name in archive.namelist() if ".dist-info/" not in name}
        (metadata,) = (archive.read(name) for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    tracked = subprocess.run(["git", "ls-files", *PACKAGES], cwd=ROOT, capture_output=True, text=True, check=True)
    assert files == set(tracked.stdout.split())
    assert {f"{package}/py.typed" for package in PACKAGES} <= files
    headers = message_from_bytes(metadata)
    for header in ("Summary", "Author", "License-Expression", "License-File", "Keywords", "Project-URL"):
        assert headers[header], header
    assert headers["Version"] == svqvae_hf.__version__
    assert set(headers.get_all("Provides-Extra")) == set(PROJECT["optional-dependencies"])


@pytest.mark.slow
def test_source_archive_is_small_and_builds_the_wheel(built):
    (archive,) = built.glob("*.tar.gz")
    assert archive.stat().st_size < 24e6  # the bundled models take 6.5 and 16.2 MB
    with tarfile.open(archive) as tar:
        top = {Path(name).parts[1] for name in tar.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "model_card.md", *PACKAGES} <= top
    assert not {"tests", "docs", "benchmarks"} & top


@pytest.mark.slow
def test_wheel_reconstructs_in_an_empty_environment(built, tmp_path):
    (wheel,) = built.glob("*.whl")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "env"], check=True)
    python = tmp_path / "env" / SCRIPTS / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-index", "--no-deps", wheel]
    subprocess.run(pip, check=True)
    paths = "import json, site, sys; print(json.dumps(site.getsitepackages()))"
    packages = json.loads(subprocess.check_output([sys.executable, "-c", paths]))[0]
    packages_of_env = json.loads(subprocess.check_output([python, "-c", paths]))[0]
    (Path(packages_of_env) / "dependencies.pth").write_text(packages)  # there is no network to install them from
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    photo = ROOT / "docs" / "images" / "chelsea.png"
    out = tmp_path / "out"
    command = [python.with_name("svqvae"), "reconstruct", photo, "--scales", "0.25", "--output", out]
    subprocess.run(command, cwd=tmp_path, env=env, check=True)
    assert [path.suffix for path in out.iterdir() if path.name[0] != "."] == [".png"]
    places = "from importlib.util import find_spec as f; print(f('svqvae_cli').origin, f('svqvae_hf').origin)"
    files = subprocess.check_output([python, "-c", places], cwd=tmp_path, env=env, text=True).split()
    for file in files:
        assert file.startswith(packages_of_env)


def test_citation_names_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == svqvae_hf.__version__
    assert citation["license"] in PROJECT["license"]
    assert f"\n## {svqvae_hf.__version__} " in (ROOT / "CHANGELOG.md").read_text()


def test_cards_reports_and_commands_name_the_version_of_the_code_that_runs(tiny_model, monkeypatch, capsys):
    """Not of the metadata, which is of another version if a checkout runs by `PYTHONPATH`."""
    monkeypatch.setattr(importlib.metadata.Distribution, "version", "9.9.9")
    version = svqvae_hf.__version__
    assert version in model_card(tiny_model.config, repo_id="org/name", standalone=True)
    assert library_versions()["svqvae-hf"] == version
    assert provenance("train.py", 1, 1, "crops")["trained by"].startswith(f"`train.py` of svqvae-hf {version},")
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"svqvae {version}\n"


def test_release_is_built_from_the_tag_of_its_version():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "release.yml").read_text())
    assert workflow[True] == {"push": {"tags": ["v*"]}}  # YAML 1.1 reads the key `on` as a boolean
    (job,) = workflow["jobs"].values()
    (check,) = (step["run"] for step in job["steps"] if step.get("run", "").startswith("test "))
    check = check.replace("hatchling", f"{sys.executable} -m hatchling")
    version = svqvae_hf.__version__
    tags = {"GITHUB_REF_NAME": f"v{version}"}, {"GITHUB_REF_NAME": f"v{version}.1"}
    codes = [
        subprocess.run(["bash", "-c", check], cwd=ROOT, env=os.environ | tag, check=False).returncode for tag in tags
    ]
    assert codes == [0, 1]

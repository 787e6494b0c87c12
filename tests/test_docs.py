"""What README and docs say runs: Python blocks, commands, the site."""

import argparse
import json
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import griffe
import pictures
import pytest
from conftest import ROOT
from hub_server import serve_hub
from hugging_face_docstrings import HuggingFaceDocstrings, to_markdown
from page_runner import python_blocks
from test_imports import ROOMS
from train_autoregressive import AutoregressiveConfig
from train_latent_diffusion import DiffusionConfig
from train_masked import MaskedConfig

from svqvae_cli.command_line import parse
from svqvae_hf.models.image_processing_svqvae import load_image
from svqvae_hf.trainer.options import read_options
from svqvae_hf.trainer.train_options import TrainConfig

PAGES = [ROOT / "README.md", ROOT / "model_card.md", *sorted((ROOT / "docs").glob("*.md"))]
WITH_CODE = [page for page in PAGES if python_blocks(page.read_text())]
OPTIONS = {
    "training/train.py": TrainConfig,
    "training/train_latent_diffusion.py": DiffusionConfig,
    "training/train_masked.py": MaskedConfig,
    "training/train_autoregressive.py": AutoregressiveConfig,
}


def name(page: Path) -> str:
    return page.name


# Python


@pytest.fixture(scope="module")
def failures(tmp_path_factory):
    """What failed on each page, of one process for all of them, since its imports take longer than the pages."""
    folder = tmp_path_factory.mktemp("pages")
    command = [sys.executable, ROOT / "tests" / "page_runner.py", folder / "hub", folder / "work", *WITH_CODE]
    with serve_hub(folder) as env:
        result = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def test_pages_have_code():
    assert {"README.md", "index.md", "scales_and_tiles.md"} <= {page.name for page in WITH_CODE}


@pytest.mark.parametrize("page", WITH_CODE, ids=name)
def test_python_blocks_run(page, failures):
    assert not failures[str(page)], failures[str(page)]


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_python_is_in_blocks_that_run(page):
    assert not re.findall(r"^    (?:import|from|svqvae|python|pip|accelerate) .*", page.read_text(), re.MULTILINE)


# Commands


def commands(text: str) -> list[list[str]]:
    """Arguments of the commands of a page, in lines of their own or, with arguments, within a line."""
    joined = text.replace("\\\n", " ")
    lines = re.findall(r"^(?:\.venv/bin/)?((?:svqvae|accelerate|\S* ?torchrun|python) .*)$", joined, re.M)
    inline = re.findall(r"`((?:svqvae|python)(?: [^`\s]+){2,})`", joined)
    return [shlex.split(command, comments=True) for command in lines + inline]


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands_parse(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    for words in commands(page.read_text()):
        check_command(words)


def check_command(words: list[str]) -> None:
    """Parses a command of ours; of others, checks that their script is there."""
    if words[0] == "svqvae":
        parse(words[1:])
    elif "svqvae_cli" in words:
        parse(words[words.index("svqvae_cli") + 1 :])
    else:
        index = next(index for index, word in enumerate(words) if word.endswith(".py"))
        script, arguments = ROOT / words[index], words[index + 1 :]
        assert script.is_file()
        if words[index] in OPTIONS:
            read_options(OPTIONS[words[index]], arguments)
        elif "parse_args()" in script.read_text():
            parse_as(script, arguments)


class ParsedError(Exception):
    """The arguments are parsed; the rest of the script is not run."""


def parse_as(script: Path, arguments: list[str]) -> None:
    def parse(parser: argparse.ArgumentParser) -> None:
        raise ParsedError(parse_args(parser, arguments))

    parse_args = argparse.ArgumentParser.parse_args
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(script.parent)
        patch.setattr(argparse.ArgumentParser, "parse_args", parse)
        main = runpy.run_path(str(script), run_name="parsed")["main"]
        with pytest.raises(ParsedError):
            main()


@pytest.mark.parametrize(
    "command",
    [
        "svqvae reconstruct a.png",
        "accelerate launch -m svqvae_cli decode --out x",
        "python training/no.py",
        "python conversion/compare.py a.safetensors --original b",
    ],
)
def test_wrong_commands_are_found(command):
    (words,) = commands(f"{command}\n")
    with pytest.raises((ValueError, AssertionError, SystemExit)):
        check_command(words)


def test_extras_and_targets_are_there():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    makefile = (ROOT / "Makefile").read_text()
    for page in PAGES:
        text = page.read_text()
        for names in re.findall(r"^pip install .*\[([\w,]+)\]", text, re.MULTILINE):
            assert set(names.split(",")) <= set(extras), page
        for target in re.findall(r"^make (\w+)", text, re.MULTILINE):
            assert f"\n{target}:" in makefile, page


def test_links_of_the_readme_lead_somewhere():
    for page in PAGES[:2]:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (ROOT / target).exists(), (page, target)


def test_line_counts_of_the_readme_are_true():
    counts = re.findall(r"^\| `([\w/]+\.py)` \| (\d+) \|", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert len(counts) >= 5
    for path, stated in counts:
        lines = len((ROOT / path).read_text().splitlines())
        assert int(stated) == pytest.approx(lines, rel=0.1), f"{path} has {lines} lines"


def test_architecture_names_each_room():
    named = re.findall(r"^\| `(\w+)/?` \|", (ROOT / "docs" / "architecture.md").read_text(), re.MULTILINE)
    assert named == ROOMS


# Site

BUILD = """
import socket, sys

def refuse(*_):
    raise OSError("the site must be built without a network")

socket.socket.connect = socket.getaddrinfo = refuse
from mkdocs.__main__ import cli
cli(["build", "--strict", "--quiet", "--site-dir", sys.argv[1]])
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    result = subprocess.run(
        [sys.executable, "-c", BUILD, folder], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return folder


def test_site_needs_no_network(site):
    for page in site.rglob("*.html"):
        text = page.read_text()
        assert not re.findall(r"<(?:script|link|img|iframe)[^>]*(?:src|href)=\"?(?:https?:)?//[^>]*>", text), page
    for sheet in site.rglob("*.css"):
        assert not re.findall(r"(?:url\(|@import )[\"']?(?:https?:)?//", sheet.read_text()), sheet


def test_api_pages_have_what_the_docstrings_say(site):
    text = (site / "api" / "model.html").read_text()
    assert 'id="svqvae_hf.SVQVAE.encode_tokens"' in text
    assert "One scale" not in text
    assert "<strong>Args</strong>" in text
    assert "<li>\n<p><code>codebook_size</code>" in text or "<li><code>codebook_size</code>" in text
    assert "[<code>" not in text  # a reference that became no link


DOCSTRING = """Encodes images, see [`Thing`].

Args:
    sample (`torch.Tensor` of shape `(batch, 3, h, w)`): Images
        of any size.
    **kwargs: Those of [`~other.Base.call`].

Returns:
    [`~package.Thing`] or `tuple`: Latents.

Raises:
    ValueError: If `sample` has another shape.

Example:
    >>> encode(1)
"""

MARKDOWN = """Encodes images, see [`Thing`][package.Thing].

**Args**

- `sample` (`torch.Tensor` of shape `(batch, 3, h, w)`): Images of any size.
- `**kwargs`: Those of `other.Base.call`.

**Returns**

[`Thing`][package.Thing] or `tuple`: Latents.

**Raises**

- `ValueError`: If `sample` has another shape.

**Example**

```pycon
>>> encode(1)
```
"""


def test_docstrings_become_markdown():
    known = {"Thing": "package.Thing", "package.Thing": "package.Thing"}
    assert to_markdown(DOCSTRING, known.get).rstrip() == MARKDOWN.rstrip()


def test_references_to_nothing_are_refused(tmp_path):
    package = tmp_path / "svqvae_hf"
    package.mkdir()
    (package / "__init__.py").write_text('class Thing:\n    """See [`Thing.gone`]."""\n')
    with pytest.raises(ValueError, match=r"`Thing.gone` in the docstring of svqvae_hf.Thing must be an object"):
        griffe.load(
            "svqvae_hf",
            search_paths=[tmp_path],
            try_relative_path=False,
            extensions=griffe.load_extensions(HuggingFaceDocstrings()),
        )


# Pictures


@pytest.mark.usefixtures("small_sample")
def test_pictures_can_be_made_again(tiny_model, photo, tmp_path, monkeypatch):
    monkeypatch.setattr(pictures.SVQVAE, "from_pretrained", lambda _: tiny_model)
    monkeypatch.setattr(pictures, "load_image", lambda _: photo.resize((90, 60)))
    monkeypatch.setattr(pictures, "LARGE", (120, 80))
    monkeypatch.setattr(pictures, "TILE", 16)
    pictures.main(tmp_path)
    made = {path.name for path in tmp_path.iterdir()}
    assert len(made) == 5
    assert made <= {path.name for path in pictures.IMAGES.iterdir()}
    sizes = {path.stem: load_image(path).size for path in tmp_path.iterdir()}
    assert sizes.pop("pyramid") == (45 + pictures.MARGIN + 22, 30 + pictures.LABEL)
    assert all(min(size) > 100 for size in sizes.values())

"""README, docs and notebook: Python runs, commands parse, the site builds, and what they state is true."""

import argparse
import importlib.util
import json
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import write_reference
from cli_runner import svqvae
from conftest import ROOT
from contact_sheet import counting_order
from diffusion_options import DiffusionOptions
from hub_server import serve_hub
from hugging_face_docstrings import to_markdown
from page_runner import code_cells, kept_kinds, python_blocks
from test_imports import SUBPACKAGES
from train_language_model import LanguageModelOptions
from train_llamagen import LlamaGenOptions
from transformers import TrainingArguments

import svqvae_hf
from svqvae_cli.command_line import COMMANDS, parse
from svqvae_hf.trainer.options import read_options
from svqvae_hf.trainer.train_options import TrainOptions

NOTEBOOK = ROOT / "notebooks" / "inference_example.ipynb"
PAGES = {page: page.read_text() for page in [ROOT / "README.md", ROOT / "model_card.md", *ROOT.glob("docs/*.md")]}
RUN_BY_TEST_EXPORT = "export.md"
OPTIONS = {"training/train.py": [TrainOptions], "training/train_latent_diffusion.py": [DiffusionOptions]}
OPTIONS |= {"training/train_language_model.py": [LanguageModelOptions, TrainingArguments]}
OPTIONS |= {"training/train_llamagen.py": [LlamaGenOptions, TrainingArguments]}


# Python


@pytest.mark.slow
def test_python_blocks_and_notebook_run(tmp_path):
    pages = [page for page, text in PAGES.items() if python_blocks(text) and page.name != RUN_BY_TEST_EXPORT]
    assert {"README.md", "index.md", "scales_and_tiles.md"} <= {page.name for page in pages}
    runner = ROOT / "tests" / "page_runner.py"
    command = [sys.executable, runner, tmp_path / "hub", tmp_path / "work", *pages, NOTEBOOK]
    with serve_hub(tmp_path) as env:  # one process for all of them, because its imports take longer than the pages
        env |= {"PYTHONWARNINGS": "ignore:IProgress", "IPYTHONDIR": str(tmp_path / "ipython")}
        result = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    errors = json.loads(result.stdout.splitlines()[-1])
    assert len(errors) == len(pages) + 1
    assert not any(errors.values()), "\n".join(errors.values())


def test_python_is_in_blocks_that_run():
    for page, text in PAGES.items():
        assert not re.findall(r"^    (?:import|from|svqvae|python|pip|accelerate) .*", text, re.MULTILINE), page


def test_notebook_is_small_and_shows_pictures():
    cells = code_cells(NOTEBOOK)
    assert NOTEBOOK.stat().st_size < 1e6
    assert sum("image/jpeg" in kinds for cell in cells for kinds in kept_kinds(cell)) >= 5
    assert "/site-packages" not in NOTEBOOK.read_text()  # warnings name paths of the machine


def test_lines_of_prose_have_at_most_120_characters():
    """Except in tables, in blocks of code, and in lines with links."""
    for page, text in PAGES.items():
        prose = re.sub(r"^\s*```.*?^\s*```|\A---$.*?^---$", "", text, flags=re.DOTALL | re.MULTILINE)
        for line in prose.splitlines():
            may_be_long = line.lstrip().startswith(("|", "<")) or "](" in line or "http" in line
            assert may_be_long or len(line) <= 120, f"{page.name}: {line}"


# Commands


def commands(text: str) -> list[list[str]]:
    """Arguments of the commands of a page: on lines of their own, or within a line if they have arguments."""
    joined = text.replace("\\\n", " ")
    lines = re.findall(r"^(?:\.venv/bin/)?((?:svqvae|accelerate|\S* ?torchrun|python) .*)$", joined, re.M)
    inline = re.findall(r"`((?:svqvae|python)(?: [^`\s]+){2,})`", joined)
    return [shlex.split(command, comments=True) for command in lines + inline]


def test_commands_parse(monkeypatch):
    monkeypatch.chdir(ROOT)
    found = [words for text in PAGES.values() for words in commands(text)]
    assert len(found) > 50
    for words in found:
        check_command(words)


@pytest.mark.slow
def test_commands_of_the_readme_run_in_order(tmp_path, monkeypatch):
    """In a folder that has what a new clone has. Installation, make and the demo are left out."""
    for path in ROOT.glob("[!.]*"):
        if path.name not in ("out", "outputs"):
            (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```bash\n(.*?)```", PAGES[ROOT / "README.md"], re.DOTALL)
    lines = [shlex.split(line, comments=True) for block in blocks for line in block.replace("\\\n", "").splitlines()]
    run = [words for words in lines if words[0] not in ("pip", "make")]
    assert len(run) == 9
    for words in run:
        if words[0] == "python":
            subprocess.run([sys.executable, *words[1:]], check=True)
        else:
            assert svqvae(*words[1:]) == 0, words
    assert (tmp_path / "out" / "my-svqvae" / "config.json").is_file()
    assert (tmp_path / "out" / "my-picture" / "chelsea_side_by_side.png").is_file()


def check_command(words: list[str]) -> None:
    """Parses a command of ours. Of other commands, checks that their script exists and takes the options."""
    if words[0] == "svqvae":
        parse(words[1:])
    elif "svqvae_cli" in words:
        parse(words[words.index("svqvae_cli") + 1 :])
    elif "-m" in words:
        assert importlib.util.find_spec(words[words.index("-m") + 1])
    else:
        index = next(index for index, word in enumerate(words) if word.endswith(".py"))
        script, arguments = ROOT / words[index], words[index + 1 :]
        assert script.is_file()
        if words[index] in OPTIONS:
            on_cpu = ["--use_cpu"] if TrainingArguments in OPTIONS[words[index]] else []  # else bf16 is refused
            read_options(OPTIONS[words[index]], [*arguments, *on_cpu])
        elif "parse_args()" in script.read_text():
            parse_as(script, arguments)


class ParsedError(Exception):
    """Ends a script once its arguments are parsed."""


def parse_as(script: Path, arguments: list[str]) -> None:
    """Parses arguments as a script does."""

    def parse(parser: argparse.ArgumentParser) -> None:
        raise ParsedError(parse_args(parser, arguments))

    parse_args = argparse.ArgumentParser.parse_args
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(script.parent)
        patch.setattr(argparse.ArgumentParser, "parse_args", parse)
        main = runpy.run_path(str(script), run_name="parsed")["main"]
        with pytest.raises(ParsedError):
            main()


# Statements


def test_reference_has_each_public_name():
    pages = "".join(page.read_text() for page in ROOT.glob("docs/api/*.md"))
    documented = set(re.findall(r"^::: svqvae_hf\.(\w+)$", pages, re.MULTILINE))
    assert documented == set(svqvae_hf.__all__) - {"DEFAULT_MODEL", "DEFAULT_GENERATOR"}


def test_reference_has_each_name_that_a_page_imports():
    """Otherwise add it to `docs/api`, because only names of the reference are public."""
    reference = (ROOT / "docs" / "reference" / "python.md").read_text()
    documented = set(re.findall(r"^### (svqvae_hf\.[\w.]+)$", reference, re.MULTILINE))
    documented |= {f"svqvae_hf.{name}" for name in svqvae_hf.__all__}
    notebook = "\n".join(cell.source for cell in code_cells(NOTEBOOK))
    for text in [*PAGES.values(), notebook]:
        for module, names in re.findall(r"^ *from (svqvae_hf[\w.]*) import (.+)$", text, re.MULTILINE):
            for name in names.split(", "):
                path = f"{module}.{name}"
                assert path in documented, path


def test_extras_and_targets_exist():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    makefile = (ROOT / "Makefile").read_text()
    for page, text in PAGES.items():
        for names in re.findall(r"pip install (?:-e )?\"(?:\.|svqvae-hf)\[([\w,]+)\]\"", text):
            assert set(names.split(",")) <= set(extras), page
        for target in re.findall(r"^make (\w+)", text, re.MULTILINE):
            assert f"\n{target}:" in makefile, page


def test_links_outside_the_site_lead_somewhere():
    pages = [*ROOT.glob("*.md"), *ROOT.glob("[!.]*/README.md")]
    assert len(pages) > 5
    for page in pages:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), (page, target)


def test_files_named_by_their_path_exist():
    readmes = [f"{folder}README.md" for folder in ("", "training/", "training/bundled/", "conversion/")]
    for page in ("CONTRIBUTING.md", "docs/architecture.md", *readmes):
        for path in re.findall(r"`([\w/]+/\w+\.(?:py|sh|json|yaml))`", (ROOT / page).read_text()):
            folders = (ROOT, ROOT / "svqvae_hf", (ROOT / page).parent)
            assert any((folder / path).is_file() for folder in folders), f"{page} names {path}"


def test_page_of_the_command_line_has_each_command():
    named = re.findall(r"^\| `([\w-]+)` \|", PAGES[ROOT / "docs" / "command_line.md"], re.MULTILINE)
    assert named == [*COMMANDS]


def test_architecture_names_each_subpackage():
    named = re.findall(r"^\| `(\w+)/?` \|", PAGES[ROOT / "docs" / "architecture.md"], re.MULTILINE)
    assert named == SUBPACKAGES


@pytest.mark.parametrize("page", ["commands.md", "training.md"])
def test_reference_is_current(page):
    """Otherwise run `PYTHONPATH=training python docs/write_reference.py`."""
    assert (ROOT / "docs" / "reference" / page).read_text() == write_reference.PAGES[page]()


@pytest.mark.slow
def test_reference_of_python_has_each_name():
    """Otherwise run `PYTHONPATH=training python docs/write_reference.py`. Docstrings may have changed since."""
    written = (ROOT / "docs" / "reference" / "python.md").read_text()
    current = write_reference.PAGES["python.md"]()
    assert re.findall(r"^#+ .*", written, re.MULTILINE) == re.findall(r"^#+ .*", current, re.MULTILINE)
    for name in set(svqvae_hf.__all__) - {"DEFAULT_MODEL", "DEFAULT_GENERATOR"}:
        assert f"### svqvae_hf.{name}\n" in written


def test_a_section_with_one_wrapped_item_becomes_one_item():
    docstring = "Opens an image.\n\nArgs:\n    file (`str`): Path of\n        the image.\n"
    markdown = to_markdown(docstring, lambda name: None)
    assert markdown.strip() == "Opens an image.\n\n**Args**\n\n- `file` (`str`): Path of the image."


def test_readme_lists_what_the_bundled_model_draws():
    known_objects = json.loads(Path(svqvae_hf.DEFAULT_GENERATOR, "known_objects.json").read_text())
    text = " ".join(PAGES[ROOT / "README.md"].split())
    assert f" {', '.join(known_objects['objects'])}. Backgrounds: {', '.join(known_objects['grounds'])}. " in text


def test_each_capability_has_its_room_and_its_test():
    table = PAGES[ROOT / "docs" / "architecture.md"].partition("## Capabilities")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (\w[^|]*) \| `([\w/]+)` \| `([\w/.]+)` \|$", table, re.MULTILINE)
    assert 30 < len(rows) < 50
    for capability, room, test in rows:
        assert (ROOT / room).is_dir() or (ROOT / "svqvae_hf" / room).is_dir(), capability
        assert (ROOT / test).is_file(), capability


# Site

BUILD = """
import socket, sys
def fail(*_):
    raise OSError("the site must be built without a network")
socket.socket.connect = socket.getaddrinfo = fail
from mkdocs.__main__ import cli
cli(["build", "--strict", "--site-dir", sys.argv[1]])  # with --quiet, warnings would not count
"""


@pytest.mark.slow
def test_site_builds_without_network_and_shows_docstrings(tmp_path):
    command = [sys.executable, "-c", BUILD, tmp_path]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    for page in tmp_path.rglob("*.html"):
        text = page.read_text()
        assert not re.findall(r"<(?:script|link|img|iframe)[^>]*(?:src|href)=\"?(?:https?:)?//[^>]*>", text), page
    for sheet in tmp_path.rglob("*.css"):
        assert not re.findall(r"(?:url\(|@import )[\"']?(?:https?:)?//", sheet.read_text()), sheet
    text = (tmp_path / "api" / "model.html").read_text()
    for shown in ("encode_tokens", "enable_tiling", "from_single_file"):
        assert f'id="svqvae_hf.SVQVAE.{shown}"' in text
    for shown in ("enable_slicing", "disable_tiling", "save_pretrained"):
        assert shown in text
    assert "encode_window" not in text
    assert "TileContext" not in text
    commands_page = (tmp_path / "reference" / "commands.html").read_text()
    assert all(f'id="svqvae-{name}"' in commands_page for name in COMMANDS)
    assert "0.1.0" in (tmp_path / "changelog.html").read_text()
    assert "<strong>Args</strong>" in text
    assert "<li>\n<p><code>codebook_size</code>" in text or "<li><code>codebook_size</code>" in text
    assert "[<code>" not in text  # a reference that became no link


# Pictures


def test_contact_sheet_of_an_empty_folder_is_one_line(tmp_path):
    command = [sys.executable, ROOT / "docs/contact_sheet.py", tmp_path, tmp_path / "sheet.jpg", "8"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode != 0
    assert result.stderr == f"contact_sheet.py: error: `{tmp_path}` must hold PNG files, but has none.\n"


def test_contact_sheet_has_picture_2_before_picture_10():
    names = ["class_crab_1.png", "prompt_10_0.png", "prompt_2_0.png", "prompt_2_10.png", "prompt_2_9.png"]
    paths = [Path(name) for name in names]
    paths.sort(key=counting_order)
    in_order = [path.name for path in paths]
    assert in_order == [names[0], names[2], names[4], names[3], names[1]]

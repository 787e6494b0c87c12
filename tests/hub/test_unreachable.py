"""A Hub that does not answer: one line at once, and what the cache holds still loads."""

import socket
import time

import pytest
from cli_runner import fails
from huggingface_hub import constants
from transformers import AutoConfig

from svqvae_hf import SVQVAE, SVQVAEAutoregressivePipeline, SVQVAEImageProcessor
from svqvae_hf.hub import repositories
from svqvae_hf.hub.repositories import from_hub
from svqvae_hf.token_sets.settings import read_settings

pytestmark = pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks` argument")  # that diffusers passes
SECONDS = 5
LOADERS = {
    "model": SVQVAE.from_pretrained,
    "processor": SVQVAEImageProcessor.from_pretrained,
    "pipeline": SVQVAEAutoregressivePipeline.from_pretrained,
    "checkpoint": lambda repo_id: SVQVAE.from_single_file(f"{repo_id}:file.pt"),
    "token set": read_settings,
    "config": lambda repo_id: from_hub(AutoConfig.from_pretrained, repo_id),
}


@pytest.fixture
def port():
    """Port of a server that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.fixture
def impatient(monkeypatch):
    """Waits a shorter time for an answer, so that a busy machine does not fail the test."""
    assert repositories.ANSWER_SECONDS < SECONDS
    monkeypatch.setattr(repositories, "ANSWER_SECONDS", 0.1)


@pytest.fixture
def closed(port, monkeypatch):
    """A Hub that refuses connections."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        closed = server.getsockname()[1]
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{closed}")


def assert_one_line_soon(load, *arguments):
    start = time.monotonic()
    with pytest.raises(OSError, match="org/gone.*the Hub cannot be reached, and the cache has no compl") as error:
        load(*arguments)
    assert time.monotonic() - start < SECONDS
    assert "\n" not in str(error.value)


@pytest.mark.usefixtures("closed")
@pytest.mark.parametrize("load", LOADERS.values(), ids=LOADERS)
def test_all_that_loads_says_so_at_once(load):
    assert_one_line_soon(load, "org/gone")


@pytest.mark.usefixtures("impatient")
def test_a_hub_that_swallows_requests(port, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")
    assert_one_line_soon(SVQVAE.from_pretrained, "org/gone")


@pytest.mark.usefixtures("closed")
@pytest.mark.parametrize("command", ["info", "encode", "generate", "tokenize"])
def test_commands_say_so_at_once(command, two_images, tmp_path, capsys):
    argv = {
        "info": ["org/gone"],
        "encode": [two_images, "--model", "org/gone", "--output", tmp_path / "out"],
        "generate": ["org/gone", "--output", tmp_path / "out"],
        "tokenize": [two_images, tmp_path / "out", "--model", "org/gone"],
    }[command]
    start = time.monotonic()
    line = fails(capsys, command, *argv)
    assert time.monotonic() - start < SECONDS
    assert line.startswith("svqvae: error: could not load the model `org/gone`: the Hub cannot be reached")
    assert not (tmp_path / "out").exists()

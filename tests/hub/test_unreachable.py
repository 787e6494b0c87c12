"""A Hub that does not answer is an error of one line."""

import socket

import pytest
from cli_runner import fails
from huggingface_hub import constants
from transformers import AutoConfig

import svqvae_hf
from svqvae_files.hub import model_folder
from svqvae_hf import SVQVAE, ContextModel, LlamaGenForCausalLM, SVQVAEAutoregressivePipeline
from svqvae_hf.hub.repositories import from_hub
from svqvae_hf.token_sets.settings import read_settings

pytestmark = pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks` argument")  # that diffusers passes
LOADERS = {
    "model": SVQVAE.from_pretrained,
    "pipeline": SVQVAEAutoregressivePipeline.from_pretrained,
    "checkpoint": lambda repo_id: SVQVAE.from_single_file(f"{repo_id}:file.pt"),
    "token set": read_settings,
    "context model": ContextModel.from_pretrained,
    "config": lambda repo_id: from_hub(AutoConfig.from_pretrained, repo_id),
}
PATH_LOADERS = [LOADERS[name] for name in ("model", "pipeline", "context model", "config")]


@pytest.fixture
def closed(monkeypatch):
    """A Hub that refuses connections."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        closed = server.getsockname()[1]
    endpoint = f"http://127.0.0.1:{closed}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)  # between its six tries


@pytest.mark.usefixtures("closed")
@pytest.mark.parametrize("load", LOADERS.values(), ids=LOADERS)
def test_all_that_loads_says_so(load):
    with pytest.raises(OSError, match="org/gone.*the Hub cannot be reached") as error:
        load("org/gone")
    assert "\n" not in str(error.value)


@pytest.mark.usefixtures("closed")
@pytest.mark.parametrize("command", ["info", "encode", "generate", "tokenize"])
def test_commands_say_so(command, two_images, tmp_path, capsys):
    argv = {
        "info": ["org/gone"],
        "encode": [two_images, "--model", "org/gone", "--output", tmp_path / "out"],
        "generate": ["--model", "org/gone", "--output", tmp_path / "out"],
        "tokenize": [two_images, "--output", tmp_path / "out", "--model", "org/gone"],
    }[command]
    line = fails(capsys, command, *argv)
    assert line.startswith("svqvae: error: could not load the model `org/gone`: ")
    assert "the Hub cannot be reached" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("closed")
@pytest.mark.parametrize("path", ["/tmp/nothing", "./nothing", "../nothing", "org/nothing/vqvae"])
@pytest.mark.parametrize("load", [*PATH_LOADERS, LlamaGenForCausalLM.from_pretrained, model_folder])
def test_a_path_that_does_not_exist_is_not_asked_for_on_the_hub(load, path):
    with pytest.raises(OSError, match=f"^could not load `{path}`: there is no such folder. On the Hub a model is"):
        load(path)


@pytest.mark.parametrize(("name", "constant"), [("bundled", "DEFAULT_MODEL"), ("scenes", "DEFAULT_GENERATOR")])
def test_bundled_names_are_not_asked_for_on_the_hub(name, constant):
    def load(source):
        raise AssertionError("the Hub was asked")

    with pytest.raises(OSError, match=f"In Python, pass `svqvae_hf.{constant}`"):
        from_hub(load, name)
    assert from_hub(str, getattr(svqvae_hf, constant)) == getattr(svqvae_hf, constant)

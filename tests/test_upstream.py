"""The files for pull requests to other libraries, made from the package's source."""

import importlib.util
import json
import subprocess
import sys
import types

import pytest
import torch
from conftest import ROOT, smooth_images
from generators import make_llamagen

from svqvae_hf import SVQVAE

CHECKOUT = {  # what the script changes in a checkout of diffusers
    "src/diffusers/models/autoencoders/__init__.py": "from .autoencoder_tiny import AutoencoderTiny\n",
    "src/diffusers/models/__init__.py": (
        '    _import_structure["autoencoders.autoencoder_tiny"] = [...]\n            VQModel,\n'
    ),
    "src/diffusers/__init__.py": '            "T2IAdapter",\n            T2IAdapter,\n',
}


@pytest.fixture
def port(tmp_path, monkeypatch):
    """The class of the port, as a module of diffusers."""
    for folder in ("tests/models/autoencoders", "docs/source/en/api/models", "scripts"):
        (tmp_path / folder).mkdir(parents=True)
    for path, text in CHECKOUT.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    monkeypatch.syspath_prepend(ROOT / "upstream" / "diffusers")
    import make_port

    make_port.main(tmp_path)
    assert [(tmp_path / path).read_text().count("SVQVAE") for path in CHECKOUT] == [1, 2, 2]
    file = tmp_path / make_port.MODEL
    checked = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--no-cache", "--select=F", file], capture_output=True, check=False
    )
    assert not checked.returncode, checked.stdout
    assert "diffusers_modules" not in file.read_text()  # which is of repositories with code
    return load(file, "diffusers.models.autoencoders.autoencoder_svqvae", monkeypatch).SVQVAE


def load(file, name, monkeypatch):
    """Loads a file as a module of another package."""
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_port_to_diffusers_equals_the_package(port, tmp_path):
    SVQVAE.from_single_file(ROOT / "tests" / "golden" / "svqvae_tiny.safetensors").save_pretrained(tmp_path / "model")
    ours, theirs = (cls.from_pretrained(tmp_path / "model") for cls in (SVQVAE, port))
    sample = smooth_images(43, 75)
    with torch.no_grad():
        for model in (ours, theirs):
            model.enable_tiling(32)
        ids, expected = theirs.encode_tokens(sample, [1, 0.5]), ours.encode_tokens(sample, [1, 0.5])
        assert all(map(torch.equal, ids, expected))
        assert torch.equal(theirs.decode_tokens(ids[0]), ours.decode_tokens(expected[0]))
        assert torch.equal(theirs(sample).losses.total, ours(sample).losses.total)
    assert "Value range of input and output images" in port.__doc__
    assert json.loads((tmp_path / "model" / "config.json").read_text())["_class_name"] == port.__name__


def test_modular_file_of_transformers_equals_the_package(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "upstream" / "transformers")
    import make_modular

    file = tmp_path / "modular_llamagen.py"
    file.write_text(make_modular.make_modular())
    monkeypatch.setitem(sys.modules, "transformers.models.llamagen", types.ModuleType("llamagen"))
    module = load(file, "transformers.models.llamagen.modular_llamagen", monkeypatch)
    ours = make_llamagen("c2i").language_model
    ours.save_pretrained(tmp_path / "model")
    theirs = module.LlamaGenForCausalLM.from_pretrained(tmp_path / "model")
    prompt = torch.tensor([[256 + 3]])
    ids, expected = (model.generate(prompt, max_new_tokens=16, do_sample=False) for model in (theirs, ours))
    assert torch.equal(ids, expected)

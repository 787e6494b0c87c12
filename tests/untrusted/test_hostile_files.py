"""No file runs code or writes to the terminal, whichever reader or command it is given to."""

import os
import pickle
from pathlib import Path

import pytest
import torch
from cli_runner import fails
from conftest import make_tiny
from safetensors.torch import load_file

from svqvae_hf import SVQVAE
from svqvae_hf.data.image_sets import open_images
from svqvae_hf.evaluation.perceptual import load_inception, load_lpips
from svqvae_hf.large.large_images import encode_large
from svqvae_hf.loaders.checkpoints import read_checkpoint
from svqvae_hf.models.image_files import load_image
from svqvae_hf.token_sets.settings import SETTINGS_FILE, read_settings
from svqvae_hf.tokens.image_tokens import encode_image
from svqvae_hf.tokens.token_files import is_token_file, load_tokens, save_tokens

pytestmark = pytest.mark.usefixtures("few_windows")


class Payload:
    """Creates a folder when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def model_folder(path: Path, files: dict[str, bytes]) -> Path:
    make_tiny().save_pretrained(path)
    (path / "diffusion_pytorch_model.safetensors").unlink()
    for name, content in files.items():
        (path / name).write_bytes(content)
    return path


def make_tiled() -> SVQVAE:
    model = make_tiny()
    model.enable_tiling(16, 4)
    return model


READERS = {
    "checkpoint.pt": lambda path: read_checkpoint(path, SVQVAE),
    "checkpoint.ckpt": SVQVAE.from_single_file,
    "checkpoint.safetensors": lambda path: read_checkpoint(path, SVQVAE),
    "tokens.safetensors": load_tokens,
    "image.png": load_image,
    "weights.pth": lambda path: load_lpips("alex", path),
    "inception.pth": load_inception,
    "set.parquet": lambda path: open_images([str(path)]),
    "large.tif": lambda path: encode_large(make_tiled(), path),
}


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("form", ["torch", "pickle"])
def test_no_reader_runs_code(tmp_path, name, form):
    content = {"model": Payload(tmp_path / "ran"), "state_dict": Payload(tmp_path / "ran")}
    path = tmp_path / name
    if form == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path)
    assert not is_token_file(path)
    with pytest.raises(ValueError, match=name):
        READERS[name](path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("command", ["info", "convert", "reconstruct", "encode", "decode"])
def test_no_command_runs_code(tmp_path, capsys, photo, command):
    file = tmp_path / "hostile.bin"
    torch.save({"state_dict": Payload(tmp_path / "ran")}, file)
    folder = model_folder(tmp_path / "model", {"diffusion_pytorch_model.bin": file.read_bytes()})
    photo.crop((0, 0, 9, 9)).save(tmp_path / "a.png")
    save_tokens(tmp_path / "a.safetensors", encode_image(make_tiny(), photo.crop((0, 0, 9, 9)), [1.0]))
    out = tmp_path / "out"
    inputs = {"info": [folder], "convert": [file, "--output", out], "decode": [tmp_path / "a.safetensors"]}
    options = [] if command in ("info", "convert") else ["--output", out, "--model", folder]
    fails(capsys, command, *inputs.get(command, [tmp_path / "a.png"]), *options)
    assert not (tmp_path / "ran").exists()
    assert not out.exists()


def test_token_set_runs_no_code(tmp_path):
    """`datasets` once ran a script of the set's name; numpy's pickles are no Parquet either."""
    (tmp_path / f"{tmp_path.name}.py").write_text("raise SystemExit('ran')")
    (tmp_path / SETTINGS_FILE).write_bytes(pickle.dumps(Payload(tmp_path / "ran")))
    with pytest.raises(ValueError, match="must hold a JSON object"):
        read_settings(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_control_characters_are_not_printed(golden_dir, tmp_path, capsys):
    weights = load_file(golden_dir / "svqvae_tiny.safetensors") | {"a\n\x1b[2J": torch.zeros(1)}
    torch.save({"model": weights}, tmp_path / "a.pt")
    assert r"unexpected: a \x1b[2J." in fails(capsys, "info", tmp_path / "a.pt")

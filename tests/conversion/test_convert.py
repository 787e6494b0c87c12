import hashlib

import pytest
import torch
from safetensors.torch import load_file, save_file

from svqvae_hf import SVQVAE
from svqvae_hf.conversion.convert import convert
from svqvae_hf.conversion.new_repository import VARIANTS
from svqvae_hf.loaders.checkpoints import read_checkpoint

GOLDEN = ["svqvae_tiny.safetensors", "llamagen_tiny.pt", "flexvar_tiny.pth", "lightning_tiny.ckpt", "taming_tiny.ckpt"]


@pytest.mark.parametrize("name", GOLDEN)
def test_conversion_is_a_whole_repository(name, golden_dir, tmp_path):
    printed = convert(golden_dir / name, tmp_path / "out")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out"]
    files = "README.md, config.json, diffusion_pytorch_model.safetensors, preprocessor_config.json"
    assert printed.endswith(f"written  {tmp_path / 'out'}: {files}")
    sha256 = hashlib.sha256((golden_dir / name).read_bytes()).hexdigest()
    assert f"sha256 {sha256})\nconfig   in_channels=3, " in printed
    checkpoint = read_checkpoint(golden_dir / name, SVQVAE)
    written = load_file(tmp_path / "out" / "diffusion_pytorch_model.safetensors")
    assert written.keys() == checkpoint.state_dict.keys()
    assert all(torch.equal(tensor, checkpoint.state_dict[key]) for key, tensor in written.items())
    model = SVQVAE.from_pretrained(tmp_path / "out")
    for key, value in checkpoint.config.items():
        assert model.config[key] == (list(value) if isinstance(value, tuple) else value)

    card = (tmp_path / "out" / "README.md").read_text()
    assert f"| layout | {checkpoint.format.title} |" in card
    assert sha256 in card
    assert str(tmp_path) not in card + (tmp_path / "out" / "config.json").read_text()


@pytest.mark.parametrize(("variant", "dtype"), VARIANTS.items())
def test_half_precision_variant_keeps_the_codebook(variant, dtype, golden_dir, tmp_path):
    convert(golden_dir / "taming_tiny.ckpt", tmp_path / "out", variant=variant, license="mit")
    full = SVQVAE.from_pretrained(tmp_path / "out")
    half = SVQVAE.from_pretrained(tmp_path / "out", variant=variant, torch_dtype=dtype)
    assert half.codebook_fingerprint() == full.codebook_fingerprint()
    assert torch.equal(half.encoder.conv_in.weight, full.encoder.conv_in.weight.to(dtype))
    size = {file.name: file.stat().st_size for file in (tmp_path / "out").iterdir()}
    assert size[f"diffusion_pytorch_model.{variant}.safetensors"] < 0.6 * size["diffusion_pytorch_model.safetensors"]
    assert f'variant="{variant}"' in (tmp_path / "out" / "README.md").read_text()


def test_weights_out_of_the_range_of_half_precision(golden_dir, tmp_path):
    path = tmp_path / "large.safetensors"
    weights = load_file(golden_dir / "svqvae_tiny.safetensors")
    save_file(weights | {"quant_conv.bias": torch.full((8,), 1e6)}, path)
    with pytest.raises(ValueError, match=r"must fit fp16, but quant_conv.bias do not.*bf16"):
        convert(path, tmp_path / "out", variant="fp16")
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_failed_conversion_leaves_no_files(golden_dir, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(SVQVAE, "from_pretrained", fail)
    with pytest.raises(KeyboardInterrupt):
        convert(golden_dir / "svqvae_tiny.safetensors", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_copy_with_other_weights_fails(golden_dir, tmp_path, monkeypatch):
    other = SVQVAE.from_single_file(golden_dir / "svqvae_tiny.safetensors")
    other.quant_conv.bias.data[0] += 1
    monkeypatch.setattr(SVQVAE, "from_pretrained", lambda *_, **__: other)
    with pytest.raises(OSError, match=r"differs in quant_conv.bias\."):
        convert(golden_dir / "svqvae_tiny.safetensors", tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"variant": "fp8"}, "must be one of fp16, bf16, got 'fp8'"),
        ({"image_size": 64}, "`text_encoder` need `tokenizer`"),
        ({"repo_id": "name"}, "`repo_id` must be `org/name`, got 'name'"),
        ({"repo_id": "org/a--b"}, r"-- or \.\..*'org/a--b'"),
        ({"out": "occupied"}, r"`.*occupied` must be a new or empty folder, but it is not empty"),
        ({"out": "occupied/file"}, "`.*occupied/file` is a file"),
        ({"out": "occupied/file/out"}, "file/out` must be a new.*`.*occupied/file` is a file"),
    ],
)
def test_wrong_arguments_are_errors(arguments, message, golden_dir, tmp_path):
    (tmp_path / "occupied").mkdir()
    (tmp_path / "occupied" / "file").touch()
    out = tmp_path / arguments.pop("out", "out")
    with pytest.raises(ValueError, match=message):
        convert(golden_dir / "svqvae_tiny.safetensors", out, **arguments)
    assert [file.name for file in tmp_path.rglob("*")] == ["occupied", "file"]

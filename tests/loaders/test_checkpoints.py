import argparse
import shutil
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from conftest import SHARED
from safetensors.torch import load_file, save_file

from svqvae_hf import SVQVAE
from svqvae_hf.loaders.checkpoint_checks import select_weights
from svqvae_hf.loaders.checkpoints import read_checkpoint
from svqvae_hf.models.quantizer import flatten_latents

UNIT, SIGNED = (0.0, 1.0), (-1.0, 1.0)
# file: format, encoder and decoder multipliers, residual blocks, z_channels, codebook, L2 norm, network range
GOLDEN = {
    "svqvae_tiny.safetensors": ("svqvae", (1, 2), (1, 2), 1, 8, (256, 8), True, UNIT),
    "llamagen_tiny.pt": ("llamagen", (1, 2), (1, 1), 1, 16, (128, 8), True, SIGNED),
    "flexvar_tiny.pth": ("llamagen", (1, 1, 2), (1, 1, 2), 1, 8, (200, 16), True, SIGNED),
    "lightning_tiny.ckpt": ("lightning", (1, 2), (1, 2), 1, 8, (256, 8), True, UNIT),
    "taming_tiny.ckpt": ("taming", (1, 2), (1, 2), 1, 16, (64, 12), False, SIGNED),
    "svqvae_small.safetensors": ("svqvae", (1, 2, 2, 4), (1, 2, 2, 4), 2, 32, (1024, 8), True, UNIT),
}
MULTI_SCALE = ["svqvae_tiny.safetensors", "flexvar_tiny.pth", "svqvae_small.safetensors"]


def locate(name: str, golden_dir: Path) -> Path:
    if (golden_dir / name).exists():
        return golden_dir / name
    if not SHARED.exists():
        pytest.skip(f"{name} is not part of the project, and there is no ../shared")
    return SHARED / "golden" / name


def outputs(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path.with_name(f"{path.stem}.outputs.safetensors"))


def unpickle(path: Path) -> dict:
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, weights_only=True)


def assert_same_ids(model: SVQVAE, latents: torch.Tensor, ids: torch.Tensor, expected: torch.Tensor) -> None:
    """Ids may differ only in ties: squared distances within 2e-5, which are cosines within 1e-5."""
    flat = flatten_latents(latents)
    flat = F.normalize(flat, dim=-1) if model.quantize.l2_norm else flat
    gaps, expected_gaps = (flat - model.quantize.embedding.lookup(each.flatten()) for each in (ids, expected))
    ties = (gaps.square().sum(-1) - expected_gaps.square().sum(-1)).abs() < 2e-5
    assert ids.shape == expected.shape
    assert torch.all((ids == expected).flatten() | ties)


@pytest.mark.parametrize("name", GOLDEN)
def test_format_and_config_are_read_from_the_file(name, golden_dir):
    checkpoint = read_checkpoint(locate(name, golden_dir), SVQVAE)
    format, encoder, decoder, num_res_blocks, z_channels, codebook, l2_norm, network_range = GOLDEN[name]
    assert checkpoint.format.name == format
    assert checkpoint.config == {
        **{"in_channels": 3, "out_channels": 3, "base_channels": 32, "norm_num_groups": 32, "z_channels": z_channels},
        **{"encoder_ch_mult": encoder, "decoder_ch_mult": decoder, "num_res_blocks": num_res_blocks},
        **{"codebook_size": codebook[0], "codebook_embed_dim": codebook[1], "codebook_l2_norm": l2_norm},
        "network_range": network_range,
    }


@pytest.mark.usefixtures("no_grad")
@pytest.mark.parametrize("name", GOLDEN)
def test_equals_the_original_code(name, golden_dir):
    path = locate(name, golden_dir)
    model = SVQVAE.from_single_file(path, pixel_range=GOLDEN[name][-1])
    expected = outputs(path)
    latents = model.encode(expected["x"]).latents
    torch.testing.assert_close(latents, expected["latents"], atol=1e-4, rtol=0)
    assert_same_ids(model, latents, model.encode_tokens(expected["x"]), expected["ids"])
    reconstruction = model.decode(expected["ids"]).sample
    torch.testing.assert_close(reconstruction, expected["reconstruction"], atol=1e-3, rtol=0)


@pytest.mark.usefixtures("no_grad")
@pytest.mark.parametrize("name", MULTI_SCALE)
def test_equals_the_original_code_at_smaller_scales(name, golden_dir):
    path = locate(name, golden_dir)
    model = SVQVAE.from_single_file(path)
    expected = outputs(path)
    low, high = GOLDEN[name][-1]
    sample = (expected["x"] - low) / (high - low)
    sizes = [key.removeprefix("ids_") for key in expected if key.startswith("ids_")]
    assert len(sizes) == 2
    for size in sizes:
        ids = expected[f"ids_{size}"]
        scale = ids.shape[-1] / expected["ids"].shape[-1]
        latents = torch.nn.functional.interpolate(expected["latents"], ids.shape[-2:], mode="area")
        assert_same_ids(model, latents, model.encode_tokens(sample, scale, "latents"), ids)
        reconstruction = model.decode(ids).sample * (high - low) + low
        torch.testing.assert_close(reconstruction, expected[f"reconstruction_{size}"], atol=1e-3, rtol=0)


def test_averaged_weights_only_with_use_ema(golden_dir, tmp_path):
    content = unpickle(golden_dir / "llamagen_tiny.pt")
    content["ema"]["quant_conv.bias"] = content["model"]["quant_conv.bias"] + 1  # one tensor in the file
    torch.save(content, tmp_path / "file.pt")
    for use_ema, part in [(False, "model"), (True, "ema")]:
        bias = read_checkpoint(tmp_path / "file.pt", SVQVAE, use_ema=use_ema).state_dict["quant_conv.bias"]
        assert torch.equal(bias, content[part]["quant_conv.bias"])
    with pytest.raises(ValueError, match="must hold averaged weights"):
        read_checkpoint(golden_dir / "flexvar_tiny.pth", SVQVAE, use_ema=True)


def test_weights_without_names_are_an_error():
    content = {None: [1, 2]}
    with pytest.raises(ValueError, match="`file.pth` must hold weights by their names, but holds a list"):
        select_weights(content, content[None], "file.pth")


@pytest.mark.parametrize("dtype", [{}, {"torch_dtype": torch.bfloat16}])
def test_dtype_casts_all_but_the_codebook(dtype, golden_dir):
    path = golden_dir / "taming_tiny.ckpt"
    model = SVQVAE.from_single_file(path, **dtype)
    dtypes = {key: tensor.dtype for key, tensor in model.state_dict().items()}
    assert dtypes.pop("quantize.embedding.weight") == torch.float32
    assert set(dtypes.values()) == {torch.bfloat16 if dtype else torch.float32}
    assert model.codebook_fingerprint() == SVQVAE.from_single_file(path).codebook_fingerprint()


def test_half_precision_is_read_as_float32(golden_dir, tmp_path):
    weights = {key: tensor.half() for key, tensor in load_file(golden_dir / "svqvae_tiny.safetensors").items()}
    save_file(weights, tmp_path / "half.safetensors")
    state_dict = read_checkpoint(tmp_path / "half.safetensors", SVQVAE).state_dict
    assert all(torch.equal(tensor, weights[key].float()) for key, tensor in state_dict.items())


# Faults of the file


def stand_in(monkeypatch, path: str) -> type:
    """Makes a class that pickles under the name of a package that is not installed."""
    module, _, name = path.rpartition(".")
    for dot in [index for index, letter in enumerate(path) if letter == "."]:
        monkeypatch.setitem(sys.modules, path[:dot], ModuleType(path[:dot]))
    cls = type(name, (), {"__module__": module})
    setattr(sys.modules[module], name, cls)
    return cls


def test_callbacks_of_lightning_are_read_and_not_imported(golden_dir, tmp_path, monkeypatch):
    content = unpickle(golden_dir / "taming_tiny.ckpt")
    content["callbacks"] = {}
    with monkeypatch.context() as patch:
        for path in ("model_checkpoint.ModelCheckpoint", "early_stopping.EarlyStopping"):
            callback = stand_in(patch, f"pytorch_lightning.callbacks.{path}")
            content["callbacks"][callback] = {"best_model_score": torch.ones(()), "callback": callback()}
        torch.save(content, tmp_path / "last.ckpt")
    (tmp_path / "pytorch_lightning").mkdir()
    (tmp_path / "pytorch_lightning" / "__init__.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    assert read_checkpoint(tmp_path / "last.ckpt", SVQVAE).format.name == "taming"
    assert not any(name.startswith("pytorch_lightning") for name in sys.modules)


def cut(source: str):
    def write(path: Path, golden_dir: Path) -> None:
        content = (golden_dir / source).read_bytes()
        path.write_bytes(content[: len(content) // 2])

    return write


def zip_archive(path: Path, _: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "no checkpoint")


@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        ("cut.safetensors", cut("svqvae_tiny.safetensors"), "must be a whole safetensors file"),
        ("pickle.safetensors", lambda path, _: torch.save({}, path), "must be a whole safetensors file"),
        ("text.ckpt", lambda path, _: path.write_text("a line\n" * 99), "must be a whole PyTorch checkpoint"),
        ("cut.ckpt", cut("taming_tiny.ckpt"), "must be a whole PyTorch checkpoint"),
        ("archive.pt", zip_archive, "must be a whole PyTorch checkpoint"),
        ("other.pt", lambda path, _: torch.save({"weights": {}}, path), r"a known format.*Found weights\."),
        ("other.safetensors", lambda path, _: save_file({"a": torch.ones(1)}, path), "`encoder.conv_blocks.0.*` in a"),
    ],
)
def test_files_that_are_not_checkpoints(name, write, message, golden_dir, tmp_path):
    write(tmp_path / name, golden_dir)
    with pytest.raises(ValueError, match=message) as error:
        read_checkpoint(tmp_path / name, SVQVAE)
    assert str(tmp_path / name) in str(error.value)
    assert "\n" not in str(error.value)


def broken(golden_dir: Path, tmp_path: Path, changes: dict[str, torch.Tensor | None]) -> Path:
    """Writes the golden svqvae file with weights replaced, added or, for None, removed."""
    weights = load_file(golden_dir / "svqvae_tiny.safetensors") | changes
    save_file({key: value for key, value in weights.items() if value is not None}, tmp_path / "broken.safetensors")
    return tmp_path / "broken.safetensors"


def test_weights_of_a_training_run_are_not_an_original_checkpoint(golden_dir, tmp_path):
    checkpoint = tmp_path / "checkpoint-100"
    checkpoint.mkdir()
    shutil.copy(golden_dir / "svqvae_tiny.safetensors", checkpoint / "model.safetensors")
    (checkpoint / "run_state.pt").touch()
    with pytest.raises(ValueError, match="belongs to a training run.*--max_steps 100`"):
        read_checkpoint(checkpoint / "model.safetensors", SVQVAE)


def test_all_faulty_keys_are_named_in_one_error(golden_dir, tmp_path):
    changes = {"quant_conv.weight": None, "encoder.mid.1.q.bias": None, "post_quant_conv.bias": torch.ones(5)}
    changes |= {"surplus.b": torch.ones(1), "discriminator.a": torch.ones(1), "quant_conv.bias": torch.ones(8).long()}
    changes |= {"encoder.norm_out.bias": torch.full((64,), torch.nan)}
    with pytest.raises(ValueError, match="must hold exactly") as error:
        read_checkpoint(broken(golden_dir, tmp_path, changes), SVQVAE)
    assert (
        "missing (2): encoder.mid.1.q.bias, quant_conv.weight; unexpected (2): discriminator.a, surplus.b; "
        "misshapen: post_quant_conv.bias (5,) instead of (8,); "
        "not float32, float16 or bfloat16: quant_conv.bias torch.int64; not finite: encoder.norm_out.bias."
    ) in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quantize.embedding.weight": torch.ones(256)}, r"misshapen: quantize.embedding.weight \(256,\)"),
        ({"encoder.conv_in.weight": torch.ones(33, 3, 3, 3)}, "channels 33 from .*`encoder_ch_mult` must be"),
        (
            {"encoder.conv_in.weight": torch.ones(16, 3, 3, 3)},
            "channels 16 from encoder.conv_in.weight.*divide 16.*pass it",
        ),
    ],
)
def test_faulty_weights_that_set_the_config(changes, message, golden_dir, tmp_path):
    with pytest.raises(ValueError, match=message):
        read_checkpoint(broken(golden_dir, tmp_path, changes), SVQVAE)


@pytest.mark.parametrize(
    ("make", "fault"),
    [
        (torch.Tensor.to_sparse, "not dense: quant_conv.bias"),
        (lambda _: torch.ones(1).expand(16), "not dense: quant_conv.bias"),
        (torch.Tensor.double, "not float32, float16 or bfloat16: quant_conv.bias torch.float64"),
    ],
    ids=["sparse", "expanded", "float64"],
)
def test_tensors_of_other_kinds_are_refused(make, fault, golden_dir, tmp_path):
    content = unpickle(golden_dir / "flexvar_tiny.pth")
    content["model"]["quant_conv.bias"] = make(content["model"]["quant_conv.bias"])
    torch.save(content, tmp_path / "file.pth")
    with pytest.raises(ValueError, match=f"but has faults: {fault}"):
        read_checkpoint(tmp_path / "file.pth", SVQVAE)


@pytest.mark.parametrize("level", ["encoder.down.0.attn.", "decoder.up.0.attn."])
def test_attention_at_other_levels_is_refused(level, golden_dir, tmp_path):
    content = unpickle(golden_dir / "taming_tiny.ckpt")
    content["state_dict"][f"{level}0.q.weight"] = torch.ones(32, 32, 1, 1)
    torch.save(content, tmp_path / "file.ckpt")
    with pytest.raises(ValueError, match=f"has faults: unexpected: {level}0.q.weight"):
        read_checkpoint(tmp_path / "file.ckpt", SVQVAE)

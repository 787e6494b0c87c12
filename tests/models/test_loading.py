import json

import pytest
import torch
from conftest import ROOT, make_tiny
from diffusers import AutoModel, DiffusionPipeline, VQModel
from generators import make_llamagen, make_next_scale
from safetensors.torch import load_file, save_file

from svqvae_hf import DEFAULT_GENERATOR, DEFAULT_MODEL, SVQVAE, NextScaleTransformer, SVQVAEImageProcessor

pytestmark = pytest.mark.usefixtures("few_windows")
WEIGHTS = "diffusion_pytorch_model.safetensors"


def test_config_round_trip(tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path)
    loaded = SVQVAE.from_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["block_out_channels"] == [8, 16, 16]
    ours = {key: value for key, value in loaded.config.items() if not key.startswith("_")}
    assert ours == {key: stored[key] for key in ours}


@pytest.mark.parametrize("shards", [None, "40KB"])
def test_saved_and_loaded_weights_are_bit_equal(tiny_model, tmp_path, shards):
    tiny_model.save_pretrained(tmp_path, **({"max_shard_size": shards} if shards else {}))
    assert len(list(tmp_path.glob("*.safetensors"))) == 1 or shards
    loaded = SVQVAE.from_pretrained(tmp_path)
    assert loaded.state_dict().keys() == tiny_model.state_dict().keys()
    assert all(torch.equal(loaded.state_dict()[key], weight) for key, weight in tiny_model.state_dict().items())


@pytest.mark.parametrize("sizes", [("20KB", "10GB"), ("10GB", "20KB"), ("20KB", "60KB")])
@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("kind", ["svqvae", "next_scale", "llamagen"])
def test_a_model_saved_over_another_one_in_other_shards_is_loaded(tmp_path, kind, variant, sizes):
    models = {
        "svqvae": make_tiny,
        "next_scale": lambda: make_next_scale().transformer,
        "llamagen": lambda: make_llamagen("c2i").language_model,
    }
    first, second = (models[kind]() for _ in range(2))
    for parameter in second.parameters():
        parameter.data.add_(1.0)
    for model, size in zip((first, second), sizes, strict=True):
        model.save_pretrained(tmp_path, max_shard_size=size, variant=variant)
    loaded = type(second).from_pretrained(tmp_path, variant=variant)
    assert all(torch.equal(loaded.state_dict()[key], weight) for key, weight in second.state_dict().items())


def test_loading_in_half_precision_keeps_the_codebook(tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path)
    half = SVQVAE.from_pretrained(tmp_path, torch_dtype=torch.float16)
    assert half.dtype == torch.float16
    assert half.codebook_fingerprint() == tiny_model.codebook_fingerprint()
    half.save_pretrained(tmp_path, variant="fp16")
    assert (tmp_path / "diffusion_pytorch_model.fp16.safetensors").stat().st_size < (tmp_path / WEIGHTS).stat().st_size
    assert SVQVAE.from_pretrained(tmp_path, variant="fp16").codebook_fingerprint() == half.codebook_fingerprint()


def test_loading_is_strict(tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / WEIGHTS)
    del weights["encoder.conv_in.bias"], weights["decoder.conv_in.bias"]
    weights["surplus"] = torch.zeros(1)
    save_file(weights, tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match="missing: decoder.conv_in.bias, encoder.conv_in.bias; unexpected: surplus"):
        SVQVAE.from_pretrained(tmp_path)


def test_a_file_is_refused():
    with pytest.raises(ValueError, match=r"svqvae_tiny.safetensors`\. Use `from_single_file`\."):
        SVQVAE.from_pretrained(ROOT / "tests" / "golden" / "svqvae_tiny.safetensors")


def test_mismatched_shapes_are_refused(tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"expected shape torch.Size\(\[128, 8\]\), but got torch.Size\(\[64, 8\]\)"):
        SVQVAE.from_pretrained(tmp_path, codebook_size=128)
    with pytest.raises(ValueError, match=r"mismatched: \('quantize.embedding.weight', "):
        SVQVAE.from_pretrained(tmp_path, codebook_size=128, ignore_mismatched_sizes=True, low_cpu_mem_usage=False)


def test_unknown_arguments_are_refused_and_known_ones_accepted(tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path)
    with pytest.raises(TypeError, match="Unknown arguments: pixel_rang. Expected config values of SVQVAE"):
        SVQVAE.from_pretrained(tmp_path, pixel_rang=(-1, 1))
    known = {"torch_dtype": torch.float16, "low_cpu_mem_usage": False, "local_files_only": True, "revision": "main"}
    loaded = SVQVAE.from_pretrained(tmp_path, pixel_range=(-1, 1), **known)
    assert loaded.config["pixel_range"] == (-1, 1)
    assert loaded.quantize.embedding.weight.dtype == torch.float32


def test_bundled_model_loads_by_its_path():
    assert SVQVAE.from_pretrained(DEFAULT_MODEL).f == 8
    assert SVQVAEImageProcessor.from_pretrained(DEFAULT_MODEL).pixel_range == (0, 1)


def test_processor_loads_from_the_folder_of_a_model(tmp_path):
    make_tiny(pixel_range=(-1.0, 1.0)).save_pretrained(tmp_path)
    assert SVQVAEImageProcessor.from_pretrained(tmp_path).pixel_range == (-1, 1)


def test_folder_of_another_class_is_refused(tmp_path):
    VQModel(block_out_channels=(32,)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="must be of class SVQVAE, got VQModel. Load it with that class"):
        SVQVAE.from_pretrained(tmp_path)


def test_usage_log_of_original_files_is_ignored(tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path)
    save_file(load_file(tmp_path / WEIGHTS) | {"quantize.codebook_used": torch.zeros(65536)}, tmp_path / WEIGHTS)
    loaded = SVQVAE.from_pretrained(tmp_path)
    assert "quantize.codebook_used" not in loaded.state_dict()


def test_what_diffusers_would_do_otherwise_in_silence_raises(saved_model, tmp_path):
    with pytest.raises(OSError, match="there is no folder .*vae`. Correct `subfolder`"):
        SVQVAE.from_pretrained(saved_model, subfolder="vae")
    with pytest.raises(TypeError, match="`torch_dtype` must be a torch.dtype such as torch.float16, got 'float16'"):
        SVQVAE.from_pretrained(saved_model, torch_dtype="float16")
    (tmp_path / "photo.jpg").touch()
    with pytest.raises(ValueError, match="photo.jpg` must be a folder, but is a file"):
        SVQVAE.from_pretrained(saved_model).save_pretrained(tmp_path / "photo.jpg")


@pytest.mark.parametrize("content", ["[]", "null", '"org/model"', "3"])
def test_a_config_that_is_no_object_is_named(tiny_model, tmp_path, content):
    tiny_model.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=f"cannot be loaded: `{tmp_path}/config.json` must hold a JSON object, but"):
        SVQVAE.from_pretrained(tmp_path)


def test_a_model_in_a_subfolder_is_pointed_at(tmp_path):
    advice = r"in a folder of its own. Load it with `from_pretrained\(..., subfolder='vqvae'\)`"
    with pytest.raises(OSError, match=advice):
        SVQVAE.from_pretrained(DEFAULT_GENERATOR)
    make_next_scale().save_pretrained(tmp_path)
    with pytest.raises(OSError, match=advice):
        SVQVAE.from_pretrained(tmp_path)
    with pytest.raises(OSError, match="subfolder='transformer'"):
        NextScaleTransformer.from_pretrained(tmp_path)
    assert SVQVAE.from_pretrained(tmp_path, subfolder="vqvae").f == 4


@pytest.mark.parametrize("size", [0, 100])
def test_cut_weights_are_named(tiny_model, tmp_path, size):
    tiny_model.save_pretrained(tmp_path)
    path = tmp_path / WEIGHTS
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(OSError, match=f"{path}"):
        SVQVAE.from_pretrained(tmp_path)


def test_what_the_tools_of_diffusers_load_after_the_import(tmp_path):
    """As `docs/questions.md` says."""
    pipeline = make_next_scale()
    pipeline.save_pretrained(tmp_path)
    assert isinstance(AutoModel.from_pretrained(str(tmp_path), subfolder="vqvae"), SVQVAE)
    assert isinstance(AutoModel.from_pretrained(str(tmp_path), subfolder="transformer"), NextScaleTransformer)
    with pytest.raises((ValueError, AttributeError), match="diffusers`? has no (class|attribute) `?SVQVAE"):
        AutoModel.from_pretrained(DEFAULT_MODEL)
    with pytest.raises(AttributeError, match="diffusers has no attribute SVQVAENextScalePipeline"):
        DiffusionPipeline.from_pretrained(tmp_path)
    assert isinstance(type(pipeline).from_pretrained(tmp_path), type(pipeline))

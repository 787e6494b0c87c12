"""Damaged repositories of LlamaGen's models, and saving; `test_loading.py` has damaged tokenizers."""

import json

import pytest
from conftest import make_tiny
from generators import make_autoregressive

from svqvae_hf import LlamaGenForCausalLM


@pytest.fixture
def saved(tmp_path):
    make_autoregressive().language_model.save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("size", [0, 5, 1000])
def test_cut_weights_are_an_error_of_one_line(saved, size):
    path = saved / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match=f"`{path}` must be a safetensors file, but") as error:
        LlamaGenForCausalLM.from_pretrained(saved)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hidden_size": 64}, "must be exactly what its config asks for, but are not: mismatched: "),
        ({"num_hidden_layers": 3}, "are not: missing: model.layers.2.input_layernorm.weight"),
        ({"codebook_size": "x"}, "cannot be loaded, .* 'codebook_size'"),
        ({"num_classes": None}, "cannot be loaded, .* 'num_classes'"),
        ({"hidden_act": "unknown"}, "cannot be loaded, .*unknown"),
        ({"intermediate_size": -3}, "cannot be loaded, .*-3"),
    ],
)
def test_a_config_that_does_not_fit_is_an_error_of_one_line(saved, values, message):
    path = saved / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    with pytest.raises(ValueError, match=message) as error:
        LlamaGenForCausalLM.from_pretrained(saved)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", ["[]", "null", "3"])
def test_a_config_that_is_no_object_is_an_error_of_one_line(saved, content):
    (saved / "config.json").write_text(content)
    with pytest.raises(ValueError, match=f"`{saved}/config.json` must hold a JSON object"):
        LlamaGenForCausalLM.from_pretrained(saved)


def test_pickles_replace_earlier_safetensors_if_arguments_come_by_position(tmp_path):
    model = make_tiny()
    model.save_pretrained(tmp_path)
    is_main_process, save_function, safe_serialization = True, None, False
    model.save_pretrained(tmp_path, is_main_process, save_function, safe_serialization)
    names = [path.name for path in tmp_path.glob("diffusion_pytorch_model*")]
    assert names == ["diffusion_pytorch_model.bin"]


def test_saved_weights_have_the_permissions_of_their_folder(saved, tmp_path):
    make_tiny().save_pretrained(tmp_path / "tokenizer")
    for folder in (saved, tmp_path / "tokenizer"):
        (weights,) = folder.glob("*.safetensors")
        assert weights.stat().st_mode & 0o666 == folder.stat().st_mode & 0o666

"""Saved and uploaded models and pipelines: arguments and files as diffusers', and cards."""

import inspect

import pytest
import torch
from conftest import make_tiny
from diffusers import DiffusionPipeline, DiTPipeline, ModelMixin
from generators import make_autoregressive, make_llamagen
from huggingface_hub import ModelCard
from pipeline_parts import make_pipeline as make_diffusion
from pipeline_parts import text_components

from svqvae_hf import SVQVAE, NextScaleTransformer, SVQVAEAutoregressivePipeline, SVQVAENextScalePipeline

CLASSES = dict.fromkeys((SVQVAE, NextScaleTransformer), ModelMixin)
CLASSES |= dict.fromkeys((SVQVAEAutoregressivePipeline, SVQVAENextScalePipeline), DiffusionPipeline)
MAKERS = {
    "model": (make_tiny, "."),
    "pipeline": (make_autoregressive, "vqvae"),
    "pipeline of diffusers": (lambda: make_diffusion(DiTPipeline), "vae"),
}


def named_parameters(method):
    parameters = inspect.signature(method).parameters.values()
    return [(each.name, each.kind, each.default) for each in parameters if each.kind is not each.VAR_KEYWORD]


@pytest.mark.parametrize("method", ["save_pretrained", "push_to_hub"])
@pytest.mark.parametrize(("ours", "theirs"), CLASSES.items(), ids=lambda cls: cls.__name__)
def test_arguments_are_those_of_diffusers(ours, theirs, method):
    """diffusers passes `variant` and others on only to a `save_pretrained` whose signature names them."""
    found = [each for each in named_parameters(getattr(ours, method)) if each[0] != "standalone"]
    assert found == named_parameters(getattr(theirs, method))


@pytest.mark.parametrize(("make", "folder"), MAKERS.values(), ids=MAKERS)
def test_files_of_each_way_to_save(make, folder, tmp_path):
    saved, folder = make(), tmp_path / folder
    saved.save_pretrained(tmp_path)
    plain = folder / "diffusion_pytorch_model.safetensors"
    before = plain.read_bytes()
    saved.to(torch.float16).save_pretrained(tmp_path, variant="fp16")
    assert plain.read_bytes() == before
    half = folder / "diffusion_pytorch_model.fp16.safetensors"
    assert half.stat().st_size < plain.stat().st_size

    saved.save_pretrained(tmp_path / "pickles", safe_serialization=False)
    pickles = tmp_path / "pickles" / folder.relative_to(tmp_path)
    assert [file.suffix for file in pickles.glob("diffusion*")] == [".bin"]
    saved.save_pretrained(tmp_path, safe_serialization=False)
    assert not plain.exists(), "it would be loaded in place of the pickle"
    assert half.exists()
    saved.save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    assert len(list((tmp_path / "shards").rglob("diffusion*-of-*.safetensors"))) > 1
    saved.save_pretrained(tmp_path / "shards", safe_serialization=False)
    replaced = tmp_path / "shards" / folder.relative_to(tmp_path)
    assert not list(replaced.glob("diffusion*.safetensors*"))


def test_a_variant_of_one_component_loads(tmp_path):
    pipeline = make_autoregressive()
    pipeline.save_pretrained(tmp_path)
    pipeline.vqvae.save_pretrained(tmp_path / "vqvae", variant="fp16")
    loaded = SVQVAEAutoregressivePipeline.from_pretrained(tmp_path, variant="fp16")
    assert loaded.vqvae.codebook_fingerprint() == pipeline.vqvae.codebook_fingerprint()


def test_card_of_a_saved_pipeline_shows_how_to_load_it(tmp_path, monkeypatch):
    make_autoregressive().save_pretrained(tmp_path / "dreams")
    card = (tmp_path / "dreams" / "README.md").read_text()
    assert "only\nafter `import svqvae_hf`" in card
    assert ModelCard(card).data.license == "unknown"
    (code,) = ModelCard(card).text.split("```python\n")[1:]
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(code.partition("```")[0], names)
    assert names["image"].size == (16, 16)


def test_card_of_a_pipeline_for_captions(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number, text in enumerate((text_components(), {})):
        make_llamagen("t2i", **text).save_pretrained(tmp_path / str(number))
        card = ModelCard.load(tmp_path / str(number) / "README.md")
        assert ("prompt=" in card.text, "prompt_embeds=" in card.text) == (bool(text), not text)
        assert card.data.pipeline_tag == ("text-to-image" if text else "unconditional-image-generation")
        names = {}
        exec(card.text.split("```python\n")[1].partition("```")[0], names)
        assert names["image"].size == (16, 16)

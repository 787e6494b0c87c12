"""Saved and uploaded models and pipelines: arguments and files as diffusers', and cards."""

import inspect

import pytest
import torch
from conftest import make_tiny
from diffusers import DiffusionPipeline, LDMPipeline, ModelMixin
from huggingface_hub import ModelCard, constants
from pipeline_parts import make_pipeline as make_diffusion
from pipeline_parts import text_components
from test_pipeline_autoregressive import make_pipeline
from test_pipeline_llamagen import make_pipeline as make_captioned

from svqvae_hf import SVQVAE, NextScaleTransformer, SVQVAEAutoregressivePipeline, SVQVAENextScalePipeline

CLASSES = {
    SVQVAE: ModelMixin,
    NextScaleTransformer: ModelMixin,
    SVQVAEAutoregressivePipeline: DiffusionPipeline,
    SVQVAENextScalePipeline: DiffusionPipeline,
}
MAKERS = {
    "model": (make_tiny, "."),
    "pipeline": (make_pipeline, "vqvae"),
    "pipeline of diffusers": (lambda: make_diffusion(LDMPipeline), "vqvae"),
}


def named_parameters(method):
    parameters = inspect.signature(method).parameters.values()
    return [(each.name, each.kind, each.default) for each in parameters if each.kind is not each.VAR_KEYWORD]


@pytest.mark.parametrize("method", ["save_pretrained", "push_to_hub"])
@pytest.mark.parametrize(("ours", "theirs"), CLASSES.items(), ids=lambda cls: cls.__name__)
def test_arguments_are_those_of_diffusers(ours, theirs, method):
    """diffusers passes `variant` and others on only to a `save_pretrained` whose signature names them."""
    assert named_parameters(getattr(ours, method)) == named_parameters(getattr(theirs, method))


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
    assert [file.suffix for file in (tmp_path / "pickles" / folder.relative_to(tmp_path)).glob("diffusion*")] == [
        ".bin"
    ]
    saved.save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    assert len(list((tmp_path / "shards").rglob("diffusion*-of-*.safetensors"))) > 1


def test_a_variant_of_one_component_loads(tmp_path):
    pipeline = make_pipeline()
    pipeline.save_pretrained(tmp_path)
    pipeline.vqvae.save_pretrained(tmp_path / "vqvae", variant="fp16")
    loaded = SVQVAEAutoregressivePipeline.from_pretrained(tmp_path, variant="fp16")
    assert loaded.vqvae.codebook_fingerprint() == pipeline.vqvae.codebook_fingerprint()


def test_card_of_a_saved_pipeline_shows_how_to_load_it(tmp_path, monkeypatch):
    make_pipeline().save_pretrained(tmp_path / "dreams")
    card = (tmp_path / "dreams" / "README.md").read_text()
    assert "only after\n`import svqvae_hf`" in card
    assert ModelCard(card).data.license == "unknown"
    (code,) = ModelCard(card).text.split("```python\n")[1:]
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(code.partition("```")[0], names)
    assert names["image"].size == (16, 32)


def test_card_of_a_pipeline_for_captions(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number, text in enumerate((text_components(), {})):
        make_captioned("t2i", **text).save_pretrained(tmp_path / str(number))
        card = ModelCard.load(tmp_path / str(number) / "README.md")
        assert ("prompt=" in card.text, "prompt_embeds=" in card.text) == (bool(text), not text)
        assert card.data.pipeline_tag == ("text-to-image" if text else "unconditional-image-generation")
        names = {}
        exec(card.text.split("```python\n")[1].partition("```")[0], names)
        assert names["image"].size == (16, 16)


def test_card_that_is_there_stays(tmp_path):
    (tmp_path / "README.md").write_text("my own")
    make_pipeline().save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "my own"


def test_upload_fails_at_once_without_a_network(monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    pipeline = make_pipeline()
    monkeypatch.setattr(pipeline, "describe", lambda: pytest.fail("wrote the card first"))
    with pytest.raises(OSError, match="Could not create `org/new` on the Hub: it cannot be reached"):
        pipeline.push_to_hub("org/new")

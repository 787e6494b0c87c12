"""Cards of saved pipelines. tests/test_hub_round_trips.py uploads one."""

import pytest
from huggingface_hub import ModelCard, constants
from pipeline_parts import text_components
from test_pipeline_autoregressive import make_pipeline
from test_pipeline_llamagen import make_pipeline as make_captioned

from svqvae_hf import SVQVAEAutoregressivePipeline


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


def test_saving_does_not_upload(tmp_path):
    with pytest.raises(ValueError, match="`save_pretrained` cannot upload. Call the pipeline's `push_to_hub`"):
        make_pipeline().save_pretrained(tmp_path / "dreams", push_to_hub=True)
    assert not (tmp_path / "dreams").exists()


def test_a_variant_of_one_component_loads(tmp_path):
    pipeline = make_pipeline()
    pipeline.save_pretrained(tmp_path)
    pipeline.vqvae.save_pretrained(tmp_path / "vqvae", variant="fp16")
    loaded = SVQVAEAutoregressivePipeline.from_pretrained(tmp_path, variant="fp16")
    assert loaded.vqvae.codebook_fingerprint() == pipeline.vqvae.codebook_fingerprint()


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

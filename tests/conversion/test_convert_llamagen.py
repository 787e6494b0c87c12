"""Conversion of LlamaGen's language models to pipeline repositories."""

import hashlib

import pytest
import torch
from cli_runner import names, svqvae
from conftest import ROOT, make_tiny
from huggingface_hub import ModelCard
from pipeline_parts import text_components
from safetensors.torch import load_file

from svqvae_hf import LlamaGenForCausalLM, SVQVAEAutoregressivePipeline
from svqvae_hf.conversion.convert import convert

GOLDEN = ROOT / "tests" / "golden"
CLASSES, CAPTIONS = (GOLDEN / f"llamagen_gpt_{kind}_tiny.pt" for kind in ("c2i", "t2i"))
SIZES = {"image_size": 16, "num_attention_heads": 4}


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Folder of a tokenizer with f = 4, `tokenizer`, and of a text encoder, `t5`."""
    folder = tmp_path_factory.mktemp("parts")
    make_tiny(codebook_size=256).save_pretrained(folder / "tokenizer")
    text = text_components()
    text["text_encoder"].save_pretrained(folder / "t5")
    text["tokenizer"].save_pretrained(folder / "t5")
    return folder


def assert_no_path_is_told(folder, *paths):
    for file in folder.rglob("*"):
        if file.suffix in (".md", ".json"):
            assert not [path for path in paths if str(path) in file.read_text()], file


@pytest.fixture(scope="module")
def converted(parts):
    """Repository of a model of classes in two precisions, made by the command."""
    options = ("--image-size", 16, "--num-heads", 4, "--variant", "bf16", "--license", "mit")
    options += ("--tokenizer", parts / "tokenizer", "--output", parts / "new" / "out")
    assert svqvae("convert", CLASSES, *options) == 0
    return parts / "new" / "out"


def test_a_model_of_classes_is_a_whole_repository(parts, converted):
    assert names(converted.parent) == ["out"]
    made = {str(file.relative_to(converted)) for file in converted.rglob("*")}
    assert {"README.md", "model_index.json", "language_model/config.json", "vqvae/config.json"} <= made
    pipeline = SVQVAEAutoregressivePipeline.from_pretrained(converted)
    assert pipeline.grid == (4, 4)
    fingerprint = pipeline.vqvae.codebook_fingerprint()
    assert pipeline.language_model.config.codebook_fingerprint == fingerprint
    original = LlamaGenForCausalLM.from_single_file(CLASSES, grid_size=4, num_attention_heads=4).state_dict()
    written = load_file(converted / "language_model" / "model.safetensors")
    assert written.keys() == original.keys()
    assert all(torch.equal(tensor, original[key]) for key, tensor in written.items())
    card = ModelCard.load(converted / "README.md")
    assert card.data.license == "mit"
    assert hashlib.sha256(CLASSES.read_bytes()).hexdigest() in card.text
    assert fingerprint in card.text
    assert_no_path_is_told(converted, parts, ROOT)
    expected = load_file(GOLDEN / "llamagen_gpt_c2i_tiny.outputs.safetensors")
    call = {"temperature": 0, "output_type": "latent", "guidance_scale": 2}
    ids = pipeline(expected["class_labels"].tolist(), **call).images.flatten(1)
    assert torch.equal(ids, expected["greedy_cfg2.ids"])


def test_half_precision_variant_keeps_the_codebook(parts, converted):
    full = SVQVAEAutoregressivePipeline.from_pretrained(converted)
    half = SVQVAEAutoregressivePipeline.from_pretrained(converted, variant="bf16", dtype=torch.bfloat16)
    assert half.vqvae.codebook_fingerprint() == full.vqvae.codebook_fingerprint()
    weights = "diffusion_pytorch_model.safetensors"
    assert (converted / "vqvae" / weights).read_bytes() == (parts / "tokenizer" / weights).read_bytes()
    assert torch.equal(half.language_model.lm_head.weight, full.language_model.lm_head.weight.bfloat16())


def test_a_model_of_captions_holds_its_text_encoder(parts, tmp_path):
    convert(CAPTIONS, tmp_path / "out", parts / "tokenizer", text_encoder=str(parts / "t5"), **SIZES)
    pipeline = SVQVAEAutoregressivePipeline.from_pretrained(tmp_path / "out")
    pipeline.set_progress_bar_config(disable=True)
    encoder = load_file(tmp_path / "out" / "text_encoder" / "model.safetensors")
    assert {tensor.dtype for tensor in encoder.values()} == {torch.bfloat16}
    assert pipeline(prompt="a cat", output_type="pt").images.shape == (1, 3, 16, 16)
    expected = load_file(GOLDEN / "llamagen_gpt_t2i_tiny.outputs.safetensors")
    captions = {"prompt_embeds": expected["caption_embeddings"], "prompt_attention_mask": expected["caption_mask"]}
    ids = pipeline(**captions, guidance_scale=2, temperature=0, output_type="latent").images
    assert torch.equal(ids.flatten(1), expected["greedy_cfg2.ids"])
    assert ModelCard.load(tmp_path / "out" / "README.md").data.pipeline_tag == "text-to-image"
    assert_no_path_is_told(tmp_path / "out", tmp_path, parts, ROOT)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image_size": 18}, "must be a positive multiple of f = 4, got 18"),
        ({"text_encoder": "t5"}, "has classes instead of captions"),
        ({"source": CAPTIONS}, "does not name the encoder of its captions. Pass `text_encoder`"),
        ({"source": GOLDEN / "llamagen_tiny.pt"}, "must be a checkpoint of a language model of LlamaGen"),
        ({"tokenizer": GOLDEN / "llamagen_tiny.pt"}, "must have the 128 codes of `vqvae`, but has 256"),
    ],
)
def test_wrong_arguments_leave_nothing(parts, tmp_path, arguments, message):
    given = {"source": CLASSES, "out": tmp_path / "out", "tokenizer": parts / "tokenizer", **SIZES} | arguments
    with pytest.raises(ValueError, match=message):
        convert(**given)
    assert not list(tmp_path.iterdir())

"""The autoregressive pipeline with small random models."""

import math
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import make_tiny
from diffusers.image_processor import VaeImageProcessor
from generators import make_autoregressive
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from svqvae_hf import SVQVAEAutoregressivePipeline
from svqvae_hf.pipelines.labels import encode_labels
from svqvae_hf.pipelines.modular_blocks import DecodeStep


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def sample_ids(pipeline, *args, **call):
    return pipeline(*args, **call, output_type="latent").images


def check_greedy(pipeline, ids, labels, guidance_scale=1.0, given=0):
    """Checks that each id below the given rows is the most likely one, by one forward pass without a cache."""
    model, codes = pipeline.language_model, pipeline.language_model.config.codebook_size
    sequences = [torch.cat([codes + row[:, None], ids.flatten(1)], 1) for row in (labels, torch.full_like(labels, 3))]
    logits, free = (model(tokens, use_cache=False).logits for tokens in sequences)
    best = (free + guidance_scale * (logits - free))[:, :-1, :codes].argmax(-1)
    start = given * ids.shape[2]
    assert torch.equal(ids.flatten(1)[:, start:], best[:, start:])


@pytest.fixture(scope="module")
def pipeline():
    """A pipeline to call, not to change."""
    return make_autoregressive()


@pytest.fixture
def own_pipeline():
    """A pipeline that a test may change."""
    return make_autoregressive()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "pipeline"
    make_autoregressive().save_pretrained(folder)
    return folder


# Sampling


def test_bfloat16():
    pipeline = make_autoregressive().to(torch.bfloat16)
    images = pipeline([0, 1], guidance_scale=2.0, output_type="pt").images
    assert images.isfinite().all()


@pytest.mark.usefixtures("no_grad")
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_greedy_ids_are_the_most_likely_ones(pipeline, guidance_scale):
    ids = sample_ids(pipeline, [0, 1, 2], temperature=0, guidance_scale=guidance_scale)
    check_greedy(pipeline, ids, torch.arange(3), guidance_scale)
    assert len(ids.unique()) > 8


# Images


@pytest.mark.usefixtures("no_grad")
def test_output_types(pipeline):
    call = {"class_labels": [0, 1], "generator": seeded()}
    ids = pipeline(**call, output_type="latent").images
    sample = pipeline.vqvae.decode_tokens(ids)
    torch.testing.assert_close(pipeline(**call | {"generator": seeded()}, output_type="pt").images, sample)
    arrays = pipeline(**call | {"generator": seeded()}, output_type="np").images
    np.testing.assert_allclose(arrays, sample.permute(0, 2, 3, 1), atol=1e-6)
    (pictures,) = pipeline(**call | {"generator": seeded()}, return_dict=False)
    assert all(np.array_equal(image, np.rint(array * 255)) for image, array in zip(pictures, arrays, strict=True))


def test_the_callback_sees_each_row(pipeline):
    seen = []

    def look(pipe, row, grid, tensors):
        seen.append((row, grid, tensors["ids"]))

    ids = pipeline([0, 1], generator=seeded(), output_type="latent", callback_on_step_end=look).images
    assert [(row, grid) for row, grid, _ in seen] == [(row, (4, 4)) for row in range(4)]
    assert all(torch.equal(rows, ids[:, :count]) for count, (_, _, rows) in enumerate(seen, start=1))


@pytest.mark.usefixtures("no_grad")
def test_ids_that_the_callback_returns_replace_the_sampled_ones(pipeline):
    fixed = torch.arange(8).reshape(2, 1, 4)

    def replace_a_row(pipe, row, grid, tensors):
        return {"ids": torch.cat([tensors["ids"][:, :2], fixed], dim=1)} if row == 2 else None

    call = {"class_labels": [0, 1], "temperature": 0, "guidance_scale": 2.0}
    plain, replaced = sample_ids(pipeline, **call), sample_ids(pipeline, **call, callback_on_step_end=replace_a_row)
    assert torch.equal(replaced[:, :2], plain[:, :2])
    assert torch.equal(replaced[:, 2:3], fixed)
    check_greedy(pipeline, replaced, torch.tensor([0, 1]), guidance_scale=2.0, given=3)


def test_the_callback_ends_the_sampling(pipeline):
    def end_after_three_rows(pipe, row, grid, tensors):
        pipe._interrupt = row == 2

    call = {"class_labels": [0, 1], "temperature": 0}
    ids = sample_ids(pipeline, **call)
    ended = sample_ids(pipeline, **call, callback_on_step_end=end_after_three_rows)
    assert pipeline.interrupt
    assert torch.equal(ended[:, :3], ids[:, :3])
    assert not ended[:, 3:].any()
    assert torch.equal(ids, sample_ids(pipeline, **call))  # the next call runs to its end


# Saved pipelines


def test_weights_are_read_strictly_and_from_safetensors_only(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "broken")
    file = tmp_path / "broken" / "language_model" / "model.safetensors"
    weights = load_file(file)
    weights["other"] = weights.pop("model.norm.weight")
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(ValueError, match=re.escape("missing: model.norm.weight; unexpected: other. Restore")):
        SVQVAEAutoregressivePipeline.from_pretrained(tmp_path / "broken")
    file.unlink()
    torch.save(weights, file.with_name("pytorch_model.bin"))
    with pytest.raises(OSError, match="safetensors"):
        SVQVAEAutoregressivePipeline.from_pretrained(tmp_path / "broken")
    shutil.copytree(saved, tmp_path / "pickled")
    file = tmp_path / "pickled" / "vqvae" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(file), file.with_suffix(".bin"))
    file.unlink()
    with pytest.raises(OSError, match="safetensors"):
        SVQVAEAutoregressivePipeline.from_pretrained(tmp_path / "pickled", use_safetensors=False)


def test_a_vqvae_with_another_codebook_raises(saved):
    other = make_tiny()
    with torch.no_grad():
        other.decoder.conv_out.weight.mul_(2)
    loaded = SVQVAEAutoregressivePipeline.from_pretrained(saved, vqvae=other)
    assert loaded.vqvae is other  # its ids are the same
    with torch.no_grad():
        other.quantize.embedding.weight[3] *= -1
    with pytest.raises(ValueError, match="must have the codebook whose ids .* but has one with .* Use the SVQVAE"):
        SVQVAEAutoregressivePipeline.from_pretrained(saved, vqvae=other)


@torch.no_grad()
def test_blocks_compare_the_codebook_with_the_one_of_training(pipeline):
    config = {"codebook_fingerprint": pipeline.config["codebook_fingerprint"]}
    values = SimpleNamespace(ids=torch.zeros(1, 4, 4, dtype=torch.int64), output_type="np")
    processor = VaeImageProcessor(do_normalize=False)
    components = SimpleNamespace(vqvae=pipeline.vqvae, config=config, image_processor=processor)
    DecodeStep().run(components, values)
    assert values.images.shape == (1, 16, 16, 3)
    components.vqvae = make_tiny()
    components.vqvae.quantize.embedding.weight.data.neg_()
    with pytest.raises(ValueError, match="must have the codebook whose ids .* but has one with .* Use the SVQVAE"):
        DecodeStep().run(components, values)


# Wrong input


LABELS_AND_SIZES = [
    ({"class_labels": 3}, "`class_labels` must be in [0, 3), got 3"),
    ({"class_labels": []}, "`class_labels` must be in [0, 3), got []"),
    ({"num_images_per_prompt": 0}, "`num_images_per_prompt` must be at least 1, got 0"),
    ({"output_type": "jpeg"}, "`output_type` must be one of pil, np, pt, latent, got 'jpeg'"),
    ({"generator": [seeded()] * 2}, "`generator` must have one generator per image, 1, got 2"),
]
SAMPLING = [
    ({"guidance_scale": 2.0}, "`guidance_scale` = 2.0 needs `class_labels`"),
    ({"guidance_scale": math.nan, "class_labels": 0}, "`guidance_scale` must be in [-1e+06, 1e+06], got nan"),
    ({"temperature": -1.0}, "`temperature` must be 0 or in [1e-06, 1e+06], got -1.0"),
    ({"top_k": -1}, "`top_k` must be at least 0, got -1"),
    ({"top_p": 0.0}, "`top_p` must be above 0 and at most 1, got 0.0"),
]


@pytest.mark.parametrize("calls", [LABELS_AND_SIZES, SAMPLING], ids=["labels and sizes", "sampling"])
def test_values_out_of_range_raise(pipeline, calls):
    for call, message in calls:
        with pytest.raises(ValueError, match=re.escape(message)):
            pipeline(**call)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"class_labels": [None]}, "`class_labels` must be numbers or names of classes, got None"),
        ({"class_labels": [True]}, "`class_labels` must be numbers or names of classes, got True"),
        ({"class_labels": [0.5]}, "`class_labels` must be tensors of integers, got torch.float32"),
        ({"top_k": 2.5}, "`top_k` must be an integer, got 2.5"),
        ({"temperature": "hot"}, "`temperature` must be a number, got 'hot'"),
        ({"num_images_per_prompt": None}, "`num_images_per_prompt` must be an integer, got None"),
    ],
)
def test_values_of_other_types_raise(pipeline, call, message):
    with pytest.raises(TypeError, match=re.escape(message)):
        pipeline(**call)


def test_numbers_of_numpy_are_numbers(pipeline):
    settings = {"output_type": "latent", "generator": seeded()}
    expected = pipeline([1], top_k=5, top_p=0.5, temperature=2.0, **settings).images
    settings["generator"] = seeded()
    numbers = {"top_k": np.int64(5), "top_p": np.float32(0.5), "temperature": np.float64(2)}
    assert torch.equal(pipeline([np.int64(1)], **numbers, **settings).images, expected)


def test_labels_of_a_model_without_classes_raise():
    with pytest.raises(ValueError, match="must be left out, because the model has no classes"):
        encode_labels(0, num_classes=0, class_names=None)


def test_a_language_model_that_does_not_fit_raises(pipeline):
    with pytest.raises(ValueError, match="must have the 65 codes of `vqvae`, but has 64"):
        SVQVAEAutoregressivePipeline(make_tiny(codebook_size=65), pipeline.language_model)
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=68, hidden_size=16, num_hidden_layers=1, num_attention_heads=2))
    with pytest.raises(TypeError, match="must be a LlamaGenForCausalLM, got LlamaForCausalLM.*`svqvae extend-lm`"):
        SVQVAEAutoregressivePipeline(make_tiny(), llama)


@pytest.mark.parametrize(
    ("call", "value"), [({"temperature": 0}, math.inf), ({"class_labels": 0, "guidance_scale": 2.0}, math.nan)]
)
def test_logits_with_nan_or_infinity_raise_after_the_row(own_pipeline, call, value):
    own_pipeline.language_model.lm_head.weight.data[5] = value
    steps = []
    message = r"must be finite, but LlamaGenForCausalLM in torch.float32 returned NaN or infinity\. Load it in another"
    with pytest.raises(ValueError, match=message):
        own_pipeline(**call, callback_on_step_end=lambda *step: steps.append(step))
    assert not steps

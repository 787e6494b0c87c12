"""The autoregressive pipeline with small random language models."""

import math
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import make_tiny
from generators import LAYOUT, SCALES, make_autoregressive, make_language_model
from safetensors.torch import load_file, save_file
from transformers import GPT2LMHeadModel, LlamaForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM

from svqvae_hf import SVQVAEAutoregressivePipeline
from svqvae_hf.pipelines.labels import encode_labels
from svqvae_hf.pipelines.sampling import draw
from svqvae_hf.pipelines.sequences import LayoutLogitsProcessor

MODELS = [LlamaForCausalLM, GPT2LMHeadModel, Qwen2ForCausalLM, Qwen3ForCausalLM]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def sample_ids(pipeline, *args, **call):
    """Ids at all scales."""
    return pipeline(*args, **call, scales=list(pipeline.layout.scales), output_type="latent").images


def check_greedy(pipeline, ids, labels, guidance_scale=1.0, given=(0, 0, 0)):
    """Checks that each token below the given rows is the most likely one, by one forward pass without a cache."""
    layout = pipeline.layout
    conditional = layout.encode(ids, labels)
    unconditional = layout.encode(ids)
    logits, free = (pipeline.language_model(tokens, use_cache=False).logits for tokens in (conditional, unconditional))
    guided = free + guidance_scale * (logits - free)
    for span, (_, columns), rows in zip(layout.spans, layout.grids, given, strict=False):
        positions = slice(span.start + rows * columns, span.stop)
        best = guided[:, positions.start - 1 : positions.stop - 1, : layout.codebook_size].argmax(-1)
        assert torch.equal(conditional[:, positions], best)


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


@pytest.mark.parametrize("cls", MODELS)
def test_greedy_ids_equal_generate_without_a_cache(cls):
    pipeline = make_autoregressive(cls)
    ids = sample_ids(pipeline, [0, 1, 2], temperature=0)
    sequences = pipeline.language_model.generate(
        LAYOUT.codebook_size + torch.arange(3)[:, None],
        logits_processor=[LayoutLogitsProcessor(LAYOUT)],
        max_new_tokens=LAYOUT.length - 1,
        do_sample=False,
        use_cache=False,
    )
    assert all(map(torch.equal, ids, LAYOUT.decode(sequences)[0]))
    assert len(ids[-1].unique()) > 16
    check_greedy(pipeline, ids, torch.arange(3))


def test_bfloat16():
    pipeline = make_autoregressive().to(torch.bfloat16)
    images = pipeline([0, 1], guidance_scale=2.0, output_type="pt").images
    assert images.isfinite().all()


def test_the_cache_changes_nothing(pipeline, monkeypatch):
    call = {"class_labels": [0, 1], "guidance_scale": 3.0, "top_k": 20, "temperature": 1.5}
    cached = sample_ids(pipeline, **call, generator=seeded())
    forward, read, lengths = pipeline.language_model.forward, [], []

    def forward_all(input_ids, use_cache, cache):
        read[:] = [torch.cat([*(read if cache else []), input_ids], dim=1)]
        lengths.append(input_ids.shape[1])
        output = forward(read[0], use_cache=False)
        output["cache"] = "all read"
        return output

    monkeypatch.setattr(pipeline.language_model, "forward", forward_all)
    assert all(map(torch.equal, cached, sample_ids(pipeline, **call, generator=seeded())))
    assert sorted(lengths)[-3:] == [1, 2, 2]  # a separator is read with the id before it, anything else alone


def test_guidance_mixes_conditional_and_unconditional_logits(pipeline):
    ids = sample_ids(pipeline, [0, 1, 2], temperature=0, guidance_scale=3.0)
    check_greedy(pipeline, ids, torch.arange(3), guidance_scale=3.0)
    plain = sample_ids(pipeline, [0, 1, 2], temperature=0)
    assert not torch.equal(ids[-1], plain[-1])


def test_draws_follow_the_probabilities():
    scores = torch.tensor([2.0, 1.0, -torch.inf, 0.0, -1.0])
    draws = draw(scores.expand(100_000, -1), seeded())
    shares = torch.bincount(draws, minlength=5) / len(draws)
    torch.testing.assert_close(shares, scores.softmax(0), atol=0.006, rtol=0)
    assert shares[2] == 0


def test_seeds_decide_the_images_alone_and_in_a_batch(pipeline):
    ids, again, other = (sample_ids(pipeline, [0, 1], generator=seeded(seed)) for seed in (0, 0, 1))
    assert all(map(torch.equal, ids, again))
    assert not torch.equal(ids[-1], other[-1])
    batch = sample_ids(pipeline, [0, 1, 2], generator=[seeded(5), seeded(6), seeded(7)])
    alone = sample_ids(pipeline, 1, generator=[seeded(6)])
    assert all(torch.equal(grid[1:2], one) for grid, one in zip(batch, alone, strict=True))


def test_temperature_top_k_and_top_p(pipeline):
    greedy = sample_ids(pipeline, [0, 1], temperature=0)
    for call in ({"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-4}):
        assert all(map(torch.equal, greedy, sample_ids(pipeline, [0, 1], generator=seeded(), **call)))
    hot = sample_ids(pipeline, [0, 1], top_k=3, temperature=100.0, generator=seeded())
    assert not torch.equal(hot[-1], greedy[-1])


def test_sampling_is_in_evaluation_mode_and_restores_the_mode():
    pipeline = make_autoregressive(attention_dropout=0.5)
    ids = sample_ids(pipeline, [0, 1], temperature=0)
    parts = {"num_classes": 3, "height": 32, "width": 16, "scales": SCALES}
    trained = SVQVAEAutoregressivePipeline(pipeline.vqvae.train(), pipeline.language_model.train(), **parts)
    trained.set_progress_bar_config(disable=True)
    assert all(map(torch.equal, ids, sample_ids(trained, [0, 1], temperature=0)))
    assert all(module.training for module in (*trained.vqvae.modules(), *trained.language_model.modules()))


# Images


def test_scales_are_returned_in_order_and_sampling_ends_with_the_finest(pipeline):
    whole, coarse = pipeline(0, scales=[1.0, 0.25], generator=seeded()).images
    assert [image.size for image in (*whole, *coarse)] == [(16, 32), (4, 8)]
    assert np.array_equal(whole[0], pipeline(0, generator=seeded()).images[0])
    assert np.array_equal(coarse[0], pipeline(0, scales=0.25, generator=seeded()).images[0])
    steps = []
    (again,) = pipeline(
        0, scales=[0.25], generator=seeded(), callback_on_step_end=lambda *step: steps.append(step)
    ).images
    assert np.array_equal(again[0], coarse[0])
    assert len(steps) == 2


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


def test_the_callback_sees_each_row_and_each_whole_scale(pipeline):
    seen = []

    def look(pipe, step, scale, tensors):
        seen.append((step, scale, tensors["ids"], pipe.vqvae.decode_tokens(tensors["ids"])))

    call = {"class_labels": [0, 1], "generator": seeded(), "scales": SCALES}
    images = pipeline(**call, output_type="pt", callback_on_step_end=look).images
    ids = sample_ids(pipeline, [0, 1], generator=seeded())
    assert [step for step, *_ in seen] == list(range(2 + 4 + 8))
    for scale, grid, image in zip(SCALES, ids, images, strict=True):
        previews = [(rows, preview) for _, seen_scale, rows, preview in seen if seen_scale == scale]
        assert len(previews) == grid.shape[1]
        assert all(torch.equal(rows, grid[:, :count]) for count, (rows, _) in enumerate(previews, start=1))
        torch.testing.assert_close(previews[-1][1], image)


def test_ids_that_the_callback_returns_replace_the_sampled_ones(pipeline):
    fixed = torch.arange(8).reshape(2, 1, 4)

    def replace_a_row(pipe, step, scale, tensors):
        if scale == 1.0 and tensors["ids"].shape[1] == 3:
            return {"ids": torch.cat([tensors["ids"][:, :2], fixed], dim=1)}
        return None

    call = {"class_labels": [0, 1], "temperature": 0, "guidance_scale": 2.0}
    plain, replaced = sample_ids(pipeline, **call), sample_ids(pipeline, **call, callback_on_step_end=replace_a_row)
    assert torch.equal(replaced[-1][:, :2], plain[-1][:, :2])
    assert torch.equal(replaced[-1][:, 2:3], fixed)
    check_greedy(pipeline, replaced, torch.tensor([0, 1]), guidance_scale=2.0, given=(0, 0, 3))


def test_the_callback_ends_the_sampling(pipeline):
    def end_after_three_rows(pipe, step, scale, tensors):
        pipe._interrupt = scale == 1.0 and tensors["ids"].shape[1] == 3

    call = {"class_labels": [0, 1], "temperature": 0}
    ids = sample_ids(pipeline, **call)
    ended = sample_ids(pipeline, **call, callback_on_step_end=end_after_three_rows)
    assert pipeline.interrupt
    assert all(map(torch.equal, ended[:2], ids[:2]))
    assert torch.equal(ended[2][:, :3], ids[2][:, :3])
    assert not ended[2][:, 3:].any()
    assert all(map(torch.equal, ids, sample_ids(pipeline, **call)))  # the next call runs to its end


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


# Wrong input


LABELS_AND_SIZES = [
    ({"class_labels": 3}, "`class_labels` must be in [0, 3), got 3"),
    ({"scales": [2.0]}, "`scales` must be among [0.25, 0.5, 1.0], as in training, each once, got [2.0]"),
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


def test_labels_of_a_model_without_classes_raise():
    with pytest.raises(ValueError, match="must be left out, because the model has no classes"):
        encode_labels(0, num_classes=0, class_names=None)


def test_a_language_model_that_does_not_match_the_layout_raises():
    parts = {"num_classes": 3, "height": 32, "width": 16, "scales": SCALES}
    other = make_language_model(vocab_size=64)
    tokens = r"70 tokens \(64 codes, 3 classes, one for no class and 2 separators\), got 64"
    with pytest.raises(ValueError, match=tokens):
        SVQVAEAutoregressivePipeline(make_tiny(), other, **parts)
    short = make_language_model(max_position_embeddings=44)
    with pytest.raises(ValueError, match="must be at least 45, the length of a sequence, got 44"):
        SVQVAEAutoregressivePipeline(make_tiny(), short, **parts)


@pytest.mark.parametrize(
    ("call", "value"), [({"temperature": 0}, math.inf), ({"class_labels": 0, "guidance_scale": 2.0}, math.nan)]
)
def test_logits_with_nan_or_infinity_raise_after_the_row(own_pipeline, call, value):
    own_pipeline.language_model.lm_head.weight.data[5] = value
    steps = []
    message = r"must be finite, but LlamaForCausalLM in torch.float32 returned NaN or infinity\. Load it in another"
    with pytest.raises(ValueError, match=message):
        own_pipeline(**call, callback_on_step_end=lambda *step: steps.append(step))
    assert not steps

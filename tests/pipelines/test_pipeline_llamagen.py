"""The autoregressive pipeline with LlamaGen's language models, compared with ids of the original code."""

import pytest
import torch
from generators import GOLDEN, make_llamagen
from pipeline_parts import text_components
from safetensors.torch import load_file
from torch.nn.attention import SDPBackend, sdpa_kernel

from svqvae_hf.pipelines.sampling import guide


def load_expected(kind: str) -> tuple[dict, dict]:
    """Outputs of the original code, and the condition as arguments of the pipeline."""
    expected = load_file(GOLDEN / f"llamagen_gpt_{kind}_tiny.outputs.safetensors")
    if kind == "c2i":
        return expected, {"class_labels": expected["class_labels"].tolist()}
    names = {"prompt_embeds": "caption_embeddings", "prompt_attention_mask": "caption_mask"}
    return expected, {argument: expected[name] for argument, name in names.items()}


@pytest.mark.parametrize("kind", ["c2i", "t2i"])
@pytest.mark.parametrize("guidance_scale", [1, 2])
def test_ids_equal_the_original_code(kind, guidance_scale):
    expected, condition = load_expected(kind)
    call = {"guidance_scale": guidance_scale, "temperature": 0, "output_type": "latent"}
    ids = make_llamagen(kind)(**condition, **call).images
    assert torch.equal(ids.flatten(1), expected[f"greedy_cfg{guidance_scale}.ids"])


@pytest.mark.parametrize("kind", ["c2i", "t2i"])
def test_ids_with_an_interval_of_guidance_equal_the_original_code(kind):
    """`cfg_interval` of 4 guides the first 6 of 16 ids."""
    expected, condition = load_expected(kind)
    pipeline, batches = make_llamagen(kind), []
    pipeline.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: batches.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    call = {"guidance_scale": 2, "guidance_stop": 6 / 16, "temperature": 0, "output_type": "latent"}
    ids = pipeline(**condition, **call).images
    assert torch.equal(ids.flatten(1), expected["greedy_cfg2_interval4.ids"])
    assert batches == [4] * 6 + [2] * 10


@pytest.mark.parametrize("guidance_scale", [1, 4])
@torch.no_grad()
def test_64_ids_in_bfloat16_equal_the_original_code_up_to_rounding(guidance_scale):
    """On the machine of the golden file, all of them are equal with plain attention."""
    exact, pipeline = (make_llamagen("c2i", grid_size=8, dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    pipeline.set_progress_bar_config(disable=True)
    labels = torch.arange(8)
    call = {"guidance_scale": guidance_scale, "temperature": 0, "output_type": "latent"}
    with sdpa_kernel(SDPBackend.MATH):
        ids = pipeline(labels, **call).images.flatten(1)
    stored = load_file(GOLDEN / "llamagen_gpt_c2i_tiny.bfloat16.safetensors")
    expected = stored[f"greedy_cfg{guidance_scale}.ids"].long()
    tokens = torch.cat([torch.cat([256 + labels, torch.full_like(labels, 266)])[:, None], expected.repeat(2, 1)], 1)
    logits, rounded = (each.language_model(tokens).logits[..., :256].float() for each in (exact, pipeline))
    margin = 2 * (2 * guidance_scale - 1) * (logits - rounded).abs().max()
    guided, unequal = guide(logits, guidance_scale), ids != expected
    for image in unequal.any(1).nonzero().flatten().tolist():
        first = int(unequal[image].float().argmax())
        assert guided[image, first, expected[image, first]] - guided[image, first, ids[image, first]] <= margin
    assert (~unequal).float().mean() > 0.5


@pytest.mark.slow
def test_a_compiled_model_is_not_compiled_at_each_step():
    """Takes five seconds, because shapes that change are traced several times."""
    from torch._dynamo.testing import CompileCounter

    expected, condition = load_expected("c2i")
    pipeline, counter = make_llamagen("c2i"), CompileCounter()
    pipeline.language_model.compile(backend=counter, dynamic=True)
    ids = pipeline(**condition, guidance_scale=2, temperature=0, output_type="latent").images
    assert torch.equal(ids.flatten(1), expected["greedy_cfg2.ids"])
    assert counter.frame_count <= 3  # the first token, the first decode step, all others


def test_unmasked_captions_equal_the_original_code():
    expected, condition = load_expected("t2i")
    condition.pop("prompt_attention_mask")
    ids = make_llamagen("t2i")(**condition, guidance_scale=2, temperature=0, output_type="latent").images
    assert torch.equal(ids.flatten(1), expected["greedy_cfg2_unmasked.ids"])


def test_a_pipeline_draws_a_caption():
    assert make_llamagen("t2i", **text_components())(prompt="a cat", output_type="pt").images.shape == (1, 3, 16, 16)


@pytest.mark.parametrize(
    ("components", "message"),
    [(text_components(), "which does not take captions"), ({"class_names": ["cat"]}, "must be 10 different names")],
)
def test_components_that_do_not_fit(components, message):
    with pytest.raises(ValueError, match=message):
        make_llamagen("c2i", **components)


def test_captions_are_encoded_as_if_alone_and_end_at_the_end():
    pipeline = make_llamagen("t2i", **text_components())
    features, mask = pipeline.encode_prompt(["a cat", "a cat on the roof"])
    assert mask.sum(1).tolist() == [3, 6]
    assert mask[:, -3:].all()
    for words, feature in zip(([2, 3, 1], [2, 3, 4, 5, 6, 1]), features, strict=True):
        with torch.no_grad():
            alone = pipeline.text_encoder(input_ids=torch.tensor([words])).last_hidden_state[0]
        torch.testing.assert_close(feature[-len(words) :], alone, atol=1e-5, rtol=0)
        assert not feature[: -len(words)].any()


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        ("t2i", {}, "take `prompt` or `prompt_embeds`, and no `class_labels`. Pass `prompt` alone"),
        ("t2i", {"prompt": "a cat", "prompt_embeds": torch.zeros(1, 120, 32)}, "Pass `prompt` alone"),
        ("t2i", {"prompt": "a " * 120}, r"must have at most 120 tokens, but 'a a a.*' has 121. Shorten it"),
        ("t2i", {"prompt_embeds": torch.zeros(1, 9, 32)}, r"must have shape \(1, 120, 32\)"),
        ("t2i", {"prompt": "a cat", "prompt_attention_mask": torch.ones(1, 120)}, "Pass `prompt` alone"),
        ("c2i", {"prompt_attention_mask": torch.ones(1, 120)}, "this one has 10 classes"),
        ("c2i", {"prompt": "a cat"}, "need a language model with captions, but this one has 10 classes"),
        ("c2i", {"guidance_scale": 2}, "needs `class_labels`. Pass them"),
        ("c2i", {"guidance_stop": 6}, r"`guidance_stop` must be a fraction in \[0, 1\], got 6"),
    ],
)
def test_wrong_conditions_are_errors(kind, arguments, message):
    pipeline = make_llamagen(kind, **(text_components() if kind == "t2i" else {}))
    with pytest.raises(ValueError, match=message):
        pipeline(**arguments)

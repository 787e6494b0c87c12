"""LlamaGen's language models, compared with the logits and ids of the original code in tests/golden."""

import copy

import pytest
import torch
from generators import GOLDEN, make_llamagen
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache, Trainer, TrainingArguments
from transformers.utils import find_labels

from svqvae_hf import LlamaGenForCausalLM

CODES, IDS = 256, 16
pytestmark = pytest.mark.usefixtures("no_grad")


def load(kind: str) -> LlamaGenForCausalLM:
    return make_llamagen(kind).language_model


def load_inputs(kind: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Outputs of the original code, inputs of a forward pass over them, and the same inputs without conditions."""
    expected = load_file(GOLDEN / f"llamagen_gpt_{kind}_tiny.outputs.safetensors")
    ids = expected["ids"]
    captions, labels, null = {}, torch.zeros(len(ids), dtype=torch.int64), 1
    if kind == "t2i":
        captions = {"prompt_embeds": expected["caption_embeddings"], "prompt_attention_mask": expected["caption_mask"]}
    else:
        labels, null = expected["class_labels"], 10
    tokens, dropped = (torch.cat([CODES + each[:, None], ids], 1) for each in (labels, torch.full_like(labels, null)))
    return expected, {"input_ids": tokens, **captions}, {"input_ids": dropped, **captions}


@pytest.fixture(params=["c2i", "t2i"])
def kind(request):
    return request.param


def test_generation_from_embeddings_equals_generation_from_tokens():
    model, (_, inputs, _) = load("c2i"), load_inputs("c2i")
    tokens, call = inputs["input_ids"][:, :3], {"max_new_tokens": 5, "do_sample": False}
    embeddings = model.get_input_embeddings()(tokens)
    assert torch.equal(model.generate(inputs_embeds=embeddings, **call), model.generate(tokens, **call)[:, 3:])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_logits_equal_the_original_code(kind, attention):
    model = load(kind)
    model.set_attn_implementation(attention)
    assert model.model.layers[0].self_attn.config._attn_implementation == attention
    expected, inputs, dropped = load_inputs(kind)
    logits = model(**inputs).logits
    assert logits.shape == (2, 1 + IDS, model.config.vocab_size)
    torch.testing.assert_close(logits[..., :CODES], expected["teacher_forced.logits"], atol=1e-4, rtol=0)
    dropped_logits = model(**dropped).logits[:, :IDS, :CODES]
    torch.testing.assert_close(dropped_logits, expected["training.dropped_logits"], atol=1e-4, rtol=0)


def test_loss_equals_the_original_code(kind):
    expected, inputs, _ = load_inputs(kind)
    loss = load(kind)(**inputs, labels=inputs["input_ids"]).loss
    torch.testing.assert_close(loss, expected["training.loss"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("cache", [{}, {"use_cache": False}, {"cache_implementation": "static"}])
def test_ids_of_generate_equal_the_original_code(kind, cache):
    expected, inputs, _ = load_inputs(kind)
    inputs["input_ids"] = inputs["input_ids"][:, :1]
    sequences = load(kind).generate(**inputs, max_new_tokens=IDS, do_sample=False, **cache)
    assert torch.equal(sequences[:, 1:], expected["greedy_cfg1.ids"])


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("steps", [[1] * 17, [9, 8]])
def test_cached_logits_equal_uncached_ones(kind, static, steps):
    model = load(kind)
    _, inputs, _ = load_inputs(kind)
    logits = model(**inputs, use_cache=False).logits
    length = model.config.max_position_embeddings
    cache = StaticCache(config=model.config, max_cache_len=length) if static else DynamicCache(config=model.config)
    found = []
    for tokens in inputs.pop("input_ids").split(steps, dim=1):
        found.append(model(tokens, **inputs, **{"cache" if static else "past_key_values": cache}).logits)
        inputs.pop("prompt_embeds", None)
    torch.testing.assert_close(torch.cat(found, dim=1), logits, atol=2e-5, rtol=0)


def test_only_codes_are_predicted(kind):
    model = load(kind).to(torch.bfloat16)
    _, inputs, _ = load_inputs(kind)
    probabilities = model(**inputs).logits.softmax(-1)
    assert probabilities.isfinite().all()
    assert not probabilities[..., CODES:].any()


def test_unconditional_token_ignores_the_caption():
    model = load("t2i")
    _, _, dropped = load_inputs("t2i")
    logits = model(**dropped).logits
    assert torch.equal(model(**dropped, logits_to_keep=500).logits, logits)
    dropped["prompt_embeds"] = torch.randn_like(dropped["prompt_embeds"])
    assert torch.equal(model(**dropped).logits, logits)


def test_missing_captions_are_an_error():
    model, tokens = load("t2i"), torch.tensor([[CODES]])
    for call in (lambda: model(tokens), lambda: model.generate(tokens, max_new_tokens=IDS, do_sample=False)):
        with pytest.raises(ValueError, match="`prompt_embeds` must be passed"):
            call()


def test_a_mask_of_tokens_also_covers_the_caption(kind):
    """As collators and peft pass it: ones change nothing, and what is masked is not seen."""
    model = load(kind)
    _, inputs, _ = load_inputs(kind)
    mask = torch.ones_like(inputs["input_ids"])
    logits = model(**inputs).logits
    assert torch.equal(model(**inputs, attention_mask=mask).logits, logits)
    mask[:, 5] = 0
    masked = model(**inputs, attention_mask=mask).logits
    torch.testing.assert_close(masked[:, :5], logits[:, :5], atol=1e-5, rtol=0)
    assert not torch.equal(masked[:, 6:], logits[:, 6:])
    inputs["input_ids"][:, 5] = 0
    torch.testing.assert_close(model(**inputs, attention_mask=mask).logits[:, 6:], masked[:, 6:], atol=1e-5, rtol=0)


def test_guidance_of_generate_is_that_of_the_pipeline_for_classes_and_an_error_for_captions(kind):
    expected, inputs, dropped = load_inputs(kind)
    prompt, null = (each["input_ids"][:, :1] for each in (inputs, dropped))
    call = {"guidance_scale": 2.0, "negative_prompt_ids": null, "max_new_tokens": IDS, "do_sample": False}
    if kind == "c2i":
        assert torch.equal(load(kind).generate(prompt, **call)[:, 1:], expected["greedy_cfg2.ids"])
        return
    with pytest.raises(ValueError, match="`prompt_embeds` must be passed"):
        load(kind).generate(**(inputs | {"input_ids": prompt}), **call)


@pytest.mark.slow
@torch.enable_grad()
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft asks for it
def test_trainer_and_peft_take_the_model(kind, tmp_path):
    _, inputs, _ = load_inputs(kind)
    rows = [{name: value[index] for name, value in inputs.items()} for index in range(2)]
    rows = [row | {"labels": row["input_ids"]} for row in rows]
    model = load(kind)
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    arguments = TrainingArguments(
        tmp_path, max_steps=1, report_to=[], per_device_train_batch_size=2, use_cpu=True, eval_strategy="steps"
    )
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)
    loss = load(kind)(**inputs, labels=inputs["input_ids"]).loss.item()
    assert trainer.train().training_loss == pytest.approx(loss, rel=0.2)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(loss, rel=0.2)
    assert find_labels(LlamaGenForCausalLM) == ["labels"]


# The rotation


def test_rotation_in_bfloat16_has_float32_tables():
    model = load("c2i")
    positions = torch.arange(17)[None]
    tables = model.model.rotary_emb(torch.zeros(1), positions)
    rounded = copy.deepcopy(model).to(torch.bfloat16).model.rotary_emb(torch.zeros(1, dtype=torch.bfloat16), positions)
    for table, other in zip(tables, rounded, strict=True):
        assert table.dtype == torch.float32
        assert torch.equal(table, other)


# As any model of transformers


def test_saving_and_loading_in_half_precision(kind, tmp_path):
    model = load(kind)
    model.save_pretrained(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"config.json", "generation_config.json", "model.safetensors"}
    _, inputs, _ = load_inputs(kind)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert type(loaded) is LlamaGenForCausalLM
    assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert torch.equal(half(**inputs).logits, model.to(torch.bfloat16)(**inputs).logits)


def test_resized_embeddings_are_kept(tmp_path):
    model = load("c2i")
    _, inputs, _ = load_inputs("c2i")
    logits = model(**inputs).logits[..., :CODES]
    model.resize_token_embeddings(300)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.vocab_size == 300
    assert torch.equal(loaded.model.embed_tokens.weight, model.model.embed_tokens.weight)
    assert torch.equal(loaded(**inputs).logits[..., :CODES], logits)
    assert loaded(torch.tensor([[299]])).logits.shape == (1, 1, 300)


@torch.enable_grad()
def test_gradient_checkpointing_changes_no_gradient(kind):
    _, inputs, _ = load_inputs(kind)
    gradients = []
    for checkpointing in (False, True):
        model = load(kind).train()
        if checkpointing:
            getattr(
                model, "activation_checkpointing_enable", model.gradient_checkpointing_enable
            )()  # names of 5.24 and before
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert all(torch.equal(gradient, gradients[1][name]) for name, gradient in gradients[0].items())
    conditioned = "caption_projection.fc1.weight" if kind == "t2i" else "model.embed_tokens.weight"
    assert gradients[0][conditioned].any()


@pytest.mark.slow
def test_decode_steps_are_compiled_once():
    """Ids equal those of the original code. A static cache keeps all shapes; each step is one graph."""
    from torch._dynamo.testing import CompileCounter

    model, (expected, inputs, _) = load("t2i"), load_inputs("t2i")
    counter = CompileCounter()
    decode = torch.compile(model.forward, backend=counter, fullgraph=True)
    cache = StaticCache(config=model.config, max_cache_len=model.config.max_position_embeddings)
    tokens, ids = inputs.pop("input_ids")[:, :1], []
    for step in range(IDS):
        logits = (decode if step else model)(tokens, **inputs, cache=cache).logits
        tokens = logits[:, -1:].argmax(-1)
        ids.append(tokens)
        inputs.pop("prompt_embeds", None)
    assert counter.frame_count == 1
    assert torch.equal(torch.cat(ids, dim=1), expected["greedy_cfg1.ids"])

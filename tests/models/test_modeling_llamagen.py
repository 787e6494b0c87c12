"""LlamaGen's language models, compared with the logits and ids of the original code in tests/golden."""

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch._dynamo.testing import CompileCounter
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    StaticCache,
    Trainer,
    TrainingArguments,
)
from transformers.utils import find_labels

from svqvae_hf import LlamaGenConfig, LlamaGenForCausalLM
from svqvae_hf.models.modeling_llamagen import FEW_ROWS, FewRowsLinear, LlamaGenRotaryEmbedding

GOLDEN = ROOT / "tests" / "golden"
CODES, IDS = 256, 16
pytestmark = pytest.mark.usefixtures("no_grad")


def load(kind: str) -> LlamaGenForCausalLM:
    return LlamaGenForCausalLM.from_single_file(
        GOLDEN / f"llamagen_gpt_{kind}_tiny.pt", grid_size=4, num_attention_heads=4
    )


def load_inputs(kind: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Outputs of the original code, inputs of a forward pass over them, and the same inputs without conditions."""
    expected = load_file(GOLDEN / f"llamagen_gpt_{kind}_tiny.outputs.safetensors")
    ids = expected["ids"]
    captions, labels, null = {}, torch.zeros(len(ids), dtype=torch.int64), 1
    if kind == "t2i":
        captions = {
            "prompt_embeds": expected["caption_embeddings"],
            "prompt_attention_mask": expected["caption_mask"],
        }
    else:
        labels, null = expected["class_labels"], 10
    tokens, dropped = (
        torch.cat([CODES + each[:, None], ids], dim=1) for each in (labels, torch.full_like(labels, null))
    )
    return expected, {"input_ids": tokens, **captions}, {"input_ids": dropped, **captions}


@pytest.fixture(params=["c2i", "t2i"])
def kind(request):
    return request.param


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_logits_equal_the_original_code(kind, attention):
    model = load(kind)
    model.set_attn_implementation(attention)
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


@pytest.mark.parametrize(
    ("kind", "run"),
    [
        *[(kind, run) for kind in ("c2i", "t2i") for run in ("greedy_cfg2", "greedy_cfg2_interval4")],
        ("t2i", "greedy_cfg2_unmasked"),
    ],
)
def test_guided_ids_equal_the_original_code(kind, run):
    model = load(kind)
    expected, inputs, dropped = load_inputs(kind)
    both = {name: torch.cat([tensor, dropped[name]]) for name, tensor in inputs.items()}
    if run.endswith("unmasked"):
        both.pop("prompt_attention_mask")
    tokens, cache = both.pop("input_ids")[:, :1], DynamicCache(config=model.config)
    ids = []
    for index in range(IDS):
        logits = model(tokens, **both, cache=cache).logits[:, -1, :CODES]
        conditional, null = logits.chunk(2)
        guided = conditional if run.endswith("interval4") and index > 5 else null + 2 * (conditional - null)
        ids.append(guided.argmax(-1, keepdim=True))
        tokens = ids[-1].repeat(2, 1)
        both.pop("prompt_embeds", None)
    assert torch.equal(torch.cat(ids, dim=1), expected[f"{run}.ids"])


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("steps", [[1] * 17, [1, 6, 10], [9, 8]])
def test_cached_logits_equal_uncached_ones(kind, static, steps):
    model = load(kind)
    _, inputs, _ = load_inputs(kind)
    logits = model(**inputs, use_cache=False).logits
    length = model.config.max_position_embeddings
    cache = StaticCache(config=model.config, max_cache_len=length) if static else DynamicCache(config=model.config)
    found = []
    for tokens in inputs.pop("input_ids").split(steps, dim=1):
        found.append(model(tokens, **inputs, cache=cache).logits)
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
    dropped["prompt_embeds"] = torch.randn_like(dropped["prompt_embeds"])
    assert torch.equal(model(**dropped).logits, logits)


def test_captions_of_the_wrong_shape_are_an_error():
    model = load("t2i")
    with pytest.raises(ValueError, match=r"must have shape \(1, 120, 32\).*got \(1, 119, 32\)"):
        model(torch.tensor([[CODES]]), prompt_embeds=torch.zeros(1, 119, 32))


def test_captions_in_a_model_of_classes_are_an_error():
    with pytest.raises(ValueError, match="`prompt_embeds` and `prompt_attention_mask` are for models with captions"):
        load("c2i")(torch.tensor([[CODES]]), prompt_embeds=torch.zeros(1, 1, 32))


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


@pytest.mark.parametrize("cache", [{}, {"cache_implementation": "static"}])
def test_generate_takes_a_mask_of_ones(kind, cache):
    expected, inputs, _ = load_inputs(kind)
    inputs["input_ids"] = inputs["input_ids"][:, :1]
    mask = torch.ones_like(inputs["input_ids"])
    sequences = load(kind).generate(**inputs, attention_mask=mask, max_new_tokens=IDS, do_sample=False, **cache)
    assert torch.equal(sequences[:, 1:], expected["greedy_cfg1.ids"])


def test_guidance_of_generate_is_that_of_the_pipeline_for_classes_and_an_error_for_captions(kind):
    expected, inputs, dropped = load_inputs(kind)
    prompt, null = (each["input_ids"][:, :1] for each in (inputs, dropped))
    call = {"guidance_scale": 2.0, "negative_prompt_ids": null, "max_new_tokens": IDS, "do_sample": False}
    if kind == "c2i":
        assert torch.equal(load(kind).generate(prompt, **call)[:, 1:], expected["greedy_cfg2.ids"])
        return
    with pytest.raises(ValueError, match="`prompt_embeds` must be passed"):
        load(kind).generate(**(inputs | {"input_ids": prompt}), **call)


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


def rotate_by_hand(vector: torch.Tensor, index: int, grid: int) -> torch.Tensor:
    """Rotates neighbours of a head's vector, the first half of the pairs by the row, the second by the column."""
    pairs = vector.float().unflatten(-1, (-1, 2))
    count = len(pairs)
    row, column = divmod(index, grid)
    for pair in range(count):
        side = row if pair < count // 2 else column
        angle = torch.tensor(side * 10000.0 ** (-2 * (pair % (count // 2)) / count))
        x, y = pairs[pair].clone()
        pairs[pair] = torch.stack([x * angle.cos() - y * angle.sin(), x * angle.sin() + y * angle.cos()])
    return pairs.flatten().to(vector.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotation_equals_a_table_by_hand(dtype, monkeypatch):
    config = LlamaGenConfig(
        codebook_size=32, num_classes=3, grid_size=5, hidden_size=48, num_hidden_layers=1, num_attention_heads=2
    )
    torch.manual_seed(0)
    model = LlamaGenForCausalLM(config).eval().to(dtype)
    attention = model.model.layers[0].self_attn
    seen = {}
    for name in ("q_proj", "k_proj"):
        getattr(attention, name).register_forward_hook(lambda _, args, output, name=name: seen.update({name: output}))
    cache = DynamicCache(config=config)
    model(torch.cat([torch.tensor([32]), torch.randint(32, (25,))])[None], cache=cache)
    keys = cache.layers[0].keys
    assert keys.dtype == dtype
    assert not keys[:, :, 0].any()
    before = seen["k_proj"][0].unflatten(-1, (2, 24))
    for index in range(25):
        for head in range(2):
            expected = rotate_by_hand(before[1 + index, head], index, 5)
            tolerance = {"atol": 1e-6, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 1e-6, "rtol": 2**-8}
            torch.testing.assert_close(keys[0, head, 1 + index], expected, **tolerance)


def test_rotation_in_bfloat16_has_float32_tables():
    model = load("c2i")
    positions = torch.arange(17)[None]
    tables = model.model.rotary_emb(torch.zeros(1), positions)
    rounded = copy.deepcopy(model).to(torch.bfloat16).model.rotary_emb(torch.zeros(1, dtype=torch.bfloat16), positions)
    for table, other in zip(tables, rounded, strict=True):
        assert table.dtype == torch.float32
        assert torch.equal(table, other)


def test_positions_are_absolute_whatever_the_padding():
    rotary = LlamaGenRotaryEmbedding(load("t2i").config)
    cos, sin = rotary(torch.zeros(1), torch.arange(136)[None])
    assert not cos[:, :120].any()
    assert not sin[:, :120].any()
    assert torch.equal(cos[:, 120], torch.ones(1, 16))
    assert torch.equal(sin[:, 120], torch.zeros(1, 16))


# As any model of transformers


def test_saving_and_loading_in_half_precision(kind, tmp_path):
    model = load(kind)
    model.save_pretrained(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
    }
    _, inputs, _ = load_inputs(kind)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert type(loaded) is LlamaGenForCausalLM
    assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert torch.equal(half(**inputs).logits, model.to(torch.bfloat16)(**inputs).logits)


def test_config_round_trip(tmp_path):
    config = LlamaGenConfig(num_condition_tokens=120, caption_dim=32, num_classes=1, codebook_fingerprint="ab")
    config.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).to_diff_dict() == config.to_diff_dict()
    assert (config.vocab_size, config.head_dim, config.max_position_embeddings) == (16386, 64, 376)


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


@pytest.mark.filterwarnings("ignore:Passing `generation_config` together with generation-related arguments")
def test_assisted_and_longer_generation_work_as_with_llama():
    model, assistant = load("c2i"), load("c2i")
    assistant.model.layers = assistant.model.layers[:1]
    assistant.config.num_hidden_layers = 1
    expected, inputs, _ = load_inputs("c2i")
    prompt = inputs["input_ids"][:1, :1]
    sequence = model.generate(prompt, assistant_model=assistant, max_new_tokens=IDS, do_sample=False)
    assert torch.equal(sequence[:, 1:], expected["greedy_cfg1.ids"][:1])
    longer = model.generate(prompt, max_new_tokens=IDS + 3, do_sample=False)
    assert torch.equal(longer[:, : 1 + IDS], sequence)
    assert longer.shape == (1, 1 + IDS + 3)


@pytest.mark.parametrize("heads", [5, 48])
def test_heads_must_fit(heads):
    with pytest.raises(ValueError, match=f"must divide the 96 channels.* got {heads}"):
        LlamaGenConfig(hidden_size=96, num_attention_heads=heads)


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


def test_device_map_places_the_model(kind, tmp_path):
    model = load(kind)
    model.save_pretrained(tmp_path)
    _, inputs, _ = load_inputs(kind)
    placed = AutoModelForCausalLM.from_pretrained(tmp_path, device_map={"": "cpu"})
    assert torch.equal(placed(**inputs).logits, model(**inputs).logits)


@pytest.mark.slow
def test_decode_steps_are_compiled_once(kind):
    """Ids equal those of the original code. A static cache keeps all shapes; each step is one graph."""
    model, (expected, inputs, _) = load(kind), load_inputs(kind)
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


@pytest.mark.parametrize("rows", [1, FEW_ROWS, FEW_ROWS + 1])
def test_few_rows_give_what_a_linear_layer_gives(rows):
    with torch.enable_grad():
        layer, inputs = FewRowsLinear(12, 20), torch.randn(rows, 1, 12, requires_grad=True)
        outputs, expected = layer(inputs), F.linear(inputs, layer.weight)
        assert outputs.is_contiguous()
        torch.testing.assert_close(outputs, expected)
        weights = torch.randn_like(expected)
        found, wanted = (
            torch.autograd.grad((each * weights).sum(), [layer.weight, inputs]) for each in (outputs, expected)
        )
        torch.testing.assert_close(found, wanted)


def test_decoding_steps_read_all_weights_as_few_rows(monkeypatch):
    model, calls = load("c2i"), []
    forward = FewRowsLinear.forward
    monkeypatch.setattr(FewRowsLinear, "forward", lambda self, rows: calls.append(self) or forward(self, rows))
    model(torch.tensor([[CODES]]))
    linears = {module for module in model.modules() if isinstance(module, torch.nn.Linear)}
    assert set(calls) == linears

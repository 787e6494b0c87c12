"""The sampler of ids with language models of several families."""

from functools import partial

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from svqvae_hf.pipelines.id_sampler import IdSampler
from svqvae_hf.pipelines.sampling import guide, sample

SIZE = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
COMMON = {"vocab_size": 80, "initializer_range": 0.5, "tie_word_embeddings": False}
COMMON |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
HEADS = {"num_key_value_heads": 1, "head_dim": 16}
WINDOW = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}
MODELS = {
    "llama": SIZE,
    "qwen2": SIZE | {"num_key_value_heads": 1},
    "qwen3": SIZE | HEADS,
    "gemma2": SIZE | HEADS | WINDOW,
    "mistral": SIZE | HEADS | {"sliding_window": None},
    "gpt_neox": SIZE,
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2},  # learned positions
    "opt": SIZE | {"ffn_dim": 32, "word_embed_proj_dim": 32},  # positions of its own
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 2},  # no positions
}
CODES = range(10, 74)
GRID = (3, 4)
PROMPTS = [[1, 2, 3, 4, 5], [6, 7], [75]]
GREEDY = partial(sample, temperature=0)


def make(family):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **COMMON, **MODELS[family])).eval()


def padded(prompts):
    """Prompts padded on the left."""
    longest = max(map(len, prompts))
    rows = [[0] * (longest - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return {"input_ids": torch.tensor(rows), "attention_mask": torch.tensor(mask)}


@torch.no_grad()
def run(model, inputs, pick=GREEDY, **options):
    sampler = IdSampler(model, inputs, GRID, CODES, pick, **options)
    for _ in range(GRID[0]):
        ids = sampler.next_row()
    return ids


@pytest.fixture(scope="module")
def llama():
    return make("llama")


@pytest.mark.parametrize("family", MODELS)
def test_ids_of_a_padded_batch_equal_ids_without_padding_or_cache(family):
    model = make(family)
    together = run(model, padded(PROMPTS))
    for ids, prompt in zip(together, PROMPTS, strict=True):
        tokens = torch.tensor([prompt])
        for _ in range(ids.numel()):
            with torch.no_grad():
                logits = model(tokens, use_cache=False).logits[:, -1, CODES.start : CODES.stop]
            tokens = torch.cat([tokens, CODES.start + logits.argmax(-1, keepdim=True)], dim=1)
        assert torch.equal(ids.flatten(), tokens[0, len(prompt) :] - CODES.start)
    assert len(together.unique()) > 2


@pytest.mark.parametrize("guided_ids", [None, 0, 5])
@torch.no_grad()
def test_guidance_joins_the_logits_of_both_prompts_up_to_an_id(llama, guided_ids):
    prompts = [*PROMPTS, [75], [75], [75]]
    ids = run(llama, padded(prompts), guide=partial(guide, guidance_scale=3.0), guided_ids=guided_ids)
    for row, prompt in enumerate(PROMPTS):
        logits = []
        for start in (prompt, [75]):
            tokens = torch.tensor([[*start, *(CODES.start + ids[row].flatten()).tolist()]])
            logits.append(llama(tokens).logits[0, len(start) - 1 : -1, CODES.start : CODES.stop])
        guided = guide(torch.stack(logits), 3.0)[0]
        stop = len(guided) if guided_ids is None else guided_ids
        best = torch.cat([guided[:stop], logits[0][stop:]]).argmax(-1)
        assert torch.equal(ids[row].flatten(), best)


def test_an_image_depends_on_its_prompt_and_generator_alone(llama):
    generators = lambda *seeds: [torch.Generator().manual_seed(seed) for seed in seeds]  # noqa: E731
    both = run(llama, padded(PROMPTS[:2]), partial(sample, top_k=9, generator=generators(1, 2)))
    alone = run(llama, padded(PROMPTS[1:2]), partial(sample, top_k=9, generator=generators(2)))
    assert torch.equal(both[1:], alone)


def test_known_ids_are_kept_and_the_others_follow_from_them(llama):
    ids = torch.arange(2 * 12).view(2, *GRID)
    is_fixed = torch.zeros(2, *GRID, dtype=torch.bool)
    is_fixed[:, 1, :3] = True
    plain = run(llama, padded(PROMPTS[:2]))
    edited = run(llama, padded(PROMPTS[:2]), known=(ids, is_fixed))
    assert torch.equal(edited[:, 0], plain[:, 0])
    assert torch.equal(edited[is_fixed], ids[is_fixed])
    prompts = []  # each with the first row of its image and the fixed ids, after which an id was drawn
    for prompt, edited_ids in zip(PROMPTS[:2], edited, strict=True):
        first_ids = edited_ids.flatten()[: GRID[1] + 3]
        prompts.append(list(prompt) + (CODES.start + first_ids).tolist())
    assert torch.equal(run(llama, padded(prompts))[:, 0, 0], edited[:, 1, 3])


@torch.no_grad()
def test_rows_below_replaced_ids_follow_from_them(llama):
    options = {"guide": partial(guide, guidance_scale=2.0)}
    sampler = IdSampler(llama, padded([*PROMPTS[:2], [75], [75]]), GRID, CODES, GREEDY, **options)
    sampler.next_row()
    fixed = torch.arange(8).view(2, 1, 4)
    sampler.replace(fixed)
    sampler.next_row()
    ids = sampler.next_row()
    kept = torch.zeros(2, *GRID, dtype=torch.bool)
    kept[:, 0] = True
    known = torch.cat([fixed, ids[:, 1:]], dim=1)
    assert torch.equal(ids, run(llama, padded([*PROMPTS[:2], [75], [75]]), known=(known, kept), **options))

"""The example that draws by a server of vLLM, against a server that answers as vLLM does, without sampling."""

import importlib
from types import SimpleNamespace

import pytest
import torch
from tiny_language_models import extended, load_extended
from transformers import GenerationConfig

from svqvae_hf.language.image_language_model import ImageLanguageModel
from svqvae_hf.pipelines.id_sampler import IdSampler
from svqvae_hf.pipelines.sampling import guide, sample


def likeliest(model, tokens, allowed, stop, length):
    """Tokens that are likeliest one by one, up to a token that stops."""
    is_allowed = torch.zeros(model.config.vocab_size, dtype=torch.bool)
    is_allowed[allowed] = True
    written = []
    while len(written) < length:
        logits = model(input_ids=torch.tensor([tokens + written])).logits[0, -1]
        token = int(logits.masked_fill(~is_allowed, -torch.inf).argmax())
        if token in stop:
            break
        written.append(token)
    return written


@pytest.fixture
def server(monkeypatch):
    """A server with a tiny model, which draws the pair of prompts of a request with guidance."""
    model, processor = load_extended("qwen")
    requests = []

    @torch.inference_mode()
    def post(url, json, timeout):
        requests.append(json)
        assert url == "http://here/v1/completions"
        if "vllm_xargs" not in json:
            (prompt,) = json["prompt"]
            stop = [*json["stop_token_ids"], processor.tokenizer.eos_token_id]
            written = likeliest(model, prompt, json["allowed_token_ids"], stop, json["max_tokens"])
            choices = [{"text": processor.decode(written, skip_special_tokens=True)}]
        else:
            _, *pair = json["prompt"]
            codes = range(json["allowed_token_ids"][0], json["allowed_token_ids"][-1] + 1)
            length = max(map(len, pair))
            inputs = {
                "input_ids": torch.tensor([[0] * (length - len(tokens)) + tokens for tokens in pair]),
                "attention_mask": torch.tensor([[0] * (length - len(tokens)) + [1] * len(tokens) for tokens in pair]),
            }
            scale = json["vllm_xargs"]["guidance_scale"]
            grid = (1, json["max_tokens"])
            sampler = IdSampler(
                model,
                inputs,
                grid,
                codes,
                sample=lambda logits: sample(logits, temperature=0, top_k=0, top_p=1.0, generator=None),
                guide=lambda logits: guide(logits, scale),
            )
            ids = sampler.next_row()[0, 0] + codes.start
            choices = [{"token_ids": []}] + [{"token_ids": ids.tolist()}] * 2
        answer = SimpleNamespace(json=lambda: {"choices": choices})
        answer.raise_for_status = lambda: answer
        return answer

    example = importlib.import_module("draw_from_server")
    monkeypatch.setattr(example.httpx, "post", post)
    return example, requests


@pytest.mark.parametrize("rewrites", [False, True])
def test_it_draws_the_ids_of_the_library(server, rewrites, tmp_path):
    example, requests = server
    pipe = ImageLanguageModel.from_pretrained(extended("qwen"), dtype="float32")
    pipe.language_model.generation_config = GenerationConfig(generation_kwargs={"rewrite_captions": rewrites})
    pipe.save_pretrained(tmp_path)
    drawn = {}
    pipe.draw(
        ["a cat"],
        guidance_scale=2.0,
        temperature=0,
        callback_on_step_end=lambda *arguments: drawn.update(arguments[-1]),
    )
    ids = example.draw("http://here", str(tmp_path), "a cat", scale=2.0, temperature=0)
    assert len(requests) == 1 + rewrites
    assert torch.equal(ids, drawn["ids"][0])

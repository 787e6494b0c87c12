"""Draws with guidance from an OpenAI-compatible server that runs `vllm_guidance.py`, and writes 0.png, 1.png, ...

python examples/draw_from_server.py http://localhost:8000 LM "a whale above a guitar on pink"
"""

import sys
from uuid import uuid4

import httpx
import torch
from transformers import GenerationConfig

from svqvae_hf import SVQVAEProcessor
from svqvae_hf.pipelines.image_chats import MAX_REWRITTEN_TOKENS, REWRITES

TRIES = 8


def rewrite(server: str, model: str, processor: SVQVAEProcessor, caption: str) -> str:
    """What the model writes before a picture: a caption if it rewrites captions, otherwise nothing."""
    generation_kwargs = getattr(GenerationConfig.from_pretrained(model), "generation_kwargs", {})
    if not generation_kwargs.get(REWRITES, False):
        return ""
    vocabulary = processor.vocabulary
    prompt = processor.apply_chat_template([{"role": "user", "content": caption}], add_generation_prompt=True)
    request = {
        "model": model,
        "prompt": processor(text=[prompt])["input_ids"],
        "temperature": 0,
        "max_tokens": MAX_REWRITTEN_TOKENS,
        "allowed_token_ids": [*range(vocabulary.first_token), vocabulary.begin],
        "stop_token_ids": [vocabulary.begin],
    }
    answer = httpx.post(f"{server}/v1/completions", json=request, timeout=600)
    return answer.raise_for_status().json()["choices"][0]["text"].strip()


def draw(server: str, model: str, caption: str, scale: float = 1.5, **sampling: float) -> torch.Tensor:
    """Draws the ids `(height, width)` of one picture."""
    processor = SVQVAEProcessor.from_pretrained(model)
    vocabulary = processor.vocabulary
    grid = vocabulary.grids[0]
    rows, columns = grid
    begin_image = processor.begin_image(grid)
    written = rewrite(server, model, processor, caption)
    guided_chat = (caption, written + begin_image)
    partner_chat = (processor.no_condition, begin_image)
    prompts = []
    for question, begun_answer in (partner_chat, guided_chat, partner_chat):  # the first wakes the server for the pair
        chat = [{"role": "user", "content": question}, {"role": "assistant", "content": begun_answer}]
        prompts.append(processor.apply_chat_template(chat, continue_final_message=True))
    request = {
        "model": model,
        "prompt": processor(text=prompts)["input_ids"],
        "return_token_ids": True,
        "seed": 0,
        "max_tokens": rows * columns,
        "min_tokens": rows * columns,
        "allowed_token_ids": list(range(vocabulary.first_token, vocabulary.begin)),
        **sampling,
    }
    for _ in range(TRIES):
        request["vllm_xargs"] = {
            "guidance_pair": uuid4().hex,
            "guidance_scale": scale,
            "no_condition": vocabulary.no_condition,
        }
        answer = httpx.post(f"{server}/v1/completions", json=request, timeout=600)
        _, guided, partner = answer.raise_for_status().json()["choices"]
        if guided["token_ids"] == partner["token_ids"]:  # else they were not in one step, and drawn without guidance
            return torch.tensor(guided["token_ids"]).view(grid) - vocabulary.first_token
    raise RuntimeError(f"the server joined no pair in {TRIES} tries. Start it with the logits processor.")


if __name__ == "__main__":
    server, model, *captions = sys.argv[1:]
    grids = []
    for number, caption in enumerate(captions):
        grids.append(draw(server, model, caption, temperature=0.1, top_k=20, seed=number))
    for number, image in enumerate(SVQVAEProcessor.from_pretrained(model).decode_images(grids)):
        image.save(f"{number}.png")

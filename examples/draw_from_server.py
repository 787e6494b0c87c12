"""Draws with guidance from an OpenAI-compatible server that runs `vllm_guidance.py`, and writes 0.png, 1.png, ...

python examples/draw_from_server.py http://localhost:8000 LM "a whale above a guitar on pink"
"""

import sys
from uuid import uuid4

import httpx
import torch

from svqvae_hf import SVQVAEProcessor

TRIES = 8


def draw(server: str, model: str, caption: str, scale: float = 1.5, **sampling: float) -> torch.Tensor:
    """Draws the ids `(height, width)` of one picture."""
    processor = SVQVAEProcessor.from_pretrained(model)
    vocabulary, grid = processor.vocabulary, processor.vocabulary.grids[0]
    texts = [processor.no_condition, caption, processor.no_condition]  # the first wakes the server before the pair
    answer = {"role": "assistant", "content": processor.begin_image(grid)}
    chats = [[{"role": "user", "content": text}, answer] for text in texts]
    prompts = [processor.apply_chat_template(chat, continue_final_message=True) for chat in chats]
    inputs = processor(text=prompts)["input_ids"]
    request = {"model": model, "prompt": inputs, "return_token_ids": True, "seed": 0, **sampling}
    request |= dict.fromkeys(["max_tokens", "min_tokens"], grid[0] * grid[1])
    request["allowed_token_ids"] = [*range(vocabulary.first_token, vocabulary.begin)]
    for _ in range(TRIES):
        pair = {"guidance_pair": uuid4().hex, "guidance_scale": scale, "no_condition": vocabulary.no_condition}
        answer = httpx.post(f"{server}/v1/completions", json=request | {"vllm_xargs": pair}, timeout=600)
        _, ids, others = (choice["token_ids"] for choice in answer.raise_for_status().json()["choices"])
        if ids == others:  # else the pair was not in one step, so it was drawn without guidance
            return torch.tensor(ids).view(grid) - vocabulary.first_token
    raise RuntimeError(f"the server joined no pair in {TRIES} tries. Start it with the logits processor.")


if __name__ == "__main__":
    server, model, *captions = sys.argv[1:]
    grids = [draw(server, model, text, temperature=0.1, top_k=20, seed=i) for i, text in enumerate(captions)]
    for number, image in enumerate(SVQVAEProcessor.from_pretrained(model).decode_images(grids)):
        image.save(f"{number}.png")

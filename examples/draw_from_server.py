"""Draws with guidance from an OpenAI-compatible server that runs `vllm_guidance.py`, and writes 0.png, 1.png, ...

python examples/draw_from_server.py http://localhost:8000 LM "a whale above a guitar on pink"
"""

import sys
from uuid import uuid4

import httpx
import torch

from svqvae_hf import SVQVAEProcessor
from svqvae_hf.pipelines.captions import keep_known_words

TRIES = 8


def draw(server: str, model: str, caption: str, scale: float = 1.5, **sampling: float) -> torch.Tensor:
    """Draws the ids `(height, width)` of one picture."""
    processor = SVQVAEProcessor.from_pretrained(model)
    (caption,) = keep_known_words(processor.tokenizer, [caption])
    vocabulary = processor.vocabulary
    grid = vocabulary.grids[0]
    rows, columns = grid
    begun_answer = {"role": "assistant", "content": processor.begin_image(grid)}
    prompts = []
    for text in (processor.no_condition, caption, processor.no_condition):  # the first wakes the server for the pair
        chat = [{"role": "user", "content": text}, begun_answer]
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

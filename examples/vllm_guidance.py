"""Draws with classifier-free guidance in vLLM. Each picture is a pair of requests, with and without its caption.

A logits processor joins the logits of a pair, and equal seeds make both continue with the same token.

python examples/vllm_guidance.py LM "a whale above a guitar on pink" --guidance_scale 1.5
"""

import argparse
from typing import Any

import torch
from vllm import LLM, SamplingParams
from vllm.v1.sample.logits_processor import LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

from svqvae_hf import SVQVAEProcessor


class GuidancePairs(LogitsProcessor):
    """Joins the logits of two requests with `extra_args={"guidance": [pair, is_conditional, scale]}`."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool):
        self.requests: dict[int, tuple[list, list[int]]] = {}  # by row: the argument, and the tokens so far

    def is_argmax_invariant(self) -> bool:
        """Whether greedy sampling needs no guidance."""
        return False

    def update_state(self, batch_update: Any) -> None:
        """Follows requests that come, go and change places."""
        process_dict_updates(
            self.requests, batch_update, lambda params, _, tokens: (params.extra_args["guidance"], tokens)
        )

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Joins logits `(requests, vocab_size)` in place."""
        pairs: dict[int, dict[bool, int]] = {}
        for row, ((pair, is_conditional, _), _) in self.requests.items():
            pairs.setdefault(pair, {})[is_conditional] = row
        for pair, rows in pairs.items():
            if len(rows) < 2 or len({len(self.requests[row][1]) for row in rows.values()}) > 1:
                raise ValueError(
                    f"both requests of pair {pair} must be at the same token in each step. Draw fewer at once."
                )
            conditional, unconditional = logits[rows[True]], logits[rows[False]]
            guided = unconditional + self.requests[rows[True]][0][2] * (conditional - unconditional)
            logits[[*rows.values()]] = guided.where(conditional.isfinite(), -torch.inf)  # others are not allowed
        return logits


def main() -> None:
    """Draws one picture per caption."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("language_model", help="folder of a language model with image tokens")
    parser.add_argument("captions", nargs="+", help="captions")
    parser.add_argument("--guidance_scale", type=float, default=1.5, help="scale of guidance (default: 1.5)")
    parser.add_argument("--temperature", type=float, default=0.1, help="0 takes the most likely codes (default: 0.1)")
    parser.add_argument(
        "--top_k", type=int, default=20, help="number of codes to sample from, 0 for all (default: 20)"
    )
    args = parser.parse_args()

    processor = SVQVAEProcessor.from_pretrained(args.language_model)
    vocabulary, grid = processor.vocabulary, processor.vocabulary.grids[0]
    requests, sampling = [], []
    for pair, caption in enumerate(args.captions):
        for is_conditional in (True, False):
            chat = [{"role": "user", "content": caption if is_conditional else processor.no_condition}]
            prompt = processor.apply_chat_template(chat, add_generation_prompt=True) + processor.begin_image(grid)
            requests.append({"prompt_token_ids": processor(text=prompt)["input_ids"][0]})
            options = {"temperature": args.temperature, "top_k": args.top_k, "seed": pair, "detokenize": False}
            options |= {"max_tokens": grid[0] * grid[1], "min_tokens": grid[0] * grid[1]}
            options["allowed_token_ids"] = [*range(vocabulary.first_token, vocabulary.begin)]
            sampling.append(
                SamplingParams(**options, extra_args={"guidance": [pair, is_conditional, args.guidance_scale]})
            )
    server = LLM(args.language_model, dtype="float32", logits_processors=[GuidancePairs], max_num_seqs=len(requests))
    answers = server.generate(requests, sampling)[::2]
    grids = [torch.tensor(answer.outputs[0].token_ids).view(grid) - vocabulary.first_token for answer in answers]
    for number, image in enumerate(processor.decode_images(grids)):
        image.save(f"{number}.png")


if __name__ == "__main__":
    main()

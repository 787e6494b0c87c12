"""Classifier-free guidance in vLLM, as a logits processor.

A picture is a pair of requests with equal seeds, with and without its caption. If both are at the same token, the
processor joins their logits, so both continue with the same token. A request without its partner is drawn unguided.

The server's option is `--logits-processors vllm_guidance:GuidancePairs`, with this folder in PYTHONPATH.
"""

import math
from typing import Any, NamedTuple

import torch
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates


class Request(NamedTuple):
    """A request of a pair: its pair, the scale of guidance, whether it has the caption, and its tokens so far."""

    pair: str
    scale: float
    is_conditional: bool
    tokens: list[int]


class GuidancePairs(LogitsProcessor):
    """Joins the logits of requests with equal `guidance_pair` in `vllm_xargs`.

    Further values are `guidance_scale`, and `no_condition`, the token that tells the request without a caption.
    """

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool):
        self.requests: dict[int, Request] = {}  # by row

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Refuses a request with other values, before it reaches the engine."""
        extra = sampling_params.extra_args or {}
        if "guidance_pair" not in extra:
            return
        scale = extra.get("guidance_scale")
        token = extra.get("no_condition")
        is_finite = isinstance(scale, int | float) and math.isfinite(scale)
        if not is_finite or not isinstance(token, int):
            raise ValueError(
                "`guidance_pair` must come with a finite `guidance_scale` and a token id `no_condition`, got "
                f"{scale!r} and {token!r}."
            )

    def is_argmax_invariant(self) -> bool:
        """Whether greedy sampling needs no guidance."""
        return False

    def update_state(self, batch_update: Any) -> None:
        """Follows requests that come, go and change places."""
        process_dict_updates(self.requests, batch_update, self._read)

    @staticmethod
    def _read(params: SamplingParams, prompt: list[int] | None, tokens: list[int]) -> Request | None:
        extra = params.extra_args or {}
        if "guidance_pair" not in extra:
            return None
        is_conditional = extra["no_condition"] not in (prompt or ())
        return Request(str(extra["guidance_pair"]), extra["guidance_scale"], is_conditional, tokens)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Joins logits `(requests, vocab_size)` in place."""
        rows_with_caption: dict[tuple[str, int], int] = {}  # by the pair and the number of tokens so far
        rows_without: dict[tuple[str, int], int] = {}
        for row, request in self.requests.items():
            step = (request.pair, len(request.tokens))
            if request.is_conditional:
                rows_with_caption[step] = row
            else:
                rows_without[step] = row
        for step, row in rows_with_caption.items():
            if step not in rows_without:
                continue  # the request without its partner is not guided
            partner_row = rows_without[step]
            conditional = logits[row]
            unconditional = logits[partner_row]
            guided = unconditional + self.requests[row].scale * (conditional - unconditional)
            is_allowed = conditional.isfinite() & unconditional.isfinite()
            logits[[row, partner_row]] = guided.where(is_allowed, -torch.inf)
        return logits

"""Sampling of tokens from a causal language model, with its cache and with guidance."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel

from svqvae_hf.pipelines.reserved_cache import reserve
from svqvae_hf.pipelines.sampling import Generators, check_finite, draw
from svqvae_hf.pipelines.sequences import LayoutLogitsProcessor, SequenceLayout


class TokenSampler:
    """Samples ids of sequences one by one, with the cached keys and values of the tokens before.

    Args:
        language_model ([`~transformers.PreTrainedModel`]): Causal language model.
        layout ([`SequenceLayout`]): Layout of the sequences.
        captions (`dict[str, torch.Tensor]`): Further arguments of a model for captions.
        guide (`Callable`): Guidance, which joins logits of a batch and of the same batch without its condition.
        guided_ids (`int`): Number of ids that are sampled with guidance.
        warpers (`list[LogitsProcessor]`): Temperature, top-k and top-p.
        greedy (`bool`): Whether to take the most likely ids.
        generator (`torch.Generator` or a list of them, *optional*): Source of randomness.
    """

    def __init__(
        self,
        language_model: PreTrainedModel,
        layout: SequenceLayout,
        captions: dict[str, torch.Tensor],
        *,
        guide: Callable[[torch.Tensor], torch.Tensor],
        guided_ids: int,
        warpers: list[LogitsProcessor],
        greedy: bool,
        generator: Generators,
    ):
        self.language_model = language_model
        self.layout = layout
        self.captions = captions
        self.guide = guide
        self.guided_ids = guided_ids  # still to come
        self.processors = LogitsProcessorList([LayoutLogitsProcessor(layout), *warpers])
        self.greedy = greedy
        self.generator = generator
        self.forget()

    def forget(self) -> None:
        """Drops the cached keys and values, after tokens have been replaced."""
        self.cache: Any = None
        self.read = 0
        self.doubled = False  # whether the cache has a second half without labels

    def sample(self, sequences: torch.Tensor, row: range) -> None:
        """Samples the ids at successive positions of sequences `(batch, length)`, in place."""
        highest = []
        for position in row:
            before = sequences[:, :position]
            scores = self.processors(before, self._next_logits(before))
            highest.append(scores.amax(-1))
            sequences[:, position] = scores.argmax(-1) if self.greedy else draw(scores, self.generator)
            self.guided_ids = max(0, self.guided_ids - 1)
        check_finite(torch.stack(highest), self.language_model, "language model")

    def _next_logits(self, sequences: torch.Tensor) -> torch.Tensor:
        """Float32 logits `(batch, vocab_size)` of the next token; `sequences` must extend the last call's."""
        if self.doubled and not self.guided_ids:  # guidance has ended
            self.cache.batch_select_indices(torch.arange(len(sequences)))
        self.doubled = self.guided_ids > 0
        tokens, captions = sequences[:, self.read :], dict(self.captions)
        if self.read:
            captions.pop("prompt_embeds", None)  # in the cache
        if self.doubled:  # the second half has no label
            tokens = tokens.repeat(2, 1)
            captions = {name: torch.cat([each, each]) for name, each in captions.items()}
            if not self.read:
                tokens[len(sequences) :, 0] = self.layout.unconditional_token
        output = self.language_model(input_ids=tokens, use_cache=True, cache=self.cache, **captions)
        self.cache = output.get("cache")
        if self.cache is None:
            raise ValueError(
                f"`language_model` must return its keys and values, but {type(self.language_model).__name__} does "
                "not. Use a causal language model with attention."
            )
        if not self.read:
            reserve(self.cache, self.layout.length - sequences.shape[1])
        self.read = sequences.shape[1]
        logits = output.logits[:, -1].float()
        return self.guide(logits) if self.doubled else logits

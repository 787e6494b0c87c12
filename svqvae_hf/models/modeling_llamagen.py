"""LlamaGen's language models (arXiv 2406.06525): Llamas whose rotation is two-dimensional.

    class token or caption features, then ids row by row
        --embed--> (RMSNorm, attention, RMSNorm, SwiGLU) x layers --RMSNorm, head--> logits of codes

transformers' Ernie 4.5 is a Llama that rotates neighbouring channels in float32, as LlamaGen does.
[`LlamaGenForCausalLM`] replaces its angles, which follow the row and the column of an id, and its head.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import Cache, Ernie4_5ForCausalLM, StaticCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_llamagen import LlamaGenConfig

MISSING_CAPTIONS = (
    "`prompt_embeds` must be passed with the first tokens, because this model has captions. Pass the caption "
    "features; sequences that begin with the unconditional token need them too, but do not read them."
)


class LlamaGenRotaryEmbedding(nn.Module):
    """Rotation of queries and keys by the row and the column of an id, in the form that Ernie 4.5 reads.

    It computes in float32, and has no buffers, which `model.to(torch.bfloat16)` would round.

    Args:
        config ([`LlamaGenConfig`]): Config of the model.
    """

    def __init__(self, config: LlamaGenConfig):
        super().__init__()
        self.config = config

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Computes the cosines and sines that Ernie 4.5 rotates queries and keys by.

        For condition tokens both are 0, as in LlamaGen. So the queries and keys of these tokens become 0.

        Args:
            x (`torch.Tensor`): Any tensor on the device of the result.
            position_ids (`torch.Tensor` of shape `(batch, length)`): Positions, condition tokens included.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: Cosines and sines `(batch, length, head_dim)`, float32.
        """
        positions_in_image = position_ids[..., None] - self.config.num_condition_tokens  # (batch, length, 1)
        angles_of_pairs = self._angles_of_pairs(positions_in_image)  # (batch, length, head_dim / 2)
        # Ernie 4.5 takes an angle per channel, but reads only the first half of them, as the angles of the pairs. The
        # second half fills the shape, and its values do not matter.
        angles = torch.cat([angles_of_pairs, angles_of_pairs], dim=-1)  # (batch, length, head_dim)
        is_in_image = positions_in_image >= 0  # (batch, length, 1), False for condition tokens
        cosines = angles.cos() * is_in_image
        sines = angles.sin() * is_in_image
        return cosines, sines

    def _angles_of_pairs(self, positions_in_image: torch.Tensor) -> torch.Tensor:
        """Angles `(batch, length, head_dim / 2)` of ids at these positions of an image, `(batch, length, 1)`.

        Neighbouring channels form a pair, which is rotated by one angle. The angles of the first half of the pairs
        follow the row of an id, the angles of the second half follow its column.
        """
        pairs_per_axis = self.config.head_dim // 4
        exponents = torch.arange(pairs_per_axis, device=positions_in_image.device, dtype=torch.float32)
        exponents = exponents / pairs_per_axis
        frequencies = 1 / self.config.rope_parameters["rope_theta"] ** exponents  # (pairs per axis,)
        rows = positions_in_image // self.config.grid_size
        columns = positions_in_image % self.config.grid_size
        angles_by_row = rows * frequencies  # (batch, length, pairs per axis)
        angles_by_column = columns * frequencies  # (batch, length, pairs per axis)
        return torch.cat([angles_by_row, angles_by_column], dim=-1)


class CodeHead(nn.Linear):
    """Logits of the codes. All other tokens get the lowest finite logit, because they are never predicted.

    Args:
        config ([`LlamaGenConfig`]): Config of the model.
    """

    def __init__(self, config: LlamaGenConfig):
        super().__init__(config.hidden_size, config.codebook_size, bias=False)
        self.config = config

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Computes logits `(batch, length, vocab_size)`."""
        logits = super().forward(hidden_states)
        num_other_tokens = self.config.vocab_size - self.config.codebook_size
        lowest = torch.finfo(logits.dtype).min
        return F.pad(logits, (0, num_other_tokens), value=lowest)


class CaptionProjection(nn.Module):
    """Projects caption features to the channels of the model.

    Args:
        caption_dim (`int`): Channels of the features.
        hidden_size (`int`): Channels of the model.
    """

    def __init__(self, caption_dim: int, hidden_size: int):
        super().__init__()
        self.fc1 = nn.Linear(caption_dim, hidden_size, bias=False)
        self.fc2 = nn.Linear(hidden_size, hidden_size, bias=False)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Projects features `(batch, length, caption_dim)`."""
        return self.fc2(F.gelu(self.fc1(features), approximate="tanh"))


class LlamaGenForCausalLM(Ernie4_5ForCausalLM):
    """LlamaGen's language model for classes or captions.

    A sequence is a condition token and the ids of an image, row by row. A class is a token of its own. With captions,
    the condition token stands for `num_condition_tokens` positions, which hold projected features of the caption. Both
    kinds take and return one position per token, so both work in an [`SVQVAEAutoregressivePipeline`].

    Args:
        config ([`LlamaGenConfig`]): Config of the model.
    """

    config_class = LlamaGenConfig
    _tied_weights_keys: dict[str, str] = {}  # the head has rows for codes alone
    _tp_plan: dict[str, str] = {}  # the head pads its logits, so its rows cannot be spread over devices
    # Code that came from a repository is saved with its model.
    _auto_class = "AutoModel" if "diffusers_modules" in __name__ else None

    def __init__(self, config: LlamaGenConfig):
        super().__init__(config)
        self.model.rotary_emb = LlamaGenRotaryEmbedding(config)
        self.lm_head = CodeHead(config)
        if config.caption_dim is not None:
            self.caption_projection = CaptionProjection(config.caption_dim, config.hidden_size)
            features = torch.randn(config.num_condition_tokens, config.caption_dim) / config.caption_dim**0.5
            self.register_buffer("uncond_embedding", features)  # in LlamaGen it is never trained
        self.post_init()

    def _get_resized_lm_head(self, old_lm_head: CodeHead, *_: Any, **__: Any) -> CodeHead:
        """Returns the head unchanged, because it has rows only for codes, however many tokens are embedded."""
        return old_lm_head

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        prompt_embeds: torch.Tensor | None = None,
        prompt_attention_mask: torch.Tensor | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Predicts the next token at each position.

        Args:
            input_ids (`torch.Tensor` of shape `(batch, length)`, *optional*): Tokens.
            attention_mask (`torch.Tensor` of shape `(batch, length)`, *optional*): 1 for tokens that are
                seen, those in the cache included. All are seen by default.
            position_ids (`torch.Tensor` of shape `(batch, length)`, *optional*): Positions, the caption's first.
                With `prompt_embeds`, their shape is `(batch, num_condition_tokens + length - 1)`.
            inputs_embeds (`torch.Tensor` of shape `(batch, length, hidden_size)`, *optional*): Embeddings, instead of
                `input_ids`. If the model reads captions, the caption must already be in the cache.
            labels (`torch.Tensor` of shape `(batch, length)`, *optional*): Tokens for the loss, -100 for none.
            logits_to_keep (`int`, defaults to 0): Number of last positions with logits, 0 for all. A model with
                classes also takes a `torch.Tensor` of positions.
            prompt_embeds (`torch.Tensor` of shape `(batch, num_condition_tokens, caption_dim)`, *optional*): Features
                of the captions, their text at the end. Pass them with the first tokens only; later calls find them in
                `cache`. They are replaced in rows that begin with the unconditional token.
            prompt_attention_mask (`torch.Tensor` of shape `(batch, num_condition_tokens)`, *optional*): 1 for features
                of text, 0 for padding. Pass it with all tokens. By default, all features are seen.
            cache ([`~transformers.Cache`], *optional*): Keys and values of the tokens before.
            **kwargs: Arguments of [`~transformers.Ernie4_5ForCausalLM`]'s `forward`.

        Returns:
            [`~transformers.modeling_outputs.CausalLMOutputWithPast`]: `logits` `(batch, length, vocab_size)`.

        Raises:
            ValueError: If the features have another shape, if they are missing and there is no cache, or if the
                model has classes instead of captions.
        """
        former_cache = kwargs.pop("past_key_values", None)  # the name of `cache` in older code
        if former_cache is not None:
            cache = former_cache
        if self.config.caption_dim is None:
            if prompt_embeds is not None or prompt_attention_mask is not None:
                raise ValueError("`prompt_embeds` and `prompt_attention_mask` are for models with captions.")
        elif prompt_embeds is not None:
            if input_ids is None or inputs_embeds is not None:
                raise ValueError("`prompt_embeds` need `input_ids`, and no `inputs_embeds`. Pass the tokens.")
            length = input_ids.shape[1]
            attention_mask = self._mask_positions(attention_mask, prompt_attention_mask, length)
            inputs_embeds = self._embed(input_ids, prompt_embeds)
            input_ids = None
            if logits_to_keep == 0 or logits_to_keep > length:
                logits_to_keep = length  # one position per token, without the other positions of the caption
        elif cache is None:
            raise ValueError(MISSING_CAPTIONS)
        else:
            # The mask covers a whole image. transformers reads as much of it as the cache holds.
            most_tokens = 1 + self.config.grid_size**2  # the condition token and all ids
            attention_mask = self._mask_positions(attention_mask, prompt_attention_mask, most_tokens)
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            labels=labels,
            logits_to_keep=logits_to_keep,
            cache=cache,
            **kwargs,
        )

    def _mask_positions(
        self, attention_mask: torch.Tensor | None, prompt_attention_mask: torch.Tensor | None, num_tokens: int
    ) -> torch.Tensor | None:
        """Mask of all positions: of the features of the caption, then of the ids.

        Args:
            attention_mask (`torch.Tensor` of shape `(batch, 1 + ids)`, *optional*): Mask of the tokens: of the
                condition token, which stands for the whole caption, and of the ids.
            prompt_attention_mask (`torch.Tensor` of shape `(batch, num_condition_tokens)`, *optional*): Mask of the
                features of the caption.
            num_tokens (`int`): Number of tokens, `1 + ids`.

        Returns:
            `torch.Tensor` of shape `(batch, num_condition_tokens + ids)`: 1 for positions that are seen. `None` if
            there is no mask, because all positions are seen.
        """
        if attention_mask is None:
            if prompt_attention_mask is None:
                return None
            num_ids = num_tokens - 1
            return F.pad(prompt_attention_mask, (0, num_ids), value=1)  # all ids are seen
        mask_of_condition = attention_mask[:, :1]  # (batch, 1)
        mask_of_ids = attention_mask[:, 1:]  # (batch, ids)
        if prompt_attention_mask is None:
            # All features are seen if the condition token is seen, and none of them otherwise.
            prompt_attention_mask = mask_of_condition.expand(-1, self.config.num_condition_tokens)
        return torch.cat([prompt_attention_mask, mask_of_ids], dim=1)

    def _embed(self, input_ids: torch.Tensor, prompt_embeds: torch.Tensor) -> torch.Tensor:
        """Embeddings of captions and ids `(batch, num_condition_tokens + ids, hidden_size)`."""
        expected = (len(input_ids), self.config.num_condition_tokens, self.config.caption_dim)
        if prompt_embeds.shape != expected:
            raise ValueError(
                f"`prompt_embeds` must have shape {expected} (batch, num_condition_tokens, caption_dim), got "
                f"{tuple(prompt_embeds.shape)}."
            )
        condition_token = input_ids[:, 0]
        image_ids = input_ids[:, 1:]
        is_unconditional = condition_token == self.config.unconditional_token  # (batch,)
        captions = prompt_embeds.to(self.uncond_embedding.dtype)
        features = torch.where(is_unconditional[:, None, None], self.uncond_embedding, captions)
        caption_embeddings = self.caption_projection(features)  # (batch, num_condition_tokens, hidden_size)
        id_embeddings = self.model.embed_tokens(image_ids)  # (batch, ids, hidden_size)
        return torch.cat([caption_embeddings, id_embeddings], dim=1)

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        inputs_embeds: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Chooses the arguments of the next call of `forward` in transformers' `generate`.

        transformers makes a mask, positions and, if asked for, a cache of fixed length. Each has one entry per token.
        In a model with captions the first token, the condition token, takes `num_condition_tokens` positions, so all
        three are too short. `forward` finds the mask and the positions by itself. A longer cache is made here.

        Args:
            input_ids (`torch.Tensor` of shape `(batch, length)`): Tokens.
            inputs_embeds (`torch.Tensor`, *optional*): Embeddings of the first tokens, instead of these.
            prompt_embeds (`torch.Tensor`, *optional*): Features of the captions.
            **kwargs: Further arguments of `generate`.
        """
        inputs = super().prepare_inputs_for_generation(input_ids, inputs_embeds=inputs_embeds, **kwargs)
        has_captions = self.config.caption_dim is not None
        if not has_captions:
            return inputs
        # Both have one entry for the whole caption, which is too few.
        inputs.pop("attention_mask", None)
        inputs.pop("position_ids", None)
        # The first call puts the caption into the cache. Without a cache, each call needs the caption.
        is_first_call = bool(kwargs.get("is_first_iteration"))
        uses_cache = bool(kwargs.get("use_cache", True))
        needs_caption = is_first_call or not uses_cache
        if not needs_caption:
            return inputs
        if prompt_embeds is None:
            raise ValueError(MISSING_CAPTIONS)
        inputs["prompt_embeds"] = prompt_embeds
        has_fixed_length = isinstance(inputs.get("cache"), StaticCache)
        if has_fixed_length:
            length = self.config.max_position_embeddings  # of the caption and a whole image
            inputs["cache"] = StaticCache(config=self.config, max_cache_len=length)
        return inputs

"""LlamaGen's language models (arXiv 2406.06525): Llamas whose rotation is two-dimensional.

    class token or caption features, then ids row by row
        --embed--> (RMSNorm, attention, RMSNorm, SwiGLU) x layers --RMSNorm, head--> logits of codes

An attention rotates queries and keys by row and column of their id. [`LlamaGenModel`] and [`LlamaGenForCausalLM`] take
the rest from transformers' Llama: masks, caches and outputs.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import Cache, LlamaForCausalLM, LlamaModel, PreTrainedModel, StaticCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRMSNorm, eager_attention_forward

from .configuration_llamagen import LlamaGenConfig

FEW_ROWS = 32
MISSING_CAPTIONS = (
    "`prompt_embeds` must be passed with the first tokens, because this model has captions. Pass the caption "
    "features; sequences that begin with the unconditional token need them too, but do not read them."
)


class LlamaGenRotaryEmbedding(nn.Module):
    """Angles by row and column of an id, in float32. It has no buffers, which `model.to(torch.bfloat16)` would round.

    Args:
        config ([`LlamaGenConfig`]): Config of the model.
    """

    def __init__(self, config: LlamaGenConfig):
        super().__init__()
        self.config = config

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Computes the factors of the rotation. Both are 0 for condition tokens, whose queries and keys thus vanish.

        Args:
            x (`torch.Tensor`): Any tensor on the device of the result.
            position_ids (`torch.Tensor` of shape `(batch, length)`): Positions, condition tokens included.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: Cosines and sines `(batch, length, head_dim)`, float32. The channels
            of a pair (0, 1), (2, 3), ... have the same angle: of the row in the first half, of the column in the
            second.
        """
        half = self.config.head_dim // 2
        exponents = torch.arange(0, half, 2, device=x.device, dtype=torch.float32) / half
        frequencies = 1 / self.config.rope_parameters["rope_theta"] ** exponents
        ids = position_ids[..., None] - self.config.num_condition_tokens
        rows, columns = ids // self.config.grid_size, ids % self.config.grid_size
        angles = torch.cat([rows * frequencies, columns * frequencies], dim=-1).repeat_interleave(2, dim=-1)
        is_image = ids >= 0
        return angles.cos() * is_image, angles.sin() * is_image


def rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates each pair of neighbouring channels, in float32.

    Args:
        states (`torch.Tensor` of shape `(batch, heads, length, head_dim)`): Queries or keys.
        cos (`torch.Tensor` of shape `(batch, length, head_dim)`): Cosines of the angles.
        sin (`torch.Tensor` of shape `(batch, length, head_dim)`): Sines of the angles.
    """
    turned = torch.stack([-states[..., 1::2], states[..., 0::2]], dim=-1).flatten(-2)  # each pair by 90 degrees
    return (states.float() * cos[:, None] + turned.float() * sin[:, None]).to(states.dtype)


class FewRowsLinear(nn.Linear):
    """Linear layer without bias, made for the few rows of a decoding step.

    On a CPU, most of such a step is spent reading weights. The product `weight @ rows.T` reads them up to 2.6 times as
    fast as `rows @ weight.T`.

    Args:
        in_features (`int`): Channels of the input.
        out_features (`int`): Channels of the output.
    """

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features, bias=False)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """`(..., in_features)` -> `(..., out_features)`."""
        rows = input.flatten(0, -2)
        if len(rows) > FEW_ROWS or input.device.type != "cpu" or input.dtype != torch.float32:
            return super().forward(input)
        return torch.mm(self.weight, rows.t()).t().contiguous().unflatten(0, input.shape[:-1])


class LlamaGenAttention(nn.Module):
    """Causal attention with rotated queries and keys.

    Args:
        config ([`LlamaGenConfig`]): Config of the model.
        layer_idx (`int`): Number of the layer, for the cache.
    """

    num_key_value_groups = 1
    attention_dropout = 0.0
    is_causal = True

    def __init__(self, config: LlamaGenConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.scaling = config.head_dim**-0.5
        width = config.hidden_size
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (FewRowsLinear(width, width) for _ in range(4))

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`(batch, length, hidden_size)` -> the same shape, and the attention weights where they are computed."""
        query, key, value = (
            projection(hidden_states).unflatten(-1, (-1, self.config.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )  # (batch, heads, length, head_dim)
        query, key = rotate(query, *position_embeddings), rotate(key, *position_embeddings)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        attended, weights = attend(self, query, key, value, attention_mask, scaling=self.scaling, **kwargs)
        return self.o_proj(attended.flatten(2).contiguous()), weights  # from (batch, length, heads, head_dim)


class LlamaGenMLP(nn.Module):
    """SwiGLU feed-forward block.

    Args:
        config ([`LlamaGenConfig`]): Config of the model.
    """

    def __init__(self, config: LlamaGenConfig):
        super().__init__()
        self.gate_proj = FewRowsLinear(config.hidden_size, config.intermediate_size)
        self.up_proj = FewRowsLinear(config.hidden_size, config.intermediate_size)
        self.down_proj = FewRowsLinear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`(batch, length, hidden_size)` -> the same shape."""
        return self.down_proj(F.silu(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


class LlamaGenDecoderLayer(GradientCheckpointingLayer):
    """Attention and feed-forward block, each normalised and beside a shortcut.

    Args:
        config ([`LlamaGenConfig`]): Config of the model.
        layer_idx (`int`): Number of the layer.
    """

    def __init__(self, config: LlamaGenConfig, layer_idx: int):
        super().__init__()
        self.self_attn = LlamaGenAttention(config, layer_idx)
        self.mlp = LlamaGenMLP(config)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """`(batch, length, hidden_size)` -> the same shape."""
        attended, _ = self.self_attn(self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class LlamaGenModel(LlamaModel):
    """Embedding, layers and norm. Its forward pass is Llama's.

    Args:
        config ([`LlamaGenConfig`]): Config of the model.
    """

    config_class = LlamaGenConfig
    _no_split_modules = ["LlamaGenDecoderLayer"]
    _can_record_outputs = {"hidden_states": LlamaGenDecoderLayer, "attentions": LlamaGenAttention}

    def __init__(self, config: LlamaGenConfig):
        PreTrainedModel.__init__(self, config)  # not Llama's, whose layers are others
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(LlamaGenDecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaGenRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()


class CodeHead(FewRowsLinear):
    """Logits of the codes. All other tokens get the lowest finite logit, because they are never predicted.

    Args:
        config ([`LlamaGenConfig`]): Config of the model.
    """

    def __init__(self, config: LlamaGenConfig):
        super().__init__(config.hidden_size, config.codebook_size)
        self.config = config

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Computes logits `(batch, length, vocab_size)`."""
        logits = super().forward(hidden_states)
        other_tokens = self.config.vocab_size - self.config.codebook_size
        return F.pad(logits, (0, other_tokens), value=torch.finfo(logits.dtype).min)


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


class LlamaGenForCausalLM(LlamaForCausalLM):
    """LlamaGen's language model for classes or captions.

    A sequence is a condition token and the ids of an image, row by row. A class is a token of its own. With captions,
    the condition token stands for `num_condition_tokens` positions, which hold projected features of the caption. Both
    kinds take and return one position per token, so both work in an [`SVQVAEAutoregressivePipeline`].

    Args:
        config ([`LlamaGenConfig`]): Config of the model.
    """

    config_class = LlamaGenConfig
    _no_split_modules = ["LlamaGenDecoderLayer"]
    _tied_weights_keys: dict[str, str] = {}  # the head has rows for codes alone
    _auto_class = "AutoModel" if "diffusers_modules" in __name__ else None  # only such code is saved with a model

    def __init__(self, config: LlamaGenConfig):
        PreTrainedModel.__init__(self, config)  # not LlamaForCausalLM: it would make a plain Llama
        self.model = LlamaGenModel(config)
        self.vocab_size = config.vocab_size
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
                `cache`. In rows that begin with the unconditional token they are replaced.
            prompt_attention_mask (`torch.Tensor` of shape `(batch, num_condition_tokens)`, *optional*): 1 for features
                of text, 0 for padding. Passed with all tokens. All features are seen by default.
            cache ([`~transformers.Cache`], *optional*): Keys and values of the tokens before.
            **kwargs: Arguments of [`~transformers.LlamaForCausalLM`]'s `forward`.

        Returns:
            [`~transformers.modeling_outputs.CausalLMOutputWithPast`]: `logits` `(batch, length, vocab_size)`.

        Raises:
            ValueError: The features have another shape, or are missing without a cache, or the model has classes
                instead of captions.
        """
        former = kwargs.pop("past_key_values", None)
        cache = cache if former is None else former
        if self.config.caption_dim is None:
            if prompt_embeds is not None or prompt_attention_mask is not None:
                raise ValueError("`prompt_embeds` and `prompt_attention_mask` are for models with captions.")
        elif prompt_embeds is not None:
            if input_ids is None or inputs_embeds is not None:
                raise ValueError("`prompt_embeds` need `input_ids`, and no `inputs_embeds`. Pass the tokens.")
            length = input_ids.shape[1]
            attention_mask = self._mask_positions(attention_mask, prompt_attention_mask, length)
            logits_to_keep = min(logits_to_keep, length) or length
            inputs_embeds, input_ids = self._embed(input_ids, prompt_embeds), None
        elif cache is None:
            raise ValueError(MISSING_CAPTIONS)
        else:  # all tokens before are in the cache, whose length bounds the mask
            attention_mask = self._mask_positions(attention_mask, prompt_attention_mask, 1 + self.config.grid_size**2)
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
        self, attention_mask: torch.Tensor | None, prompt_attention_mask: torch.Tensor | None, tokens: int
    ) -> torch.Tensor | None:
        """Mask of the caption and of the `tokens - 1` tokens after it."""
        if prompt_attention_mask is None:
            if attention_mask is None:
                return None
            prompt_attention_mask = attention_mask[:, :1].expand(-1, self.config.num_condition_tokens)
        if attention_mask is None:
            return F.pad(prompt_attention_mask, (0, tokens - 1), value=1)
        return torch.cat([prompt_attention_mask, attention_mask[:, 1:]], dim=1)

    def _embed(self, input_ids: torch.Tensor, prompt_embeds: torch.Tensor) -> torch.Tensor:
        """Embeddings of captions and ids `(batch, num_condition_tokens + ids, hidden_size)`."""
        expected = (len(input_ids), self.config.num_condition_tokens, self.config.caption_dim)
        if prompt_embeds.shape != expected:
            raise ValueError(
                f"`prompt_embeds` must have shape {expected} (batch, num_condition_tokens, caption_dim), got "
                f"{tuple(prompt_embeds.shape)}."
            )
        is_dropped = (input_ids[:, :1] == self.config.unconditional_token)[..., None]
        features = torch.where(is_dropped, self.uncond_embedding, prompt_embeds.to(self.uncond_embedding.dtype))
        return torch.cat([self.caption_projection(features), self.model.embed_tokens(input_ids[:, 1:])], dim=1)

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        inputs_embeds: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Chooses the arguments of the next call of `forward` in transformers' `generate`.

        Args:
            input_ids (`torch.Tensor` of shape `(batch, length)`): Tokens.
            inputs_embeds (`torch.Tensor`, *optional*): Embeddings of the first tokens, instead of these.
            prompt_embeds (`torch.Tensor`, *optional*): Features of the captions.
            **kwargs: Further arguments of `generate`.
        """
        inputs = super().prepare_inputs_for_generation(input_ids, inputs_embeds=inputs_embeds, **kwargs)
        if self.config.caption_dim is not None:
            for name in ("attention_mask", "position_ids"):  # counted without the positions of the caption
                inputs.pop(name, None)
            if kwargs.get("is_first_iteration") or not kwargs.get("use_cache", True):
                if prompt_embeds is None:
                    raise ValueError(MISSING_CAPTIONS)
                inputs["prompt_embeds"] = prompt_embeds
                if isinstance(inputs.get("cache"), StaticCache):  # made for tokens: a caption has more positions
                    length = self.config.max_position_embeddings
                    inputs["cache"] = StaticCache(config=self.config, max_cache_len=length)
        return inputs

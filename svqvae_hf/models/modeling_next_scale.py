"""NextScaleTransformer: predicts the ids of an image scale by scale, each scale in one step.

    class, start     codes of scale 0      codes of scale 1                 each token sees its own scale
         |            |  resize             |  resize                       and all scales before
         v            v  word_embed         v  word_embed
      scale 0      scale 1               scale 2          + positions
         |            |                     |
         +------------+---------------------+------> blocks -> head -> logits of the ids of each scale

A block is attention, then an MLP, both modulated by the class (adaLN). Queries and keys have length one; a learned
factor per head scales the queries. Positions are a learned grid, averaged to the height and width of each scale, so
scales of any size work. Only the positions tell the scales apart. If the model reads captions, one stands before the
first scale. It is padded to a fixed number of tokens.

The architecture and the names of the weights come from FlexVAR (arXiv 2502.20313), which follows VAR
(arXiv 2404.02905).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention import AttentionModuleMixin
from diffusers.utils import BaseOutput
from torch import nn
from transformers import DynamicCache

from .checks import check_depth, check_json_integer
from .layers import AttentionProcessor
from .loading import StrictLoadingMixin
from .resizing import resize

NORM_EPS = 1e-6
SMALLEST_NORM = 1e-12  # as in `F.normalize`
MLP_RATIO = 4
POSITION_PERIOD = 10_000  # of the initial positions
MAX_LOG_NORM = math.log(100)  # of queries

# Factors of FlexVAR's initial weights
INITIAL_QUERY_NORM = 4.0
HEAD_GAIN = 0.02
MODULATION_GAIN = 0.5
GATE_GAIN = 1e-3
MODULATION_WEIGHT = "ada_lin.1.weight"  # end of the names of the parameters that modulate

POSITIVE_INTEGERS = (
    "num_layers",
    "num_attention_heads",
    "attention_head_dim",
    "codebook_size",
    "codebook_embed_dim",
    "position_size",
)

Size = tuple[int, int]


@dataclass
class NextScaleTransformerOutput(BaseOutput):
    """Output of [`NextScaleTransformer`].

    Args:
        logits (`torch.Tensor` of shape `(batch, tokens, codebook_size)`): Logits in float32, scale by scale, and
            row by row within a scale.
    """

    logits: torch.Tensor


class Attention(nn.Module, AttentionModuleMixin):
    """Attention of each scale to itself and to the scales before, with queries and keys of length one."""

    def __init__(self, width: int, num_heads: int, layer: int):
        super().__init__()
        self.num_heads = num_heads
        self.layer = layer  # number of the layer, by which a cache stores its keys and values
        # The parameters and their names are FlexVAR's. `scale_mul_1H11` is the logarithm of the norm that the queries
        # of each head are scaled to. "1H11" is its shape, where H is the number of heads.
        log_of_norm = math.log(INITIAL_QUERY_NORM)
        self.scale_mul_1H11 = nn.Parameter(torch.full((1, num_heads, 1, 1), log_of_norm))
        # One matrix projects to queries, keys and values. It has no bias of its own, because in FlexVAR only the
        # queries and the values have one.
        self.mat_qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.proj = nn.Linear(width, width)
        self.processor = AttentionProcessor()

    def forward(self, hidden: torch.Tensor, lengths: Sequence[int], cache: DynamicCache | None) -> torch.Tensor:
        """`(batch, tokens, width)` -> the same shape. `lengths` are the numbers of tokens of the scales."""
        query, key, value = self.mat_qkv(hidden).chunk(3, dim=-1)
        query = self._split_heads(query + self.q_bias)  # (batch, heads, tokens, head width)
        key = self._split_heads(key)  # (batch, heads, tokens, head width)
        value = self._split_heads(value + self.v_bias)  # (batch, heads, tokens, head width)
        query = set_norm(query, self._query_norm())
        key = set_norm(key, 1.0)
        if cache is not None:
            # Adds the keys and values to the cache, which returns them for all tokens so far:
            # (batch, heads, cached tokens + tokens, head width).
            key, value = cache.update(key, value, self.layer)
        attended = self._attend_by_scale(query, key, value, lengths)  # (batch, tokens, heads, head width)
        return self.proj(attended.flatten(2))

    def _query_norm(self) -> torch.Tensor:
        """Norm, the length as a vector, of the queries of each head: `(1, heads, 1, 1)` in float32."""
        log_of_norm = self.scale_mul_1H11.float().clamp(max=MAX_LOG_NORM)
        return log_of_norm.exp()

    def _attend_by_scale(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: Sequence[int]
    ) -> torch.Tensor:
        """Attention of the tokens of each scale to the cached tokens, the scales before and their own scale.

        These are all tokens up to the last one of the scale. So one attention per scale needs no mask.

        Args:
            query (`torch.Tensor` of shape `(batch, heads, tokens, head width)`): Queries of the new tokens.
            key (`torch.Tensor` of shape `(batch, heads, cached tokens + tokens, head width)`): Keys of all tokens.
            value (`torch.Tensor` of shape `(batch, heads, cached tokens + tokens, head width)`): Values of all tokens.
            lengths (`Sequence[int]`): Numbers of tokens of the scales, whose sum is `tokens`.

        Returns:
            `torch.Tensor` of shape `(batch, tokens, heads, head width)`.
        """
        # The attention takes the tokens before the heads.
        query = query.transpose(1, 2)  # (batch, tokens, heads, head width)
        key = key.transpose(1, 2)  # (batch, cached tokens + tokens, heads, head width)
        value = value.transpose(1, 2)  # (batch, cached tokens + tokens, heads, head width)
        num_visible = key.shape[1] - query.shape[1]  # the cached tokens, and then those of one scale after the other
        attended = []
        for query_of_scale in query.split(list(lengths), dim=1):
            num_visible += query_of_scale.shape[1]
            visible_key = key[:, :num_visible]
            visible_value = value[:, :num_visible]
            # This `scale` is a factor of the products of queries and keys. `forward` has already multiplied the
            # queries by the learned factor of their head, so it is 1.
            attended.append(self.processor(query_of_scale, visible_key, visible_value, scale=1.0))
        return torch.cat(attended, dim=1)

    def _split_heads(self, features: torch.Tensor) -> torch.Tensor:
        """`(batch, tokens, width)` -> `(batch, heads, tokens, head width)`."""
        return features.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


class MLP(nn.Module):
    """Two linear layers around a GELU."""

    def __init__(self, width: int):
        super().__init__()
        self.fc1 = nn.Linear(width, MLP_RATIO * width)
        self.fc2 = nn.Linear(MLP_RATIO * width, width)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """`(batch, tokens, width)` -> the same shape."""
        return self.fc2(F.gelu(self.fc1(hidden), approximate="tanh"))


class NextScaleBlock(nn.Module):
    """Attention and MLP, each with a normalisation before and a gate after it that depend on the class."""

    def __init__(self, width: int, num_heads: int, layer: int):
        super().__init__()
        self.attn = Attention(width, num_heads, layer)
        self.ffn = MLP(width)
        self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(
        self, hidden: torch.Tensor, condition: torch.Tensor, lengths: Sequence[int], cache: DynamicCache | None
    ) -> torch.Tensor:
        """`(batch, tokens, width)` -> the same shape.

        Args:
            hidden (`torch.Tensor` of shape `(batch, tokens, width)`): Tokens of the caption, if any, and the scales.
            condition (`torch.Tensor` of shape `(batch, 1, width)`): Embedded class.
            lengths (`Sequence[int]`): Numbers of tokens of the caption, if any, and of each scale.
            cache ([`~transformers.DynamicCache`], *optional*): Keys and values of the scales before.
        """
        # Six vectors (batch, 1, width) from the class: 1 is for the attention, 2 for the MLP.
        gate1, gate2, factor1, factor2, shift1, shift2 = self.ada_lin(condition).chunk(6, dim=-1)
        attended = self.attn(modulate(hidden, factor1, shift1), lengths, cache)
        hidden = torch.addcmul(hidden, gate1, attended)  # hidden + gate1 * attended
        transformed = self.ffn(modulate(hidden, factor2, shift2))
        return torch.addcmul(hidden, gate2, transformed)  # hidden + gate2 * transformed


class ModulatedNorm(nn.Module):
    """Last normalisation, which depends on the class."""

    def __init__(self, width: int):
        super().__init__()
        self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, hidden: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        """`(batch, tokens, width)` -> the same shape."""
        factor, shift = self.ada_lin(condition).chunk(2, dim=-1)  # (batch, 1, width) each
        return modulate(hidden, factor, shift)


class NextScaleTransformer(StrictLoadingMixin):
    """Transformer that predicts the ids of a scale from the class and from the codes of the scales before.

    It can be trained for the codebook of any [`SVQVAE`]. Its weights belong to that codebook.

    Args:
        num_layers (`int`, defaults to 16): Number of blocks.
        num_attention_heads (`int`, defaults to 16): Number of attention heads.
        attention_head_dim (`int`, defaults to 64): Width of a head.
        num_classes (`int`, defaults to 1000): Number of classes, 0 for none; label `num_classes` means no class.
        codebook_size (`int`, defaults to 16384): Number of codes.
        codebook_embed_dim (`int`, defaults to 8): Dimension of a code.
        position_size (`int`, defaults to 32): Side of the learned grid of positions.
        vocab_size (`int`, defaults to 0): Number of tokens of captions; 0 for a model without captions.
        max_text_length (`int`, defaults to 0): Length of padded captions.

    Raises:
        ValueError: If a value is not a positive integer (`num_classes`, `vocab_size` and `max_text_length`
            may be 0), or there are too many layers.
    """

    component_name = "transformer"
    _supports_gradient_checkpointing = True
    _no_split_modules = ["NextScaleBlock"]
    _repeated_blocks = ["NextScaleBlock"]

    @register_to_config
    def __init__(
        self,
        num_layers: int = 16,
        num_attention_heads: int = 16,
        attention_head_dim: int = 64,
        num_classes: int = 1000,
        codebook_size: int = 16384,
        codebook_embed_dim: int = 8,
        position_size: int = 32,
        vocab_size: int = 0,
        max_text_length: int = 0,
    ):
        super().__init__()
        for name in POSITIVE_INTEGERS:
            check_json_integer(name, self.config[name])
        check_json_integer("num_classes", num_classes, least=0)
        reads_captions = bool(vocab_size or max_text_length)
        least = 1 if reads_captions else 0  # captions need a vocabulary and a length
        check_json_integer("vocab_size", vocab_size, least)
        check_json_integer("max_text_length", max_text_length, least)
        check_depth("The config", {"layers": num_layers})
        width = num_attention_heads * attention_head_dim
        self.class_emb = nn.Embedding(num_classes + 1, width)
        self.pos_start = nn.Parameter(torch.empty(1, 1, width))
        self.pos_1LC = nn.Parameter(initial_positions(position_size, width))  # channels first in spite of its name
        self.word_embed = nn.Linear(codebook_embed_dim, width)
        if vocab_size:
            self.text_emb = nn.Embedding(vocab_size, width)
            self.text_pos = nn.Parameter(torch.empty(1, max_text_length, width))
        self.blocks = nn.ModuleList(NextScaleBlock(width, num_attention_heads, layer) for layer in range(num_layers))
        self.head_nm = ModulatedNorm(width)
        self.head = nn.Linear(width, codebook_size)
        self.gradient_checkpointing = False
        self._initialise()

    def forward(
        self,
        class_labels: torch.Tensor,
        codes: Sequence[torch.Tensor],
        sizes: Sequence[Size],
        cache: DynamicCache | None = None,
        text: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> NextScaleTransformerOutput | tuple[torch.Tensor]:
        """Predicts the ids of scales, all in one pass: in training all scales, in sampling the next one.

        Args:
            class_labels (`torch.Tensor` of shape `(batch,)`): Class of each image in `[0, num_classes]`, in int64;
                `num_classes` means no class.
            codes (list of `torch.Tensor` of shape `(batch, codebook_embed_dim, h, w)`): For each scale, the codes of
                the previous one, as [`VectorQuantizer.get_codebook_entry`] returns them. The first scale of an image
                has none, so pass one fewer than `sizes` while `cache` is empty.
            sizes (list of `(height, width)`): Sizes of the scales in ids.
            cache ([`~transformers.DynamicCache`], *optional*): Keys and values of the scales before, which are added
                to it.
            text (`torch.Tensor` of shape `(batch, max_text_length)`, *optional*): Tokens of padded captions, for
                models that read captions. Only read with the first scale.
            return_dict (`bool`, defaults to `True`): Whether to return an output object or a tuple.

        Returns:
            [`NextScaleTransformerOutput`] or `tuple`: Logits of all tokens of these scales.

        Raises:
            ValueError: If the number of codes is wrong, or the text is missing or has another length.
        """
        is_first = cache is None or cache.get_seq_length() == 0
        check_number_of_codes(codes, sizes, is_first=is_first)
        condition = self.class_emb(class_labels).unsqueeze(1)  # (batch, 1, width)
        # Tokens of each part of the sequence: of the caption, if any, and of the scales
        parts: list[torch.Tensor] = []
        caption_length = 0
        if is_first and self._reads_captions(text):
            caption = self.text_emb(text) + self.text_pos  # (batch, max_text_length, width)
            caption_length = caption.shape[1]
            parts.append(caption)
        if is_first:
            start = condition + self.pos_start  # (batch, 1, width)
            inputs = [start] + self._embed_codes(codes, sizes[1:], condition.dtype)
        else:
            inputs = self._embed_codes(codes, sizes, condition.dtype)
        for tokens, size in zip(inputs, sizes, strict=True):
            parts.append(tokens + self._positions(size))  # (batch, height * width, width of the model)
        lengths = [part.shape[1] for part in parts]
        hidden = torch.cat(parts, dim=1)  # (batch, tokens, width)
        for block in self.blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden = self._gradient_checkpointing_func(block, hidden, condition, lengths, cache)
            else:
                hidden = block(hidden, condition, lengths, cache)
        hidden = hidden[:, caption_length:]  # the tokens of the scales
        logits = self.head(self.head_nm(hidden, condition)).float()
        if not return_dict:
            return (logits,)
        return NextScaleTransformerOutput(logits=logits)

    def _embed_codes(
        self, codes: Sequence[torch.Tensor], sizes: Sequence[Size], dtype: torch.dtype
    ) -> list[torch.Tensor]:
        """Tokens `(batch, height * width, width of the model)` of each scale, from the codes of the scale before.

        Both lists have one entry per scale: its size, and the codes of the scale before, which have another size.
        """
        tokens = []
        for codes_before, size in zip(codes, sizes, strict=True):
            resized = resize_codes(codes_before, size)  # (batch, height * width, codebook_embed_dim)
            tokens.append(self.word_embed(resized.to(dtype)))
        return tokens

    def _reads_captions(self, text: torch.Tensor | None) -> bool:
        """Whether the model reads captions. Raises ValueError unless `text` `(batch, length)` fits that."""
        length = self.config["max_text_length"]
        if text is None and length > 0:
            raise ValueError(f"`text` must be captions of {length} tokens, got none.")
        if text is not None and text.shape[1] != length:
            raise ValueError(f"`text` must be captions of {length} tokens, got {text.shape[1]} tokens.")
        return text is not None

    def _positions(self, size: Size) -> torch.Tensor:
        """Positions of a scale, `(1, height * width, width of the model)`."""
        resized = resize(self.pos_1LC, size, "area")  # (1, width of the model, height, width)
        return resized.flatten(2).transpose(1, 2)

    def _initialise(self) -> None:
        """Draws the weights as FlexVAR does, and sets biases to 0.

        The positions of the scales and the lengths of the queries keep the values that they were created with.
        """
        width = self.pos_start.shape[-1]
        std = math.sqrt(1 / (3 * width))
        for name, parameter in self.named_parameters():
            is_bias = name.endswith("bias")
            is_weight = name.endswith("weight") or name in ("pos_start", "text_pos")
            if is_bias:
                nn.init.zeros_(parameter)
            elif is_weight:
                gain = initial_gain(name, len(self.blocks))
                nn.init.trunc_normal_(parameter, std=gain * std)
            modulates_block = name.startswith("blocks.") and name.endswith(MODULATION_WEIGHT)
            if modulates_block:
                # Some rows of this weight compute the gates. They are drawn again, because they start far smaller.
                draw_gates(parameter, std)


def draw_gates(weight: torch.Tensor, std: float) -> None:
    """Draws again, and far smaller, the rows of a weight `(6 * width, width)` by which a block computes its gates.

    [`NextScaleBlock`] computes six vectors of `width` by the weight. The first two vectors are its gates.
    """
    width = weight.shape[1]
    rows_of_gates = weight.detach()[: 2 * width]  # (2 * width, width)
    nn.init.trunc_normal_(rows_of_gates, std=GATE_GAIN * std)


def initial_gain(name: str, num_blocks: int) -> float:
    """Factor of the standard deviation that the weights of a parameter are drawn with."""
    if name.endswith("head.weight"):
        return HEAD_GAIN
    if name.endswith(MODULATION_WEIGHT):
        return MODULATION_GAIN
    ends_residual_branch = name.endswith(("proj.weight", "fc2.weight"))
    if ends_residual_branch:
        return 1 / math.sqrt(2 * num_blocks)
    return 1.0


def check_number_of_codes(codes: Sequence[torch.Tensor], sizes: Sequence[Size], *, is_first: bool) -> None:
    """Raises ValueError unless there are codes for each scale, except for the first scale of an image."""
    if is_first and len(codes) != len(sizes) - 1:
        raise ValueError(
            f"`codes` must hold the codes before each of the {len(sizes)} scales but the first, got {len(codes)}."
        )
    if not is_first and len(codes) != len(sizes):
        raise ValueError(f"`codes` must hold the codes before each of the {len(sizes)} scales, got {len(codes)}.")


def modulate(hidden: torch.Tensor, factor: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """Normalises tokens without weights, multiplies them by `1 + factor`, and adds `shift`.

    Tokens have shape `(batch, tokens, width)`, `factor` and `shift` have shape `(batch, 1, width)`.
    """
    normed = F.layer_norm(hidden, hidden.shape[-1:], eps=NORM_EPS)
    return torch.addcmul(shift, normed, 1 + factor)  # shift + normed * (1 + factor)


def set_norm(vectors: torch.Tensor, norm: torch.Tensor | float) -> torch.Tensor:
    """Scales vectors along the last dimension to a norm (length), computed in float32."""
    norms = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True, dtype=torch.float32)
    factors = norm / norms.clamp(min=SMALLEST_NORM)
    return (vectors * factors).to(vectors.dtype)


def resize_codes(codes: torch.Tensor, size: Size) -> torch.Tensor:
    """Resizes codes to the next scale, bicubic and in float32. They are not normalised again.

    Args:
        codes (`torch.Tensor` of shape `(batch, codebook_embed_dim, h, w)`): Codes of a scale.
        size (`tuple[int, int]`): Height and width of the next one.

    Returns:
        `torch.Tensor`: Tokens `(batch, height * width, codebook_embed_dim)`, row by row.
    """
    resized = F.interpolate(codes.float(), size, mode="bicubic")  # (batch, codebook_embed_dim, height, width)
    return resized.flatten(2).transpose(1, 2)


def initial_positions(side: int, width: int) -> torch.Tensor:
    """Grid of sines of the rows in even channels, and cosines of the columns in odd ones, `(1, width, side, side)`."""
    channels = torch.arange(width)
    pairs = channels // 2  # neighbouring channels have one frequency
    frequencies = POSITION_PERIOD ** (-2 * pairs / width)
    angles = frequencies[:, None] * torch.arange(side)  # (width, side)
    sines_of_rows = angles.sin()[:, :, None]  # (width, side, 1)
    cosines_of_columns = angles.cos()[:, None, :]  # (width, 1, side)
    is_even = (channels % 2 == 0)[:, None, None]  # (width, 1, 1)
    grid = torch.where(is_even, sines_of_rows, cosines_of_columns)  # (width, side, side)
    return grid.unsqueeze(0)

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

from .checks import check_depth, check_integers
from .layers import AttentionProcessor
from .loading import StrictLoadingMixin
from .resizing import resize

NORM_EPS = 1e-6
LENGTH_EPS = 1e-12  # as in `F.normalize`
MLP_RATIO = 4
POSITION_PERIOD = 10_000  # of the initial positions
MAX_LOG_FACTOR = math.log(100)  # of queries

# Factors of FlexVAR's initial weights
INITIAL_QUERY_FACTOR = 4.0
GATE_GAIN = 1e-3

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
        self.layer = layer
        self.scale_mul_1H11 = nn.Parameter(torch.full((1, num_heads, 1, 1), math.log(INITIAL_QUERY_FACTOR)))
        self.mat_qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.proj = nn.Linear(width, width)
        self.processor = AttentionProcessor()

    def forward(self, hidden: torch.Tensor, lengths: Sequence[int], cache: DynamicCache | None) -> torch.Tensor:
        """`(batch, tokens, width)` -> the same shape. `lengths` are the numbers of tokens of the scales."""
        query, key, value = self.mat_qkv(hidden).chunk(3, dim=-1)
        biased = (query + self.q_bias, key, value + self.v_bias)
        query, key, value = (each.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for each in biased)
        query, key = set_length(query, self.scale_mul_1H11.float().clamp(max=MAX_LOG_FACTOR).exp()), set_length(key)
        if cache is not None:
            key, value = cache.update(key, value, self.layer)
        query, key, value = (each.transpose(1, 2) for each in (query, key, value))  # (batch, tokens, heads, width)
        parts, seen = [], key.shape[1] - query.shape[1]  # cached tokens
        for part in query.split(list(lengths), dim=1):  # without a mask: a scale sees all keys up to its own last one
            seen += part.shape[1]
            parts.append(self.processor(part, key[:, :seen], value[:, :seen], scale=1.0))
        return self.proj(torch.cat(parts, dim=1).flatten(2))


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
        """`(batch, tokens, width)` -> the same shape. `condition` `(batch, 1, width)` is the embedded class."""
        gate1, gate2, scale1, scale2, shift1, shift2 = self.ada_lin(condition).chunk(6, dim=-1)
        hidden = torch.addcmul(hidden, gate1, self.attn(modulate(hidden, scale1, shift1), lengths, cache))
        return torch.addcmul(hidden, gate2, self.ffn(modulate(hidden, scale2, shift2)))


class ModulatedNorm(nn.Module):
    """Last normalisation, which depends on the class."""

    def __init__(self, width: int):
        super().__init__()
        self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, hidden: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        """`(batch, tokens, width)` -> the same shape."""
        scale, shift = self.ada_lin(condition).chunk(2, dim=-1)
        return modulate(hidden, scale, shift)


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
        captions = {"vocab_size": vocab_size, "max_text_length": max_text_length}
        check_integers(captions, least=int(bool(vocab_size or max_text_length)))  # both or neither
        check_integers({"num_classes": num_classes}, least=0)
        optional = {"num_classes", *captions}
        check_integers({name: value for name, value in self.config.items() if name[0] != "_" and name not in optional})
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
        if len(codes) != len(sizes) - is_first:
            raise ValueError(
                f"`codes` must hold the codes before each of the {len(sizes)} scales"
                f"{' but the first' if is_first else ''}, got {len(codes)}."
            )
        condition = self.class_emb(class_labels).unsqueeze(1)
        starts = [condition + self.pos_start] if is_first else []
        inputs = starts + [
            self.word_embed(resize_codes(before, size).to(condition.dtype))
            for before, size in zip(codes, sizes[len(starts) :], strict=True)
        ]
        parts = [tokens + self._positions(size) for tokens, size in zip(inputs, sizes, strict=True)]
        prefix = self._embed(text) if is_first else []
        hidden = torch.cat([*prefix, *parts], dim=1)
        lengths = [part.shape[1] for part in (*prefix, *parts)]
        for block in self.blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden = self._gradient_checkpointing_func(block, hidden, condition, lengths, cache)
            else:
                hidden = block(hidden, condition, lengths, cache)
        hidden = hidden[:, sum(part.shape[1] for part in prefix) :]
        logits = self.head(self.head_nm(hidden, condition)).float()
        return NextScaleTransformerOutput(logits=logits) if return_dict else (logits,)

    def _embed(self, text: torch.Tensor | None) -> list[torch.Tensor]:
        """Tokens `(batch, length, width)` before the first scale: a caption, or nothing if the model reads none."""
        length = self.config["max_text_length"]
        if (0 if text is None else text.shape[1]) != length:
            raise ValueError(
                f"`text` must be captions of {length} tokens, got "
                f"{'none' if text is None else f'{text.shape[1]} tokens'}."
            )
        return [] if text is None else [self.text_emb(text) + self.text_pos]

    def _positions(self, size: Size) -> torch.Tensor:
        """Positions of a scale, `(1, height * width, width of the model)`."""
        return resize(self.pos_1LC, size, "area").flatten(2).transpose(1, 2)

    def _initialise(self) -> None:
        """Draws the weights as FlexVAR does; the first third of a block's modulation are its gates."""
        width = self.pos_start.shape[-1]
        std, residual = math.sqrt(1 / (3 * width)), 1 / math.sqrt(2 * len(self.blocks))
        gains = {"head.weight": 0.02, "ada_lin.1.weight": 0.5, "proj.weight": residual, "fc2.weight": residual}
        for name, weight in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(weight)
            elif name.endswith("weight") or name in ("pos_start", "text_pos"):
                gain = next((gain for ending, gain in gains.items() if name.endswith(ending)), 1.0)
                nn.init.trunc_normal_(weight, std=gain * std)
            if name.startswith("blocks.") and name.endswith("ada_lin.1.weight"):
                nn.init.trunc_normal_(weight.detach()[: 2 * width], std=GATE_GAIN * std)


def modulate(hidden: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """Normalises tokens `(batch, tokens, width)` without weights, then scales and shifts them."""
    return torch.addcmul(shift, F.layer_norm(hidden, hidden.shape[-1:], eps=NORM_EPS), 1 + scale)


def set_length(vectors: torch.Tensor, length: torch.Tensor | float = 1.0) -> torch.Tensor:
    """Scales vectors along the last dimension to a length, computed in float32."""
    norms = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True, dtype=torch.float32)
    return (vectors * (length / norms.clamp(min=LENGTH_EPS))).to(vectors.dtype)


def resize_codes(codes: torch.Tensor, size: Size) -> torch.Tensor:
    """Resizes codes to the next scale, bicubic and in float32. They are not normalised again.

    Args:
        codes (`torch.Tensor` of shape `(batch, codebook_embed_dim, h, w)`): Codes of a scale.
        size (`tuple[int, int]`): Height and width of the next one.

    Returns:
        `torch.Tensor`: Tokens `(batch, height * width, codebook_embed_dim)`, row by row.
    """
    return F.interpolate(codes.float(), size, mode="bicubic").flatten(2).transpose(1, 2)


def initial_positions(side: int, width: int) -> torch.Tensor:
    """Grid of sines of the rows in even channels, and cosines of the columns in odd ones, `(1, width, side, side)`."""
    channels = torch.arange(width)
    frequencies = POSITION_PERIOD ** (-2 * (channels // 2) / width)
    angles = frequencies[:, None] * torch.arange(side)
    rows, columns = angles.sin()[:, :, None], angles.cos()[:, None, :]
    return torch.where((channels % 2 == 0)[:, None, None], rows, columns).unsqueeze(0)

"""SVQVAE: encoder, vector quantizer with one L2-normalised codebook, decoder; any image size, several scales.

The architecture and the parameter names are those of the Open Model Initiative's SVQVAE (`modules.py`, `svqvae.py`),
which follows LlamaGen (arXiv 2406.06525) and FlexVAR (arXiv 2502.20313).
"""

import hashlib
import inspect
import math
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from numbers import Integral, Real
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.vae import AutoencoderMixin, DecoderOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from huggingface_hub import HfApi
from torch import distributed, nn

from svqvae_hf.hub.model_cards import model_card
from svqvae_hf.loaders.checkpoints import read_checkpoint
from svqvae_hf.models.tiling import Core, Read, map_tiles, sample_windows, trim, zoom
from svqvae_hf.untrusted.weights import check_depth

NORM_EPS = 1e-6
SAMPLE_WINDOWS = 64  # of an image at most, which give what its tiles share
SAMPLE_SHARE = 1 / 4  # of an image at most that they are
SAMPLE_SIDE = 12  # of such a window, in latents
SAMPLE_MARGIN = 3  # of it next to a cut, in latents
OVERLAP = 32  # halo of a tile in pixels, where it fits
SEARCH_SCORES = 1 << 21  # cosines held at once by the nearest-code search on CPU, where they stay in the cache: 8 MiB
SEARCH_SCORES_GPU = 1 << 24  # on other devices, where each chunk costs a launch: 64 MiB
ENTROPY_TEMPERATURE = 0.01
SIZES = (
    *("in_channels", "out_channels", "base_channels", "num_res_blocks", "norm_num_groups", "z_channels"),
    *("codebook_size", "codebook_embed_dim", "sample_size"),
)
DERIVED_CONFIG = ("block_out_channels", "latent_channels", "vq_embed_dim", "num_vq_embeddings", "lookup_from_codebook")


@dataclass
class SVQVAEEncoderOutput(BaseOutput):
    """Output of [`SVQVAE.encode`].

    Args:
        latents (`torch.Tensor` of shape `(batch, codebook_embed_dim, h, w)`): Latents before quantisation.
    """

    latents: torch.Tensor


class VQLosses(NamedTuple):
    """Losses of one quantisation, scalar tensors in float32, and what it used of the codebook.

    Args:
        vq (`torch.Tensor`): `mean((q - sg[z])^2)`, moves the codes to the latents.
        commit (`torch.Tensor`): `commit_loss_beta * mean((sg[q] - z)^2)`, moves the latents to the codes.
        entropy (`torch.Tensor`): `entropy_loss_ratio` times the entropy term; 0 without it and in evaluation.
        usage (`torch.Tensor`): Share of the codebook in use since the counts were reset in training, in this call
            otherwise.
    """

    vq: torch.Tensor
    commit: torch.Tensor
    entropy: torch.Tensor
    usage: torch.Tensor


@dataclass
class SVQVAEOutput(BaseOutput):
    """Output of [`SVQVAE.forward`]; lists, in the caller's order, where scales were asked for.

    Args:
        sample (`torch.Tensor` of shape `(batch, out_channels, height, width)` or a list of them): Reconstruction in
            `pixel_range`.
        losses ([`VQLosses`] or a list of them): Losses of the quantisation.
    """

    sample: torch.Tensor | list[torch.Tensor]
    losses: VQLosses | list[VQLosses] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Takes the fields from one mapping too, as accelerate's hooks rebuild an output on another device."""
        if isinstance(self.sample, dict):
            self.sample, self.losses = self.sample["sample"], self.sample["losses"]
        super().__post_init__()


class TileContext:
    """What all tiles of an image share: the statistics of each norm, the keys and values of each attention.

    A sample of windows, spread over the image, gives them. While `gathering`, the windows pass through the network
    together: each norm takes the statistics of all of them, and in each attention all of them see each other. Only
    their interior counts, since a window is cut where the image goes on. After that every tile is normalised alike and
    attends to the same positions, wherever it lies.

    Args:
        batch (`int`): Number of images.
        window (`tuple[int, int]`): Height and width of a window in latents.
        margin (`tuple[int, int]`): What does not count at each end of its height and width, in latents.
    """

    def __init__(self, batch: int, window: Sequence[int], margin: Sequence[int]):
        self.batch = batch
        self.window = window
        self.margin = margin
        self.gathering = True
        self.moments: dict[nn.Module, tuple[torch.Tensor, torch.Tensor]] = {}
        self.keys: dict[nn.Module, tuple[torch.Tensor, torch.Tensor]] = {}

    def interior(self, hidden: torch.Tensor) -> torch.Tensor:
        """The interior of the windows: `(batch, windows, channels, h, w)` of `(batch * windows, channels, h', w')`."""
        lengths = zip(hidden.shape[-2:], self.window, self.margin, strict=True)
        rows, columns = (
            slice(margin * side // window, side - margin * side // window) for side, window, margin in lengths
        )
        return hidden[..., rows, columns].unflatten(0, (self.batch, -1))


class GroupNorm(nn.GroupNorm):
    """Group normalisation, with the statistics of the activations at hand or with those that tiles share."""

    def __init__(self, num_groups: int, num_channels: int):
        super().__init__(num_groups, num_channels, eps=NORM_EPS)

    def forward(self, hidden: torch.Tensor, context: TileContext | None = None) -> torch.Tensor:
        """Normalises `(batch, channels, h, w)`."""
        if torch.is_grad_enabled() and hidden.device.type == "cpu":
            hidden = hidden.contiguous()  # in channels_last the backward takes half of a CPU training step
        if context is None:
            # `F.group_norm` refuses one value a group, which a 1 x 1 image can come to; the operator does not.
            return torch.group_norm(hidden, self.num_groups, self.weight, self.bias, self.eps)
        if context.gathering:
            groups = context.interior(hidden).to(_sum_type(hidden)).unflatten(2, (self.num_groups, -1))
            variance, mean = torch.var_mean(groups, dim=(1, 3, 4, 5), correction=0)  # (images, groups)
            context.moments[self] = mean, variance
        return self._normalise(hidden, *context.moments[self])

    def _normalise(self, hidden: torch.Tensor, mean: torch.Tensor, variance: torch.Tensor) -> torch.Tensor:
        per_group = hidden.shape[1] // self.num_groups
        mean, variance = (each.repeat_interleave(per_group, dim=1) for each in (mean, variance))  # (images, channels)
        weight, bias = self.weight.to(mean.dtype), self.bias.to(mean.dtype)
        if len(mean) == 1 and not torch.is_grad_enabled():  # a fused kernel, without gradients for the statistics
            return F.batch_norm(hidden, mean[0], variance[0], weight, bias, eps=self.eps)
        scale = weight * torch.rsqrt(variance + self.eps)
        shift = bias - mean * scale
        of_images = hidden.unflatten(0, (len(mean), -1))  # (images, windows, channels, h, w)
        normed = of_images * scale[:, None, :, None, None] + shift[:, None, :, None, None]
        return normed.flatten(0, 1).to(hidden.dtype)


def _sum_type(values: torch.Tensor) -> torch.dtype:
    return torch.promote_types(values.dtype, torch.float32)


def silu(normed: torch.Tensor) -> torch.Tensor:
    """Activation of a norm's output; without gradients in its memory, since on CPU fresh memory costs more than it."""
    return F.silu(normed, inplace=not torch.is_grad_enabled())


class ResnetBlock(nn.Module):
    """Two normalised 3 x 3 convolutions beside a shortcut."""

    def __init__(self, in_channels: int, out_channels: int, num_groups: int, dropout: float):
        super().__init__()
        self.norm1 = GroupNorm(num_groups, in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = GroupNorm(num_groups, out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, hidden: torch.Tensor, context: TileContext | None = None) -> torch.Tensor:
        """Maps `(batch, in_channels, h, w)` to `(batch, out_channels, h, w)`."""
        # One expression and the shortcut last: a name, or a shortcut at hand, would hold memory at the peak.
        residual = self.conv2(
            self.dropout(silu(self.norm2(self.conv1(silu(self.norm1(hidden, context))), context))),
        )
        return residual.add_(hidden if self.nin_shortcut is None else self.nin_shortcut(hidden))


class AttnBlock(nn.Module):
    """Self-attention over all positions, one head; in a tile, attention over the positions that tiles share."""

    def __init__(self, channels: int, num_groups: int):
        super().__init__()
        self.norm = GroupNorm(num_groups, channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, hidden: torch.Tensor, context: TileContext | None = None) -> torch.Tensor:
        """Maps `(batch, channels, h, w)` to the same shape."""
        normed = self.norm(hidden, context)
        if context is None:
            key, value = (_positions(project(normed).unsqueeze(1)) for project in (self.k, self.v))
        elif context.gathering:
            key, value = (_positions(context.interior(project(normed))) for project in (self.k, self.v))
            context.keys[self] = key, value
        else:
            key, value = context.keys[self]
        query = _positions(self.q(normed).unflatten(0, (key.shape[0], -1)))
        attended = F.scaled_dot_product_attention(query, key, value)  # (images, 1, positions, channels)
        attended = attended.reshape(hidden.shape[0], -1, hidden.shape[1]).transpose(1, 2).reshape(hidden.shape)
        return hidden + self.proj_out(attended)


def _positions(windows: torch.Tensor) -> torch.Tensor:
    """Maps `(images, windows, channels, h, w)` to `(images, 1, windows * h * w, channels)`.

    Contiguous, since the fused kernels of attention, which never hold all pairs of positions, take no other layout.
    """
    return windows.movedim(2, -1).flatten(1, 3).unsqueeze(1).contiguous()


class Downsample(nn.Module):
    """Halves both sides by a strided convolution, padded at the bottom and at the right only."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Maps `(batch, channels, h, w)` to `(batch, channels, h / 2, w / 2)`."""
        return self.conv(F.pad(hidden, (0, 1, 0, 1)))


class RepeatConv2d(nn.Conv2d):
    """A 3 x 3 convolution of the input with each pixel repeated to 2 x 2, computed at the input's resolution.

    Of the nine repeated pixels below the kernel only four are different, so that sums of its weights do, in 4 / 9 of
    the arithmetic: a transposed convolution of stride 2, whose 4 x 4 kernel is the sum of four shifted 3 x 3 ones.
    """

    def __init__(self, channels: int):
        super().__init__(channels, channels, 3)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Maps `(batch, channels, h, w)` to `(batch, channels, 2 * h, 2 * w)`."""
        kernel = F.pad(self.weight.to(_sum_type(self.weight)), (1, 1, 1, 1))
        kernel = kernel[..., 1:] + kernel[..., :-1]
        kernel = kernel[..., 1:, :] + kernel[..., :-1, :]
        kernel = kernel.flip(-2, -1).transpose(0, 1).to(self.weight.dtype)
        return F.conv_transpose2d(hidden, kernel, self.bias, stride=2, padding=1)


class Upsample(nn.Module):
    """Doubles both sides by repetition, then a convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = RepeatConv2d(channels)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Maps `(batch, channels, h, w)` to `(batch, channels, 2 * h, 2 * w)`."""
        return self.conv(hidden)


class Level(nn.Module):
    """The blocks at one resolution: residual, attention after each if asked for, then a change of resolution."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        num_blocks: int,
        num_groups: int,
        dropout: float,
        attention: bool = False,
        downsample: bool = False,
        upsample: bool = False,
    ):
        super().__init__()
        self.res = nn.ModuleList(
            ResnetBlock(out_channels if i else in_channels, out_channels, num_groups, dropout)
            for i in range(num_blocks)
        )
        self.attn = nn.ModuleList(AttnBlock(out_channels, num_groups) for _ in range(num_blocks if attention else 0))
        self.downsample = Downsample(out_channels) if downsample else None
        self.upsample = Upsample(out_channels) if upsample else None
        self.gradient_checkpointing = False
        self._gradient_checkpointing_func: Callable[..., torch.Tensor]

    def forward(self, hidden: torch.Tensor, context: TileContext | None = None) -> torch.Tensor:
        """Maps `(batch, in_channels, h, w)` to `(batch, out_channels, h', w')`, the sides halved, doubled or kept."""
        for i, res in enumerate(self.res):
            hidden = self._run(res, hidden, context)
            if self.attn:
                hidden = self._run(self.attn[i], hidden, context)
        if self.downsample is not None:
            hidden = self.downsample(hidden)
        if self.upsample is not None:
            hidden = self.upsample(hidden)
        return hidden

    def _run(self, block: nn.Module, hidden: torch.Tensor, context: TileContext | None) -> torch.Tensor:
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            return self._gradient_checkpointing_func(block, hidden, context)
        return block(hidden, context)


def middle_blocks(channels: int, num_groups: int, dropout: float) -> nn.ModuleList:
    """Residual block, attention, residual block at the lowest resolution."""
    return nn.ModuleList(
        [
            ResnetBlock(channels, channels, num_groups, dropout),
            AttnBlock(channels, num_groups),
            ResnetBlock(channels, channels, num_groups, dropout),
        ]
    )


def fast_layout(hidden: torch.Tensor) -> torch.Tensor:
    """The memory format that the networks are fastest in.

    On CPU channels_last without gradients, and with them not, since the norms' backward is slow in it. On other
    devices it is for the caller to choose, by `model.to(memory_format=torch.channels_last)`.
    """
    if hidden.device.type == "cpu" and not torch.is_grad_enabled():
        return hidden.contiguous(memory_format=torch.channels_last)
    return hidden


class Encoder(nn.Module):
    """Image to features, `2 ** (len(ch_mult) - 1)` pixels a feature along each side."""

    def __init__(
        self,
        in_channels: int,
        base_channels: int,
        ch_mult: Sequence[int],
        num_res_blocks: int,
        num_groups: int,
        dropout: float,
        z_channels: int,
    ):
        super().__init__()
        channels = [base_channels * mult for mult in ch_mult]
        last = len(channels) - 1
        self.conv_in = nn.Conv2d(in_channels, base_channels, 3, padding=1)
        self.conv_blocks = nn.ModuleList(
            Level(
                channels[i - 1] if i else base_channels,
                channels[i],
                num_res_blocks,
                num_groups,
                dropout,
                attention=i == last,
                downsample=i != last,
            )
            for i in range(len(channels))
        )
        self.mid = middle_blocks(channels[last], num_groups, dropout)
        self.norm_out = GroupNorm(num_groups, channels[last])
        self.conv_out = nn.Conv2d(channels[last], z_channels, 3, padding=1)

    def forward(self, sample: torch.Tensor, context: TileContext | None = None) -> torch.Tensor:
        """Maps `(batch, in_channels, height, width)` to `(batch, z_channels, h, w)`."""
        hidden = self.conv_in(fast_layout(sample))
        for block in (*self.conv_blocks, *self.mid):
            hidden = block(hidden, context)
        return self.conv_out(silu(self.norm_out(hidden, context)))


class Decoder(nn.Module):
    """Features to image; one residual block more a level than the encoder."""

    def __init__(
        self,
        out_channels: int,
        base_channels: int,
        ch_mult: Sequence[int],
        num_res_blocks: int,
        num_groups: int,
        dropout: float,
        z_channels: int,
    ):
        super().__init__()
        channels = [base_channels * mult for mult in reversed(ch_mult)]
        last = len(channels) - 1
        # Positions around a core that each level and what follows read, at its own resolution.
        reach = 2 * (num_res_blocks + 1)
        margins = [reach + 1]
        for _ in range(last):
            margins.append(reach + 1 + margins[-1] // 2)
        self.margins = margins[::-1]
        self.conv_in = nn.Conv2d(z_channels, channels[0], 3, padding=1)
        self.mid = middle_blocks(channels[0], num_groups, dropout)
        self.conv_blocks = nn.ModuleList(
            Level(
                channels[i - 1] if i else channels[0],
                channels[i],
                num_res_blocks + 1,
                num_groups,
                dropout,
                attention=i == 0,
                upsample=i != last,
            )
            for i in range(len(channels))
        )
        self.norm_out = GroupNorm(num_groups, channels[last])
        self.conv_out = nn.Conv2d(channels[last], out_channels, 3, padding=1)

    def forward(
        self, hidden: torch.Tensor, context: TileContext | None = None, core: Core | None = None
    ) -> torch.Tensor:
        """Maps `(batch, z_channels, h, w)` to `(batch, out_channels, height, width)`, or to that of a core of it.

        Compiled, it gives the whole all the same: it would have a graph for each size of what is left.
        """
        core = None if torch.compiler.is_compiling() else core
        hidden = self.conv_in(fast_layout(hidden))
        for block in self.mid:
            hidden = block(hidden, context)
        for level, margin in zip(self.conv_blocks, self.margins, strict=True):
            if core is not None:
                hidden, core = trim(hidden, core, margin)
                hidden = fast_layout(hidden)
                if level.upsample is not None:
                    core = zoom(core, 2)
            hidden = level(hidden, context)
        sample = self.conv_out(silu(self.norm_out(hidden, context)))
        return sample if core is None else trim(sample, core, 0)[0]


class Codebook(nn.Module):
    """The code vectors.

    Everything that reads the weight happens in `forward`: hooks that offload weights hold them only there.
    """

    def __init__(self, size: int, dim: int, l2_norm: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, dim))
        nn.init.normal_(self.weight)  # uniform on the sphere once normalised
        self.l2_norm = l2_norm

    def forward(self, query: torch.Tensor | None = None) -> torch.Tensor:
        """Looks up ids, or finds the ids of the nearest codes of latents, or gives the codes as they are stored.

        Args:
            query (`torch.Tensor`, *optional*): Ids of any shape, an integer type; or latents of shape `(n, dim)` in
                float32, normalised if the codebook is.

        Returns:
            `torch.Tensor`: Codes `(*shape, dim)` in float32 for ids; ids `(n,)` in int64 for latents, the lowest on a
            tie; the codes as stored, `(size, dim)`, without a query.
        """
        if query is None:
            return self.weight.clone()
        codes = self.weight.float()
        if self.l2_norm:
            codes = F.normalize(codes, dim=-1)
        if not query.is_floating_point():
            return F.embedding(query, codes)
        # |z - e|^2 = |z|^2 - 2 (z e - |e|^2 / 2): the nearest code has the largest score, for unit vectors the largest
        # cosine.
        offset = None if self.l2_norm else codes.square().sum(-1) / 2
        scores_at_once = SEARCH_SCORES if query.device.type == "cpu" else SEARCH_SCORES_GPU
        rows = max(1, scores_at_once // codes.shape[0])
        ids = []
        for latents in query.detach().tensor_split(-(-query.shape[0] // rows)):  # no small rest, which rounds apart
            scores = latents @ codes.detach().T
            ids.append((scores if offset is None else scores - offset).argmax(-1))
        return torch.cat(ids)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "Codebook":
        """Moves with the model, but keeps its type: a rounded codebook would be another one."""

        def move(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(move, recurse)


class VectorQuantizer(nn.Module):
    """Replaces each latent by its nearest code. Always in float32, outside autocast.

    With `l2_norm`, latents and codes are put on the unit sphere first (LlamaGen, section 3.1).
    """

    def __init__(self, size: int, dim: int, commit_loss_beta: float, entropy_loss_ratio: float, l2_norm: bool):
        super().__init__()
        self.size = size
        self.commit_loss_beta = commit_loss_beta
        self.entropy_loss_ratio = entropy_loss_ratio
        self.l2_norm = l2_norm
        self.embedding = Codebook(size, dim, l2_norm)
        self.code_counts: torch.Tensor
        self.register_buffer("code_counts", torch.zeros(size, dtype=torch.int64), persistent=False)

    def forward(self, latents: torch.Tensor) -> tuple[torch.Tensor, VQLosses, tuple[torch.Tensor, None, torch.Tensor]]:
        """Quantises latents; gradients pass straight through.

        Args:
            latents (`torch.Tensor` of shape `(batch, codebook_embed_dim, h, w)`): Output of [`SVQVAE.encode`].

        Returns:
            `tuple`: Quantised latents in the shape and type of `latents`; [`VQLosses`]; and `(perplexity, None, ids)`
            with flat ids `(batch * h * w,)` in int64.
        """
        with _without_autocast(latents):
            flat = self._flatten(latents)
            ids = self.embedding(flat)
            codes = self.embedding(ids)
            # The codes, bit by bit, with the gradient of the latents.
            quantized = codes.detach() + (flat - flat.detach())
            counts = torch.zeros_like(self.code_counts).index_add_(0, ids, torch.ones_like(ids))
            losses = VQLosses(
                vq=F.mse_loss(codes, flat.detach()),
                commit=self.commit_loss_beta * F.mse_loss(flat, codes.detach()),
                entropy=self._entropy_loss(flat),
                usage=self._usage(counts),
            )
            share = counts / ids.numel()
            perplexity = torch.exp(-torch.special.xlogy(share, share).sum())
        return self._unflatten(quantized, latents), losses, (perplexity, None, ids)

    def nearest_ids(self, latents: torch.Tensor) -> torch.Tensor:
        """Ids `(batch, h, w)`, int64, of the codes nearest to latents `(batch, codebook_embed_dim, h, w)`.

        Raises:
            ValueError: If latents are NaN or infinite, which have no nearest code: one such pixel makes all latents of
                its image so, and float16 may overflow in the networks. A compiled graph does not look.
        """
        if not torch.compiler.is_compiling() and not latents.isfinite().all():
            raise ValueError(
                "latents must be finite to have ids, but some are NaN or infinite. Pass images without such values, "
                "or load the model in float32 or bfloat16 if float16 is too small for it."
            )
        with _without_autocast(latents):
            ids = self.embedding(self._flatten(latents))
        return ids.view(latents.shape[0], *latents.shape[-2:])

    def get_codebook_entry(self, ids: torch.Tensor, shape: tuple[int, int, int, int] | None = None) -> torch.Tensor:
        """Looks up codes.

        Args:
            ids (`torch.Tensor`): Integers in `[0, codebook_size)`, of any shape.
            shape (`tuple[int, int, int, int]`, *optional*): `(batch, h, w, codebook_embed_dim)`.

        Returns:
            `torch.Tensor`: Codes in float32, `(batch, codebook_embed_dim, h, w)` with a shape, `(*ids.shape,
            codebook_embed_dim)` without.
        """
        codes = self.embedding(ids)
        return codes if shape is None else codes.view(shape).permute(0, 3, 1, 2).contiguous()

    def reset_counts(self) -> None:
        """Starts the count of used codes anew."""
        self.code_counts.zero_()

    def _flatten(self, latents: torch.Tensor) -> torch.Tensor:
        flat = flatten_latents(latents).float()
        return F.normalize(flat, dim=-1) if self.l2_norm else flat

    @staticmethod
    def _unflatten(flat: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        batch, dim, height, width = latents.shape
        return flat.view(batch, height, width, dim).permute(0, 3, 1, 2).to(latents.dtype).contiguous()

    def _usage(self, counts: torch.Tensor) -> torch.Tensor:
        if self.training:
            counts = self.code_counts.add_(counts)
        return (counts > 0).float().mean()

    def _entropy_loss(self, flat: torch.Tensor) -> torch.Tensor:
        """Low entropy of each latent, high entropy of their mean (LlamaGen, `compute_entropy_loss`).

        The mean is over the latents of all processes, which have as many each, so that their mean gradient is that of
        the joined batch.
        """
        if self.entropy_loss_ratio == 0 or not self.training:
            return flat.new_zeros(())
        codes = self.embedding(torch.arange(self.size, device=flat.device))
        log_probs = F.log_softmax(-torch.cdist(flat, codes).square() / ENTROPY_TEMPERATURE, dim=-1)
        probs = log_probs.exp()
        mean_probs = _mean_over_processes(probs.mean(0))
        entropy = -(probs * log_probs).sum(-1).mean()
        log_mean_probs = mean_probs.clamp(min=torch.finfo(mean_probs.dtype).tiny).log()  # finite for unused codes, too
        return self.entropy_loss_ratio * (entropy + (mean_probs * log_mean_probs).sum())


def _without_autocast(latents: torch.Tensor) -> AbstractContextManager:
    device = latents.device.type
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


def _mean_over_processes(value: torch.Tensor) -> torch.Tensor:
    """The mean, with the gradient of this process's own value."""
    if not distributed.is_available() or not distributed.is_initialized():
        return value
    mean = value.detach().clone()
    distributed.all_reduce(mean)
    mean /= distributed.get_world_size()
    return value + (mean - value.detach())


def flatten_latents(latents: torch.Tensor) -> torch.Tensor:
    """One row a latent: `(batch * h * w, channels)` of `(batch, channels, h, w)`."""
    return latents.permute(0, 2, 3, 1).flatten(0, 2)


def resize_latents(latents: torch.Tensor, scale: float) -> torch.Tensor:
    """Resizes latents to a scale, by area below 1 and bilinearly above.

    Args:
        latents (`torch.Tensor` of shape `(batch, channels, h, w)`): Latents before quantisation.
        scale (`float`): More than 0.

    Returns:
        `torch.Tensor`: Latents `(batch, channels, max(1, round(scale * h)), max(1, round(scale * w)))`.
    """
    size = [max(1, round(scale * side)) for side in latents.shape[-2:]]
    if list(latents.shape[-2:]) == size:
        return latents
    mode = "area" if scale < 1 else "bilinear"
    return F.interpolate(latents.float(), size, mode=mode).to(latents.dtype)


class SVQVAE(ModelMixin, AutoencoderMixin, ConfigMixin):
    """Scalable vector-quantized VAE: tokenizes images of any size, at several scales, with one codebook.

    Args:
        in_channels (`int`, defaults to 3): Channels of the image.
        out_channels (`int`, defaults to 3): Channels of the reconstruction.
        base_channels (`int`, defaults to 128): Channels at multiplier 1.
        encoder_ch_mult (`tuple[int, ...]`, defaults to `(1, 1, 2, 2, 4)`): Channel multiplier of each encoder level,
            full resolution first. Each level but the last halves the sides.
        decoder_ch_mult (`tuple[int, ...]`, defaults to `(1, 1, 2, 2, 4)`): The same for the decoder, in the same
            order.
        num_res_blocks (`int`, defaults to 2): Residual blocks of an encoder level; a decoder level has one more.
        norm_num_groups (`int`, defaults to 32): Groups of each normalisation.
        z_channels (`int`, defaults to 256): Channels between the networks and the 1 x 1 convolutions around the
            quantizer.
        dropout_p (`float`, defaults to 0.0): Dropout probability in residual blocks.
        codebook_size (`int`, defaults to 16384): Number of codes.
        codebook_embed_dim (`int`, defaults to 8): Dimension of a code.
        codebook_l2_norm (`bool`, defaults to `True`): Latents and codes on the unit sphere.
        commit_loss_beta (`float`, defaults to 0.25): Weight of the commitment loss.
        entropy_loss_ratio (`float`, defaults to 0.0): Weight of the entropy loss; at 0 it is not computed.
        pixel_range (`tuple[float, float]`, defaults to `(0.0, 1.0)`): Range of the images that callers give and get.
        network_range (`tuple[float, float]`, defaults to `(0.0, 1.0)`): Range that the weights were trained on.
        sample_size (`int`, defaults to 256): Side, in pixels, of the images that the weights were trained on.
        scaling_factor (`float`, defaults to 1.0): What a latent diffusion model multiplies latents by.
        force_upcast (`bool`, defaults to `False`): Whether pipelines should run the model in float32.

    Raises:
        ValueError: If values do not fit each other.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["ResnetBlock", "AttnBlock", "VectorQuantizer"]
    _repeated_blocks = ["ResnetBlock", "AttnBlock"]
    _skip_layerwise_casting_patterns = ["quantize", "norm"]
    _keep_in_fp32_modules = ["quantize"]
    _keys_to_ignore_on_load_unexpected = [
        r"quantize\.codebook_used"
    ]  # a usage log in every original file, not a weight
    _group_offload_block_modules = ["encoder", "decoder", "quant_conv", "post_quant_conv", "quantize", "embedding"]

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        base_channels: int = 128,
        encoder_ch_mult: tuple[int, ...] = (1, 1, 2, 2, 4),
        decoder_ch_mult: tuple[int, ...] = (1, 1, 2, 2, 4),
        num_res_blocks: int = 2,
        norm_num_groups: int = 32,
        z_channels: int = 256,
        dropout_p: float = 0.0,
        codebook_size: int = 16384,
        codebook_embed_dim: int = 8,
        codebook_l2_norm: bool = True,
        commit_loss_beta: float = 0.25,
        entropy_loss_ratio: float = 0.0,
        pixel_range: tuple[float, float] = (0.0, 1.0),
        network_range: tuple[float, float] = (0.0, 1.0),
        sample_size: int = 256,
        scaling_factor: float = 1.0,
        force_upcast: bool = False,
    ):
        super().__init__()
        _check_config(self.config)
        self.encoder = Encoder(
            in_channels, base_channels, encoder_ch_mult, num_res_blocks, norm_num_groups, dropout_p, z_channels
        )
        self.decoder = Decoder(
            out_channels, base_channels, decoder_ch_mult, num_res_blocks, norm_num_groups, dropout_p, z_channels
        )
        self.quantize = VectorQuantizer(
            codebook_size, codebook_embed_dim, commit_loss_beta, entropy_loss_ratio, codebook_l2_norm
        )
        self.quant_conv = nn.Conv2d(z_channels, codebook_embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(codebook_embed_dim, z_channels, 1)
        # The names that diffusers' pipelines read.
        self.register_to_config(
            block_out_channels=[base_channels * mult for mult in encoder_ch_mult],
            latent_channels=codebook_embed_dim,
            vq_embed_dim=codebook_embed_dim,
            num_vq_embeddings=codebook_size,
            lookup_from_codebook=True,
        )
        self.f = 2 ** (len(encoder_ch_mult) - 1)
        self.use_slicing = False
        self.use_tiling = False
        self.tile_size = 256
        self.overlap = OVERLAP
        self.on_tile: Callable[[int, int], None] | None = None

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> "SVQVAE":
        """Loads a model from a folder or from the Hub, strictly.

        Args:
            pretrained_model_name_or_path (`str` or `Path`): Folder, or `org/name` on the Hub.
            **kwargs: Those of [`~diffusers.ModelMixin.from_pretrained`], and config values that replace the stored
                ones, such as `pixel_range=(-1, 1)`. `low_cpu_mem_usage` is always `True`.

        Raises:
            ValueError: If weights are missing, not expected or of another shape, or the folder is of another class.
            TypeError: If an argument is none of these.
        """
        with_info = kwargs.pop("output_loading_info", False)
        kwargs.pop("low_cpu_mem_usage", None)  # diffusers keeps the codebook in float32 only with it
        loaded = super().from_pretrained(pretrained_model_name_or_path, output_loading_info=True, **kwargs)
        faults = list_faults(loaded[1])
        if faults:
            raise ValueError(
                f"The weights of {pretrained_model_name_or_path} must be exactly those that its config asks for, but "
                f"are not: {faults}. Restore the files, or correct config.json."
            )
        return loaded if with_info else loaded[0]

    @classmethod
    def from_config(cls, config: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """As in the base class, but keyword arguments that mean nothing are refused unless they are asked for.

        Raises:
            ValueError: If the config is of another class.
            TypeError: If a keyword argument is no config value.
        """
        known = {*inspect.signature(cls.__init__).parameters, "trust_remote_code"}
        unknown = sorted(name for name in kwargs.keys() - known if not name.startswith("_"))
        if unknown and not return_unused_kwargs:
            raise TypeError(
                f"Arguments must be those of diffusers' method or config values of {cls.__name__}, but these are "
                f"neither: {', '.join(unknown)}. Correct their names."
            )
        return super().from_config(config, return_unused_kwargs, **kwargs)

    @classmethod
    def from_single_file(
        cls,
        source: str | Path,
        *,
        use_ema: bool = False,
        dtype: torch.dtype | None = None,
        torch_dtype: torch.dtype | None = None,
        **config: Any,
    ) -> "SVQVAE":
        """Loads an original checkpoint; see [`~svqvae_hf.loaders.checkpoints.read_checkpoint`].

        Args:
            source (`str` or `Path`): Local file, or `org/repo:file` on the Hub.
            use_ema (`bool`, defaults to `False`): Take the averaged weights, which LlamaGen's files may have.
            dtype (`torch.dtype`, *optional*): Type of the weights, float32 if not given. The codebook is always in
                float32.
            torch_dtype (`torch.dtype`, *optional*): The same, under its older name.
            **config: Config values that replace those read from the file, such as `network_range`.

        Returns:
            [`SVQVAE`]: The model in evaluation mode.
        """
        model = read_checkpoint(source, cls, use_ema=use_ema, **config).model()
        dtype = dtype or torch_dtype
        return model if dtype is None else model.to(dtype)

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> tuple[dict, dict, dict]:
        """As in the base class, without the config values that the constructor derives."""
        if config_dict.get("_class_name", cls.__name__) not in {each.__name__ for each in cls.__mro__}:
            raise ValueError(
                f"The config must be of class {cls.__name__}, but is of {config_dict['_class_name']}. Load it by that "
                "class, or an original checkpoint by `from_single_file`."
            )
        return super().extract_init_dict({k: v for k, v in config_dict.items() if k not in DERIVED_CONFIG}, **kwargs)

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str = "Upload SVQVAE",
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
        variant: str | None = None,
        **card: Any,
    ) -> str:
        """Uploads the model with its card.

        Args:
            repo_id (`str`): `org/name`; created if it does not exist.
            commit_message (`str`, defaults to `"Upload SVQVAE"`): Title of the commit.
            private (`bool`, *optional*): Visibility of a new repository; the organization's default if not given.
            token (`str`, *optional*): Access token; the stored one if not given.
            create_pr (`bool`, defaults to `False`): Open a pull request instead of a commit.
            variant (`str`, *optional*): Suffix of the weight files, such as `fp16`. They join a repository that has
                its card already.
            **card: Facts for [`~svqvae_hf.hub.model_cards.model_card`].

        Returns:
            `str`: Address of the commit or of the pull request.
        """
        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, variant=variant)
            if variant is None:
                text = model_card(self.config, repo_id=repo_id, **card)
                Path(folder, "README.md").write_text(text, encoding="utf-8")
            commit = api.upload_folder(
                repo_id=repo_id, folder_path=folder, commit_message=commit_message, create_pr=create_pr
            )
        return commit.pr_url or commit.commit_url

    def codebook_fingerprint(self) -> str:
        """SHA-256 in hexadecimal of the codebook's float32 bytes, little-endian: ids have meaning only with it."""
        weight = self.quantize.embedding().detach().float().cpu()
        return hashlib.sha256(weight.numpy().astype("<f4").tobytes()).hexdigest()

    def enable_tiling(
        self, tile_size: int = 256, overlap: int | None = None, on_tile: Callable[[int, int], None] | None = None
    ) -> None:
        """Encodes and decodes large images tile by tile, so that memory grows only with the image and its latents.

        All tiles of an image share their normalisation statistics and what they attend to, which a sample of windows
        gives: a quarter of the image, at most 64 of 12 x 12 latents, spread over it. An image of no more latents than
        these or a tile have is not tiled, since it takes no more memory whole: up to 768 x 768 pixels at f = 8.

        Args:
            tile_size (`int`, defaults to 256): Largest side, in pixels, of what the networks read at once, a multiple
                of `f`.
            overlap (`int`, *optional*, 32 if not given): Halo on each side of a tile, in pixels: read, but not kept. A
                multiple of `f`, less than half of `tile_size`. Where 32 does not fit, the default is the largest that
                does.
            on_tile (`Callable`, *optional*): Called after each tile with the tiles done and their number.

        Raises:
            ValueError: If `tile_size` or `overlap` does not fit.
        """
        self._check_tiles(tile_size, overlap)
        overlap = self._fit_overlap(OVERLAP, tile_size) if overlap is None else overlap
        super().enable_tiling()
        self.tile_size, self.overlap, self.on_tile = tile_size, overlap, on_tile

    @apply_forward_hook
    def encode(self, sample: torch.Tensor, return_dict: bool = True) -> SVQVAEEncoderOutput | tuple[torch.Tensor]:
        """Encodes images.

        Args:
            sample (`torch.Tensor` of shape `(batch, in_channels, height, width)`): Images of any size in
                `pixel_range`. Sides that are no multiple of `f` are padded by repeating the last row and column.
            return_dict (`bool`, defaults to `True`): Whether to give an output object or a tuple.

        Returns:
            [`SVQVAEEncoderOutput`] or `tuple`: Latents `(batch, codebook_embed_dim, ceil(height / f), ceil(width /
            f))`, before quantisation.

        Raises:
            ValueError: If `sample` has another shape.
            TypeError: If `sample` is not of the model's type.
        """
        latents = self._encode(sample, self._tiles())
        return SVQVAEEncoderOutput(latents=latents) if return_dict else (latents,)

    @apply_forward_hook
    def decode(
        self,
        h: torch.Tensor,
        force_not_quantize: bool = False,
        return_dict: bool = True,
        shape: tuple[int, int, int, int] | None = None,
    ) -> DecoderOutput | tuple[torch.Tensor]:
        """Decodes ids or latents.

        The type says which: integers are looked up, floats are quantised unless told not to.

        Args:
            h (`torch.Tensor`): Ids `(batch, h, w)`, or of any shape if `shape` is given; or latents
                `(batch, codebook_embed_dim, h, w)`.
            force_not_quantize (`bool`, defaults to `False`): Whether float latents are decoded as they are.
            return_dict (`bool`, defaults to `True`): Whether to give an output object or a tuple.
            shape (`tuple[int, int, int, int]`, *optional*): `(batch, h, w, codebook_embed_dim)` of ids.

        Returns:
            [`~diffusers.models.autoencoders.vae.DecoderOutput`] or `tuple`: Sample, not clamped, of shape
            `(batch, out_channels, h * f, w * f)`.

        Raises:
            ValueError: If `h` has another shape, or an id is out of range.
            TypeError: If `h` is no tensor of integers or floats.
        """
        if not isinstance(h, torch.Tensor) or not h.is_floating_point():
            quantized = self._look_up(h, shape)
        else:
            self._check_latents(h)
            quantized = (h if force_not_quantize else self.quantize(h)[0]).to(self.dtype)
        sample = self._decode(quantized, self._tiles())
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    @apply_forward_hook
    @torch.no_grad()
    def encode_tokens(
        self, sample: torch.Tensor, scales: Sequence[float] | None = None
    ) -> torch.Tensor | list[torch.Tensor]:
        """Encodes images to ids, which have no gradient.

        Args:
            sample (`torch.Tensor` of shape `(batch, in_channels, height, width)`): Images of any size in
                `pixel_range`.
            scales (`Sequence[float]`, *optional*): Scales, each more than 0; one id grid each, in this order.

        Returns:
            `torch.Tensor` or `list[torch.Tensor]`: Ids `(batch, h, w)` in int64, a list of them if scales are given.
        """
        checked = None if scales is None else _check_scales(scales)
        latents = self._encode(sample, self._tiles())
        if checked is None:
            return self.quantize.nearest_ids(latents)
        return [self.quantize.nearest_ids(resize_latents(latents, scale)) for scale in checked]

    @apply_forward_hook
    def decode_tokens(self, ids: torch.Tensor | list[torch.Tensor]) -> torch.Tensor | list[torch.Tensor]:
        """Decodes ids to images.

        Args:
            ids (`torch.Tensor` of shape `(batch, h, w)` or a list of them): Integers in `[0, codebook_size)`.

        Returns:
            `torch.Tensor` or `list[torch.Tensor]`: Images `(batch, out_channels, h * f, w * f)`, clamped to
            `pixel_range`; a list for a list.

        Raises:
            ValueError: If an id is out of range, or the shape is another.
            TypeError: If ids are no tensor of an integer type.
        """
        if isinstance(ids, list | tuple):
            return [self.decode_tokens(each) for each in ids]
        return self._clamp(self._decode(self._look_up(ids, None), self._tiles()))

    def forward(
        self,
        sample: torch.Tensor,
        scales: Sequence[float] | None = None,
        patch_nums: Sequence[int] | None = None,
        tile_size: int | None = None,
        overlap: int | None = None,
        return_dict: bool = True,
    ) -> SVQVAEOutput | tuple[torch.Tensor | list[torch.Tensor], VQLosses | list[VQLosses]]:
        """Reconstructs images, at one or several scales. The encoder runs once.

        In evaluation the reconstruction is clamped to `pixel_range`, in training it is not.

        Args:
            sample (`torch.Tensor` of shape `(batch, in_channels, height, width)`): Images of any size in
                `pixel_range`.
            scales (`Sequence[float]`, *optional*): Output side over input side of each reconstruction.
            patch_nums (`Sequence[int]`, *optional*): The original's way to give scales: latent cells along a tile of
                `tile_size` pixels, so that a scale is `patch_num * f / tile_size`.
            tile_size (`int`, *optional*): As in [`~SVQVAE.enable_tiling`], whose value is the default. Given here, or
                with `patch_nums`, it switches tiling on for this call.
            overlap (`int`, *optional*): Likewise; less where the tile is too small for it.
            return_dict (`bool`, defaults to `True`): Whether to give an output object or a tuple.

        Returns:
            [`SVQVAEOutput`] or `tuple`: Reconstruction `(batch, out_channels, round(scale * height), round(scale *
            width))`, at least one pixel a side, and [`VQLosses`]; lists in the order of the scales if scales or
            `patch_nums` are given.

        Raises:
            ValueError: If a value does not fit.
        """
        if scales is not None and patch_nums is not None:
            raise ValueError("Either `scales` or `patch_nums` must be given, but both were. Leave one out.")
        if patch_nums is not None:
            tile_size = self.tile_size if tile_size is None else tile_size
            self._check_tiles(tile_size, None)
            scales = [patch_num * self.f / tile_size for patch_num in _check_scales(patch_nums, "`patch_nums`")]
        checked = [1.0] if scales is None else _check_scales(scales)
        tiles = self._tiles(tile_size, overlap)
        latents = self._encode(sample, tiles)
        reconstructions: list[torch.Tensor] = []
        losses: list[VQLosses] = []
        for scale in checked:
            quantized, loss, _ = self.quantize(resize_latents(latents, scale))
            decoded = self._decode(quantized, tiles)
            reconstructions.append(self.resize_to_image(decoded, sample.shape[-2:], scale))
            losses.append(loss)
        output = (reconstructions[0], losses[0]) if scales is None else (reconstructions, losses)
        return SVQVAEOutput(*output) if return_dict else output

    def resize_to_image(self, decoded: torch.Tensor, image_size: Sequence[int], scale: float) -> torch.Tensor:
        """Brings what `decode` gives for the ids of an image at a scale to the image's own size at that scale.

        The ids stand for the whole image, padded to multiples of `f`. Where `scale` times its latents is no whole
        number, they are of a little more or less than `scale`; the sample is then resized first, so that the content
        keeps its place.

        Args:
            decoded (`torch.Tensor` of shape `(batch, out_channels, h * f, w * f)`): Decoded ids.
            image_size (`tuple[int, int]`): Height and width of the image that was encoded.
            scale (`float`): Scale that it was encoded at.

        Returns:
            `torch.Tensor`: `(batch, out_channels, round(scale * height), round(scale * width))`, at least one pixel a
            side; clamped to `pixel_range` in evaluation.
        """
        padded = [max(1, round(scale * -(-side // self.f) * self.f)) for side in image_size]
        if list(decoded.shape[-2:]) != padded:
            decoded = F.interpolate(decoded.float(), padded, mode="bilinear", antialias=True).to(decoded.dtype)
        height, width = (max(1, round(scale * side)) for side in image_size)
        decoded = decoded[..., :height, :width]
        return decoded if self.training else self._clamp(decoded)

    def encode_window(
        self, window: torch.Tensor, context: TileContext | None = None, core: Core | None = None
    ) -> torch.Tensor:
        """Latents of a window of an image, for those who do the tiling.

        Args:
            window (`torch.Tensor` of shape `(batch, in_channels, h * f, w * f)`): Pixels in `pixel_range`.
            context ([`TileContext`], *optional*): That of the image.
            core (`tuple[slice, slice]`, *optional*): Rows and columns of the window to give, in latents.

        Returns:
            `torch.Tensor`: Latents `(batch, codebook_embed_dim, h, w)`, or those of the core, before quantisation.
        """
        window = map_range(window, self.config["pixel_range"], self.config["network_range"])
        latents = self.quant_conv(self.encoder(window, context))
        return (latents if core is None else trim(latents, core, 0)[0]).contiguous()

    def decode_window(
        self, window: torch.Tensor, context: TileContext | None = None, core: Core | None = None
    ) -> torch.Tensor:
        """Pixels of a window of quantised latents, for those who do the tiling.

        Args:
            window (`torch.Tensor` of shape `(batch, codebook_embed_dim, h, w)`): Quantised latents.
            context ([`TileContext`], *optional*): That of the image.
            core (`tuple[slice, slice]`, *optional*): Rows and columns of the window to give, in latents. What they do
                not depend on is left out; without `context`, of what the norms see as well.

        Returns:
            `torch.Tensor`: Pixels `(batch, out_channels, h * f, w * f)`, or those of the core, in `pixel_range`, not
            clamped.
        """
        decoded = self.decoder(self.post_quant_conv(window), context, core)
        if core is not None:
            kept = zoom(core, self.f)
            if list(decoded.shape[-2:]) != [span.stop - span.start for span in kept]:  # the decoder is compiled
                decoded, _ = trim(decoded, kept, 0)
        return map_range(decoded.contiguous(), self.config["network_range"], self.config["pixel_range"])

    def _encode(self, sample: torch.Tensor, tiles: tuple[int, int] | None) -> torch.Tensor:
        self._check_sample(sample)
        bottom, right = (-(-side // self.f) * self.f - side for side in sample.shape[-2:])
        sample = F.pad(sample, (0, right, 0, bottom), mode="replicate")
        return self._run(self.encode_window, sample, tiles, source_cell=self.f, result_cell=1)

    def _decode(self, quantized: torch.Tensor, tiles: tuple[int, int] | None) -> torch.Tensor:
        return self._run(self.decode_window, quantized, tiles, source_cell=1, result_cell=self.f)

    def _run(
        self,
        network: Callable[..., torch.Tensor],
        source: torch.Tensor,
        tiles: tuple[int, int] | None,
        source_cell: int,
        result_cell: int,
    ) -> torch.Tensor:
        """Runs a network over a batch: slices outside, tiles inside."""
        if self.use_slicing and source.shape[0] > 1:
            return torch.cat([self._run(network, part, tiles, source_cell, result_cell) for part in source.split(1)])
        size = [side // source_cell for side in source.shape[-2:]]
        if tiles is None or fits_whole(size, tiles[0]):
            return network(source)
        if torch.is_grad_enabled() and self.is_gradient_checkpointing:
            raise ValueError(
                "Gradient checkpointing runs the network again, when what its tiles share is no longer that of the "
                "first run. Disable it, tiling or gradients."
            )
        context = gather_context(
            network, lambda rows, columns: source[..., rows, columns], size, tiles[0], source_cell
        )
        return map_tiles(partial(network, context=context), source, *tiles, source_cell, result_cell, self.on_tile)

    def _clamp(self, sample: torch.Tensor) -> torch.Tensor:
        return sample.clamp(*self.config["pixel_range"])

    def _look_up(self, ids: torch.Tensor, shape: tuple[int, int, int, int] | None) -> torch.Tensor:
        is_tensor = isinstance(ids, torch.Tensor)
        if not is_tensor or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            kind = ids.dtype if is_tensor else type(ids).__name__
            raise TypeError(f"ids must be a tensor of an integer type, but are {kind}. Latents are for `decode`.")
        ids = ids.long()
        if shape is None:
            if ids.ndim != 3:
                raise ValueError(
                    f"ids must have shape (batch, h, w), but have shape {tuple(ids.shape)}. Reshape them to the grid, "
                    "or pass `shape`."
                )
            shape = (*ids.shape, self.config["codebook_embed_dim"])
        dim = self.config["codebook_embed_dim"]
        if not ids.numel() or len(shape) != 4 or math.prod(shape[:-1]) != ids.numel() or shape[-1] != dim:
            raise ValueError(
                f"ids must be at least one and `shape` must be (batch, h, w, {dim}) of as many ids, but there are "
                f"{ids.numel()} for {tuple(shape)}. Reshape them to the grid."
            )
        size = self.config["codebook_size"]
        # A compiled graph has no place for a check that depends on values.
        if not torch.compiler.is_compiling() and not 0 <= ids.min() <= ids.max() < size:
            raise ValueError(
                f"ids must lie in [0, {size}) (`codebook_size`), but lie in [{ids.min()}, {ids.max()}]. Pass ids of "
                "this codebook, without special tokens."
            )
        return self.quantize.get_codebook_entry(ids, shape).to(self.dtype)

    def _tiles(self, tile_size: int | None = None, overlap: int | None = None) -> tuple[int, int] | None:
        """Tile and halo in latents, or `None` where no tiles are asked for."""
        if not self.use_tiling and tile_size is None and overlap is None:
            return None
        tile_size = self.tile_size if tile_size is None else tile_size
        self._check_tiles(tile_size, overlap)
        overlap = self._fit_overlap(self.overlap, tile_size) if overlap is None else overlap
        return tile_size // self.f, overlap // self.f

    def _fit_overlap(self, overlap: int, tile_size: int) -> int:
        """The overlap, or the largest that fits where the tile is too small for it."""
        return max(0, min(overlap // self.f, (tile_size // self.f - 1) // 2)) * self.f

    def _check_tiles(self, tile_size: int, overlap: int | None) -> None:
        f = self.f
        for name, value in {"tile_size": tile_size, "overlap": 0 if overlap is None else overlap}.items():
            if not isinstance(value, Integral) or isinstance(value, bool):
                raise ValueError(f"`{name}` must be a whole number of pixels, but is {value!r}.")
        if tile_size % f or tile_size < f:
            fitting = max(1, round(tile_size / f)) * f
            raise ValueError(
                f"`tile_size` must be a positive multiple of f = {f}, but is {tile_size}. The nearest that fits is "
                f"{fitting}."
            )
        largest = (tile_size // f - 1) // 2 * f
        if overlap is not None and (overlap % f or not 0 <= overlap <= largest):
            fitting = min(max(0, round(overlap / f) * f), largest)
            raise ValueError(
                f"`overlap` must be a multiple of f = {f} and less than half of `tile_size` = {tile_size}, but is "
                f"{overlap}. The nearest that fits is {fitting}."
            )

    def _check_sample(self, sample: torch.Tensor) -> None:
        if not isinstance(sample, torch.Tensor) or not sample.is_floating_point():
            kind = sample.dtype if isinstance(sample, torch.Tensor) else type(sample).__name__
            raise TypeError(
                f"`sample` must be a tensor of a floating type with values in {tuple(self.config['pixel_range'])} "
                f"(`pixel_range`), but is {kind}. Prepare images with SVQVAEImageProcessor."
            )
        if sample.dtype != self.dtype and not torch.is_autocast_enabled(sample.device.type):
            raise TypeError(
                f"`sample` must be of the model's type {self.dtype}, but is {sample.dtype}. Pass "
                "`sample.to(model.dtype)`."
            )
        if sample.ndim != 4 or sample.shape[1] != self.config["in_channels"] or 0 in sample.shape:
            raise ValueError(
                f"`sample` must have shape (batch, {self.config['in_channels']}, height, width), none of them 0, but "
                f"has shape {tuple(sample.shape)}. Prepare images with SVQVAEImageProcessor."
            )

    def _check_latents(self, latents: torch.Tensor) -> None:
        if latents.ndim != 4 or latents.shape[1] != self.config["codebook_embed_dim"] or 0 in latents.shape:
            raise ValueError(
                f"`latents` must have {self.config['codebook_embed_dim']} channels (`codebook_embed_dim`) and no "
                f"side of 0, but has shape {tuple(latents.shape)}. Pass the output of `encode`, not an image."
            )


def fits_whole(size: Sequence[int], tile: int) -> bool:
    """Whether an image takes no more memory whole than by tiles, of which there is then no need.

    Args:
        size (`tuple[int, int]`): Height and width of the image in latents.
        tile (`int`): Largest side of a window in latents.
    """
    return math.prod(size) <= max(tile**2, SAMPLE_WINDOWS * min(SAMPLE_SIDE, tile) ** 2)


def gather_context(
    network: Callable[..., torch.Tensor], read: Read, size: Sequence[int], tile: int, source_cell: int
) -> TileContext:
    """What the tiles of an image share, from a sample of its windows.

    Args:
        network (`Callable`): [`SVQVAE.encode_window`] or [`SVQVAE.decode_window`].
        read (`Callable`): Gives the source `(batch, channels, rows, columns)` at two slices, in samples.
        size (`tuple[int, int]`): Height and width of the image in latents.
        tile (`int`): Largest side of a window in latents.
        source_cell (`int`): Samples of the source along a side of a latent.
    """
    side = min(SAMPLE_SIDE, tile)
    count = min(SAMPLE_WINDOWS, max(1, round(SAMPLE_SHARE * math.prod(size) / side**2)))
    windows = sample_windows(size, side, min(SAMPLE_MARGIN, (side - 1) // 2), count)
    source = windows.read(read, source_cell)
    context = TileContext(len(source) // len(windows.places), windows.window, windows.margin)
    network(source, context)
    context.gathering = False
    return context


def list_faults(loading_info: Mapping[str, Any]) -> str:
    """The weights that a loader found missing, not expected or of another shape; empty if there are none."""
    faults = {kind: sorted(map(str, loading_info[f"{kind}_keys"])) for kind in ("missing", "unexpected", "mismatched")}
    return "; ".join(f"{kind}: {', '.join(keys)}" for kind, keys in faults.items() if keys)


def map_range(values: torch.Tensor, source: Sequence[float], target: Sequence[float]) -> torch.Tensor:
    """Maps values linearly, `source` (low, high) to `target` (low, high); nothing is clamped."""
    if list(source) == list(target):
        return values
    gain = (target[1] - target[0]) / (source[1] - source[0])
    return values * gain + (target[0] - source[0] * gain)


def _check_scales(scales: Iterable[float], name: str = "`scales`") -> list[float]:
    checked = list(scales) if isinstance(scales, Iterable) else [None]
    if not all(isinstance(scale, Real) for scale in checked):
        raise TypeError(f"{name} must be a list of numbers, but are {scales!r}. Put a single one in a list.")
    for scale in checked:
        if not 0 < scale < float("inf"):
            raise ValueError(f"Each of {name} must be finite and more than 0, but one is {scale}.")
    return checked


def _check_config(config: Mapping[str, Any]) -> None:
    numbers = {key: [config[key]] for key in SIZES} | {
        key: config[key] for key in ("encoder_ch_mult", "decoder_ch_mult")
    }
    for key, values in numbers.items():
        if not isinstance(values, list | tuple) or not all(type(value) is int and value > 0 for value in values):
            raise ValueError(f"`{key}` must be made of whole numbers above 0, but is {config[key]!r}.")
    if len(config["encoder_ch_mult"]) != len(config["decoder_ch_mult"]):
        raise ValueError(
            "`encoder_ch_mult` and `decoder_ch_mult` must have as many levels, so that both have the same f, but have "
            f"{len(config['encoder_ch_mult'])} and {len(config['decoder_ch_mult'])}."
        )
    check_depth("The config", len(config["encoder_ch_mult"]), config["num_res_blocks"])
    groups, base = config["norm_num_groups"], config["base_channels"]
    for channels in sorted(
        {base, *(base * mult for mult in (*config["encoder_ch_mult"], *config["decoder_ch_mult"]))}
    ):
        if channels % groups:
            raise ValueError(
                f"`norm_num_groups` must divide the channels of each level, but {groups} does not divide {channels}."
            )
    if not isinstance(config["codebook_l2_norm"], bool):
        raise ValueError(f"`codebook_l2_norm` must be True or False, but is {config['codebook_l2_norm']!r}.")
    for key in ("pixel_range", "network_range"):
        bounds = config[key]
        if (
            not isinstance(bounds, list | tuple)
            or len(bounds) != 2
            or not all(isinstance(bound, int | float) and abs(bound) < float("inf") for bound in bounds)
            or not bounds[0] < bounds[1]
        ):
            raise ValueError(f"`{key}` must be two finite numbers (low, high) with low < high, but is {bounds!r}.")

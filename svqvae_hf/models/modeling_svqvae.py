"""SVQVAE: an encoder, a vector quantizer with one codebook for every scale, and a decoder.

    image (3, H, W) --pad--> Encoder --quant_conv--> latents (8, H/f, W/f)
                                                         |  for each scale s: resize by s, find the nearest codes
                                                         v
    image (3, sH, sW) <--crop-- Decoder <--post_quant_conv-- codes (8, sH/f, sW/f) = codebook[ids]

    By default the padded image is resized by s instead, and the encoder runs for each scale.

    Encoder, ch_mult (1, 2, 2, 4), f = 8               Decoder, the same levels from the last to the first

      conv_in                      3 -> c                conv_in                         z -> 4c
      level 0   res res     down   c                     mid       res attn res          4c
      level 1   res res     down   2c                    level 0   (res attn) x 3   up   4c
      level 2   res res     down   2c                    level 1   res res res      up   2c
      level 3   (res attn) x 2     4c                    level 2   res res res      up   2c
      mid       res attn res       4c                    level 3   res res res           c
      norm, silu, conv_out         4c -> z               norm, silu, conv_out            c -> 3

The architecture and the names of the weights come from the Open Model Initiative's SVQVAE (`modules.py`,
`svqvae.py`), which follows LlamaGen (arXiv 2406.06525) and FlexVAR (arXiv 2502.20313). The quantizer is in
`quantizer.py`, tiling of large images in `tiling.py`, loading in `loading.py`, and checks of arguments in `checks.py`.
"""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import AttentionBackendName
from diffusers.utils import BaseOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import nn

from .checks import (
    check_config,
    check_ids,
    check_latents,
    check_sample,
    check_scale_from,
    check_scales,
    check_tiles,
    is_list_of_scales,
)
from .layers import AttentionProcessor, Conv3x3, GroupNorm, RepeatConv2d, TileContext, fast_layout, pad_edges, silu
from .loading import StrictLoadingMixin
from .quantizer import VectorQuantizer, VQLosses
from .resizing import resize, resize_latents, resize_sample
from .tiling import OVERLAP_PX, TILE_SIZE_PX, Tiles, TilingMixin


@dataclass
class SVQVAEEncoderOutput(BaseOutput):
    """Output of [`SVQVAE.encode`].

    Args:
        latents (`torch.Tensor` of shape `(batch, codebook_embed_dim, h, w)`): Latents before quantisation.
    """

    latents: torch.Tensor


@dataclass
class SVQVAEDecoderOutput(BaseOutput):
    """Output of [`SVQVAE.decode`].

    Args:
        sample (`torch.Tensor` of shape `(batch, out_channels, height, width)`): Images in `pixel_range`, not clamped.
    """

    sample: torch.Tensor


@dataclass
class SVQVAEOutput(BaseOutput):
    """Output of [`SVQVAE.forward`]. For several scales, all fields are lists in their order.

    Args:
        sample (`torch.Tensor` of shape `(batch, out_channels, height, width)` or a list of them): Reconstruction in
            `pixel_range`.
        losses ([`VQLosses`] or a list of them, *optional*): Losses of the quantisation. `None` or empty if nothing
            was quantised.
        latents (`torch.Tensor` of shape `(batch, codebook_embed_dim, h, w)` or a list of them): Latents before
            quantisation.
        ids (`torch.Tensor` of shape `(batch, h, w)` or a list of them, *optional*): Ids in int64. `None` or empty if
            nothing was quantised.
    """

    sample: torch.Tensor | list[torch.Tensor]
    losses: VQLosses | list[VQLosses] | None = None
    latents: torch.Tensor | list[torch.Tensor] | None = None
    ids: torch.Tensor | list[torch.Tensor] | None = None


class ResnetBlock(nn.Module):
    """Two normalised 3 x 3 convolutions beside a shortcut."""

    def __init__(self, in_channels: int, out_channels: int, num_groups: int, dropout: float):
        super().__init__()
        self.norm1 = GroupNorm(num_groups, in_channels)
        self.conv1 = Conv3x3(in_channels, out_channels)
        self.norm2 = GroupNorm(num_groups, out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = Conv3x3(out_channels, out_channels)
        self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, hidden: torch.Tensor, shared: TileContext | None = None) -> torch.Tensor:
        """`(batch, in_channels, h, w)` -> `(batch, out_channels, h, w)`."""
        # Each step stores its result under the name `residual`, so that Python frees the result of the step before.
        # The shortcut is computed last, so that it takes no memory during these steps.
        residual = silu(self.norm1(hidden, shared))
        residual = self.conv1(residual, shared)
        residual = silu(self.norm2(residual, shared))
        residual = self.conv2(self.dropout(residual), shared)
        shortcut = hidden if self.nin_shortcut is None else self.nin_shortcut(hidden)
        return residual.add_(shortcut)


class AttnBlock(nn.Module, AttentionModuleMixin):
    """Single-head self-attention. In a tile, queries attend to keys and values gathered once per image."""

    def __init__(self, channels: int, num_groups: int):
        super().__init__()
        self.processor = AttentionProcessor(AttentionBackendName.NATIVE)  # other kernels need narrower heads
        self.norm = GroupNorm(num_groups, channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, hidden: torch.Tensor, shared: TileContext | None = None) -> torch.Tensor:
        """`(images * windows, channels, h, w)` -> the same shape.

        Without `shared`, each window is a whole image. With `shared`, the batch holds the same number of windows of
        each image, first all windows of the first image. All windows of an image attend to the same keys and values.
        """
        normed = self.norm(hidden, shared)  # (images * windows, channels, h, w)
        if shared is None:
            images, _, _, _ = hidden.shape
            key, value = self.keys_and_values(normed, images)  # (images, h * w, 1, channels)
        else:
            # Gathered from the sampled windows of each image: (images, positions in all windows, 1, channels)
            key, value = shared.keys_and_values(attention=self, normed=normed)
            images, _, _, _ = key.shape
        query = to_positions(self.q(normed), images)  # (images, windows * h * w, 1, channels)
        attended = self.processor(query, key, value)  # (images, windows * h * w, 1, channels)
        by_window = from_positions(attended, hidden.shape)  # (images * windows, channels, h, w)
        return hidden + self.proj_out(by_window)

    def keys_and_values(self, normed: torch.Tensor, images: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values `(images, positions, 1, channels)`."""
        key = to_positions(self.k(normed), images)
        value = to_positions(self.v(normed), images)
        return key, value


def to_positions(hidden: torch.Tensor, images: int) -> torch.Tensor:
    """`(images * windows, channels, h, w)` -> `(images, windows * h * w, 1, channels)`.

    The result is contiguous, as the fused attention kernels require.
    """
    by_image = hidden.unflatten(0, (images, -1))  # (images, windows, channels, h, w)
    positions = by_image.movedim(2, -1).flatten(1, 3)  # (images, windows * h * w, channels)
    return positions.unsqueeze(2).contiguous()


def from_positions(positions: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """`(images, windows * h * w, 1, channels)` -> `shape`, `(images * windows, channels, h, w)`."""
    all_windows, channels, _, _ = shape
    by_window = positions.reshape(all_windows, -1, channels)  # (images * windows, h * w, channels)
    return by_window.transpose(1, 2).reshape(shape)


class Downsample(nn.Module):
    """Strided convolution that halves both sides, padded at the bottom and at the right only."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, hidden: torch.Tensor, shared: TileContext | None = None) -> torch.Tensor:
        """`(batch, channels, h, w)` -> `(batch, channels, h / 2, w / 2)`."""
        return self.conv(pad_edges(hidden, shared, before=0))


class Upsample(nn.Module):
    """Nearest-neighbour upsampling by 2, then a 3 x 3 convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = RepeatConv2d(channels)

    def forward(self, hidden: torch.Tensor, shared: TileContext | None = None) -> torch.Tensor:
        """`(batch, channels, h, w)` -> `(batch, channels, 2 * h, 2 * w)`."""
        return self.conv(hidden, shared)


class ResolutionBlock(nn.Module):
    """Residual blocks of one resolution, each followed by attention if asked for, then a change of resolution."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        num_blocks: int,
        num_groups: int,
        dropout: float,
        attention: bool = False,
        down: bool = False,
        up: bool = False,
    ):
        super().__init__()
        self.res = nn.ModuleList()
        self.attn = nn.ModuleList()
        for block in range(num_blocks):
            channels = in_channels if block == 0 else out_channels
            self.res.append(ResnetBlock(channels, out_channels, num_groups, dropout))
        if attention:
            for _ in range(num_blocks):
                self.attn.append(AttnBlock(out_channels, num_groups))
        self.downsample = Downsample(out_channels) if down else None
        self.upsample = Upsample(out_channels) if up else None
        self.gradient_checkpointing = False
        self._gradient_checkpointing_func: Callable[..., torch.Tensor]  # diffusers sets it

    def forward(self, hidden: torch.Tensor, shared: TileContext | None = None) -> torch.Tensor:
        """`(batch, in_channels, h, w)` -> `(batch, out_channels, h', w')`, both sides halved, doubled or kept."""
        for number, res in enumerate(self.res):
            hidden = self._run_block(res, hidden, shared)
            if self.attn:
                hidden = self._run_block(self.attn[number], hidden, shared)
        if self.downsample is not None:
            hidden = self.downsample(hidden, shared)
        if self.upsample is not None:
            hidden = self.upsample(hidden, shared)
        return hidden

    def _run_block(self, block: nn.Module, hidden: torch.Tensor, shared: TileContext | None) -> torch.Tensor:
        """Runs a block, with gradient checkpointing if it is on."""
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            return self._gradient_checkpointing_func(block, hidden, shared)
        return block(hidden, shared)


class Encoder(nn.Module):
    """Image -> features, one per `2 ** (len(encoder_ch_mult) - 1)` pixels along each side."""

    def __init__(self, config: Mapping[str, Any]):
        super().__init__()
        num_groups = config["norm_num_groups"]
        dropout = config["dropout_p"]
        num_levels = len(config["encoder_ch_mult"])
        channels = config["base_channels"]
        self.conv_in = Conv3x3(config["in_channels"], channels)
        self.conv_blocks = nn.ModuleList()
        for level, multiplier in enumerate(config["encoder_ch_mult"]):
            is_last = level == num_levels - 1
            out_channels = config["base_channels"] * multiplier
            block = ResolutionBlock(
                channels,
                out_channels,
                config["num_res_blocks"],
                num_groups,
                dropout,
                attention=is_last,
                down=not is_last,
            )
            self.conv_blocks.append(block)
            channels = out_channels
        self.mid = middle_blocks(channels, num_groups, dropout)
        self.norm_out = GroupNorm(num_groups, channels)
        self.conv_out = Conv3x3(channels, config["z_channels"])

    def forward(self, hidden: torch.Tensor, shared: TileContext | None = None) -> torch.Tensor:
        """`(batch, in_channels, h * f, w * f)` -> `(batch, z_channels, h, w)`."""
        hidden = self.conv_in(fast_layout(hidden), shared)
        for level in self.conv_blocks:
            hidden = level(hidden, shared)
        for block in self.mid:
            hidden = block(hidden, shared)
        return self.conv_out(silu(self.norm_out(hidden, shared)), shared)


class Decoder(nn.Module):
    """Features -> image, with one residual block more per level than the encoder."""

    def __init__(self, config: Mapping[str, Any]):
        super().__init__()
        num_groups = config["norm_num_groups"]
        dropout = config["dropout_p"]
        num_levels = len(config["decoder_ch_mult"])
        num_blocks = config["num_res_blocks"] + 1
        channels = config["base_channels"] * config["decoder_ch_mult"][-1]
        self.conv_in = Conv3x3(config["z_channels"], channels)
        self.mid = middle_blocks(channels, num_groups, dropout)
        self.conv_blocks = nn.ModuleList()
        for level, multiplier in enumerate(reversed(config["decoder_ch_mult"])):
            is_last = level == num_levels - 1
            out_channels = config["base_channels"] * multiplier
            block = ResolutionBlock(
                channels, out_channels, num_blocks, num_groups, dropout, attention=level == 0, up=not is_last
            )
            self.conv_blocks.append(block)
            channels = out_channels
        self.margins = margins_of_levels(num_levels, num_blocks)
        self.norm_out = GroupNorm(num_groups, channels)
        self.conv_out = Conv3x3(channels, config["out_channels"])

    def forward(self, hidden: torch.Tensor, shared: TileContext | None = None) -> torch.Tensor:
        """`(batch, z_channels, h, w)` -> `(batch, out_channels, h * f, w * f)`.

        With `shared`, the input is a window of an image: a core and a margin around it. The result is the image at the
        core alone. After each level, the margin is cropped to the part of it that later levels read.
        """
        hidden = self.conv_in(fast_layout(hidden), shared)
        for block in self.mid:
            hidden = block(hidden, shared)
        for level, margin in zip(self.conv_blocks, self.margins, strict=True):
            hidden = level(hidden, shared)
            is_last_level = margin == 0  # `conv_out` reads a margin of its output, which `core_of` then crops
            if shared is not None and not is_last_level:
                # The new `shared` describes the smaller window.
                hidden, shared = shared.crop(hidden, margin)
        hidden = self.conv_out(silu(self.norm_out(hidden, shared)), shared)
        if shared is None:
            return hidden
        return shared.core_of(hidden)


def margins_of_levels(num_levels: int, num_blocks: int) -> list[int]:
    """Margin around the core that must be kept of the output of each decoder level, because later levels read it.

    Margins are in positions of the output of the level. With 3 levels of 3 blocks, which have 7 convolutions each, the
    margins are `[10, 7, 0]`:

        level 2, the last:  0, because no level reads its output.
        level 1:            7, because each convolution of level 2 reads one position further.
        level 0:            10 = 3 + 7. The 7 positions at the output of level 1 are 7 // 2 = 3 positions at its input,
                            which has half the resolution. Its convolutions read 7 positions further.
    """
    # Each 3 x 3 convolution reads one position on each side. A residual block has two of them. One more follows the
    # blocks of a level: in its upsampling, or at the end of the decoder.
    num_convolutions = 2 * num_blocks + 1
    margins = [0]  # from the last level to the first
    for _ in range(num_levels - 1):
        margin_of_next_level = margins[-1]
        margin_in_its_input = margin_of_next_level // 2
        margins.append(margin_in_its_input + num_convolutions)
    margins.reverse()
    return margins


def middle_blocks(channels: int, num_groups: int, dropout: float) -> nn.ModuleList:
    """Residual block, attention and residual block at the lowest resolution."""
    return nn.ModuleList(
        [
            ResnetBlock(channels, channels, num_groups, dropout),
            AttnBlock(channels, num_groups),
            ResnetBlock(channels, channels, num_groups, dropout),
        ]
    )


class SVQVAE(StrictLoadingMixin, TilingMixin):
    """Scalable vector-quantized VAE: tokenizes images of any size, at several scales, with one codebook.

    Args:
        in_channels (`int`, defaults to 3): Channels of the image.
        out_channels (`int`, defaults to 3): Channels of the reconstruction.
        base_channels (`int`, defaults to 128): Channels at multiplier 1.
        encoder_ch_mult (`tuple[int, ...]`, defaults to `(1, 1, 2, 2, 4)`): Channel multiplier of each encoder level,
            full resolution first. Each level but the last halves the sides.
        decoder_ch_mult (`tuple[int, ...]`, defaults to `(1, 1, 2, 2, 4)`): Channel multiplier of each decoder level,
            full resolution first.
        num_res_blocks (`int`, defaults to 2): Residual blocks per encoder level; a decoder level has one more.
        norm_num_groups (`int`, defaults to 32): Groups of each normalisation.
        z_channels (`int`, defaults to 256): Channels between each network and its 1 x 1 convolution.
        dropout_p (`float`, defaults to 0.0): Dropout probability in residual blocks.
        codebook_size (`int`, defaults to 16384): Number of codes.
        codebook_embed_dim (`int`, defaults to 8): Dimension of a code.
        codebook_l2_norm (`bool`, defaults to `True`): Whether latents and codes lie on the unit sphere.
        commit_loss_beta (`float`, defaults to 0.25): Weight of the commitment loss.
        entropy_loss_ratio (`float`, defaults to 0.0): Weight of the entropy loss; at 0 it is not computed.
        pixel_range (`tuple[float, float]`, defaults to `(0.0, 1.0)`): Value range of input and output images.
        network_range (`tuple[float, float]`, defaults to `(0.0, 1.0)`): Value range that the weights were trained on.
        sample_size (`int`, defaults to 256): Side in pixels of the images that the weights were trained on.
        scaling_factor (`float`, defaults to 1.0): Factor by which a latent diffusion model multiplies latents.
        force_upcast (`bool`, defaults to `False`): Whether pipelines should run the model in float32.

    Raises:
        ValueError: If values do not fit each other.
    """

    component_name = "vqvae"
    _supports_gradient_checkpointing = True
    _no_split_modules = ["Encoder", "Decoder", "VectorQuantizer"]
    _repeated_blocks = ["ResnetBlock", "AttnBlock"]
    _skip_layerwise_casting_patterns = ["quantize", "norm"]
    _keep_in_fp32_modules = ["quantize"]
    _keys_to_ignore_on_load_unexpected = [r"quantize\.codebook_used"]  # a usage log in every original file
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
        check_config(self.config)
        self.encoder = Encoder(self.config)
        self.decoder = Decoder(self.config)
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
        self.tile_size = TILE_SIZE_PX
        self.overlap = OVERLAP_PX // self.f * self.f

    @apply_forward_hook
    def encode(self, sample: torch.Tensor, return_dict: bool = True) -> SVQVAEEncoderOutput | tuple[torch.Tensor]:
        """Encodes images to latents.

        Args:
            sample (`torch.Tensor` of shape `(batch, in_channels, height, width)`): Images of any size in
                `pixel_range`. Sides are padded to multiples of `f` by repeating the last row and column.
            return_dict (`bool`, defaults to `True`): Whether to return an output object or a tuple.

        Returns:
            [`SVQVAEEncoderOutput`] or `tuple`: Latents `(batch, codebook_embed_dim, ceil(height / f), ceil(width /
            f))`, before quantisation.

        Raises:
            ValueError: If `sample` has the wrong shape.
            TypeError: If `sample` is not of the model's type.
        """
        check_sample(sample, self.config, self.dtype, self.training)
        latents = self._encode(sample, self.tiles_of_call())
        if not return_dict:
            return (latents,)
        return SVQVAEEncoderOutput(latents=latents)

    @apply_forward_hook
    def decode(
        self,
        h: torch.Tensor,
        force_not_quantize: bool = False,
        return_dict: bool = True,
        shape: tuple[int, int, int, int] | None = None,
        tiles: Tiles | tuple[int, int] | None = None,
    ) -> SVQVAEDecoderOutput | tuple[torch.Tensor]:
        """Decodes ids or latents, told apart by their type: integers are looked up, floats are quantised.

        Args:
            h (`torch.Tensor`): Ids `(batch, h, w)`, or of any shape if `shape` is given; or latents
                `(batch, codebook_embed_dim, h, w)`.
            force_not_quantize (`bool`, defaults to `False`): See [`~SVQVAE.forward`].
            return_dict (`bool`, defaults to `True`): Whether to return an output object or a tuple.
            shape (`tuple[int, int, int, int]`, *optional*): `(batch, h, w, codebook_embed_dim)` of ids.
            tiles ([`Tiles`] or `tuple[int, int]`, *optional*): Tile size and overlap of this call in pixels, as in
                [`~SVQVAE.enable_tiling`]. By default those that are enabled, if any.

        Returns:
            [`SVQVAEDecoderOutput`] or `tuple`: Sample `(batch, out_channels, h * f, w * f)`, not clamped.

        Raises:
            ValueError: If `h` has the wrong shape, or an id is out of range.
            TypeError: If `h` is not a tensor of integers or floats.
        """
        is_latents = isinstance(h, torch.Tensor) and h.is_floating_point()
        if is_latents and force_not_quantize:
            check_latents(h, self.config)
            quantized = self.quantize.normalise(h)
        elif is_latents:
            check_latents(h, self.config)
            quantized, _, _ = self.quantize(h)
        else:
            check_ids(h, self.config, shape)
            if shape is None:
                batch, height, width = h.shape
                shape = (batch, height, width, self.config["codebook_embed_dim"])
            quantized = self.quantize.get_codebook_entry(h.long(), shape)
        sample = self._decode(quantized.to(self.dtype), self._check_tiles(tiles))
        if not return_dict:
            return (sample,)
        return SVQVAEDecoderOutput(sample=sample)

    @apply_forward_hook
    def encode_scales(
        self,
        sample: torch.Tensor,
        scales: Sequence[float],
        scale_from: str = "image",
        tiles: Tiles | tuple[int, int] | None = None,
    ) -> list[torch.Tensor]:
        """Encodes images to the latents of each scale, before quantisation.

        Args:
            sample (`torch.Tensor` of shape `(batch, in_channels, height, width)`): Images of any size in
                `pixel_range`.
            scales (`Sequence[float]`): Scales, each above 0.
            scale_from (`str`, defaults to `"image"`): What is resized to a scale. With `"image"` the image is resized
                and the encoder runs for each scale (an image pyramid). With `"latents"` the encoder runs once and its
                latents are resized, as in the original and in FlexVAR: faster, but 1 to 3 dB worse from as many ids.
                At scale 1 both are the same.
            tiles ([`Tiles`] or `tuple[int, int]`, *optional*): Tile size and overlap of this call in pixels, as in
                [`~SVQVAE.enable_tiling`]. By default those that are enabled, if any.

        Returns:
            `list[torch.Tensor]`: Latents `(batch, codebook_embed_dim, max(1, round(scale * h)), max(1, round(scale *
            w)))` of each scale, where `h = ceil(height / f)` and `w = ceil(width / f)`.

        Raises:
            ValueError: If an argument is out of range or does not fit the model.
        """
        check_sample(sample, self.config, self.dtype, self.training)
        check_scale_from(scale_from)
        scales = check_scales(scales)
        tiles_of_call = self._check_tiles(tiles)
        if scale_from == "latents":
            latents = self._encode(sample, tiles_of_call)
            return [resize_latents(latents, scale) for scale in scales]
        latents_of_scales = []
        for scale in scales:
            resized = resize_sample(sample, scale, self.f)
            latents_of_scales.append(self._encode(resized, tiles_of_call))
        return latents_of_scales

    @apply_forward_hook
    @torch.no_grad()
    def encode_tokens(
        self,
        sample: torch.Tensor,
        scales: float | Sequence[float] | None = None,
        scale_from: str = "image",
        tiles: Tiles | tuple[int, int] | None = None,
    ) -> torch.Tensor | list[torch.Tensor]:
        """Encodes images to ids, without gradients.

        Args:
            sample (`torch.Tensor` of shape `(batch, in_channels, height, width)`): Images of any size in
                `pixel_range`.
            scales (`float` or `Sequence[float]`, *optional*): One scale or several, each above 0.
            scale_from (`str`, defaults to `"image"`): See [`~SVQVAE.encode_scales`].
            tiles ([`Tiles`] or `tuple[int, int]`, *optional*): Tile size and overlap of this call in pixels, as in
                [`~SVQVAE.enable_tiling`]. By default those that are enabled, if any.

        Returns:
            `torch.Tensor` or `list[torch.Tensor]`: Ids `(batch, h, w)` in int64. For several scales, a list with one
            grid per scale, in the same order. The shape of a grid does not depend on `scale_from`.
        """
        list_of_scales = [1.0] if scales is None else check_scales(scales)
        latents_of_scales = self.encode_scales(sample, list_of_scales, scale_from, tiles)
        grids = [self.quantize.nearest_ids(latents) for latents in latents_of_scales]
        if is_list_of_scales(scales):
            return grids
        return grids[0]

    @apply_forward_hook
    def decode_tokens(
        self, ids: torch.Tensor | list[torch.Tensor], tiles: Tiles | tuple[int, int] | None = None
    ) -> torch.Tensor | list[torch.Tensor]:
        """Decodes ids to images.

        Args:
            ids (`torch.Tensor` of shape `(batch, h, w)` or a list of them): Integers in `[0, codebook_size)`.
            tiles ([`Tiles`] or `tuple[int, int]`, *optional*): Tile size and overlap of this call in pixels, as in
                [`~SVQVAE.enable_tiling`]. By default those that are enabled, if any.

        Returns:
            `torch.Tensor` or `list[torch.Tensor]`: Images `(batch, out_channels, h * f, w * f)`, clamped to
            `pixel_range`; a list for a list.

        Raises:
            ValueError: If an id is out of range, or `ids` has the wrong shape.
            TypeError: If `ids` is not a tensor of an integer type.
        """
        if isinstance(ids, list | tuple):
            return [self.decode_tokens(grid, tiles) for grid in ids]
        check_ids(ids, self.config)
        sample = self.decode(ids, tiles=tiles).sample
        return sample.clamp(*self.config["pixel_range"])

    def forward(
        self,
        sample: torch.Tensor,
        scales: float | Sequence[float] | None = None,
        patch_nums: Sequence[int] | None = None,
        tile_size: int | None = None,
        overlap: int | None = None,
        return_dict: bool = True,
        scale_from: str = "image",
        force_not_quantize: bool = False,
    ) -> SVQVAEOutput | tuple:
        """Reconstructs images at one or several scales.

        In evaluation mode the reconstruction is clamped to `pixel_range`, in training mode it is not.

        Args:
            sample (`torch.Tensor` of shape `(batch, in_channels, height, width)`): Images of any size in
                `pixel_range`.
            scales (`float` or `Sequence[float]`, *optional*): Output side over input side of each reconstruction.
            patch_nums (`Sequence[int]`, *optional*): The original's form of `scales`: latents along a tile of
                `tile_size` pixels, so that a scale is `patch_num * f / tile_size`. The latents are resized, whatever
                `scale_from` is.
            tile_size (`int`, *optional*): Tile size of this call, see [`~SVQVAE.enable_tiling`]. Switches tiling on.
            overlap (`int`, *optional*): Overlap of this call. Switches tiling on. By default the model's, or a
                quarter of a small tile.
            return_dict (`bool`, defaults to `True`): Whether to return an output object or the original's tuple
                `(sample, (vq, commit, entropy, usage))`.
            scale_from (`str`, defaults to `"image"`): What is resized to a scale, see [`~SVQVAE.encode_scales`].
            force_not_quantize (`bool`, defaults to `False`): Whether to decode the latents without quantising them,
                normalised if the codes are.

        Returns:
            [`SVQVAEOutput`] or `tuple`: Reconstruction `(batch, out_channels, round(scale * height), round(scale *
            width))`, at least one pixel per side, and [`VQLosses`]. All are lists, in the order of the scales, if
            `scales` is a list or `patch_nums` is given.

        Raises:
            ValueError: If an argument is out of range or does not fit the model.
        """
        if scales is not None and patch_nums is not None:
            raise ValueError("Only one of `scales` and `patch_nums` can be given, got both. Leave one out.")
        if patch_nums is not None:
            if tile_size is None:
                tile_size = self.tile_size
                overlap = self.overlap if overlap is None else overlap
            scales = self._scales_of_patches(patch_nums, tile_size)
            scale_from = "latents"
        list_of_scales = [1.0] if scales is None else check_scales(scales)
        tiles = self.tiles_of_call(tile_size, overlap)
        latents_of_scales = self.encode_scales(sample, list_of_scales, scale_from, tiles)
        # One entry per scale in each list
        samples: list[torch.Tensor] = []
        losses: list[Any] = []
        ids: list[torch.Tensor] = []
        for scale, latents in zip(list_of_scales, latents_of_scales, strict=True):
            if force_not_quantize:
                quantized = self.quantize.normalise(latents)
            else:
                quantized, losses_of_scale, (_, _, flat_ids) = self.quantize(latents)
                batch, _, height, width = latents.shape
                losses.append(losses_of_scale)
                ids.append(flat_ids.view(batch, height, width))
            decoded = self._decode(quantized, tiles)
            samples.append(self.resize_to_image(decoded, sample.shape[-2:], scale))
        if not return_dict:  # the tuple of the original
            losses = self._add_usage(losses, ids)
        output = SVQVAEOutput(sample=samples, losses=losses, latents=latents_of_scales, ids=ids)
        if not is_list_of_scales(scales):
            output = first_scale(output)
        if not return_dict:
            return (output.sample, output.losses)
        return output

    def _scales_of_patches(self, patch_nums: Sequence[int], tile_size: int) -> list[float]:
        """Scales at which the latents along a tile of `tile_size` pixels are these numbers.

        At scale 1 they are `tile_size / f`, so 8 latents along a tile of 256 pixels, for f = 16, mean a scale of 0.5.
        """
        check_tiles(self.f, tile_size, None)
        latents_along_tile = check_scales(patch_nums, "`patch_nums`")
        return [patch_num * self.f / tile_size for patch_num in latents_along_tile]

    def _add_usage(self, losses: list[VQLosses], ids: list[torch.Tensor]) -> list[tuple]:
        """Losses of each scale in the form of the original, `(vq, commit, entropy, usage)`."""
        losses_with_usage = []
        for losses_of_scale, ids_of_scale in zip(losses, ids, strict=True):
            usage = self.quantize.usage(ids_of_scale)
            losses_with_usage.append((*losses_of_scale, usage))
        return losses_with_usage

    def resize_to_image(self, decoded: torch.Tensor, image_size: Sequence[int], scale: float) -> torch.Tensor:
        """Resizes and crops a decoded sample to the size of the original image at `scale`.

        The grid of ids is rounded to whole latents, so it may be a little larger or smaller than the padded image at
        `scale`. For example, an image of 100 pixels is padded to 112 pixels, 7 latents of f = 16. At scale 0.5 it has
        4 latents, which are decoded to 64 pixels. These 64 pixels show what 112 pixels show at scale 0.5. So they are
        resized to 56 pixels, and cropped to 50.

        Args:
            decoded (`torch.Tensor` of shape `(batch, out_channels, h * f, w * f)`): Decoded ids.
            image_size (`tuple[int, int]`): Height and width of the image that was encoded.
            scale (`float`): Scale that it was encoded at.

        Returns:
            `torch.Tensor`: `(batch, out_channels, round(scale * height), round(scale * width))`, at least one pixel
            per side, clamped to `pixel_range` in evaluation mode.
        """
        # The decoded sample shows the image with the padding that made its sides multiples of f.
        padded_size = [math.ceil(side / self.f) * self.f for side in image_size]
        resized = resize(decoded, scaled_size(padded_size, scale), "bilinear", antialias=True)
        height, width = scaled_size(image_size, scale)
        cropped = resized[..., :height, :width]
        if self.training:
            return cropped
        return cropped.clamp(*self.config["pixel_range"])

    def codebook_fingerprint(self) -> str:
        """Identifies the codebook: SHA-256 in hexadecimal of its float32 bytes, little-endian."""
        codes = self.quantize.embedding.table().detach().float().cpu()
        little_endian = codes.numpy().astype("<f4").tobytes()
        return hashlib.sha256(little_endian).hexdigest()


def first_scale(output: SVQVAEOutput) -> SVQVAEOutput:
    """Output of the only scale, without lists. A field is `None` if its list is empty."""
    values_of_scale = {}
    for field, values in output.items():
        if values:
            values_of_scale[field] = values[0]
    return SVQVAEOutput(**values_of_scale)


def scaled_size(size: Sequence[int], scale: float) -> list[int]:
    """Height and width in pixels at a scale, at least 1."""
    return [max(1, round(scale * side)) for side in size]

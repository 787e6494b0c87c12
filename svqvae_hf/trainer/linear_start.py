"""Starts a new model as a linear autoencoder, fitted to some images.

With random weights, image content has to find its way through many random layers, and group norm removes the mean and
the contrast of each image. Training then spends hours learning what a linear map does at once. This start sets weights
only, so the architecture and the file format stay:

- **Neutral norms.** In each group of each norm, two channels are constants, +B and -B. They dominate the variance, so
  the norm is almost a fixed scale. The weight of the norm undoes that scale for the other channels.
- **Principal components.** Each strided convolution computes the principal components of 2 x 2 neighbours. The latents
  are the leading components of f x f blocks. The decoder's convolutions are regressed, level by level, on the
  encoder's features.
- **Silent branches.** Residual branches and attention start at zero, so at first the network is this linear map.

Spare channels keep random weights at a reduced scale, so that they can learn.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from svqvae_hf.models.layers import RepeatConv2d
from svqvae_hf.models.modeling_svqvae import SVQVAE, AttnBlock, Downsample, GroupNorm, ResnetBlock
from svqvae_hf.models.resizing import map_range

Convolution = Any  # nn.Conv2d, whose type allows no bias, while all of these have one

NORM_RATIO = 10.0  # variance of the constants over the variance of the other channels
SPARE_SCALE = 0.5  # of random weights that the start does not use
COLOURS = ((1.0, 1.0, 1.0), (1.0, 0.0, -1.0), (-0.5, 1.0, -0.5))  # brightness and two colour differences
SMALLEST_DEVIATION = 0.01  # floor for the deviation of a component, relative to the largest
PIXELS = 1 << 19  # at most, of the images that are used
POSITIONS = 40_000  # at most, in a regression
RIDGE = 1e-4  # relative to the mean square of the inputs
LATENT_RIDGE = 1e-5  # smaller, because latents are few and hardly correlated


class ChannelLayout:
    """Channels of a stream: two constants per group of its norms, the others free.

    Args:
        channels (`int`): Number of channels.
        groups (`int`): Number of groups of the norms.
    """

    def __init__(self, channels: int, groups: int):
        per_group = channels // groups
        self.positive = list(range(0, channels, per_group))
        self.negative = [index + 1 for index in self.positive]
        self.constant = self.positive + self.negative
        self.free = [index for index in range(channels) if index % per_group > 1]
        self.value = math.sqrt(NORM_RATIO * per_group / 2)
        self.norm_weight = math.sqrt(1 + 2 * self.value**2 / per_group)


@torch.no_grad()
def start_linear(vqvae: SVQVAE, sample: torch.Tensor) -> None:
    """Fits a linear autoencoder to images, and sets all weights but the codebook so that the model computes it.

    Args:
        vqvae ([`SVQVAE`]): New model with the weights of [`~svqvae_hf.trainer.model.initialise`].
        sample (`torch.Tensor` of shape `(batch, 3, height, width)`): Images in `pixel_range`, of
            which the first half megapixel is used.

    Raises:
        ValueError: If the config has too few channels or levels for a linear autoencoder.
    """
    groups = vqvae.config["norm_num_groups"]
    widths = {layer.num_channels for layer in vqvae.modules() if isinstance(layer, GroupNorm)}
    layouts = {channels: ChannelLayout(channels, groups) for channels in widths}
    _check_config(vqvae, layouts)
    sample = sample[: max(1, PIXELS // sample[0, 0].numel())]
    _neutralise(vqvae, layouts)
    pixels = map_range(sample, vqvae.config["pixel_range"], vqvae.config["network_range"])
    features = _start_encoder(vqvae, layouts, pixels)
    _start_decoder(vqvae, layouts, pixels, features)


def _check_config(vqvae: SVQVAE, layouts: dict[int, ChannelLayout]) -> None:
    config, dim = vqvae.config, vqvae.config["codebook_embed_dim"]
    first, last = vqvae.decoder.conv_out.in_channels, vqvae.encoder.conv_out.in_channels
    fits = (
        config["in_channels"] == config["out_channels"] == len(COLOURS)
        and len(config["encoder_ch_mult"]) > 1
        and config["encoder_ch_mult"][-1] > config["encoder_ch_mult"][-2]
        and config["z_channels"] >= dim
        and len(layouts[first].free) >= 2 * len(COLOURS)
        and len(layouts[last].free) >= 2 * dim
    )
    if not fits:
        raise ValueError(
            "The linear start needs 3 channels in and out, at least two levels, an encoder whose last level is wider, "
            "`z_channels` of at least `codebook_embed_dim`, and more than two channels per group of a norm. Change "
            "the config, or start with random weights."
        )


def _neutralise(vqvae: SVQVAE, layouts: dict[int, ChannelLayout]) -> None:
    """Makes norms almost a fixed scale, and residual branches and attention silent."""

    def set_constants(layer: Convolution) -> None:
        layout = layouts[layer.out_channels]
        layer.weight[layout.constant] = 0
        layer.bias[layout.positive], layer.bias[layout.negative] = layout.value, -layout.value

    def fix_stream(layer: Convolution) -> None:
        if layer.in_channels in layouts:
            layer.weight[:, layouts[layer.in_channels].constant] = 0
        layer.weight.mul_(SPARE_SCALE)
        set_constants(layer)

    def silence(layer: Convolution) -> None:
        layer.weight.zero_()
        layer.bias.zero_()

    modules: list[Any] = [*vqvae.modules()]
    for module in modules:
        if isinstance(module, GroupNorm):
            layout = layouts[module.num_channels]
            module.weight.fill_(layout.norm_weight)
            module.weight[layout.constant] = 0
        elif isinstance(module, RepeatConv2d) or module in (vqvae.encoder.conv_in, vqvae.decoder.conv_in):
            fix_stream(module)
        elif isinstance(module, Downsample):
            fix_stream(module.conv)
        elif isinstance(module, ResnetBlock):
            set_constants(module.conv1)
            silence(module.conv2)
            if module.nin_shortcut is not None:
                fix_stream(module.nin_shortcut)
        elif isinstance(module, AttnBlock):
            silence(module.proj_out)


def _start_encoder(vqvae: SVQVAE, layouts: dict[int, ChannelLayout], pixels: torch.Tensor) -> list[torch.Tensor]:
    """Sets the encoder. Returns its features at each resolution, at unit variance, full resolution first."""
    encoder: Any = vqvae.encoder
    dim = vqvae.config["codebook_embed_dim"]
    colours = F.normalize(pixels.new_tensor(COLOURS), dim=1)
    mixed = torch.einsum("ij,bjhw->bihw", colours, pixels)
    mean, deviation = mixed.mean((0, 2, 3)), mixed.std((0, 2, 3))
    rows = layouts[encoder.conv_in.out_channels].free[: len(COLOURS)]
    encoder.conv_in.weight[rows] = 0
    encoder.conv_in.weight[rows, :, 1, 1] = colours / deviation[:, None]
    encoder.conv_in.bias[rows] = -mean / deviation
    features = [(mixed - mean[:, None, None]) / deviation[:, None, None]]

    *levels, last = encoder.conv_blocks
    for index, level in enumerate(levels):
        _copy_channels(level.res[0].nin_shortcut, layouts, len(deviation))
        layout = layouts[level.downsample.conv.out_channels]
        room = len(layout.free)
        if level is levels[-1]:
            room = min(room, len(layouts[encoder.conv_out.in_channels].free) // 2)
        weight, bias, deviation, components = _principal_components(features[index], deviation, room)
        _set_rows(level.downsample.conv, layout.free, layout.free, F.pad(weight, (0, 1, 0, 1)), bias)
        features.append(components)

    count = len(deviation)
    _copy_channels(last.res[0].nin_shortcut, layouts, count, signs=(1, -1))
    free = layouts[encoder.conv_out.in_channels].free
    # On the unit sphere the first latent is constant. Latents then form a cone, where cosine is nearly pixel distance.
    skipped = 1 if vqvae.config["codebook_l2_norm"] else 0
    gains = (deviation / deviation[0])[: dim - skipped]
    encoder.conv_out.bias.zero_()
    encoder.conv_out.weight.mul_(SPARE_SCALE)
    encoder.conv_out.weight[:dim] = 0
    encoder.conv_out.bias[:skipped] = 1.0
    for row, gain in enumerate(gains.tolist()):  # silu(x) - silu(-x) = x
        encoder.conv_out.weight[skipped + row, free[row], 1, 1] = gain
        encoder.conv_out.weight[skipped + row, free[count + row], 1, 1] = -gain
    _copy_first(vqvae.quant_conv, dim)
    return features


def _start_decoder(
    vqvae: SVQVAE, layouts: dict[int, ChannelLayout], pixels: torch.Tensor, features: Sequence[torch.Tensor]
) -> None:
    """Sets the decoder: each convolution is regressed on the encoder's features one resolution up."""
    decoder: Any = vqvae.decoder
    dim = vqvae.config["codebook_embed_dim"]
    latents = vqvae.quant_conv(vqvae.encoder(pixels))
    if vqvae.config["codebook_l2_norm"]:
        latents = F.normalize(latents, dim=1)
    _copy_first(vqvae.post_quant_conv, dim)
    free = layouts[decoder.conv_in.out_channels].free
    mean = latents.mean((0, 2, 3))
    weight, bias = _regress(latents - mean[:, None, None], features[-1][:, : len(free)], LATENT_RIDGE, border=1)
    _set_rows(decoder.conv_in, free, range(dim), weight, bias - weight.sum((2, 3)) @ mean)
    hidden = decoder.conv_in(vqvae.post_quant_conv(latents))

    known = len(weight)
    for index, level in enumerate(decoder.conv_blocks):
        shortcut = level.res[0].nin_shortcut
        if shortcut is not None:
            known = _copy_channels(shortcut, layouts, known)
            hidden = shortcut(hidden)
        if level.upsample is not None:
            free = layouts[hidden.shape[1]].free
            target = features[-2 - index]
            if target is features[0]:
                target = torch.cat([target, -target], dim=1)
            repeated = hidden[:, free[:known]].repeat_interleave(2, 2).repeat_interleave(2, 3)
            weight, bias = _regress(repeated, target[:, : len(free)], RIDGE, border=2 ** (index + 2))
            _set_rows(level.upsample.conv, free, free, weight, bias)
            hidden, known = level.upsample(hidden), len(weight)

    free = layouts[decoder.conv_out.in_channels].free[: 2 * len(COLOURS)]
    activated = F.silu(decoder.norm_out(hidden))[:, free]
    weight, bias = _regress(activated, pixels, RIDGE, border=2 ** len(decoder.conv_blocks))
    decoder.conv_out.weight.zero_()
    decoder.conv_out.weight[:, free] = weight
    decoder.conv_out.bias.copy_(bias)


def _principal_components(
    features: torch.Tensor, deviation: torch.Tensor, room: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Principal components of 2 x 2 neighbours, in the order of their variance in pixels.

    Args:
        features (`torch.Tensor` of shape `(batch, channels, h, w)`): Features at unit variance.
        deviation (`torch.Tensor` of shape `(channels,)`): Their standard deviation in pixels.
        room (`int`): Maximum number of components.

    Returns:
        `tuple`: Weight `(components, channels, 2, 2)` and bias of the convolution to components at unit variance;
        their standard deviation in pixels; the components `(batch, components, h / 2, w / 2)`.
    """
    neighbours = F.unfold(features * deviation[:, None, None], 2, stride=2)  # (batch, channels * 4, positions)
    flat = neighbours.transpose(1, 2).flatten(0, 1)
    variances, vectors = torch.linalg.eigh(flat.T.cov())
    largest = variances[-1].sqrt()
    kept = min(room, len(variances))
    deviations = variances.flip(0)[:kept].clamp(min=0).sqrt().clamp(min=SMALLEST_DEVIATION * largest)
    matrix = (vectors.flip(1)[:, :kept] / deviations).T
    bias = -matrix @ flat.mean(0)
    weight = matrix.unflatten(1, (-1, 2, 2)) * deviation[:, None, None]
    return weight, bias, deviations, F.conv2d(features, weight, bias, stride=2)


def _regress(
    inputs: torch.Tensor, targets: torch.Tensor, ridge: float, border: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ridge regression of targets on 3 x 3 neighbours: weight `(targets, inputs, 3, 3)` and bias.

    Args:
        inputs (`torch.Tensor` of shape `(batch, channels, h, w)`): Inputs.
        targets (`torch.Tensor` of shape `(batch, targets, h, w)`): Targets.
        ridge (`float`): Ridge, relative to the mean square of the inputs.
        border (`int`): Rows and columns at each side that are left out, because they depend on padding.
    """
    border = min(border, (min(inputs.shape[-2:]) - 1) // 2)
    inner = slice(border, -border or None)
    generator = torch.Generator().manual_seed(0)
    size = 9 * inputs.shape[1] + 1
    gram = inputs.new_zeros(size, size, dtype=torch.float64)
    products = inputs.new_zeros(size, targets.shape[1], dtype=torch.float64)
    # One image at a time, because neighbours take nine times the memory.
    for image, target in zip(inputs, targets, strict=True):
        neighbours = F.unfold(image[None], 3, padding=1).unflatten(2, image.shape[-2:])
        neighbours = neighbours[0, :, inner, inner].flatten(1).T  # (positions, channels * 9)
        values = target[:, inner, inner].flatten(1).T
        chosen = torch.randperm(len(values), generator=generator)[: POSITIONS // len(inputs) + 1].to(values.device)
        rows = F.pad(neighbours[chosen], (0, 1), value=1.0).double()
        gram += rows.T @ rows
        products += rows.T @ values[chosen].double()
    penalty = ridge * gram.diagonal().mean() * torch.ones_like(gram[0])
    penalty[-1] = 0  # none for the bias
    solution = torch.linalg.solve(gram + penalty.diag(), products).to(inputs.dtype)
    return solution[:-1].T.unflatten(1, (-1, 3, 3)).contiguous(), solution[-1]


def _copy_channels(
    shortcut: Convolution | None, layouts: dict[int, ChannelLayout], count: int, signs: Sequence[int] = (1,)
) -> int:
    """Makes a shortcut copy its first free channels, once per sign. Returns how many it copies."""
    if shortcut is None:
        return count
    source, target = layouts[shortcut.in_channels].free, layouts[shortcut.out_channels].free
    count = min(count, len(source), len(target) // len(signs))
    shortcut.weight[target[: count * len(signs)]] = 0
    for part, sign in enumerate(signs):
        shortcut.weight[target[part * count : (part + 1) * count], source[:count]] = sign
    return count


def _copy_first(layer: Convolution, count: int) -> None:
    """Makes a 1 x 1 convolution pass its first channels on unchanged."""
    layer.bias.zero_()
    layer.weight.mul_(SPARE_SCALE)
    layer.weight[:count] = 0
    layer.weight[range(count), range(count)] = 1.0


def _set_rows(
    layer: Convolution, rows: Sequence[int], columns: Sequence[int], weight: torch.Tensor, bias: torch.Tensor
) -> None:
    """Sets the first of some output channels to read the first of some input channels, and nothing else."""
    out, into = list(rows[: len(weight)]), list(columns[: weight.shape[1]])
    layer.weight[out] = 0
    layer.weight[torch.tensor(out)[:, None], into] = weight
    layer.bias[out] = bias

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
from dataclasses import dataclass
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

    Attributes:
        positive, negative (`list[int]`): Channels that are constants above and below 0, one of each per group.
        constant (`list[int]`): Both.
        free (`list[int]`): All others.
        value (`float`): Absolute value of the constants.
        norm_weight (`float`): Weight of a norm that undoes its scale, which the constants decide.
    """

    def __init__(self, channels: int, groups: int):
        per_group = channels // groups
        self.positive = []
        self.negative = []
        self.free = []
        for channel in range(channels):
            place_in_group = channel % per_group
            if place_in_group == 0:
                self.positive.append(channel)
            elif place_in_group == 1:
                self.negative.append(channel)
            else:
                self.free.append(channel)
        self.constant = self.positive + self.negative
        self.value = math.sqrt(NORM_RATIO * per_group / 2)
        self.norm_weight = math.sqrt(1 + 2 * self.value**2 / per_group)


Layouts = dict[int, ChannelLayout]  # by number of channels


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
    layouts = {}
    for layer in vqvae.modules():
        if isinstance(layer, GroupNorm):
            layouts[layer.num_channels] = ChannelLayout(layer.num_channels, groups)
    _check_config(vqvae, layouts)
    pixels_per_image = sample[0, 0].numel()
    sample = sample[: max(1, PIXELS // pixels_per_image)]
    _neutralise(vqvae, layouts)
    pixels = map_range(sample, vqvae.config["pixel_range"], vqvae.config["network_range"])
    features = _start_encoder(vqvae, layouts, pixels)
    _start_decoder(vqvae, layouts, pixels, features)


def _check_config(vqvae: SVQVAE, layouts: Layouts) -> None:
    """Raises ValueError if the config has too few channels or levels."""
    config = vqvae.config
    dim = config["codebook_embed_dim"]
    multipliers = config["encoder_ch_mult"]
    first_free = layouts[vqvae.decoder.conv_out.in_channels].free
    last_free = layouts[vqvae.encoder.conv_out.in_channels].free
    requirements = {
        "3 channels in and out": config["in_channels"] == config["out_channels"] == len(COLOURS),
        "at least two levels": len(multipliers) > 1,
        "an encoder whose last level is wider": multipliers[-1] > multipliers[-2:][0],
        "`z_channels` of at least `codebook_embed_dim`": config["z_channels"] >= dim,
        "more channels per group of a norm": len(first_free) >= 2 * len(COLOURS) and len(last_free) >= 2 * dim,
    }
    for requirement, is_met in requirements.items():
        if not is_met:
            raise ValueError(f"The linear start needs {requirement}. Change the config, or start with random weights.")


def _neutralise(vqvae: SVQVAE, layouts: Layouts) -> None:
    """Makes norms almost a fixed scale, and residual branches and attention silent."""
    modules: list[Any] = list(vqvae.modules())
    for module in modules:
        if isinstance(module, GroupNorm):
            layout = layouts[module.num_channels]
            module.weight.fill_(layout.norm_weight)
            module.weight[layout.constant] = 0
        elif isinstance(module, RepeatConv2d) or module in (vqvae.encoder.conv_in, vqvae.decoder.conv_in):
            _fix_stream(module, layouts)
        elif isinstance(module, Downsample):
            _fix_stream(module.conv, layouts)
        elif isinstance(module, ResnetBlock):
            _set_constants(module.conv1, layouts)
            _silence(module.conv2)
            if module.nin_shortcut is not None:
                _fix_stream(module.nin_shortcut, layouts)
        elif isinstance(module, AttnBlock):
            _silence(module.proj_out)


def _fix_stream(layer: Convolution, layouts: Layouts) -> None:
    """Lets a convolution ignore constants that it reads, shrinks its random weights, and makes it write constants."""
    if layer.in_channels in layouts:
        layer.weight[:, layouts[layer.in_channels].constant] = 0
    layer.weight.mul_(SPARE_SCALE)
    _set_constants(layer, layouts)


def _set_constants(layer: Convolution, layouts: Layouts) -> None:
    """Makes the constant channels of a convolution constants."""
    layout = layouts[layer.out_channels]
    layer.weight[layout.constant] = 0
    layer.bias[layout.positive] = layout.value
    layer.bias[layout.negative] = -layout.value


def _silence(layer: Convolution) -> None:
    """Makes a convolution write zeros."""
    layer.weight.zero_()
    layer.bias.zero_()


def _start_encoder(vqvae: SVQVAE, layouts: Layouts, pixels: torch.Tensor) -> list[torch.Tensor]:
    """Sets the encoder. Returns its features at each resolution, at unit variance, full resolution first."""
    encoder: Any = vqvae.encoder
    colours = _start_colours(encoder.conv_in, layouts, pixels)
    features = [colours.features]
    deviation = colours.deviation
    last_free = layouts[encoder.conv_out.in_channels].free
    levels = list(encoder.conv_blocks)
    last_level = levels.pop()
    for index, level in enumerate(levels):
        _copy_channels(level.res[0].nin_shortcut, layouts, len(deviation))
        downsample = level.downsample.conv
        free = layouts[downsample.out_channels].free
        room = len(free)
        if index == len(levels) - 1:  # the last level holds each component twice, with both signs
            room = min(room, len(last_free) // 2)
        components = _principal_components(features[index], deviation, room)
        kernel = F.pad(components.weight, (0, 1, 0, 1))  # 2 x 2 to 3 x 3
        _set_rows(downsample, free, free, kernel, components.bias)
        features.append(components.features)
        deviation = components.deviation
    _copy_channels(last_level.res[0].nin_shortcut, layouts, len(deviation), signs=(1, -1))
    _start_latents(vqvae, last_free, deviation)
    return features


@dataclass
class Components:
    """Linear features of images at unit variance, and the convolution that computes them.

    Args:
        weight (`torch.Tensor` of shape `(components, channels, k, k)`): Weight of the convolution.
        bias (`torch.Tensor` of shape `(components,)`): Its bias.
        deviation (`torch.Tensor` of shape `(components,)`): Standard deviation of the components in pixels.
        features (`torch.Tensor` of shape `(batch, components, h, w)`): The components.
    """

    weight: torch.Tensor
    bias: torch.Tensor
    deviation: torch.Tensor
    features: torch.Tensor


def _start_colours(conv_in: Convolution, layouts: Layouts, pixels: torch.Tensor) -> Components:
    """Lets the first convolution compute brightness and two colour differences."""
    colours = F.normalize(pixels.new_tensor(COLOURS), dim=1)  # (3, 3)
    mixed = torch.einsum("ij,bjhw->bihw", colours, pixels)
    mean = mixed.mean((0, 2, 3))
    deviation = mixed.std((0, 2, 3))
    weight = colours / deviation[:, None]
    bias = -mean / deviation
    rows = layouts[conv_in.out_channels].free[: len(COLOURS)]
    conv_in.weight[rows] = 0
    conv_in.weight[rows, :, 1, 1] = weight
    conv_in.bias[rows] = bias
    features = (mixed - mean[:, None, None]) / deviation[:, None, None]
    return Components(weight, bias, deviation, features)


def _start_latents(vqvae: SVQVAE, free: Sequence[int], deviation: torch.Tensor) -> None:
    """Lets the last convolution of the encoder write the leading components, of which it reads both signs."""
    conv_out: Any = vqvae.encoder.conv_out
    dim = vqvae.config["codebook_embed_dim"]
    count = len(deviation)
    # On the unit sphere the first latent is constant. Latents then form a cone, where cosine is nearly pixel distance.
    skipped = 1 if vqvae.config["codebook_l2_norm"] else 0
    gains = (deviation / deviation[0])[: dim - skipped]
    conv_out.bias.zero_()
    conv_out.weight.mul_(SPARE_SCALE)
    conv_out.weight[:dim] = 0
    conv_out.bias[:skipped] = 1.0
    for row, gain in enumerate(gains.tolist()):  # silu(x) - silu(-x) = x
        conv_out.weight[skipped + row, free[row], 1, 1] = gain
        conv_out.weight[skipped + row, free[count + row], 1, 1] = -gain
    _copy_first(vqvae.quant_conv, dim)


def _start_decoder(vqvae: SVQVAE, layouts: Layouts, pixels: torch.Tensor, features: Sequence[torch.Tensor]) -> None:
    """Sets the decoder: each convolution is regressed on the encoder's features one resolution up."""
    decoder: Any = vqvae.decoder
    latents = vqvae.quant_conv(vqvae.encoder(pixels))  # (B, C, h, w)
    if vqvae.config["codebook_l2_norm"]:
        latents = F.normalize(latents, dim=1)
    num_features = _start_first_layer(vqvae, layouts, latents, features[-1])
    hidden = decoder.conv_in(vqvae.post_quant_conv(latents))

    for index, level in enumerate(decoder.conv_blocks):
        shortcut = level.res[0].nin_shortcut
        if shortcut is not None:
            num_features = _copy_channels(shortcut, layouts, num_features)
            hidden = shortcut(hidden)
        if level.upsample is not None:
            free = layouts[hidden.shape[1]].free
            target = features[-2 - index]
            if target is features[0]:  # the last activation needs both signs
                target = torch.cat([target, -target], dim=1)
            target = target[:, : len(free)]
            enlarged = hidden[:, free[:num_features]].repeat_interleave(2, 2).repeat_interleave(2, 3)
            fit = _regress(enlarged, target, RIDGE, border=2 ** (index + 2))
            _set_rows(level.upsample.conv, free, free, fit.weight, fit.bias)
            hidden = level.upsample(hidden)
            num_features = len(fit.weight)

    free = layouts[decoder.conv_out.in_channels].free[: 2 * len(COLOURS)]
    activated = F.silu(decoder.norm_out(hidden))[:, free]
    fit = _regress(activated, pixels, RIDGE, border=2 ** len(decoder.conv_blocks))
    decoder.conv_out.weight.zero_()
    decoder.conv_out.weight[:, free] = fit.weight
    decoder.conv_out.bias.copy_(fit.bias)


def _start_first_layer(vqvae: SVQVAE, layouts: Layouts, latents: torch.Tensor, features: torch.Tensor) -> int:
    """Lets the decoder's first convolution restore the encoder's last features. Returns their number."""
    conv_in: Any = vqvae.decoder.conv_in
    dim = vqvae.config["codebook_embed_dim"]
    _copy_first(vqvae.post_quant_conv, dim)
    free = layouts[conv_in.out_channels].free
    mean = latents.mean((0, 2, 3))
    fit = _regress(latents - mean[:, None, None], features[:, : len(free)], LATENT_RIDGE, border=1)
    bias = fit.bias - fit.weight.sum((2, 3)) @ mean
    _set_rows(conv_in, free, range(dim), fit.weight, bias)
    return len(fit.weight)


def _principal_components(features: torch.Tensor, deviation: torch.Tensor, room: int) -> Components:
    """Principal components of 2 x 2 neighbours, in the order of their variance in pixels.

    Args:
        features (`torch.Tensor` of shape `(batch, channels, h, w)`): Features at unit variance.
        deviation (`torch.Tensor` of shape `(channels,)`): Their standard deviation in pixels.
        room (`int`): Maximum number of components.

    Returns:
        `Components`: Components `(batch, components, h / 2, w / 2)`.
    """
    neighbours = F.unfold(features * deviation[:, None, None], 2, stride=2)  # (B, channels * 4, positions)
    flat = neighbours.transpose(1, 2).flatten(0, 1)  # (B * positions, channels * 4)
    variances, vectors = torch.linalg.eigh(flat.T.cov())  # in ascending order
    largest = variances[-1].sqrt()
    count = min(room, len(variances))
    leading_variances = variances.flip(0)[:count].clamp(min=0)
    deviations = leading_variances.sqrt().clamp(min=SMALLEST_DEVIATION * largest)
    matrix = (vectors.flip(1)[:, :count] / deviations).T  # (components, channels * 4)
    bias = -matrix @ flat.mean(0)
    weight = matrix.unflatten(1, (-1, 2, 2)) * deviation[:, None, None]
    components = F.conv2d(features, weight, bias, stride=2)
    return Components(weight, bias, deviations, components)


@dataclass
class Fit:
    """Convolution that a regression has found: weight `(targets, inputs, 3, 3)` and bias `(targets,)`."""

    weight: torch.Tensor
    bias: torch.Tensor


def _regress(inputs: torch.Tensor, targets: torch.Tensor, ridge: float, border: int) -> Fit:
    """Ridge regression of targets on 3 x 3 neighbours.

    Args:
        inputs (`torch.Tensor` of shape `(batch, channels, h, w)`): Inputs.
        targets (`torch.Tensor` of shape `(batch, targets, h, w)`): Targets.
        ridge (`float`): Ridge, relative to the mean square of the inputs.
        border (`int`): Rows and columns at each side that are left out, because they depend on padding.
    """
    border = min(border, (min(inputs.shape[-2:]) - 1) // 2)
    inner = slice(border, -border or None)
    generator = torch.Generator().manual_seed(0)
    positions_per_image = POSITIONS // len(inputs) + 1
    size = 9 * inputs.shape[1] + 1  # neighbours and the constant of the bias
    gram = inputs.new_zeros(size, size, dtype=torch.float64)
    products = inputs.new_zeros(size, targets.shape[1], dtype=torch.float64)
    # One image at a time, because neighbours take nine times the memory.
    for image, target in zip(inputs, targets, strict=True):
        unfolded = F.unfold(image[None], 3, padding=1).unflatten(2, image.shape[-2:])  # (1, channels * 9, h, w)
        neighbours = unfolded[0, :, inner, inner].flatten(1).T  # (positions, channels * 9)
        values = target[:, inner, inner].flatten(1).T  # (positions, targets)
        order = torch.randperm(len(values), generator=generator)
        chosen = order[:positions_per_image].to(values.device)
        rows = F.pad(neighbours[chosen], (0, 1), value=1.0).double()
        gram += rows.T @ rows
        products += rows.T @ values[chosen].double()
    penalty = ridge * gram.diagonal().mean() * torch.ones_like(gram[0])
    penalty[-1] = 0  # none for the bias
    solution = torch.linalg.solve(gram + penalty.diag(), products).to(inputs.dtype)  # (size, targets)
    weight = solution[:-1].T.unflatten(1, (-1, 3, 3)).contiguous()
    return Fit(weight, solution[-1])


def _copy_channels(shortcut: Convolution | None, layouts: Layouts, count: int, signs: Sequence[int] = (1,)) -> int:
    """Makes a shortcut copy its first free channels, once per sign. Returns how many it copies."""
    if shortcut is None:
        return count
    source = layouts[shortcut.in_channels].free
    target = layouts[shortcut.out_channels].free
    count = min(count, len(source), len(target) // len(signs))
    shortcut.weight[target[: count * len(signs)]] = 0
    for number, sign in enumerate(signs):
        copies = target[number * count : (number + 1) * count]
        shortcut.weight[copies, source[:count]] = sign
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
    outputs = list(rows[: len(weight)])
    inputs = list(columns[: weight.shape[1]])
    layer.weight[outputs] = 0
    layer.weight[torch.tensor(outputs)[:, None], inputs] = weight
    layer.bias[outputs] = bias

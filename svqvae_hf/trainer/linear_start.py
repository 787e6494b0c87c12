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
SMALLEST_STD = 0.01  # floor for the standard deviation of a component, relative to the largest
PIXELS = 1 << 19  # at most, of the images that are used
POSITIONS = 40_000  # at most, in a regression
RIDGE = 1e-4  # relative to the mean square of the inputs
LATENT_RIDGE = 1e-5  # smaller, because latents are few and hardly correlated


class ChannelLayout:
    """What each channel of a feature map holds: constants, two per group of the norms, or image content.

    Args:
        channels (`int`): Number of channels.
        groups (`int`): Number of groups of the norms.

    Attributes:
        positive (`list[int]`): Channels that hold the positive constant, the first of each group.
        negative (`list[int]`): Channels that hold the negative constant, the second of each group.
        constant (`list[int]`): All channels that hold a constant.
        content (`list[int]`): All other channels, for image content.
        constant_value (`float`): Absolute value of the constants.
        norm_weight (`float`): Weight with which a norm leaves content at its scale.
    """

    def __init__(self, channels: int, groups: int):
        channels_per_group = channels // groups
        self.positive = []
        self.negative = []
        self.content = []
        for channel in range(channels):
            position_in_group = channel % channels_per_group
            if position_in_group == 0:
                self.positive.append(channel)
            elif position_in_group == 1:
                self.negative.append(channel)
            else:
                self.content.append(channel)
        self.constant = self.positive + self.negative

        # The norm divides by the standard deviation of a group. Content has a variance of about 1.
        self.constant_value = math.sqrt(NORM_RATIO * channels_per_group / 2)
        variance_of_constants = 2 * self.constant_value**2 / channels_per_group
        self.norm_weight = math.sqrt(1 + variance_of_constants)


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
    layouts = _make_layouts(vqvae)
    _check_config(vqvae, layouts)
    pixels_per_image = sample.shape[-2] * sample.shape[-1]
    num_images = max(1, PIXELS // pixels_per_image)
    pixels = map_range(sample[:num_images], vqvae.config["pixel_range"], vqvae.config["network_range"])
    _neutralise(vqvae, layouts)
    features = _start_encoder(vqvae, layouts, pixels)
    _start_decoder(vqvae, layouts, pixels, features)


def _make_layouts(vqvae: SVQVAE) -> Layouts:
    """Layout of each number of channels that a norm of the model has."""
    groups = vqvae.config["norm_num_groups"]
    layouts = {}
    for layer in vqvae.modules():
        if isinstance(layer, GroupNorm):
            layouts[layer.num_channels] = ChannelLayout(layer.num_channels, groups)
    return layouts


def _check_config(vqvae: SVQVAE, layouts: Layouts) -> None:
    """Raises ValueError if the config has too few channels or levels."""
    requirement = _unmet_requirement(vqvae, layouts)
    if requirement is not None:
        raise ValueError(f"The linear start needs {requirement}. Change the config, or start with random weights.")


def _unmet_requirement(vqvae: SVQVAE, layouts: Layouts) -> str | None:
    """First requirement of the linear start that the config does not meet, in words."""
    config = vqvae.config
    latent_channels = config["codebook_embed_dim"]
    multipliers = config["encoder_ch_mult"]
    num_colours = len(COLOURS)
    if config["in_channels"] != num_colours or config["out_channels"] != num_colours:
        return "3 channels in and out"
    if len(multipliers) < 2:
        return "at least two levels"
    if multipliers[-1] <= multipliers[-2]:
        return "an encoder whose last level is wider"
    if config["z_channels"] < latent_channels:
        return "`z_channels` of at least `codebook_embed_dim`"

    # The last activations of encoder and decoder need two channels, x and -x, for each value x that they pass on.
    encoder_content = layouts[vqvae.encoder.conv_out.in_channels].content
    decoder_content = layouts[vqvae.decoder.conv_out.in_channels].content
    if len(encoder_content) < 2 * latent_channels or len(decoder_content) < 2 * num_colours:
        return "more channels per group of a norm"
    return None


def _neutralise(vqvae: SVQVAE, layouts: Layouts) -> None:
    """Makes norms almost a fixed scale, and residual branches and attention silent."""
    _write_constants(vqvae.encoder.conv_in, layouts)
    _write_constants(vqvae.decoder.conv_in, layouts)
    for module in vqvae.modules():
        if isinstance(module, GroupNorm):
            layout = layouts[module.num_channels]
            module.weight.fill_(layout.norm_weight)
            module.weight[layout.constant] = 0
        elif isinstance(module, RepeatConv2d):
            _write_constants(module, layouts)
        elif isinstance(module, Downsample):
            _write_constants(module.conv, layouts)
        elif isinstance(module, ResnetBlock):
            _set_constants(module.conv1, layouts)
            _silence(module.conv2)
            if module.nin_shortcut is not None:
                _write_constants(module.nin_shortcut, layouts)
        elif isinstance(module, AttnBlock):
            _silence(module.proj_out)


def _write_constants(layer: Convolution, layouts: Layouts) -> None:
    """Makes a convolution of the main path write constants, ignore those it reads, and shrinks its random weights."""
    if layer.in_channels in layouts:
        layer.weight[:, layouts[layer.in_channels].constant] = 0
    layer.weight.mul_(SPARE_SCALE)
    _set_constants(layer, layouts)


def _set_constants(layer: Convolution, layouts: Layouts) -> None:
    """Makes a convolution write the constants to their channels, whatever it reads."""
    layout = layouts[layer.out_channels]
    layer.weight[layout.constant] = 0
    layer.bias[layout.positive] = layout.constant_value
    layer.bias[layout.negative] = -layout.constant_value


def _silence(layer: Convolution) -> None:
    """Makes a convolution write zeros."""
    layer.weight.zero_()
    layer.bias.zero_()


# Encoder


def _start_encoder(vqvae: SVQVAE, layouts: Layouts, pixels: torch.Tensor) -> list[torch.Tensor]:
    """Sets the encoder. Returns its features at each resolution, at unit variance, full resolution first."""
    encoder: Any = vqvae.encoder
    levels = list(encoder.conv_blocks)
    levels_with_downsample = levels[:-1]
    last_level = levels[-1]
    num_last_channels = len(layouts[encoder.conv_out.in_channels].content)
    components = _start_colours(encoder.conv_in, layouts, pixels)
    features = [components.features]
    for index, level in enumerate(levels_with_downsample):
        _copy_channels(level.res[0].nin_shortcut, layouts, len(components.stds))
        downsample = level.downsample.conv
        content = layouts[downsample.out_channels].content
        max_components = len(content)
        is_before_last_level = index == len(levels_with_downsample) - 1
        if is_before_last_level:  # the last level holds each component twice, as x and as -x
            max_components = min(max_components, num_last_channels // 2)
        components = _principal_components(components, max_components)
        kernel = F.pad(components.weight, (0, 1, 0, 1))  # 2 x 2 to 3 x 3
        _set_rows(downsample, content, content, kernel, components.bias)
        features.append(components.features)
    _copy_channels(last_level.res[0].nin_shortcut, layouts, len(components.stds), signs=(1, -1))
    _start_latents(vqvae, layouts, components.stds)
    return features


@dataclass
class Components:
    """Linear features of images at unit variance, and the convolution that computes them.

    Args:
        weight (`torch.Tensor` of shape `(components, channels, k, k)`): Weight of the convolution.
        bias (`torch.Tensor` of shape `(components,)`): Bias of the convolution.
        stds (`torch.Tensor` of shape `(components,)`): Standard deviation of each component before it was divided by
            this number, in the unit of `network_range`.
        features (`torch.Tensor` of shape `(batch, components, h, w)`): The components at unit variance.
    """

    weight: torch.Tensor
    bias: torch.Tensor
    stds: torch.Tensor
    features: torch.Tensor


def _start_colours(conv_in: Convolution, layouts: Layouts, pixels: torch.Tensor) -> Components:
    """Lets the first convolution compute brightness and two colour differences."""
    colours = F.normalize(pixels.new_tensor(COLOURS), dim=1)  # (3, 3)
    mixed = torch.einsum("ij,bjhw->bihw", colours, pixels)  # (B, 3, H, W)
    means = mixed.mean((0, 2, 3))
    stds = mixed.std((0, 2, 3))
    weight = colours / stds[:, None]  # (3, 3)
    bias = -means / stds
    outputs = layouts[conv_in.out_channels].content[: len(COLOURS)]
    conv_in.weight[outputs] = 0
    conv_in.weight[outputs, :, 1, 1] = weight  # at the centre of the kernel
    conv_in.bias[outputs] = bias
    features = (mixed - means[:, None, None]) / stds[:, None, None]
    return Components(weight[:, :, None, None], bias, stds, features)


def _principal_components(inputs: Components, max_components: int) -> Components:
    """Principal components of 2 x 2 neighbours, in the order of their variance in pixels.

    Args:
        inputs ([`Components`]): Features `(batch, channels, h, w)` of the resolution above.
        max_components (`int`): Maximum number of components.

    Returns:
        `Components`: Components `(batch, components, h / 2, w / 2)`.
    """
    scales = inputs.stds[:, None, None]  # (channels, 1, 1)
    neighbours = F.unfold(inputs.features * scales, 2, stride=2)  # (B, channels * 4, positions)
    samples = neighbours.transpose(1, 2).flatten(0, 1)  # (B * positions, channels * 4)

    # `eigh` sorts by ascending variance. Components are sorted by descending variance.
    ascending_variances, ascending_vectors = torch.linalg.eigh(samples.T.cov())
    variances = ascending_variances.flip(0)[:max_components]
    vectors = ascending_vectors.flip(1)[:, :max_components]  # (channels * 4, components)
    largest_std = variances[0].sqrt()
    stds = variances.clamp(min=0).sqrt().clamp(min=SMALLEST_STD * largest_std)

    # The convolution projects on the vectors, and divides by the standard deviations. Its inputs are at unit variance,
    # so that its weight multiplies them by their own standard deviations again.
    projection = (vectors / stds).T  # (components, channels * 4)
    bias = -projection @ samples.mean(0)
    weight = projection.unflatten(1, (-1, 2, 2)) * scales  # (components, channels, 2, 2)
    features = F.conv2d(inputs.features, weight, bias, stride=2)  # (B, components, h / 2, w / 2)
    return Components(weight, bias, stds, features)


def _start_latents(vqvae: SVQVAE, layouts: Layouts, stds: torch.Tensor) -> None:
    """Lets the last convolution of the encoder write the leading components as latents.

    It reads each component as x and as -x, because silu(x) - silu(-x) = x.
    """
    conv_out: Any = vqvae.encoder.conv_out
    latent_channels = vqvae.config["codebook_embed_dim"]
    first_channel = 0  # of the components
    conv_out.bias.zero_()
    conv_out.weight.mul_(SPARE_SCALE)
    conv_out.weight[:latent_channels] = 0
    if vqvae.config["codebook_l2_norm"]:
        # A constant first latent makes latents a cone, in which their cosine nearly is the distance of pixels.
        conv_out.bias[0] = 1.0
        first_channel = 1

    content = layouts[conv_out.in_channels].content
    num_components = len(stds)
    positive = content[:num_components]  # hold x
    negative = content[num_components:]  # hold -x
    gains = stds / stds[0]
    num_latents = min(num_components, latent_channels - first_channel)
    for component in range(num_latents):
        latent = first_channel + component
        conv_out.weight[latent, positive[component], 1, 1] = gains[component]
        conv_out.weight[latent, negative[component], 1, 1] = -gains[component]
    _pass_on(vqvae.quant_conv, latent_channels)


# Decoder


def _start_decoder(vqvae: SVQVAE, layouts: Layouts, pixels: torch.Tensor, features: Sequence[torch.Tensor]) -> None:
    """Sets the decoder: each convolution is regressed on the encoder's features one resolution up."""
    decoder: Any = vqvae.decoder
    latents = vqvae.quant_conv(vqvae.encoder(pixels))  # (B, C, h, w)
    if vqvae.config["codebook_l2_norm"]:
        latents = F.normalize(latents, dim=1)
    num_features = _start_first_layer(vqvae, layouts, latents, features[-1])
    hidden = decoder.conv_in(vqvae.post_quant_conv(latents))

    border = 2  # pixels that depend on padding, doubled by each upsampling
    finer_features = list(features[:-1])
    for level in decoder.conv_blocks:
        shortcut = level.res[0].nin_shortcut
        if shortcut is not None:
            num_features = _copy_channels(shortcut, layouts, num_features)
            hidden = shortcut(hidden)
        if level.upsample is None:
            continue
        border = 2 * border
        target = finer_features.pop()
        if not finer_features:  # the last activation needs each feature as x and as -x
            target = torch.cat([target, -target], dim=1)
        upsample = level.upsample.conv
        num_features = _start_upsample(upsample, layouts, hidden, num_features, target, border)
        hidden = level.upsample(hidden)

    content = layouts[decoder.conv_out.in_channels].content[: 2 * len(COLOURS)]
    activated = F.silu(decoder.norm_out(hidden))[:, content]  # (B, 6, H, W)
    fit = _regress(activated, pixels, RIDGE, border=2 ** len(decoder.conv_blocks))
    decoder.conv_out.weight.zero_()
    decoder.conv_out.weight[:, content] = fit.weight
    decoder.conv_out.bias.copy_(fit.bias)


def _start_upsample(
    layer: Convolution,
    layouts: Layouts,
    hidden: torch.Tensor,
    num_features: int,
    target: torch.Tensor,
    border: int,
) -> int:
    """Lets the convolution after an enlargement restore the features of the finer resolution.

    Args:
        layer (`nn.Conv2d`): The convolution.
        layouts (`dict[int, ChannelLayout]`): Layouts.
        hidden (`torch.Tensor` of shape `(batch, channels, h, w)`): Input of the enlargement.
        num_features (`int`): Features that its first content channels hold.
        target (`torch.Tensor` of shape `(batch, features, 2 * h, 2 * w)`): Features of the encoder.
        border (`int`): Rows and columns at each side that depend on padding.

    Returns:
        `int`: Number of features that are restored.
    """
    content = layouts[hidden.shape[1]].content
    features = hidden[:, content[:num_features]]
    enlarged = features.repeat_interleave(2, 2).repeat_interleave(2, 3)  # (B, features, 2 * h, 2 * w)
    fit = _regress(enlarged, target[:, : len(content)], RIDGE, border)
    _set_rows(layer, content, content, fit.weight, fit.bias)
    return len(fit.weight)


def _start_first_layer(vqvae: SVQVAE, layouts: Layouts, latents: torch.Tensor, features: torch.Tensor) -> int:
    """Lets the decoder's first convolution restore the encoder's last features. Returns their number."""
    conv_in: Any = vqvae.decoder.conv_in
    latent_channels = vqvae.config["codebook_embed_dim"]
    _pass_on(vqvae.post_quant_conv, latent_channels)
    content = layouts[conv_in.out_channels].content
    means = latents.mean((0, 2, 3))  # (C,)
    centred = latents - means[:, None, None]
    fit = _regress(centred, features[:, : len(content)], LATENT_RIDGE, border=1)
    # The convolution reads latents that are not centred, so its bias takes their means off.
    bias = fit.bias - fit.weight.sum((2, 3)) @ means
    _set_rows(conv_in, content, range(latent_channels), fit.weight, bias)
    return len(fit.weight)


@dataclass
class Fit:
    """Convolution that a regression has found: weight `(targets, inputs, 3, 3)` and bias `(targets,)`."""

    weight: torch.Tensor
    bias: torch.Tensor


def _regress(inputs: torch.Tensor, targets: torch.Tensor, ridge: float, border: int) -> Fit:
    """Ridge regression of targets on 3 x 3 neighbours, by normal equations in float64.

    Args:
        inputs (`torch.Tensor` of shape `(batch, channels, h, w)`): Inputs.
        targets (`torch.Tensor` of shape `(batch, targets, h, w)`): Targets.
        ridge (`float`): Ridge, relative to the mean square of the inputs.
        border (`int`): Rows and columns at each side that are left out, because they depend on padding.
    """
    largest_border = (min(inputs.shape[-2:]) - 1) // 2  # leaves at least one row and one column
    border = min(border, largest_border)
    generator = torch.Generator().manual_seed(0)
    max_positions = POSITIONS // len(inputs) + 1  # per image
    num_columns = 9 * inputs.shape[1] + 1  # neighbours, and a column of ones for the bias
    gram = inputs.new_zeros(num_columns, num_columns, dtype=torch.float64)
    products = inputs.new_zeros(num_columns, targets.shape[1], dtype=torch.float64)
    # One image at a time, because neighbours take nine times the memory.
    for image, target in zip(inputs, targets, strict=True):
        unfolded = F.unfold(image[None], 3, padding=1)[0]  # (channels * 9, h * w)
        neighbours = _inner_positions(unfolded.unflatten(1, image.shape[-2:]), border)  # (positions, channels * 9)
        target_rows = _inner_positions(target, border)  # (positions, targets)
        order = torch.randperm(len(target_rows), generator=generator)
        chosen = order[:max_positions].to(target_rows.device)
        input_rows = F.pad(neighbours[chosen], (0, 1), value=1.0).double()  # (chosen, columns)
        gram += input_rows.T @ input_rows
        products += input_rows.T @ target_rows[chosen].double()
    penalty = ridge * gram.diagonal().mean() * torch.ones_like(gram[0])  # (columns,)
    penalty[-1] = 0  # the bias is free
    solution = torch.linalg.solve(gram + penalty.diag(), products).to(inputs.dtype)  # (columns, targets)
    weight = solution[:-1].T.unflatten(1, (-1, 3, 3)).contiguous()  # (targets, channels, 3, 3)
    return Fit(weight, solution[-1])


def _inner_positions(image: torch.Tensor, border: int) -> torch.Tensor:
    """Values of an image `(channels, h, w)` without its border, one row per position: `(positions, channels)`."""
    height, width = image.shape[-2:]
    inner = image[:, border : height - border, border : width - border]
    return inner.flatten(1).T


# Weights of a convolution


def _copy_channels(shortcut: Convolution | None, layouts: Layouts, count: int, signs: Sequence[int] = (1,)) -> int:
    """Makes a 1 x 1 convolution copy its first content channels, once per sign.

    Args:
        shortcut (`nn.Conv2d`, *optional*): The convolution. Without one, the block passes all channels on.
        layouts (`dict[int, ChannelLayout]`): Layouts.
        count (`int`): Number of channels to copy, if both sides have as many.
        signs (`Sequence[int]`, defaults to `(1,)`): Factor of each copy. The copies follow one another.

    Returns:
        `int`: Number of channels that are copied.
    """
    if shortcut is None:
        return count
    inputs = layouts[shortcut.in_channels].content
    outputs = layouts[shortcut.out_channels].content
    count = min(count, len(inputs), len(outputs) // len(signs))
    shortcut.weight[outputs[: count * len(signs)]] = 0
    for copy_index, sign in enumerate(signs):
        start = copy_index * count
        shortcut.weight[outputs[start : start + count], inputs[:count]] = sign
    return count


def _pass_on(layer: Convolution, count: int) -> None:
    """Makes a 1 x 1 convolution pass its first channels on unchanged."""
    layer.bias.zero_()
    layer.weight.mul_(SPARE_SCALE)
    layer.weight[:count] = 0
    layer.weight[range(count), range(count)] = 1.0


def _set_rows(
    layer: Convolution,
    output_channels: Sequence[int],
    input_channels: Sequence[int],
    weight: torch.Tensor,
    bias: torch.Tensor,
) -> None:
    """Sets a convolution's weights between some channels, and the bias. The outputs read no other channel.

    Args:
        layer (`nn.Conv2d`): The convolution.
        output_channels (`Sequence[int]`): Channels to write; as many as the weight has are used.
        input_channels (`Sequence[int]`): Channels to read; as many as the weight has are used.
        weight (`torch.Tensor` of shape `(outputs, inputs, 3, 3)`): Weight.
        bias (`torch.Tensor` of shape `(outputs,)`): Bias.
    """
    outputs = torch.tensor(output_channels[: len(weight)])
    inputs = torch.tensor(input_channels[: weight.shape[1]])
    layer.weight[outputs] = 0
    layer.weight[outputs[:, None], inputs] = weight
    layer.bias[outputs] = bias

"""Starts a new model as a linear autoencoder, fitted to some images.

With random weights, image content has to find its way through many random layers, and group norm removes the mean and
the contrast of each image. Training then spends hours learning what a linear map does at once. This start sets weights
only, so the architecture and the file format stay:

- **Neutral norms.** In each group of each norm, two channels are constants, +B and -B. They dominate the variance, so
  the norm is almost a fixed scale. The weight of the norm undoes that scale for the other channels, which hold image
  content. `ChannelLayout` lists both kinds of channels for each number of channels.
- **Features in order.** The features of a resolution fill its content channels from the first one on.
- **Pairs.** Encoder and decoder apply silu before their last convolution. Since silu(x) - silu(-x) = x,
  the convolution restores a value x from two channels that hold x and -x before silu.
- **Principal components.** Each strided convolution computes the principal components of 2 x 2 neighbours. The latents
  are the leading components of f x f blocks. The decoder's convolutions are regressed, level by level, on the
  encoder's features.
- **Silent branches.** Residual branches and attention start at zero, so at first the network is this linear map.

Spare channels keep random weights at a reduced scale, so that they can learn.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from svqvae_hf.models.layers import RepeatConv2d
from svqvae_hf.models.modeling_svqvae import SVQVAE, AttnBlock, Downsample, GroupNorm, ResnetBlock
from svqvae_hf.models.resizing import map_range
from svqvae_hf.trainer.channel_layouts import (
    SPARE_SCALE,
    Convolution,
    Layouts,
    copy_content,
    copy_content_and_negative,
    make_layouts,
    pass_on,
    set_constants,
    set_rows,
    silence,
    write_constants,
)
from svqvae_hf.trainer.linear_fits import COLOURS, Components, Fit, colour_components, principal_components, regress

PIXELS = 1 << 19  # at most, of the images that are used
RIDGE = 1e-4  # relative to the mean square of the inputs
LATENT_RIDGE = 1e-5  # smaller, because latents are few and hardly correlated
BORDER_OF_LATENTS = 2  # rows and columns of the decoder's first features that depend on padding


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
    layouts = make_layouts(vqvae)
    _check_config(vqvae, layouts)
    pixels_per_image = sample.shape[-2] * sample.shape[-1]
    num_images = max(1, PIXELS // pixels_per_image)
    pixels = map_range(sample[:num_images], vqvae.config["pixel_range"], vqvae.config["network_range"])
    _write_constants_everywhere(vqvae, layouts)
    _neutralise_norms(vqvae, layouts)
    _silence_branches(vqvae, layouts)
    features_of_levels = _fit_encoder(vqvae, layouts, pixels)
    _fit_decoder(vqvae, layouts, pixels, features_of_levels)


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

    # Before the last convolutions of encoder and decoder, two channels hold each value, as x and as -x. They must be
    # content channels. In each group of a norm, these are all channels but two, which hold constants.
    encoder_content = layouts[vqvae.encoder.conv_out.in_channels].content
    decoder_content = layouts[vqvae.decoder.conv_out.in_channels].content
    encoder_is_too_narrow = len(encoder_content) < 2 * latent_channels
    decoder_is_too_narrow = len(decoder_content) < 2 * num_colours
    if encoder_is_too_narrow or decoder_is_too_narrow:
        return "more channels per group of a norm"
    return None


# Constants, norms, and residual branches


def _write_constants_everywhere(vqvae: SVQVAE, layouts: Layouts) -> None:
    """Lets each convolution of the main path write the constants of `ChannelLayout` to its output.

    In each group of a norm, these are a large number B in one channel, and -B in another one.

    The main path is what is left of the network if residual branches and attention add nothing: the first
    convolutions, the changes of resolution, and the shortcuts of blocks that change the number of channels.
    """
    write_constants(vqvae.encoder.conv_in, layouts)
    write_constants(vqvae.decoder.conv_in, layouts)
    for module in vqvae.modules():
        if isinstance(module, RepeatConv2d):  # doubles the resolution
            write_constants(module, layouts)
        elif isinstance(module, Downsample):
            write_constants(module.conv, layouts)
        elif isinstance(module, ResnetBlock) and module.nin_shortcut is not None:
            write_constants(module.nin_shortcut, layouts)


def _neutralise_norms(vqvae: SVQVAE, layouts: Layouts) -> None:
    """Lets norms pass content on at almost its own scale, and zeros in place of constants."""
    for module in vqvae.modules():
        if isinstance(module, GroupNorm):
            layout = layouts[module.num_channels]
            module.weight.fill_(layout.norm_weight)
            module.weight[layout.constant] = 0


def _silence_branches(vqvae: SVQVAE, layouts: Layouts) -> None:
    """Lets residual branches and attention add zeros."""
    for module in vqvae.modules():
        if isinstance(module, ResnetBlock):
            set_constants(module.conv1, layouts)  # for the norm inside the branch
            silence(module.conv2)
        elif isinstance(module, AttnBlock):
            silence(module.proj_out)


# Encoder


def _fit_encoder(vqvae: SVQVAE, layouts: Layouts, pixels: torch.Tensor) -> list[torch.Tensor]:
    """Lets the encoder compute principal components, level by level.

    The first convolution computes 3 colours at full resolution. Each level but the last then halves the resolution,
    and computes components from those before. The last level keeps the resolution. The last convolution writes the
    leading components to the latents.

    Returns:
        `list[torch.Tensor]`: Components `(batch, components, h, w)` of each resolution at unit variance, full
            resolution first.
    """
    encoder: Any = vqvae.encoder
    levels = list(encoder.conv_blocks)
    last_level = levels[-1]
    levels_with_downsample = levels[:-1]
    components = colour_components(pixels)
    _write_colours(encoder.conv_in, layouts, components)
    features_of_levels = [components.features]  # (B, 3, H, W)
    limits = _limits_of_components(encoder, layouts)
    for level, max_components in zip(levels_with_downsample, limits, strict=True):
        # The residual blocks of the level pass its components on to its strided convolution.
        copy_content(level.res[0].nin_shortcut, layouts, count=len(components.stds))
        components = principal_components(components, max_components)  # of the next resolution
        _write_components(level.downsample.conv, layouts, components)
        features_of_levels.append(components.features)  # (B, components, h, w), with half the height and width
    # The first block of the last level writes each component x to two channels, as x and as -x.
    copy_content_and_negative(last_level.res[0].nin_shortcut, layouts, count=len(components.stds))
    _write_latents(vqvae, layouts, components.stds)
    return features_of_levels


def _limits_of_components(encoder: Any, layouts: Layouts) -> list[int]:
    """Maximum number of components at each lower resolution, from fine to coarse.

    Each component needs a content channel that holds it. At the lowest resolution, the last level then writes each
    component x to two content channels, as x and as -x.
    """
    levels_with_downsample = list(encoder.conv_blocks)[:-1]
    limits = []
    for level in levels_with_downsample:
        content_channels = layouts[level.downsample.conv.out_channels].content
        limits.append(len(content_channels))
    content_channels_of_last_level = layouts[encoder.conv_out.in_channels].content
    limit_of_last_level = len(content_channels_of_last_level) // 2
    limits[-1] = min(limits[-1], limit_of_last_level)  # at the lowest resolution
    return limits


def _write_colours(conv_in: Convolution, layouts: Layouts, colours: Components) -> None:
    """Lets the first convolution compute brightness and two colour differences, by the centre of its kernel."""
    content_channels = layouts[conv_in.out_channels].content
    colour_channels = content_channels[: len(COLOURS)]
    conv_in.weight[colour_channels] = 0
    conv_in.weight[colour_channels, :, 1, 1] = colours.weight[:, :, 0, 0]  # (colours, 3)
    conv_in.bias[colour_channels] = colours.bias


def _write_components(downsample: Convolution, layouts: Layouts, components: Components) -> None:
    """Lets a strided convolution compute components of the resolution that it writes.

    It reads the components of the finer resolution from its first content channels, and writes to its first content
    channels. It has equally many channels in and out, so input and output have the same layout.
    """
    kernel_of_blocks = components.weight  # (components, channels, 2, 2)
    # The 3 x 3 kernel of the convolution starts at the first pixel of each 2 x 2 block. The last row and the last
    # column of the kernel lie in other blocks, so they are zeros.
    kernel = F.pad(kernel_of_blocks, (0, 1, 0, 1))  # (components, channels, 3, 3)
    content_channels = layouts[downsample.out_channels].content
    set_rows(
        downsample,
        output_channels=content_channels,
        input_channels=content_channels,
        weight=kernel,
        bias=components.bias,
    )


def _write_latents(vqvae: SVQVAE, layouts: Layouts, stds: torch.Tensor) -> None:
    """Lets the last convolution of the encoder write the leading components to the channels of the latents.

    Args:
        vqvae ([`SVQVAE`]): The model.
        layouts (`dict[int, ChannelLayout]`): Layouts.
        stds (`torch.Tensor` of shape `(components,)`): Standard deviation of each component in pixels.
    """
    conv_out: Any = vqvae.encoder.conv_out
    latent_channels = vqvae.config["codebook_embed_dim"]
    conv_out.bias.zero_()
    # The first output channels hold the latents. Any further ones are spare, and keep small random weights.
    conv_out.weight.mul_(SPARE_SCALE)
    conv_out.weight[:latent_channels] = 0
    output_channels = range(latent_channels)
    if vqvae.config["codebook_l2_norm"]:
        # The quantizer compares directions of latents. With a constant 1 as the first value of each latent, latents
        # of nearly equal pixels have nearly equal directions, also where the pixels are near the mean.
        conv_out.bias[0] = 1.0  # its weights are zeros, so the output is the bias
        output_channels = range(1, latent_channels)
    _restore_components(conv_out, layouts, output_channels, stds)
    pass_on(vqvae.quant_conv, latent_channels)


def _restore_components(
    conv_out: Convolution, layouts: Layouts, output_channels: Sequence[int], stds: torch.Tensor
) -> None:
    """Lets the last convolution of the encoder write one component to each of some output channels.

    Its first content channels hold each component x as silu(x), and equally many after them hold it as silu(-x). For
    any x, the difference silu(x) - silu(-x) is x. The components have unit variance. A gain gives the outputs the
    proportions that the components have in pixels.
    """
    num_components = len(stds)
    content_channels = layouts[conv_out.in_channels].content
    positive_channels = content_channels[:num_components]  # hold silu(x) of each component
    negative_channels = content_channels[num_components : 2 * num_components]  # hold silu(-x) of each component
    gains = stds / stds[0]  # (components,)
    num_restored = min(num_components, len(output_channels))
    for component in range(num_restored):
        output_channel = output_channels[component]
        kernels = conv_out.weight[output_channel]  # (channels, 3, 3), a view
        # Only the centre of the 3 x 3 kernel is not 0.
        kernels[positive_channels[component], 1, 1] = gains[component]
        kernels[negative_channels[component], 1, 1] = -gains[component]


# Decoder


@dataclass
class _Hidden:
    """Feature map inside the decoder.

    Args:
        values (`torch.Tensor` of shape `(batch, channels, h, w)`): All channels.
        num_features (`int`): Number of features, which the first content channels hold.
    """

    values: torch.Tensor
    num_features: int


def _fit_decoder(
    vqvae: SVQVAE, layouts: Layouts, pixels: torch.Tensor, features_of_levels: Sequence[torch.Tensor]
) -> None:
    """Fits the convolutions of the decoder, level by level, so that they restore the encoder's features.

    The first convolution restores the features at the resolution of the latents. Each level but the last then doubles
    the resolution, and restores the features there. The last convolution restores the pixels.
    """
    decoder: Any = vqvae.decoder
    levels = list(decoder.conv_blocks)
    levels_with_upsample = levels[:-1]
    latents = vqvae.quant_conv(vqvae.encoder(pixels))  # (B, C, h, w)
    if vqvae.config["codebook_l2_norm"]:
        latents = F.normalize(latents, dim=1)
    coarsest_features = features_of_levels[-1]  # (B, features, h, w), at the resolution of the latents
    hidden = _fit_first_layer(vqvae, layouts, latents, coarsest_features)
    border = BORDER_OF_LATENTS
    targets = _targets_of_levels(features_of_levels)  # from coarse to fine, one for each level that enlarges
    for level, target in zip(levels_with_upsample, targets, strict=True):
        hidden = _pass_through_blocks(level, layouts, hidden)
        border = 2 * border  # each row of the coarse resolution becomes two rows of the finer one
        hidden = _fit_upsample(level.upsample, layouts, hidden, target, border)
    hidden = _pass_through_blocks(levels[-1], layouts, hidden)
    _fit_last_layer(decoder, layouts, hidden, pixels, border)


def _targets_of_levels(features_of_levels: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Features that each level of the decoder restores when it doubles the resolution, from coarse to fine.

    With features of 256, 128, 64 and 32 pixels a side, the levels restore those of 64, 128 and 256 pixels. At full
    resolution, each feature x is restored as x and as -x, because silu before the last convolution needs both.

    Args:
        features_of_levels (`Sequence[torch.Tensor]`): Features of the encoder, full resolution first.
    """
    full_features = features_of_levels[0]  # (B, features, H, W)
    full_target = torch.cat([full_features, -full_features], dim=1)  # (B, 2 * features, H, W)
    targets = [full_target]
    targets += features_of_levels[1:-1]  # without the coarsest, which the first layer restores
    targets.reverse()
    return targets


def _fit_first_layer(vqvae: SVQVAE, layouts: Layouts, latents: torch.Tensor, features: torch.Tensor) -> _Hidden:
    """Lets the decoder's first convolution restore the encoder's last features, and returns its output.

    Args:
        vqvae ([`SVQVAE`]): The model.
        layouts (`dict[int, ChannelLayout]`): Layouts.
        latents (`torch.Tensor` of shape `(batch, codebook_embed_dim, h, w)`): Latents.
        features (`torch.Tensor` of shape `(batch, features, h, w)`): Last features of the encoder.
    """
    conv_in: Any = vqvae.decoder.conv_in
    latent_channels = vqvae.config["codebook_embed_dim"]
    pass_on(vqvae.post_quant_conv, latent_channels)
    content_channels = layouts[conv_in.out_channels].content
    restored_features = features[:, : len(content_channels)]  # no more features than channels that can hold them
    # Without their means, latents have a mean square that is their variance. The ridge is relative to it.
    means = latents.mean((0, 2, 3))  # (C,)
    centred = latents - means[:, None, None]  # (B, C, h, w)
    # The outermost positions are left out, because their 3 x 3 neighbours include padding.
    fit = regress(centred, restored_features, LATENT_RIDGE, border=1)
    set_rows(
        conv_in,
        output_channels=content_channels,
        input_channels=range(latent_channels),  # `post_quant_conv` passes the latents on in its first channels
        weight=fit.weight,
        bias=_bias_without_centring(fit, means),
    )
    values = conv_in(vqvae.post_quant_conv(latents))  # (B, channels, h, w)
    return _Hidden(values, num_features=restored_features.shape[1])


def _bias_without_centring(fit: Fit, means: torch.Tensor) -> torch.Tensor:
    """Bias with which a convolution that was fitted to centred inputs reads the inputs themselves.

    Without the positions of the kernel, the reason is: w * (input - mean) + bias = w * input + (bias - w * mean).

    Args:
        fit ([`Fit`]): The fit, with a weight `(targets, channels, 3, 3)`.
        means (`torch.Tensor` of shape `(channels,)`): Means that were subtracted from the inputs.

    Returns:
        `torch.Tensor` of shape `(targets,)`: The bias.
    """
    weight_of_means = fit.weight.sum((2, 3))  # (targets, channels), because the mean is the same at each position
    return fit.bias - weight_of_means @ means


def _pass_through_blocks(level: Any, layouts: Layouts, hidden: _Hidden) -> _Hidden:
    """Lets the residual blocks of a level pass its features on, and returns their output."""
    shortcut = level.res[0].nin_shortcut
    if shortcut is None:  # the blocks add zeros, and change nothing
        return hidden
    num_features = copy_content(shortcut, layouts, hidden.num_features)
    return _Hidden(shortcut(hidden.values), num_features)


def _fit_upsample(upsample: Any, layouts: Layouts, hidden: _Hidden, target: torch.Tensor, border: int) -> _Hidden:
    """Lets the convolution after an enlargement restore the features of the finer resolution, and returns its output.

    Args:
        upsample (`Upsample`): Doubles height and width, and then applies its convolution.
        layouts (`dict[int, ChannelLayout]`): Layouts.
        hidden (`_Hidden` of shape `(batch, channels, h, w)`): Input of `upsample`.
        target (`torch.Tensor` of shape `(batch, features, 2 * h, 2 * w)`): Features of the encoder.
        border (`int`): Rows and columns at each side of the target that depend on padding.
    """
    convolution = upsample.conv
    # The channels that can hold features. They are the same before and after the convolution, which has equally many
    # channels in and out. The first ones hold the features that there are.
    content_channels = layouts[convolution.out_channels].content
    num_inputs = hidden.num_features
    num_outputs = min(target.shape[1], len(content_channels))  # features without a channel are not restored
    input_channels = content_channels[:num_inputs]
    output_channels = content_channels[:num_outputs]

    coarse = hidden.values[:, input_channels]  # (B, num_inputs, h, w)
    enlarged = coarse.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)  # (B, num_inputs, 2 * h, 2 * w)
    fit = regress(enlarged, target[:, :num_outputs], RIDGE, border)
    set_rows(convolution, output_channels, input_channels, fit.weight, fit.bias)
    values = upsample(hidden.values)  # (B, channels, 2 * h, 2 * w)
    return _Hidden(values, num_features=num_outputs)


def _fit_last_layer(decoder: Any, layouts: Layouts, hidden: _Hidden, pixels: torch.Tensor, border: int) -> None:
    """Lets the decoder's last convolution restore the pixels.

    Before silu, the first content channels hold each of the three colours x of [`colour_components`]: three channels
    as x, and three as -x. For any x, the difference silu(x) - silu(-x) is x. So the pixels are a linear map of the six
    channels after silu, and a regression finds it.

    Args:
        decoder (`nn.Module`): The decoder.
        layouts (`dict[int, ChannelLayout]`): Layouts.
        hidden (`_Hidden` of shape `(batch, channels, height, width)`): Last features of the decoder.
        pixels (`torch.Tensor` of shape `(batch, 3, height, width)`): Images.
        border (`int`): Rows and columns at each side that depend on padding.
    """
    conv_out = decoder.conv_out
    content_channels = layouts[conv_out.in_channels].content
    colour_channels = content_channels[: 2 * len(COLOURS)]
    # The convolution reads the output of the norm after silu.
    activated = F.silu(decoder.norm_out(hidden.values))  # (B, channels, H, W)
    activated_colours = activated[:, colour_channels]  # (B, 6, H, W)
    fit = regress(activated_colours, pixels, RIDGE, border)
    conv_out.weight.zero_()
    conv_out.weight[:, colour_channels] = fit.weight
    conv_out.bias.copy_(fit.bias)

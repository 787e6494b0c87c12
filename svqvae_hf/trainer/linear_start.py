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

from collections.abc import Sequence
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
from svqvae_hf.trainer.linear_fits import COLOURS, Components, colour_components, principal_components, regress

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
    _neutralise(vqvae, layouts)
    features_of_levels = _start_encoder(vqvae, layouts, pixels)
    _start_decoder(vqvae, layouts, pixels, features_of_levels)


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
    write_constants(vqvae.encoder.conv_in, layouts)
    write_constants(vqvae.decoder.conv_in, layouts)
    for module in vqvae.modules():
        if isinstance(module, GroupNorm):
            layout = layouts[module.num_channels]
            module.weight.fill_(layout.norm_weight)
            module.weight[layout.constant] = 0
        elif isinstance(module, RepeatConv2d):
            write_constants(module, layouts)
        elif isinstance(module, Downsample):
            write_constants(module.conv, layouts)
        elif isinstance(module, ResnetBlock):
            set_constants(module.conv1, layouts)
            silence(module.conv2)
            if module.nin_shortcut is not None:
                write_constants(module.nin_shortcut, layouts)
        elif isinstance(module, AttnBlock):
            silence(module.proj_out)


# Encoder


def _start_encoder(vqvae: SVQVAE, layouts: Layouts, pixels: torch.Tensor) -> list[torch.Tensor]:
    """Sets the encoder. Returns its features at each resolution, at unit variance, full resolution first."""
    encoder: Any = vqvae.encoder
    levels = list(encoder.conv_blocks)
    levels_with_downsample = levels[:-1]
    last_level = levels[-1]
    num_last_channels = len(layouts[encoder.conv_out.in_channels].content)
    components = colour_components(pixels)
    _start_colours(encoder.conv_in, layouts, components)
    features_of_levels = [components.features]
    for index, level in enumerate(levels_with_downsample):
        copy_content(level.res[0].nin_shortcut, layouts, count=len(components.stds))
        downsample = level.downsample.conv
        content = layouts[downsample.out_channels].content
        max_components = len(content)
        is_before_last_level = index == len(levels_with_downsample) - 1
        if is_before_last_level:  # the last level holds each component twice, as x and as -x
            max_components = min(max_components, num_last_channels // 2)
        components = principal_components(components, max_components)
        kernel = F.pad(components.weight, (0, 1, 0, 1))  # 2 x 2 to 3 x 3
        set_rows(downsample, content, content, kernel, components.bias)
        features_of_levels.append(components.features)
    copy_content_and_negative(last_level.res[0].nin_shortcut, layouts, count=len(components.stds))
    _start_latents(vqvae, layouts, components.stds)
    return features_of_levels


def _start_colours(conv_in: Convolution, layouts: Layouts, colours: Components) -> None:
    """Lets the first convolution compute brightness and two colour differences, by the centre of its kernel."""
    outputs = layouts[conv_in.out_channels].content[: len(COLOURS)]
    conv_in.weight[outputs] = 0
    conv_in.weight[outputs, :, 1, 1] = colours.weight[:, :, 0, 0]
    conv_in.bias[outputs] = colours.bias


def _start_latents(vqvae: SVQVAE, layouts: Layouts, stds: torch.Tensor) -> None:
    """Lets the last convolution of the encoder write the leading components to the channels of the latents.

    It reads each component x from two channels, after an activation: as silu(x) and silu(-x), and their difference is
    x. `stds` `(components,)` are the standard deviations of the components in pixels.
    """
    conv_out: Any = vqvae.encoder.conv_out
    latent_channels = vqvae.config["codebook_embed_dim"]
    conv_out.bias.zero_()
    conv_out.weight.mul_(SPARE_SCALE)
    conv_out.weight[:latent_channels] = 0
    first_latent = 0
    if vqvae.config["codebook_l2_norm"]:
        # The quantizer compares directions of latents. With a constant 1 as the first value of each latent, latents
        # of nearly equal pixels have nearly equal directions, also where the pixels are near the mean.
        conv_out.bias[0] = 1.0
        first_latent = 1

    content = layouts[conv_out.in_channels].content
    num_components = len(stds)
    positive_channels = content[:num_components]  # hold x of each component
    negative_channels = content[num_components:]  # hold -x of each component
    gains = stds / stds[0]
    num_latents = min(num_components, latent_channels - first_latent)
    for component in range(num_latents):
        kernels = conv_out.weight[first_latent + component]  # (channels, 3, 3), a view
        kernels[positive_channels[component], 1, 1] = gains[component]
        kernels[negative_channels[component], 1, 1] = -gains[component]
    pass_on(vqvae.quant_conv, latent_channels)


# Decoder


def _start_decoder(
    vqvae: SVQVAE, layouts: Layouts, pixels: torch.Tensor, features_of_levels: Sequence[torch.Tensor]
) -> None:
    """Sets the decoder: each convolution is regressed on the encoder's features one resolution up."""
    decoder: Any = vqvae.decoder
    latents = vqvae.quant_conv(vqvae.encoder(pixels))  # (B, C, h, w)
    if vqvae.config["codebook_l2_norm"]:
        latents = F.normalize(latents, dim=1)
    coarsest_features = features_of_levels[-1]
    num_features = _start_first_layer(vqvae, layouts, latents, coarsest_features)
    hidden = decoder.conv_in(vqvae.post_quant_conv(latents))

    finer_features = list(features_of_levels[:-1])  # full resolution first
    border = BORDER_OF_LATENTS
    for level in decoder.conv_blocks:
        shortcut = level.res[0].nin_shortcut
        if shortcut is not None:
            num_features = copy_content(shortcut, layouts, num_features)
            hidden = shortcut(hidden)
        if level.upsample is None:
            continue
        border = 2 * border
        target = finer_features.pop()
        is_full_resolution = not finer_features
        if is_full_resolution:  # the last activation needs each feature as x and as -x
            target = torch.cat([target, -target], dim=1)
        num_features = _start_upsample(level.upsample.conv, layouts, hidden, num_features, target, border)
        hidden = level.upsample(hidden)
    _start_last_layer(decoder, layouts, hidden, pixels)


def _start_first_layer(vqvae: SVQVAE, layouts: Layouts, latents: torch.Tensor, features: torch.Tensor) -> int:
    """Lets the decoder's first convolution restore the encoder's last features. Returns their number."""
    conv_in: Any = vqvae.decoder.conv_in
    latent_channels = vqvae.config["codebook_embed_dim"]
    pass_on(vqvae.post_quant_conv, latent_channels)
    content = layouts[conv_in.out_channels].content
    means = latents.mean((0, 2, 3))  # (C,)
    centred = latents - means[:, None, None]
    fit = regress(centred, features[:, : len(content)], LATENT_RIDGE, border=1)
    # The convolution reads latents that are not centred, so its bias takes their means off.
    bias = fit.bias - fit.weight.sum((2, 3)) @ means
    set_rows(conv_in, content, range(latent_channels), fit.weight, bias)
    return len(fit.weight)


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
    enlarged = features.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)  # (B, features, 2 * h, 2 * w)
    fit = regress(enlarged, target[:, : len(content)], RIDGE, border)
    set_rows(layer, content, content, fit.weight, fit.bias)
    return len(fit.weight)


def _start_last_layer(decoder: Any, layouts: Layouts, hidden: torch.Tensor, pixels: torch.Tensor) -> None:
    """Lets the decoder's last convolution restore the pixels from its last features `(batch, channels, h, w)`."""
    num_channels = 2 * len(COLOURS)  # each feature as x and as -x
    content = layouts[decoder.conv_out.in_channels].content[:num_channels]
    activated = F.silu(decoder.norm_out(hidden))[:, content]  # (B, 6, H, W)
    fit = regress(activated, pixels, RIDGE, border=2 ** len(decoder.conv_blocks))
    decoder.conv_out.weight.zero_()
    decoder.conv_out.weight[:, content] = fit.weight
    decoder.conv_out.bias.copy_(fit.bias)

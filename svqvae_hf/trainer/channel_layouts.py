"""What the channels of a linearly started model hold, and how its convolutions read and write them."""

import math
from collections.abc import Sequence
from typing import Any

import torch

from svqvae_hf.models.modeling_svqvae import SVQVAE, GroupNorm

Convolution = Any  # nn.Conv2d, whose type allows no bias, while all of these have one

CONTENT_VARIANCE = 1.0  # about the variance of the channels that hold image content
CONSTANTS_VARIANCE = 10.0  # what the two constants of a group add to its variance
SPARE_SCALE = 0.5  # of random weights that the start does not use


class ChannelLayout:
    """What each channel of a feature map holds: a constant, or image content.

    A norm divides each group of channels by the group's standard deviation. Two channels of each group hold the
    constants +B and -B, which are so large that they decide this standard deviation. So a norm divides any image by
    nearly the same number, and its weight can undo that. All convolutions of the linear start read and write image
    content in the channels of `content` alone.

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
        self.positive = []  # channels that hold the constant +B, the first of each group
        self.negative = []  # channels that hold the constant -B, the second of each group
        self.content = []  # channels that hold image content, which are all others
        for channel in range(channels):
            position_in_group = channel % channels_per_group
            if position_in_group == 0:
                self.positive.append(channel)
            elif position_in_group == 1:
                self.negative.append(channel)
            else:
                self.content.append(channel)
        self.constant = self.positive + self.negative

        self.constant_value = _constant_value(channels_per_group)  # B

        # The constants make the variance of a group nearly the same for any image. A norm divides the group by the
        # square root of this variance. The weight multiplies by it again.
        variance_of_group = CONTENT_VARIANCE + CONSTANTS_VARIANCE
        self.norm_weight = math.sqrt(variance_of_group)


def _constant_value(channels_per_group: int) -> float:
    """The value B for which the constants +B and -B add `CONSTANTS_VARIANCE` to the variance of their group.

    The mean of a group is about 0, so its variance is the mean of the squares of its channels. The two constants add
    (B**2 + B**2) / channels_per_group to this mean.
    """
    return math.sqrt(CONSTANTS_VARIANCE * channels_per_group / 2)


Layouts = dict[int, ChannelLayout]  # by number of channels


def make_layouts(vqvae: SVQVAE) -> Layouts:
    """Makes the layout of each number of channels that a norm of the model has."""
    groups = vqvae.config["norm_num_groups"]
    layouts = {}
    for layer in vqvae.modules():
        if isinstance(layer, GroupNorm):
            layouts[layer.num_channels] = ChannelLayout(layer.num_channels, groups)
    return layouts


def write_constants(layer: Convolution, layouts: Layouts) -> None:
    """Makes a convolution of the main path write the constants, and ignore the constants that it reads.

    The random weights between all other channels are scaled by `SPARE_SCALE`.
    """
    if layer.in_channels in layouts:
        constant_inputs = layouts[layer.in_channels].constant
        layer.weight[:, constant_inputs] = 0
    layer.weight.mul_(SPARE_SCALE)
    set_constants(layer, layouts)


def set_constants(layer: Convolution, layouts: Layouts) -> None:
    """Makes a convolution write the constants to their channels, whatever it reads."""
    layout = layouts[layer.out_channels]
    layer.weight[layout.constant] = 0
    layer.bias[layout.positive] = layout.constant_value
    layer.bias[layout.negative] = -layout.constant_value


def silence(layer: Convolution) -> None:
    """Makes a convolution write zeros."""
    layer.weight.zero_()
    layer.bias.zero_()


def pass_on(layer: Convolution, count: int) -> None:
    """Makes a 1 x 1 convolution pass its first channels on unchanged."""
    layer.bias.zero_()
    layer.weight.mul_(SPARE_SCALE)
    layer.weight[:count] = 0
    for channel in range(count):
        layer.weight[channel, channel] = 1.0


def copy_content(shortcut: Convolution | None, layouts: Layouts, count: int) -> int:
    """Makes a 1 x 1 convolution copy the first content channels that it reads to the first ones that it writes.

    Args:
        shortcut (`nn.Conv2d`, *optional*): The convolution. Blocks that do not change the number of channels have
            none. They pass all channels on.
        layouts (`dict[int, ChannelLayout]`): Layouts.
        count (`int`): Largest number of channels to copy. Fewer are copied if the convolution reads or writes fewer.

    Returns:
        `int`: Number of channels that are copied; `count` without a convolution.
    """
    if shortcut is None:
        return count  # nothing limits it, because all channels are passed on
    inputs = layouts[shortcut.in_channels].content
    outputs = layouts[shortcut.out_channels].content
    num_copied = min(count, len(inputs), len(outputs))
    _copy_channels(shortcut, inputs[:num_copied], outputs[:num_copied], factor=1)
    return num_copied


def copy_content_and_negative(shortcut: Convolution, layouts: Layouts, count: int) -> None:
    """Makes a 1 x 1 convolution write its first content channels, and after them the same channels times -1."""
    inputs = layouts[shortcut.in_channels].content
    outputs = layouts[shortcut.out_channels].content
    num_copied = min(count, len(inputs), len(outputs) // 2)
    copied_inputs = inputs[:num_copied]
    positive_outputs = outputs[:num_copied]
    negative_outputs = outputs[num_copied : 2 * num_copied]
    _copy_channels(shortcut, copied_inputs, positive_outputs, factor=1)
    _copy_channels(shortcut, copied_inputs, negative_outputs, factor=-1)


def _copy_channels(layer: Convolution, inputs: Sequence[int], outputs: Sequence[int], factor: int) -> None:
    """Makes a 1 x 1 convolution write each of some inputs, times a factor, to the output at the same position."""
    for input_channel, output_channel in zip(inputs, outputs, strict=True):
        layer.weight[output_channel] = 0
        layer.weight[output_channel, input_channel] = factor


def set_rows(
    layer: Convolution,
    output_channels: Sequence[int],
    input_channels: Sequence[int],
    weight: torch.Tensor,
    bias: torch.Tensor,
) -> None:
    """Lets some output channels of a convolution read some input channels by given weights, and no other channels.

    Args:
        layer (`nn.Conv2d`): The convolution.
        output_channels (`Sequence[int]`): Output channels, of which the first `num_outputs` are set.
        input_channels (`Sequence[int]`): Input channels, of which the first `num_inputs` are read.
        weight (`torch.Tensor` of shape `(num_outputs, num_inputs, 3, 3)`): Weight between these channels.
        bias (`torch.Tensor` of shape `(num_outputs,)`): Bias of these output channels.
    """
    num_outputs, num_inputs = weight.shape[:2]
    written_channels = output_channels[:num_outputs]
    read_channels = list(input_channels[:num_inputs])
    for row, output_channel in enumerate(written_channels):
        layer.weight[output_channel] = 0
        layer.weight[output_channel, read_channels] = weight[row]  # (num_inputs, 3, 3)
        layer.bias[output_channel] = bias[row]

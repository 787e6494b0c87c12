"""The config of an original checkpoint, read from the shapes of its weights."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from svqvae_hf.loaders.checkpoint_checks import read_sizes
from svqvae_hf.loaders.checkpoint_formats import CheckpointFormat, count_numbers

NORM_NUM_GROUPS = 32  # in all formats

# Config values that are sizes of weights, with their axes.
CONFIG_AXES = {
    "in_channels": ("encoder.conv_in.weight", 1),
    "out_channels": ("decoder.conv_out.weight", 0),
    "base_channels": ("encoder.conv_in.weight", 0),
    "z_channels": ("encoder.conv_out.weight", 0),
    "codebook_size": ("quantize.embedding.weight", 0),
    "codebook_embed_dim": ("quantize.embedding.weight", 1),
}


def infer_config(
    format: CheckpointFormat, weights: Mapping[str, Any], num_levels: int, source: str | Path
) -> dict[str, Any]:
    """Reads the config from the shapes of the weights and, where shapes do not tell, from the format."""

    def sizes_of(axes: Mapping[str, tuple[str, int]]) -> dict[str, int]:
        originals = {key: (format.to_original(name, num_levels), axis) for key, (name, axis) in axes.items()}
        return read_sizes(weights, originals, source)

    def multipliers(network: str, levels: Iterable[int]) -> tuple[int, ...]:
        axes = {str(level): (f"{network}.conv_blocks.{level}.res.0.conv1.weight", 0) for level in levels}
        return tuple(channels // sizes["base_channels"] for channels in sizes_of(axes).values())

    sizes, levels = sizes_of(CONFIG_AXES), range(num_levels)
    return {
        **sizes,
        "encoder_ch_mult": multipliers("encoder", levels),
        "decoder_ch_mult": multipliers("decoder", reversed(levels)),  # its first level has the lowest resolution
        "num_res_blocks": count_numbers(weights, format.to_original("encoder.conv_blocks.0.res.", num_levels)),
        "norm_num_groups": NORM_NUM_GROUPS,
        "codebook_l2_norm": format.codebook_l2_norm,
        "network_range": format.network_range,
    }

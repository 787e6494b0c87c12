"""The config of an original checkpoint, read from the shapes of its weights."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from svqvae_hf.loaders.checkpoint_checks import raise_faults
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
    level_keys = {
        network: [f"{network}.conv_blocks.{level}.res.0.conv1.weight" for level in range(num_levels)]
        for network in ("encoder", "decoder")
    }
    level_keys["decoder"].reverse()  # the decoder's first level has the lowest resolution
    keys = [*(key for key, _ in CONFIG_AXES.values()), *level_keys["encoder"], *level_keys["decoder"]]
    names = {key: format.to_original(key, num_levels) for key in keys}
    _check_present(weights, set(names.values()), source)
    shapes = {key: tuple(weights[name].shape) for key, name in names.items()}
    sizes = {value: shapes[key][axis] for value, (key, axis) in CONFIG_AXES.items()}
    base = sizes["base_channels"]
    not_multiples = {
        f"{names[key]} {shapes[key]}" for network in level_keys.values() for key in network if shapes[key][0] % base
    }
    raise_faults(
        source, {f"not a multiple of the {base} channels of {names['encoder.conv_in.weight']}": not_multiples}
    )
    return {
        **sizes,
        "encoder_ch_mult": tuple(shapes[key][0] // base for key in level_keys["encoder"]),
        "decoder_ch_mult": tuple(shapes[key][0] // base for key in level_keys["decoder"]),
        "num_res_blocks": count_numbers(weights, format.to_original("encoder.conv_blocks.0.res.", num_levels)),
        "norm_num_groups": NORM_NUM_GROUPS,
        "codebook_l2_norm": format.codebook_l2_norm,
        "network_range": format.network_range,
    }


def _check_present(weights: Mapping[str, Any], names: set[str], source: str | Path) -> None:
    present = names & weights.keys()
    misshapen = {name for name in present if weights[name].ndim < 2 or 0 in weights[name].shape}
    raise_faults(
        source,
        {
            "missing": names - present,
            "misshapen": {f"{name} {tuple(weights[name].shape)}" for name in misshapen},
        },
    )

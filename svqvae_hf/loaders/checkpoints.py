"""Reads original checkpoints of tokenizers."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from svqvae_hf.hub.repositories import hub_repo
from svqvae_hf.loaders.checkpoint_checks import check_tensors, check_weights, read_sizes, select_weights
from svqvae_hf.loaders.checkpoint_files import Checkpoint, load_checkpoint_file, locate_checkpoint, top_level_weights
from svqvae_hf.loaders.checkpoint_formats import CHECKPOINT_FORMATS, CheckpointFormat, count_numbers
from svqvae_hf.loaders.llamagen_checkpoints import find_language_model
from svqvae_hf.models.checks import check_depth
from svqvae_hf.untrusted.weights import key_text

NORM_NUM_GROUPS = 32  # in all formats
KEYS_SHOWN = 5  # of a file in an error
RUN_STATE = "run_state.pt"  # beside the weights in each checkpoint of a training run of this package

# Config values that are sizes of weights, each with the name of the weight in this library and the axis.
CONFIG_AXES = {
    "in_channels": ("encoder.conv_in.weight", 1),
    "out_channels": ("decoder.conv_out.weight", 0),
    "base_channels": ("encoder.conv_in.weight", 0),
    "z_channels": ("encoder.conv_out.weight", 0),
    "codebook_size": ("quantize.embedding.weight", 0),
    "codebook_embed_dim": ("quantize.embedding.weight", 1),
}


def read_checkpoint(
    source: str | Path, model_class: type[nn.Module], *, use_ema: bool = False, **config: Any
) -> Checkpoint:
    """Reads an original checkpoint, strictly. Its keys and shapes tell its format and config.

    A safetensors file is `svqvae`, `janus-vqvae` or `janus`, by its names. A pickle with `model` is `llamagen`, and so
    is FlexVAR's, which looks the same. A pickle with `state_dict` is `lightning` or `taming`. Pickles are read as
    weights only; code in them raises an error.

    Args:
        source (`str` or `Path`): Local file, or `org/repo:file` on the Hub.
        model_class (`type[nn.Module]`): Class that the config and the weights are for, [`SVQVAE`].
        use_ema (`bool`, defaults to `False`): Take the averaged weights, which LlamaGen's files may have.
        **config: Config values that replace the values read from the file. Shapes do not tell the range of the images
            or whether the codebook is normalised, so both come from the format.

    Returns:
        [`Checkpoint`]: Format, config and weights.

    Raises:
        OSError: If the file is missing or cannot be downloaded.
        ValueError: If the file is broken, has an unknown format, or does not hold exactly the weights that its config
            asks for.
    """
    path = locate_checkpoint(source)
    _check_not_converted(path, source)
    _check_not_of_a_run(path, source)
    content = load_checkpoint_file(path, source)
    format = _find_format(content, source)
    stored_weights = content[format.container]  # the part of the content that holds the weights
    all_weights = select_weights(content, stored_weights, source, use_ema=use_ema)
    weights = _without_training_weights(all_weights, format)  # by the names in the file
    check_tensors(weights, source)
    full_config = _infer_config(format, weights, source)
    full_config.update(config)
    expected_shapes = _expected_shapes(model_class, full_config, source)  # by the names in this library
    state_dict = _rename_and_check(weights, expected_shapes, format, source)
    return Checkpoint(
        source=str(source), path=path, use_ema=use_ema, format=format, config=full_config, state_dict=state_dict
    )


def _rename_and_check(
    weights: Mapping[str, torch.Tensor],
    expected_shapes: Mapping[str, torch.Size],
    format: CheckpointFormat,
    source: str | Path,
) -> dict[str, torch.Tensor]:
    """Weights by their names in this library, in float32.

    Args:
        weights (`Mapping[str, torch.Tensor]`): Weights by their names in the file.
        expected_shapes (`Mapping[str, torch.Size]`): Shapes of all weights by their names in this library.
        format ([`CheckpointFormat`]): Format of the file.
        source (`str` or `Path`): Name of the file in errors.

    Raises:
        ValueError: The file does not hold exactly these weights, in these shapes.
    """
    num_levels = count_numbers(weights, format.level_prefix)
    shapes_in_file = {}  # by the names in the file, so that errors name what is in the file
    for name, shape in expected_shapes.items():
        name_in_file = format.to_original(name, num_levels)
        shapes_in_file[name_in_file] = shape
    check_weights(weights, shapes_in_file, source)
    state_dict = {}
    for name in expected_shapes:
        name_in_file = format.to_original(name, num_levels)
        state_dict[name] = weights[name_in_file].float()
    return state_dict


def _check_not_converted(path: Path, source: str | Path) -> None:
    """Raises ValueError if a file lies in the folder of a model that `from_pretrained` loads."""
    config = path.with_name("config.json")
    is_converted = config.is_file() and b'"_class_name"' in config.read_bytes()
    if is_converted:
        folder = hub_repo(source) or path.parent
        raise ValueError(f"`{source}` is already converted. Load its folder, `{folder}`, with `from_pretrained`.")


def _check_not_of_a_run(path: Path, source: str | Path) -> None:
    """Raises ValueError for weights in a checkpoint of a training run, which do not tell their config."""
    if not path.with_name(RUN_STATE).is_file():
        return
    step = path.parent.name.rpartition("-")[2]
    raise ValueError(
        f"`{source}` must be an original checkpoint, but belongs to a training run. To make a model of it, repeat the "
        f"command of the run with `--resume_from_checkpoint latest --max_steps {step}`."
    )


def _find_format(content: Mapping[str | None, Any], source: str | Path) -> CheckpointFormat:
    """Format of a file with this content. Raises ValueError for an unknown one, with the keys that were found."""
    for format in CHECKPOINT_FORMATS:
        if format.matches(content):
            return format
    if find_language_model(content) is not None:
        raise ValueError(
            f"`{source}` is a language model of LlamaGen, and must be a tokenizer here. `svqvae convert` makes a "
            "pipeline of both if it is given the tokenizer by `--tokenizer`; `LlamaGenForCausalLM.from_single_file` "
            "loads it alone."
        )
    known_formats = [_describe_format(format) for format in CHECKPOINT_FORMATS]
    keys = [key_text(key) for key in top_level_weights(content)]
    raise ValueError(
        f"`{source}` must be a checkpoint of a known format, but is not. Looked for {'; '.join(known_formats)}. Found "
        f"{_describe_keys(sorted(keys))}. A transformer is converted by `svqvae convert` with `--tokenizer`."
    )


def _without_training_weights(weights: Mapping[str, Any], format: CheckpointFormat) -> dict[str, Any]:
    """The weights of a file without the ones that only training or other networks need."""
    model_weights = {}
    for name, weight in weights.items():
        if not name.startswith(format.training_keys):
            model_weights[name] = weight
    return model_weights


def _describe_format(format: CheckpointFormat) -> str:
    """Words for a format: its name, and the keys that show it."""
    container = "a .safetensors file" if format.container is None else f"`{format.container}`"
    return f"{format.name}: `{format.level_prefix}0.*` in {container}"


def _describe_keys(keys: list[str]) -> str:
    """Words for the keys of a file: the first few of them."""
    if not keys:
        return "no keys"
    listed = ", ".join(keys[:KEYS_SHOWN])
    if len(keys) > KEYS_SHOWN:
        return f"{listed} and others"
    return listed


def _infer_config(format: CheckpointFormat, weights: Mapping[str, Any], source: str | Path) -> dict[str, Any]:
    """Reads the config from the names and shapes of the weights and, where these do not tell, from the format."""
    num_levels = count_numbers(weights, format.level_prefix)
    # The names of the weights of a block begin with this, followed by the number of the block.
    start_of_names = format.to_original("encoder.conv_blocks.0.res.", num_levels)
    num_blocks = count_numbers(weights, start_of_names)
    check_depth(f"`{source}`", {"levels": num_levels, "residual blocks per level": num_blocks})
    sizes = _read_sizes(format, weights, num_levels, source)
    config: dict[str, Any] = {key: sizes[key] for key in CONFIG_AXES}
    encoder_multipliers = _channel_multipliers("encoder", sizes, num_levels)
    decoder_multipliers = _channel_multipliers("decoder", sizes, num_levels)
    config["encoder_ch_mult"] = tuple(encoder_multipliers)
    config["decoder_ch_mult"] = tuple(reversed(decoder_multipliers))  # in the config, full resolution comes first
    config["norm_num_groups"] = NORM_NUM_GROUPS
    config["codebook_l2_norm"] = format.codebook_l2_norm
    config["network_range"] = format.network_range
    config["num_res_blocks"] = num_blocks
    return config


def _read_sizes(
    format: CheckpointFormat, weights: Mapping[str, Any], num_levels: int, source: str | Path
) -> dict[str, int]:
    """Sizes of weights: the config values of `CONFIG_AXES`, and the channels of each level of both networks."""
    axes = dict(CONFIG_AXES)  # for each size, the name of a weight and the axis that has the size
    for level in range(num_levels):
        axes[_key_of_channels("encoder", level)] = (f"encoder.conv_blocks.{level}.res.0.conv1.weight", 0)
        axes[_key_of_channels("decoder", level)] = (f"decoder.conv_blocks.{level}.res.0.conv1.weight", 0)
    axes_in_file = {}
    for key, (name, axis) in axes.items():
        name_in_file = format.to_original(name, num_levels)
        axes_in_file[key] = (name_in_file, axis)
    return read_sizes(weights, axes_in_file, source)  # all at once, so that one error names all faulty weights


def _key_of_channels(network: str, level: int) -> str:
    """Key of the channels of a level, such as `encoder level 0`, beside the config values among the sizes."""
    return f"{network} level {level}"


def _channel_multipliers(network: str, sizes: Mapping[str, int], num_levels: int) -> list[int]:
    """Channels of each level of a network, from its first level to its last, as multiples of `base_channels`."""
    multipliers = []
    for level in range(num_levels):
        channels = sizes[_key_of_channels(network, level)]
        multipliers.append(channels // sizes["base_channels"])
    return multipliers


def _expected_shapes(
    model_class: type[nn.Module], config: Mapping[str, Any], source: str | Path
) -> dict[str, torch.Size]:
    """Shapes of the weights of a model with this config, by their names.

    Raises:
        ValueError: There is no model with this config. The message names the weights that the sizes come from.
    """
    try:
        with torch.device("meta"):  # the weights take no memory
            model = model_class(**config)
    except ValueError as error:
        sizes = []  # such as "in_channels 3 from encoder.conv_in.weight"
        for key, (name_of_weight, _) in CONFIG_AXES.items():
            sizes.append(f"{key} {config[key]} from {name_of_weight}")
        listed = ", ".join(sizes)
        raise ValueError(
            f"`{source}` must have the shapes of an SVQVAE, but has {listed}: {error} Shapes do not tell "
            f"`norm_num_groups`, which is {NORM_NUM_GROUPS} in original checkpoints. If it is another, pass it."
        ) from error
    return {name: tensor.shape for name, tensor in model.state_dict().items()}

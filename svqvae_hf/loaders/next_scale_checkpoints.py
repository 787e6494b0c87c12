"""Reads original checkpoints of FlexVAR's transformer."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from svqvae_hf.loaders.checkpoint_checks import check_tensors, check_weights, read_sizes, select_weights
from svqvae_hf.loaders.checkpoint_files import Checkpoint, load_checkpoint_file, locate_checkpoint, top_level_weights
from svqvae_hf.loaders.checkpoint_formats import CheckpointFormat, count_numbers
from svqvae_hf.models.checks import check_depth

FLEXVAR = CheckpointFormat("flexvar-transformer", "FlexVAR's transformer", container=None, level_prefix="blocks.")
BUFFERS = re.compile(r"attn_bias_for_masking|blocks\.\d+\.attn\.zero_k_bias")  # constants that FlexVAR saves

CLASSES = "class_emb.weight"  # a row for each class, and one for no class
CODES = "word_embed.weight"
POSITIONS = "pos_1LC"
TRAINER = "trainer"  # key of everything in a file of FlexVAR's trainer
TRAINED_TRANSFORMER = "var_wo_ddp"  # key of the transformer's weights there

# Config values that are sizes of weights, with their axes.
CONFIG_AXES = {
    "heads": ("blocks.0.attn.scale_mul_1H11", 1),
    "width": (CODES, 0),
    "classes": (CLASSES, 0),
    "codebook_size": ("head.weight", 0),
    "codebook_embed_dim": (CODES, 1),
    "position_size": (POSITIONS, 2),
}


def read_next_scale_checkpoint(source: str | Path, model_class: type[nn.Module]) -> Checkpoint:
    """Reads a checkpoint of FlexVAR's transformer, strictly. The shapes of its weights tell the config.

    Args:
        source (`str` or `Path`): Local file, or `org/repo:file` on the Hub.
        model_class (`type[nn.Module]`): Class that the config and the weights are for, [`NextScaleTransformer`].

    Returns:
        [`Checkpoint`]: Format, config and weights.

    Raises:
        OSError: If the file is missing or cannot be downloaded.
        ValueError: If the file is broken, or does not hold exactly the weights of such a transformer.
    """
    path = locate_checkpoint(source)
    content = load_checkpoint_file(path, source)
    stored_weights = _find_weights(content)
    if not _is_transformer(stored_weights):
        raise ValueError(
            f"`{source}` must be a checkpoint of FlexVAR's transformer, with `{CODES}` and `{POSITIONS}` at the "
            f"top or in `{TRAINER}` > `{TRAINED_TRANSFORMER}`, but is not. Load a tokenizer with "
            "`SVQVAE.from_single_file`."
        )
    weights = _without_buffers(select_weights(content, stored_weights, source))
    check_tensors(weights, source)
    config = _infer_config(weights, source)
    with torch.device("meta"):  # the weights of this model take no memory
        expected = model_class(**config).state_dict()
    shapes = {name: tensor.shape for name, tensor in expected.items()}
    check_weights(weights, shapes, source)
    state_dict = {name: tensor.detach().float() for name, tensor in weights.items()}
    return Checkpoint(
        source=str(source), path=path, use_ema=False, format=FLEXVAR, config=config, state_dict=state_dict
    )


def _find_weights(content: Mapping[str | None, Any]) -> Any:
    """The place in a file where the weights should be: in the part of FlexVAR's trainer, or at the top level."""
    trainer = content.get(TRAINER)
    if isinstance(trainer, Mapping):
        return trainer.get(TRAINED_TRANSFORMER)
    return top_level_weights(content)


def _without_buffers(weights: Mapping[str, Any]) -> dict[str, Any]:
    """The weights of a file without the constants that FlexVAR saves with them."""
    return {name: value for name, value in weights.items() if not BUFFERS.fullmatch(name)}


def _infer_config(weights: Mapping[str, torch.Tensor], source: str | Path) -> dict[str, int]:
    """Reads the config from the shapes of the weights.

    Raises:
        ValueError: The weights lack a size, or the sizes do not fit each other.
    """
    sizes = read_sizes(weights, CONFIG_AXES, source)
    heads = sizes["heads"]
    width = sizes["width"]
    class_rows = sizes["classes"]
    num_layers = count_numbers(weights, FLEXVAR.level_prefix)
    check_depth(f"`{source}`", {"layers": num_layers})
    if width % heads != 0 or class_rows < 2:
        raise ValueError(
            f"`{source}` must have a width that is a multiple of its heads, and at least one class, but has width "
            f"{width}, {heads} heads and {class_rows} rows in {CLASSES}. Download the file again."
        )
    return {
        "num_layers": num_layers,
        "num_attention_heads": heads,
        "attention_head_dim": width // heads,
        "num_classes": class_rows - 1,  # the last row is for no class
        "codebook_size": sizes["codebook_size"],
        "codebook_embed_dim": sizes["codebook_embed_dim"],
        "position_size": sizes["position_size"],
    }


def _is_transformer(stored_weights: Any) -> bool:
    """Whether a value in a file holds weights under the names of FlexVAR's transformer."""
    return isinstance(stored_weights, Mapping) and CODES in stored_weights and POSITIONS in stored_weights

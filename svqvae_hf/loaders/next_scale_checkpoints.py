"""Reads original checkpoints of FlexVAR's transformer."""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from svqvae_hf.loaders.checkpoint_checks import check_tensors, check_weights, read_sizes, select_weights
from svqvae_hf.loaders.checkpoint_files import Checkpoint, load_checkpoint_file, locate_checkpoint
from svqvae_hf.loaders.checkpoint_formats import CheckpointFormat, count_numbers
from svqvae_hf.models.checks import check_depth

FLEXVAR = CheckpointFormat("flexvar-transformer", "FlexVAR's transformer", container=None, level_prefix="blocks.")
BUFFERS = re.compile(r"attn_bias_for_masking|blocks\.\d+\.attn\.zero_k_bias")  # constants that FlexVAR saves

CLASSES = "class_emb.weight"  # a row for each class, and one for no class

# Config values that are sizes of weights, with their axes.
CONFIG_AXES = {
    "heads": ("blocks.0.attn.scale_mul_1H11", 1),
    "width": ("word_embed.weight", 0),
    "classes": (CLASSES, 0),
    "codebook_size": ("head.weight", 0),
    "codebook_embed_dim": ("word_embed.weight", 1),
    "position_size": ("pos_1LC", 2),
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
    trainer = content.get("trainer")
    if isinstance(trainer, Mapping):
        transformer = trainer.get("var_wo_ddp")
    else:
        transformer = content.get(None, content)
    if not isinstance(transformer, Mapping) or not {"word_embed.weight", "pos_1LC"} <= transformer.keys():
        raise ValueError(
            f"`{source}` must be a checkpoint of FlexVAR's transformer, with `word_embed.weight` and `pos_1LC` at the "
            "top or in `trainer` > `var_wo_ddp`, but is not. Load a tokenizer with `SVQVAE.from_single_file`."
        )
    all_weights = select_weights(content, transformer, source)
    weights = {key: value for key, value in all_weights.items() if not BUFFERS.fullmatch(key)}
    check_tensors(weights, source)
    sizes = read_sizes(weights, CONFIG_AXES, source)
    heads = sizes["heads"]
    width = sizes["width"]
    classes = sizes["classes"]
    num_layers = count_numbers(weights, FLEXVAR.level_prefix)
    check_depth(f"`{source}`", {"layers": num_layers})
    if width % heads or classes < 2:
        raise ValueError(
            f"`{source}` must have a width that is a multiple of its heads, and at least one class, but has width "
            f"{width}, {heads} heads and {classes} rows in {CLASSES}. Download the file again."
        )
    config = {
        "num_layers": num_layers,
        "num_attention_heads": heads,
        "attention_head_dim": width // heads,
        "num_classes": classes - 1,
        "codebook_size": sizes["codebook_size"],
        "codebook_embed_dim": sizes["codebook_embed_dim"],
        "position_size": sizes["position_size"],
    }
    with torch.device("meta"):
        expected = model_class(**config).state_dict()
    shapes = {key: tensor.shape for key, tensor in expected.items()}
    check_weights(weights, shapes, source)
    state_dict = {key: tensor.detach().float() for key, tensor in weights.items()}
    return Checkpoint(str(source), path, False, FLEXVAR, config, state_dict)

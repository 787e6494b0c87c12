"""Checkpoints of LlamaGen's language models, read as a config and weights."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from svqvae_hf.loaders.checkpoint_checks import check_tensors, check_weights, read_sizes, select_weights
from svqvae_hf.loaders.checkpoint_files import Checkpoint, load_checkpoint_file, locate_checkpoint, top_level_weights
from svqvae_hf.loaders.checkpoint_formats import CheckpointFormat, count_numbers
from svqvae_hf.models.checks import check_depth

LLAMAGEN = CheckpointFormat("llamagen-transformer", "LlamaGen's language model", None, level_prefix="layers.")
EMBEDDING = "tok_embeddings.weight"  # every such checkpoint has it
EMBEDDED = "model.embed_tokens.weight"  # in this library, with the rows of classes, which lie apart in the file
CLASSES = "cls_embedding.embedding_table.weight"
CAPTION = "cls_embedding.uncond_embedding"
ANGLES = "freqs_cis"  # a row for each position of a sequence, in files of older code
CONTAINERS = ("model", "module", "state_dict")  # keys of the weights in files of DDP, DeepSpeed and others

# Heads of the sizes that LlamaGen defines, by layers and channels: B, L, XL, XXL, XXXL, 1B, 3B, 7B.
HEADS = {
    (12, 768): 12,
    (24, 1024): 16,
    (36, 1280): 20,
    (48, 1536): 24,
    (48, 2560): 40,
    (22, 2048): 32,
    (24, 3200): 32,
    (32, 4096): 32,
}


@dataclass(frozen=True)
class FileWeight:
    """A weight of a file.

    Args:
        shape (`tuple[int, ...]`): Its shape.
        names (`list[str]`): Its name in this library. If the weight stacks several weights of this library along its
            rows, as queries, keys and values are stacked, the names of all of them in this order.
    """

    shape: tuple[int, ...]
    names: list[str]


def read_llamagen(
    source: str | Path, grid_size: int | None = None, *, num_attention_heads: int | None = None, use_ema: bool = False
) -> Checkpoint:
    """Reads a checkpoint of LlamaGen's language models, strictly.

    The weights may be at the top level of the file, or in `model`, `module` or `state_dict`. Pickles are read as
    weights only; code in them raises an error.

    Args:
        source (`str` or `Path`): Local file, or `org/repo:file` on the Hub.
        grid_size (`int`, *optional*): Rows and columns of ids of an image. Required unless the file holds `freqs_cis`.
        num_attention_heads (`int`, *optional*): Number of heads. Required for sizes that LlamaGen does not define.
        use_ema (`bool`, defaults to `False`): Take the averaged weights, which checkpoints of training may have.

    Returns:
        [`Checkpoint`]: Arguments of [`LlamaGenConfig`], and weights.

    Raises:
        OSError: If the file is missing or cannot be downloaded.
        ValueError: If the file is broken, is another checkpoint, does not hold exactly the weights of such a model, or
            does not hold a value that was not passed.
    """
    path = locate_checkpoint(source)
    content = load_checkpoint_file(path, source)
    stored_weights = find_language_model(content)
    if stored_weights is None:
        raise ValueError(
            f"`{source}` must be a checkpoint of a language model of LlamaGen, but has no `{EMBEDDING}`, at "
            f"its top level or in {', '.join(CONTAINERS)}. Load a tokenizer with `SVQVAE.from_single_file`."
        )
    weights = select_weights(content, stored_weights, source, use_ema=use_ema)
    # The angles are no weights, so none of the checks is for them. They only tell the number of positions.
    angles = weights.pop(ANGLES, None)
    check_tensors(weights, source)
    sizes = _read_sizes(weights, source)
    layout = _layout(sizes)
    expected_shapes = {name: torch.Size(file_weight.shape) for name, file_weight in layout.items()}
    check_weights(weights, expected_shapes, source)
    config = dict(sizes)
    config["grid_size"] = _find_grid_size(angles, sizes["num_condition_tokens"], grid_size, source)
    config["num_attention_heads"] = num_attention_heads or _find_heads(sizes, source)
    state_dict = _rename(weights, layout)
    _join_embeddings(state_dict, sizes["num_classes"])
    return Checkpoint(
        source=str(source), path=path, use_ema=use_ema, format=LLAMAGEN, config=config, state_dict=state_dict
    )


def find_language_model(content: Mapping[str | None, Any]) -> dict[Any, Any] | None:
    """Returns the weights of a language model of LlamaGen from the content of its file, or None for other files."""
    candidates: list[Any] = [top_level_weights(content)]
    for name in CONTAINERS:
        candidates.append(content.get(name))
    for weights in candidates:
        if isinstance(weights, dict) and EMBEDDING in weights:
            return weights
    return None


def _find_heads(sizes: Mapping[str, Any], source: str | Path) -> int:
    """Number of heads of the sizes that LlamaGen defines."""
    layers = sizes["num_hidden_layers"]
    hidden = sizes["hidden_size"]
    if (layers, hidden) not in HEADS:
        raise ValueError(
            f"`{source}` has {layers} layers of {hidden} channels, which is not a size that LlamaGen defines, and "
            "does not state the number of heads, `n_head` in training. Pass `num_attention_heads`, or `--num-heads` "
            "to `svqvae convert`."
        )
    return HEADS[layers, hidden]


def _read_sizes(weights: Mapping[str, torch.Tensor], source: str | Path) -> dict[str, Any]:
    """Config values that are sizes of weights."""
    reads_captions = CAPTION in weights
    # A row per position of a caption, or a row per class
    condition = CAPTION if reads_captions else CLASSES
    axes = {  # for each size, the name of a weight and the axis that has the size
        "codebook_size": (EMBEDDING, 0),
        "hidden_size": (EMBEDDING, 1),
        "intermediate_size": ("layers.0.feed_forward.w1.weight", 0),
        "condition_rows": (condition, 0),
        "condition_channels": (condition, 1),
    }
    sizes = read_sizes(weights, axes, source)
    num_layers = count_numbers(weights, LLAMAGEN.level_prefix)
    check_depth(f"`{source}`", {"layers": num_layers})
    config: dict[str, Any] = {
        "codebook_size": sizes["codebook_size"],
        "hidden_size": sizes["hidden_size"],
        "intermediate_size": sizes["intermediate_size"],
        "num_hidden_layers": num_layers,
    }
    condition_rows = sizes["condition_rows"]
    condition_channels = sizes["condition_channels"]
    if reads_captions:
        config["num_classes"] = 1
        config["num_condition_tokens"] = condition_rows
        config["caption_dim"] = condition_channels
    else:
        config["num_classes"] = condition_rows - 1  # the last row is for no class
        config["num_condition_tokens"] = 1
        config["caption_dim"] = None
    return config


def _layout(sizes: Mapping[str, Any]) -> dict[str, FileWeight]:
    """Weights of a file with these sizes, by their names in the file."""
    codes = sizes["codebook_size"]
    hidden = sizes["hidden_size"]
    layout = {  # shapes are (output channels, input channels), or (rows, channels) of an embedding
        EMBEDDING: FileWeight((codes, hidden), names=[EMBEDDED]),
        "norm.weight": FileWeight((hidden,), names=["model.norm.weight"]),
        "output.weight": FileWeight((codes, hidden), names=["lm_head.weight"]),
    }
    layer_layout = _layer_layout(hidden, sizes["intermediate_size"])
    for index in range(sizes["num_hidden_layers"]):
        for name_in_layer, weight in layer_layout.items():
            our_names = [f"model.layers.{index}.{our_name}" for our_name in weight.names]
            layout[f"layers.{index}.{name_in_layer}"] = FileWeight(weight.shape, names=our_names)
    caption_dim = sizes["caption_dim"]
    if caption_dim is None:
        layout[CLASSES] = FileWeight((sizes["num_classes"] + 1, hidden), names=[CLASSES])
        return layout
    projection = "cls_embedding.cap_proj"
    layout[f"{projection}.fc1.weight"] = FileWeight((hidden, caption_dim), names=["caption_projection.fc1.weight"])
    layout[f"{projection}.fc2.weight"] = FileWeight((hidden, hidden), names=["caption_projection.fc2.weight"])
    layout[CAPTION] = FileWeight((sizes["num_condition_tokens"], caption_dim), names=["uncond_embedding"])
    return layout


def _layer_layout(hidden: int, inner: int) -> dict[str, FileWeight]:
    """Weights of a layer with `hidden` channels, and `inner` ones in its MLP, by their names in the file."""
    queries_keys_values = ["self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"]
    return {
        "attention.wqkv.weight": FileWeight((3 * hidden, hidden), names=queries_keys_values),
        "attention.wo.weight": FileWeight((hidden, hidden), names=["self_attn.o_proj.weight"]),
        "feed_forward.w1.weight": FileWeight((inner, hidden), names=["mlp.gate_proj.weight"]),
        "feed_forward.w3.weight": FileWeight((inner, hidden), names=["mlp.up_proj.weight"]),
        "feed_forward.w2.weight": FileWeight((hidden, inner), names=["mlp.down_proj.weight"]),
        "attention_norm.weight": FileWeight((hidden,), names=["input_layernorm.weight"]),
        "ffn_norm.weight": FileWeight((hidden,), names=["post_attention_layernorm.weight"]),
    }


def _rename(weights: dict[str, torch.Tensor], layout: Mapping[str, FileWeight]) -> dict[str, torch.Tensor]:
    """Moves weights to this library's names, in float32.

    Each weight is removed from `weights` before it is copied, so that memory holds no weight twice for long.
    """
    renamed: dict[str, torch.Tensor] = {}
    for file_name, file_weight in layout.items():
        weight = weights.pop(file_name).float()
        num_parts = len(file_weight.names)  # more than 1 for a weight that stacks several weights along its rows
        parts = weight.chunk(num_parts)
        for name, part in zip(file_weight.names, parts, strict=True):
            renamed[name] = part.clone()
    return renamed


def _join_embeddings(state_dict: dict[str, torch.Tensor], num_classes: int) -> None:
    """Joins the embeddings of a file, one for the codes and one for the classes, to one embedding of all tokens.

    The rows of the classes, and of the token for no condition, follow the rows of the codes. A model with captions has
    no embedding of classes. It reads features in place of these rows, so they may be zeros.
    """
    codes = state_dict[EMBEDDED]  # (codes, hidden)
    classes = state_dict.pop(CLASSES, None)  # (classes + 1, hidden)
    if classes is None:
        classes = codes.new_zeros(num_classes + 1, codes.shape[1])
    state_dict[EMBEDDED] = torch.cat([codes, classes])


def _find_grid_size(angles: Any, condition_tokens: int, grid_size: int | None, source: str | Path) -> int:
    """Rows and columns of ids, from the angles in a file or as they were passed.

    `angles` is what the file holds in their place: None, or any value that a pickle can hold.
    """
    has_rows = isinstance(angles, torch.Tensor) and angles.ndim > 0
    has_angles_of_ids = has_rows and len(angles) > condition_tokens
    if has_angles_of_ids:
        num_positions = len(angles)  # of the condition tokens, then of the ids
        stored_size = math.isqrt(num_positions - condition_tokens)
        if grid_size is not None and grid_size != stored_size:
            raise ValueError(f"`grid_size` must be {stored_size}, as `{ANGLES}` in `{source}` tells, got {grid_size}.")
        return stored_size
    if grid_size is None:
        raise ValueError(
            f"`{source}` does not state the size of its images. Pass `grid_size`, or the side in pixels to "
            "`svqvae convert` as `--image-size`. LlamaGen's file names end with the "
            "side: `grid_size` is 16 for 256 pixels, 24 for 384, 32 for 512."
        )
    return grid_size

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
# Names of weights in a file
CODES_IN_FILE = "tok_embeddings.weight"  # every such checkpoint has it
CLASSES_IN_FILE = "cls_embedding.embedding_table.weight"  # in models with classes
NO_CAPTION_IN_FILE = "cls_embedding.uncond_embedding"  # in models with captions
ANGLES_IN_FILE = "freqs_cis"  # a row for each position of a sequence, in files of older code
# Name in this library of the embedding of all tokens, which joins the embeddings of codes and classes
TOKEN_EMBEDDING = "model.embed_tokens.weight"
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
            f"`{source}` must be a checkpoint of a language model of LlamaGen, but has no `{CODES_IN_FILE}`, at "
            f"its top level or in {', '.join(CONTAINERS)}. Load a tokenizer with `SVQVAE.from_single_file`."
        )
    weights = select_weights(content, stored_weights, source, use_ema=use_ema)
    # The angles lie among the weights, but are not one. They are taken out before the weights are checked, because
    # they only tell the size of the grid.
    angles = weights.pop(ANGLES_IN_FILE, None)
    check_tensors(weights, source)
    sizes = _read_sizes(weights, source)
    layout = _layout(sizes)
    _check_shapes(weights, layout, source)
    config = dict(sizes)
    config["grid_size"] = _find_grid_size(angles, sizes["num_condition_tokens"], grid_size, source)
    config["num_attention_heads"] = num_attention_heads or _find_heads(sizes, source)
    state_dict = _rename(weights, layout)
    _join_embeddings(state_dict, sizes["num_classes"])
    return Checkpoint(
        source=str(source), path=path, use_ema=use_ema, format=LLAMAGEN, config=config, state_dict=state_dict
    )


def _check_shapes(weights: Mapping[str, torch.Tensor], layout: Mapping[str, FileWeight], source: str | Path) -> None:
    """Raises ValueError unless a file holds exactly the weights of a layout, by their names in the file."""
    expected_shapes = {name: torch.Size(file_weight.shape) for name, file_weight in layout.items()}
    check_weights(weights, expected_shapes, source)


def find_language_model(content: Mapping[str | None, Any]) -> dict[Any, Any] | None:
    """Returns the weights of a language model of LlamaGen from the content of its file, or None for other files."""
    candidates: list[Any] = [top_level_weights(content)]
    for name in CONTAINERS:
        candidates.append(content.get(name))
    for weights in candidates:
        if isinstance(weights, dict) and CODES_IN_FILE in weights:
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
    reads_captions = NO_CAPTION_IN_FILE in weights
    # A row per position of a caption, or a row per class
    condition = NO_CAPTION_IN_FILE if reads_captions else CLASSES_IN_FILE
    axes = {  # for each size, the name of a weight and the axis that has the size
        "codebook_size": (CODES_IN_FILE, 0),
        "hidden_size": (CODES_IN_FILE, 1),
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
    """Weights of a file with these sizes, by their names in the file.

    The embedding of the codes gets the name of the embedding of all tokens. The embedding of the classes keeps its
    name, because `_join_embeddings` will join both to one.
    """
    codes = sizes["codebook_size"]
    hidden = sizes["hidden_size"]
    layout = {  # shapes are (output channels, input channels), or (rows, channels) of an embedding
        CODES_IN_FILE: FileWeight((codes, hidden), names=[TOKEN_EMBEDDING]),
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
        layout[CLASSES_IN_FILE] = FileWeight((sizes["num_classes"] + 1, hidden), names=[CLASSES_IN_FILE])
        return layout
    projection = "cls_embedding.cap_proj"
    layout[f"{projection}.fc1.weight"] = FileWeight((hidden, caption_dim), names=["caption_projection.fc1.weight"])
    layout[f"{projection}.fc2.weight"] = FileWeight((hidden, hidden), names=["caption_projection.fc2.weight"])
    layout[NO_CAPTION_IN_FILE] = FileWeight((sizes["num_condition_tokens"], caption_dim), names=["uncond_embedding"])
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

    `state_dict` has the names that `_layout` gives the weights.

    The rows of the classes, and of the token for no condition, follow the rows of the codes. A model with captions has
    no embedding of classes. It reads features in place of these rows, so they may be zeros.
    """
    codes = state_dict[TOKEN_EMBEDDING]  # (codes, hidden)
    classes = state_dict.pop(CLASSES_IN_FILE, None)  # (classes + 1, hidden)
    if classes is None:
        classes = codes.new_zeros(num_classes + 1, codes.shape[1])
    state_dict[TOKEN_EMBEDDING] = torch.cat([codes, classes])


def _find_grid_size(angles: Any, num_condition_tokens: int, grid_size: int | None, source: str | Path) -> int:
    """Side of the square grid of ids, as the angles in a file tell it, or as the user passed it in `grid_size`."""
    stored_size = _grid_size_of_angles(angles, num_condition_tokens)
    if stored_size is None:
        return _passed_grid_size(grid_size, source)
    if grid_size is not None and grid_size != stored_size:
        raise ValueError(
            f"`grid_size` must be {stored_size}, as `{ANGLES_IN_FILE}` in `{source}` tells, got {grid_size}."
        )
    return stored_size


def _passed_grid_size(grid_size: int | None, source: str | Path) -> int:
    """Returns `grid_size`, which the user must pass if the file has none. Raises ValueError if it is missing."""
    if grid_size is None:
        raise ValueError(
            f"`{source}` does not state the size of its images. Pass `grid_size`, or the side in pixels to "
            "`svqvae convert` as `--image-size`. LlamaGen's file names end with the "
            "side: `grid_size` is 16 for 256 pixels, 24 for 384, 32 for 512."
        )
    return grid_size


def _grid_size_of_angles(angles: Any, num_condition_tokens: int) -> int | None:
    """Side of the square grid of ids that the angles of a file are for; `None` if they do not tell it.

    Angles have a row for each position: first for the condition tokens, then for the ids. For example, 1 + 256 rows
    are for a class and 16 x 16 ids.

    Args:
        angles: The value that the file holds as its angles, which nothing has checked; `None` if it holds none.
        num_condition_tokens (`int`): Number of positions of the condition.
    """
    has_rows = isinstance(angles, torch.Tensor) and angles.ndim > 0
    if not has_rows:
        return None
    num_ids = len(angles) - num_condition_tokens
    if num_ids < 1:
        return None
    return math.isqrt(num_ids)

"""Checkpoints of LlamaGen's language models, read as a config and weights."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from svqvae_hf.loaders.checkpoint_checks import check_tensors, check_weights, read_sizes, select_weights
from svqvae_hf.loaders.checkpoint_files import Checkpoint, load_checkpoint_file, locate_checkpoint
from svqvae_hf.loaders.checkpoint_formats import CheckpointFormat, count_numbers
from svqvae_hf.models.checks import check_depth

LLAMAGEN = CheckpointFormat("llamagen-transformer", "LlamaGen's language model", None, level_prefix="layers.")
EMBEDDING = "tok_embeddings.weight"  # every such checkpoint has it
EMBEDDED = "model.embed_tokens.weight"  # with the rows of classes, which lie apart in the file
CLASSES = "cls_embedding.embedding_table.weight"
CAPTION = "cls_embedding.uncond_embedding"
TABLE = "freqs_cis"  # angles, in files of older code
CONTAINERS = ("model", "module", "state_dict")  # keys of the weights in files of DDP, DeepSpeed and others

# Heads of the sizes that LlamaGen defines, by layers and channels: B, L, XL, XXL, XXXL, 1B, 3B, 7B.
HEADS = {
    **{(12, 768): 12, (24, 1024): 16, (36, 1280): 20, (48, 1536): 24, (48, 2560): 40},
    **{(22, 2048): 32, (24, 3200): 32, (32, 4096): 32},
}


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
    found = find_language_model(content)
    if found is None:
        raise ValueError(
            f"`{source}` must be a checkpoint of a language model of LlamaGen, but has no `{EMBEDDING}`, at "
            f"its top level or in {', '.join(CONTAINERS)}. Load a tokenizer with `SVQVAE.from_single_file`."
        )
    weights = select_weights(content, found, source, use_ema=use_ema)
    table = weights.pop(TABLE, None)
    check_tensors(weights, source)
    sizes = _read_sizes(weights, source)
    check_weights(weights, {name: torch.Size(shape) for name, (shape, _) in _layout(sizes).items()}, source)
    layers, hidden = sizes["num_hidden_layers"], sizes["hidden_size"]
    heads = num_attention_heads or HEADS.get((layers, hidden))
    if heads is None:
        raise ValueError(
            f"`{source}` has {layers} layers of {hidden} channels, which is not a size that LlamaGen defines, and "
            "does not state the number of heads, `n_head` in training. Pass `num_attention_heads`, or `--num-heads` "
            "to `svqvae convert`."
        )
    grid_size = _find_grid_size(table, sizes["num_condition_tokens"], grid_size, source)
    config = {**sizes, "grid_size": grid_size, "num_attention_heads": heads}
    return Checkpoint(str(source), path, use_ema, LLAMAGEN, config, _rename(weights, sizes))


def find_language_model(content: Mapping[str | None, Any]) -> dict[Any, Any] | None:
    """Returns the weights of a language model of LlamaGen from the content of its file, or None for other files."""
    for weights in (content, *(content.get(name) for name in (None, *CONTAINERS))):
        if isinstance(weights, dict) and EMBEDDING in weights:
            return weights
    return None


def _read_sizes(weights: Mapping[str, torch.Tensor], source: str | Path) -> dict[str, Any]:
    """Config values that are sizes of weights."""
    condition = CAPTION if CAPTION in weights else CLASSES
    axes = {
        "codebook_size": (EMBEDDING, 0),
        "hidden_size": (EMBEDDING, 1),
        "intermediate_size": ("layers.0.feed_forward.w1.weight", 0),
        "rows": (condition, 0),
        "channels": (condition, 1),
    }
    sizes = read_sizes(weights, axes, source)
    rows, channels = sizes.pop("rows"), sizes.pop("channels")
    with_captions = condition == CAPTION
    layers = count_numbers(weights, LLAMAGEN.level_prefix)
    check_depth(f"`{source}`", {"layers": layers})
    return {
        **sizes,
        "num_classes": 1 if with_captions else rows - 1,
        "num_condition_tokens": rows if with_captions else 1,
        "caption_dim": channels if with_captions else None,
        "num_hidden_layers": layers,
    }


def _layout(sizes: Mapping[str, Any]) -> dict[str, tuple[tuple[int, ...], list[str]]]:
    """Shape of each weight of a file with these sizes, and its name here, or the names of those that it stacks."""
    codes, hidden, inner = (sizes[name] for name in ("codebook_size", "hidden_size", "intermediate_size"))
    layer = {
        "attention.wqkv.weight": ((3 * hidden, hidden), [f"self_attn.{each}_proj.weight" for each in "qkv"]),
        "attention.wo.weight": ((hidden, hidden), ["self_attn.o_proj.weight"]),
        "feed_forward.w1.weight": ((inner, hidden), ["mlp.gate_proj.weight"]),
        "feed_forward.w3.weight": ((inner, hidden), ["mlp.up_proj.weight"]),
        "feed_forward.w2.weight": ((hidden, inner), ["mlp.down_proj.weight"]),
        "attention_norm.weight": ((hidden,), ["input_layernorm.weight"]),
        "ffn_norm.weight": ((hidden,), ["post_attention_layernorm.weight"]),
    }
    layout: dict[str, tuple[tuple[int, ...], list[str]]] = {
        EMBEDDING: ((codes, hidden), [EMBEDDED]),
        "norm.weight": ((hidden,), ["model.norm.weight"]),
        "output.weight": ((codes, hidden), ["lm_head.weight"]),
    }
    for index in range(sizes["num_hidden_layers"]):
        for name, (shape, ours) in layer.items():
            layout[f"layers.{index}.{name}"] = shape, [f"model.layers.{index}.{each}" for each in ours]
    if sizes["caption_dim"] is None:
        return layout | {CLASSES: ((sizes["num_classes"] + 1, hidden), [CLASSES])}
    return layout | {
        "cls_embedding.cap_proj.fc1.weight": ((hidden, sizes["caption_dim"]), ["caption_projection.fc1.weight"]),
        "cls_embedding.cap_proj.fc2.weight": ((hidden, hidden), ["caption_projection.fc2.weight"]),
        CAPTION: ((sizes["num_condition_tokens"], sizes["caption_dim"]), ["uncond_embedding"]),
    }


def _rename(weights: dict[str, torch.Tensor], sizes: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Moves weights to this library's names, in float32. Emptying `weights` holds each tensor in memory only once."""
    renamed: dict[str, torch.Tensor] = {}
    for name, (_, ours) in _layout(sizes).items():
        parts = weights.pop(name).float().chunk(len(ours))
        renamed |= {key: part.clone() for key, part in zip(ours, parts, strict=True)}
    codes = renamed[EMBEDDED]
    # The rows of classes and of no class follow the codes. With captions nothing reads them.
    classes = renamed.pop(CLASSES, codes.new_zeros(sizes["num_classes"] + 1, codes.shape[1]))
    return renamed | {EMBEDDED: torch.cat([codes, classes])}


def _find_grid_size(table: Any, condition_tokens: int, grid_size: int | None, source: str | Path) -> int:
    if isinstance(table, torch.Tensor) and table.ndim and table.shape[0] > condition_tokens:
        found = math.isqrt(table.shape[0] - condition_tokens)
        if grid_size not in (None, found):
            raise ValueError(f"`grid_size` must be {found}, as `{TABLE}` in `{source}` tells, got {grid_size}.")
        return found
    if grid_size is None:
        raise ValueError(
            f"`{source}` does not state the size of its images. Pass `grid_size`, or the side in pixels to "
            "`svqvae convert` as `--image-size`. LlamaGen's file names end with the "
            "side: `grid_size` is 16 for 256 pixels, 24 for 384, 32 for 512."
        )
    return grid_size

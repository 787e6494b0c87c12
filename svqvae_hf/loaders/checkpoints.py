"""Original checkpoints, local or on the Hub: read, checked, and made a model."""

import argparse
import hashlib
import pickle
import re
from collections.abc import Mapping, Set
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HTTPError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from svqvae_hf.hub.repositories import hub_reason, hub_repo
from svqvae_hf.loaders.checkpoint_formats import FAMILIES, Family, count_numbers
from svqvae_hf.untrusted.limits import MAX_BLOCKS, MAX_LEVELS
from svqvae_hf.untrusted.pickles import load_pickle

ModelT = TypeVar("ModelT", bound=nn.Module)

WEIGHT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
NORM_NUM_GROUPS = 32  # in all families

# Config values that are sizes of weights, with their axes.
CONFIG_AXES = {
    "in_channels": ("encoder.conv_in.weight", 1),
    "out_channels": ("decoder.conv_out.weight", 0),
    "base_channels": ("encoder.conv_in.weight", 0),
    "z_channels": ("encoder.conv_out.weight", 0),
    "codebook_size": ("quantize.embedding.weight", 0),
    "codebook_embed_dim": ("quantize.embedding.weight", 1),
}

# Beside weights and plain values a pickle may hold an `argparse.Namespace`, which only stores attributes. Lightning's
# files name callbacks by their classes, too: those names stand for empty classes of ours, so that such a file can be
# read, and still imports and runs nothing but torch's rebuilding of tensors.
SAFE_GLOBALS = (
    argparse.Namespace,
    type("ModelCheckpoint", (), {"__module__": "pytorch_lightning.callbacks.model_checkpoint"}),
    type("EarlyStopping", (), {"__module__": "pytorch_lightning.callbacks.early_stopping"}),
)


@dataclass(frozen=True)
class Checkpoint(Generic[ModelT]):
    """An original checkpoint, as a model of ours takes it.

    Args:
        source (`str`): As given.
        path (`Path`): The file, after a download if it is on the Hub.
        use_ema (`bool`): Whether the weights are the averaged ones.
        family ([`Family`]): Code base that it comes from.
        model_class (`type[nn.Module]`): Class of the model.
        config (`dict[str, Any]`): Arguments of its constructor.
        state_dict (`dict[str, torch.Tensor]`): Weights by our names, in float32.
    """

    source: str
    path: Path
    use_ema: bool
    family: Family
    model_class: type[ModelT]
    config: dict[str, Any]
    state_dict: dict[str, torch.Tensor]

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the file, in hexadecimal."""
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def model(self) -> ModelT:
        """The model, in evaluation mode."""
        model = self.model_class(**self.config)
        model.load_state_dict(self.state_dict)
        return model.eval()


def read_checkpoint(
    source: str | Path, model_class: type[ModelT], *, use_ema: bool = False, **config: Any
) -> Checkpoint[ModelT]:
    """Reads an original checkpoint, strictly; family and config come from its keys and shapes.

    The container and the keys tell the family: a safetensors file is `svqvae`; a pickle with `model` is `llamagen` if
    `args`, `ema` or `optimizer` stand beside it, else `flexvar` (whose config would be the same); one with
    `state_dict` is `lightning` or `taming`. Pickles are read as weights only: one with code in it is refused.

    Args:
        source (`str` or `Path`): Local file, or `org/repo:file` on the Hub.
        model_class (`type[nn.Module]`): Class that the config and the weights are for, [`SVQVAE`].
        use_ema (`bool`, defaults to `False`): Take the averaged weights, which LlamaGen's files may have.
        **config: Config values that replace those read from the file. What shapes cannot tell, the range of the
            images and whether the codebook is normalised, comes from the family.

    Returns:
        [`Checkpoint`]: Family, config and weights.

    Raises:
        OSError: If the file is not there, or not to be had from the Hub.
        ValueError: If it is broken, of no known family, or its weights are not exactly those that its config asks for.
    """
    path = _fetch(source)
    content = _read(path, source)
    family = _find_family(content, source)
    weights = content[family.container]
    if use_ema:
        weights = content.get("ema")
        if not isinstance(weights, dict):
            raise ValueError(
                f"`{source}` must hold averaged weights (`ema`) for `use_ema`, but has none. Leave it out."
            )
    weights = {_text(key): value for key, value in weights.items()}
    weights = {key: value for key, value in weights.items() if not key.startswith(family.training_keys)}
    not_tensors = {key for key, value in weights.items() if not isinstance(value, torch.Tensor)}
    not_dense = {key for key in weights.keys() - not_tensors if not _is_dense(weights[key])}
    _refuse(source, {"not tensors": not_tensors, "not dense": not_dense})
    num_levels = count_numbers(weights, family.levels)
    _check_depth(family, weights, num_levels, source)
    _check_attention(family, weights, num_levels, source)
    config = {**_infer_config(family, weights, num_levels, source), **config}
    try:
        with torch.device("meta"):
            expected = model_class(**config).state_dict()
    except ValueError as error:
        sizes = ", ".join(f"{key} {config[key]} from {weight}" for key, (weight, _) in CONFIG_AXES.items())
        raise ValueError(f"`{source}` must have the shapes of an SVQVAE, but gives {sizes}: {error}") from error
    original_names = {key: family.original_name(key, num_levels) for key in expected}
    _check_weights(weights, {name: expected[key].shape for key, name in original_names.items()}, source)
    state_dict = {key: weights[name].detach().float() for key, name in original_names.items()}
    return Checkpoint(str(source), path, use_ema, family, model_class, config, state_dict)


def _fetch(source: str | Path) -> Path:
    if Path(source).is_file():
        return Path(source)
    if Path(source).is_dir():
        raise IsADirectoryError(
            f"`{source}` must be a checkpoint file, but is a folder. Name the file in it; a folder with config.json "
            "is for `SVQVAE.from_pretrained`."
        )
    repo_id = hub_repo(source)
    if repo_id is None:
        raise FileNotFoundError(f"There is no file `{source}`. Pass an existing one, or `org/repo:file` on the Hub.")
    try:
        return Path(hf_hub_download(repo_id, str(source).removeprefix(f"{repo_id}:")))
    except (HTTPError, EntryNotFoundError, OSError) as error:
        raise OSError(f"`{source}` cannot be had from the Hub: {hub_reason(error)}") from error


def _read(path: Path, source: str | Path) -> dict[str | None, Any]:
    """Content of a file: a pickled dict, or `{None: weights}` of a safetensors file."""
    if path.suffix.lower() == ".safetensors":
        try:
            return {None: load_file(path)}
        except SafetensorError as error:
            raise ValueError(
                f"`{source}` must be a whole safetensors file, as its name says, but is not: {error}. Download it "
                "again."
            ) from error
    try:
        content = load_pickle(path, SAFE_GLOBALS)
    except OSError:
        raise
    except Exception as error:  # a broken pickle makes the reader raise almost anything
        code = re.search(r"GLOBAL (\S+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
        if code is not None:
            raise ValueError(
                f"`{source}` must hold weights only, but is a pickle that calls for `{code[1]}`, which could run any "
                "code or take any memory. Ask for a safetensors file, or, where it was made, save the weights alone: "
                '`torch.save({"state_dict": ...}, file)`.'
            ) from None
        raise ValueError(
            f"`{source}` must be a whole PyTorch checkpoint that holds weights only, but cannot be read as one; it "
            "may be empty, cut short, compressed, of another format, or a pickle with code in it. Download it again, "
            "or ask for a safetensors file."
        ) from error
    return content if isinstance(content, dict) else {}


def _find_family(content: Mapping[str | None, Any], source: str | Path) -> Family:
    for family in FAMILIES:
        if family.holds(content):
            return family
    looked_for = "; ".join(
        f"{family.name}: `{family.levels}0.*` "
        + ("in a .safetensors file" if family.container is None else f"in `{family.container}`")
        + (f" beside {' or '.join(sorted(family.beside))}" if family.beside else "")
        for family in FAMILIES
    )
    keys = sorted(_text(key) for key in content.get(None, content))
    raise ValueError(
        f"`{source}` is a checkpoint of no known family. Looked for {looked_for}. Found {', '.join(keys[:5])}"
        f"{' and others' if keys[5:] else '' if keys else 'no keys'}."
    )


def _check_depth(family: Family, weights: Mapping[str, Any], num_levels: int, source: str | Path) -> None:
    blocks = 0
    if num_levels <= MAX_LEVELS:
        blocks = count_numbers(weights, family.original_name("encoder.conv_blocks.0.res.", num_levels))
    if num_levels > MAX_LEVELS or blocks > MAX_BLOCKS:
        raise ValueError(
            f"`{source}` must have at most {MAX_LEVELS} levels and {MAX_BLOCKS} residual blocks a level, but has "
            f"{num_levels} levels{f' and {blocks} blocks' if blocks else ''}. It is no SVQVAE."
        )


def _check_attention(family: Family, weights: Mapping[str, Any], num_levels: int, source: str | Path) -> None:
    allowed = {"encoder": num_levels - 1, "decoder": 0}
    elsewhere = sorted(
        prefix
        for network, lowest in allowed.items()
        for level in range(num_levels)
        if level != lowest
        and count_numbers(weights, prefix := family.original_name(f"{network}.conv_blocks.{level}.attn.", num_levels))
    )
    if elsewhere:
        raise ValueError(
            f"`{source}` must have attention at the lowest resolution only, as every SVQVAE, but also has "
            f"{', '.join(f'{prefix}*' for prefix in elsewhere)}. It cannot be converted."
        )


def _infer_config(family: Family, weights: Mapping[str, Any], num_levels: int, source: str | Path) -> dict[str, Any]:
    level_keys = {
        network: [f"{network}.conv_blocks.{level}.res.0.conv1.weight" for level in range(num_levels)]
        for network in ("encoder", "decoder")
    }
    level_keys["decoder"].reverse()  # the decoder's first level is the lowest resolution
    keys = [*(key for key, _ in CONFIG_AXES.values()), *level_keys["encoder"], *level_keys["decoder"]]
    names = {key: family.original_name(key, num_levels) for key in keys}
    _refuse(
        source,
        {
            "missing": {name for name in names.values() if name not in weights},
            "misshapen": {
                f"{name} {tuple(weights[name].shape)}"
                for name in names.values()
                if name in weights and (weights[name].ndim < 2 or 0 in weights[name].shape)
            },
        },
    )
    sizes = {key: weights[names[weight]].shape[axis] for key, (weight, axis) in CONFIG_AXES.items()}
    channels = {network: [weights[names[key]].shape[0] for key in keys] for network, keys in level_keys.items()}
    base_channels = sizes["base_channels"]
    _refuse(
        source,
        {
            f"not of {base_channels} channels, as {names['encoder.conv_in.weight']}, or a multiple": {
                f"{names[key]} {tuple(weights[names[key]].shape)}"
                for network, keys in level_keys.items()
                for key, number in zip(keys, channels[network], strict=True)
                if number % base_channels
            }
        },
    )
    return {
        **sizes,
        "encoder_ch_mult": tuple(number // base_channels for number in channels["encoder"]),
        "decoder_ch_mult": tuple(number // base_channels for number in channels["decoder"]),
        "num_res_blocks": count_numbers(weights, family.original_name("encoder.conv_blocks.0.res.", num_levels)),
        "norm_num_groups": NORM_NUM_GROUPS,
        "codebook_l2_norm": family.codebook_l2_norm,
        "network_range": family.network_range,
    }


def _text(key: Any) -> str:
    """A key of a pickled dict, which may be anything; a nest of tuples may have a text as large as the memory."""
    return key if isinstance(key, str) else f"a key of type {type(key).__name__}"


def _is_dense(tensor: torch.Tensor) -> bool:
    """Whether each element has data of its own: a small file can claim any shape by sparse or expanded tensors."""
    return (
        tensor.layout == torch.strided
        and not tensor.is_nested
        and not tensor.is_meta
        and tensor.untyped_storage().nbytes() >= tensor.numel() * tensor.itemsize
    )


def _check_weights(weights: Mapping[str, torch.Tensor], shapes: Mapping[str, torch.Size], source: str | Path) -> None:
    known = {name: weights[name] for name in shapes if name in weights}
    misshapen = {name for name, tensor in known.items() if tensor.shape != shapes[name]}
    odd = {name for name, tensor in known.items() if tensor.dtype not in WEIGHT_DTYPES}
    _refuse(
        source,
        {
            "missing": shapes.keys() - weights.keys(),
            "unexpected": weights.keys() - shapes.keys(),
            "misshapen": {f"{name} {tuple(known[name].shape)} instead of {tuple(shapes[name])}" for name in misshapen},
            "not float32, float16 or bfloat16": {f"{name} {known[name].dtype}" for name in odd},
            "not finite": {name for name in known.keys() - misshapen - odd if not known[name].isfinite().all()},
        },
    )


def _refuse(source: str | Path, faults: Mapping[str, Set[str]]) -> None:
    """Raises if there are faults: all of them, by kind, sorted."""
    found = "; ".join(
        f"{kind}{f' ({len(names)})' if len(names) > 1 else ''}: {', '.join(sorted(names))}"
        for kind, names in faults.items()
        if names
    )
    if found:
        raise ValueError(
            f"`{source}` must hold exactly the weights that its config asks for, but there are {found}. Restore the "
            "file; config values that replace those read from it must fit it, too."
        )

"""Describes a model, pipeline, LoRA adapter, checkpoint, token file or token set.

Of a token set that is not complete, prints which parts are missing.

  svqvae info photo.safetensors
"""

import argparse
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from svqvae_cli.arguments import Parser, bundled_folder, path_or_url
from svqvae_cli.errors import one_line
from svqvae_cli.files import check_source, check_trained, is_token_set_folder
from svqvae_files.file_names import IMAGE_SUFFIXES, REPO_ID
from svqvae_files.inputs import is_url
from svqvae_files.json_files import read_json_object

ADAPTER_FILE = "adapter_config.json"
ADAPTER_FACTS = ("base_model_name_or_path", "r", "lora_alpha", "target_modules")


def add_arguments(parser: Parser) -> None:
    """Adds the arguments."""
    path_help = "model, pipeline, LoRA adapter, checkpoint, token file, or folder or URL of a token set"
    parser.option("path", _path, "PATH", path_help)


def _path(text: str) -> str:
    """Reads a path, a URL, or a name on the Hub or of a bundled model."""
    return bundled_folder(path_or_url(text))


def run(args: argparse.Namespace) -> None:
    """Prints facts about a model, a pipeline, an original checkpoint, token files or a token set."""
    facts = _facts(args.path)
    lines = {}
    for name, value in facts.items():
        lines[one_line(name)] = one_line(str(value))
    width = max(len(name) for name in lines)
    for name, value in lines.items():
        print(f"{name:<{width}}  {value}")


def _facts(source: str) -> dict[str, Any]:
    """Facts by their names, in the order in which they are printed."""
    path = Path(source)
    if is_url(source):
        return _set_facts(source)
    if path.is_dir():
        return _folder_facts(path)
    if path.exists():
        return _file_facts(path)
    if re.fullmatch(f"{REPO_ID}:.+", source):
        return _checkpoint_facts(source)
    try:
        check_source(source)  # raises unless it is a name on the Hub
    except ValueError as error:
        raise ValueError(
            f"If `{source}` is a token set, no part of it has begun. If it is a model, {error}"
        ) from error
    return _model_facts(source)


def _folder_facts(path: Path) -> dict[str, Any]:
    """Facts about a folder with a token set, an adapter, a model or a pipeline."""
    if is_token_set_folder(path):
        return _set_facts(str(path))
    if (path / ADAPTER_FILE).is_file():
        return _adapter_facts(path / ADAPTER_FILE)
    check_trained(str(path))
    has_config = any(path.glob("*.json"))
    if not has_config:
        raise ValueError(f"`{path}` holds no model and no token set. info describes these, and files of tokens.")
    return _model_facts(str(path))


def _adapter_facts(config_file: Path) -> dict[str, Any]:
    config = read_json_object(config_file)
    facts: dict[str, Any] = {"kind": "LoRA adapter"}
    for name in ADAPTER_FACTS:
        facts[name] = config.get(name)
    return facts


def _file_facts(path: Path) -> dict[str, Any]:
    """Facts about a token file or an original checkpoint."""
    from svqvae_hf.tokens.token_files import is_compressed, is_token_file

    is_regular = path.is_file()  # unlike a pipe, which cannot be read twice
    if is_regular and is_compressed(path):
        return _compressed_file_facts(path)
    if is_regular and is_token_file(path):
        return _token_file_facts(path)
    if path.suffix.lower() in IMAGE_SUFFIXES:
        raise ValueError(f"info describes models and tokens, got the image `{path}`. Encode it with `svqvae encode`.")
    return _checkpoint_facts(str(path))


def _compressed_file_facts(path: Path) -> dict[str, Any]:
    from svqvae_hf.tokens.token_files import load_compressed

    compressed = load_compressed(path)
    facts = {"kind": "compressed token file", "context model": f"sha256 {compressed.fingerprint}..."}
    bits_per_scale = [8.0 * len(chunk) for chunk in compressed.chunks]
    return facts | _image_facts(compressed.record, bits_per_scale)


def _token_file_facts(path: Path) -> dict[str, Any]:
    """Facts about a token file that is not compressed. All ids of its codebook count as equally likely."""
    from svqvae_hf.tokens.token_files import load_tokens

    tokens = load_tokens(path)
    bits_per_id = math.log2(tokens.codebook_size)
    bits_per_scale = [ids.numel() * bits_per_id for ids in tokens.ids]
    facts = {"kind": "token file", "codebook": _codebook(tokens)}
    return facts | _image_facts(tokens.to_record(), bits_per_scale)


def _image_facts(record: Mapping[str, Any], bits_per_scale: Sequence[float]) -> dict[str, Any]:
    """Facts about the image of a token file.

    Args:
        record (`Mapping[str, Any]`): All values of the file but the ids, from [`ImageTokens.to_record`].
        bits_per_scale (`Sequence[float]`): Bits of all ids at each scale.
    """
    from svqvae_hf.models.resizing import grid_shape

    height = record["height"]
    width = record["width"]
    downsampling = record["f"]
    facts = {
        "image": f"{width} x {height} pixels (width x height)",
        "f": downsampling,
        "tiles": _tiles(record["tile_size"], record["overlap"]),
    }
    is_resized = any(scale != 1 for scale in record["scales"])
    if is_resized:
        facts["scales from"] = record["scale_from"]
    for scale, bits in zip(record["scales"], bits_per_scale, strict=True):
        rows, columns = grid_shape(height, width, downsampling, scale)
        num_tokens = rows * columns
        rates = f"{bits / num_tokens:.2f} bits/token, {bits / (height * width):.4f} bits/pixel"
        facts[f"scale {scale:g}"] = f"{columns} x {rows} = {num_tokens:,} tokens, {rates}"
    return facts


def _set_facts(source: str) -> dict[str, Any]:
    """Facts about a token set in a folder or at a URL: its rows and settings, or its parts if it is not complete."""
    from svqvae_files.folders import Folder
    from svqvae_hf.token_sets.classes import describe_classes
    from svqvae_hf.token_sets.manifest import TokenSet
    from svqvae_hf.token_sets.parts import describe_state, read_totals

    facts: dict[str, Any] = {"kind": "token set"}
    facts |= describe_state(source)  # raises if a file of a complete set is missing, cut or foreign
    totals = read_totals(Folder(source))
    if totals is None:  # the set is not complete
        return facts
    facts["rows"] = totals.get("rows")
    facts["ids"] = totals.get("ids")
    facts["Parquet files"] = totals.get("files")
    token_set = TokenSet(source)
    for column, classes in describe_classes(token_set.features).items():
        facts[f"classes of {column}"] = classes
    settings = token_set.settings
    facts["model"] = settings.model
    facts["crops"] = settings.crops
    facts["resolution"] = settings.resolution or "of the images"
    facts["scales"] = ", ".join(f"{scale:g}" for scale in settings.scales)
    facts["scales from"] = settings.scale_from
    facts["f"] = settings.f  # pixels per id, along each side
    facts["tiles"] = _tiles(settings.tile_size, settings.overlap)
    facts["codebook"] = _codebook(settings)
    return facts


def _tiles(tile_size: int | None, overlap: int | None) -> str:
    """Tiles that ids were encoded with."""
    if tile_size is None:
        return "none"
    return f"{tile_size} pixels, overlap {overlap}"


def _codebook(tokens: Any) -> str:
    """Codebook of a token file or a token set."""
    return f"{tokens.codebook_size} codes, sha256 {tokens.codebook_fingerprint}"


def _checkpoint_facts(source: str) -> dict[str, Any]:
    from svqvae_hf import SVQVAE
    from svqvae_hf.loaders.checkpoints import read_checkpoint

    checkpoint = read_checkpoint(source, SVQVAE)
    return {"kind": f"original checkpoint, {checkpoint.format.title}"} | checkpoint.config


def _model_facts(source: str) -> dict[str, Any]:
    """Config values of a model or pipeline, by their own names."""
    from svqvae_cli.loading import load_model
    from svqvae_hf import SVQVAE

    config = _load_config(source)
    facts = {"kind": _class_of_config(config)}
    if facts["kind"] == SVQVAE.__name__:
        model = load_model(source, "cpu", "float32")
        facts["parameters"] = f"{model.num_parameters():,}"
        facts["f"] = model.f
        facts["codebook sha256"] = model.codebook_fingerprint()
        config = model.config
    for name, value in config.items():
        is_private = name.startswith("_")
        is_absent = value in (None, [None, None])  # a pipeline lacks a component whose class is [None, None]
        if not is_private and not is_absent:
            facts[name] = value
    return facts


def _load_config(source: str) -> Mapping[str, Any]:
    """Config of a model, or the index of a pipeline."""
    from svqvae_cli.loading import explain_loading
    from svqvae_hf import SVQVAE
    from svqvae_hf.hub.repositories import from_hub
    from svqvae_hf.pipelines.repository_index import read_index

    with explain_loading(source):
        try:
            config = read_index(source)
        except OSError:  # no model_index.json
            config = from_hub(SVQVAE.load_config, source)
    if not isinstance(config, Mapping):
        raise ValueError(f"the config of `{source}` must be a JSON object, got a {type(config).__name__}.")
    return config


def _class_of_config(config: Mapping[str, Any]) -> str:
    """Name of the class in a config of diffusers or transformers."""
    class_name = config.get("_class_name")
    if class_name:
        return str(class_name)
    architectures = config.get("architectures")
    if isinstance(architectures, list) and architectures:
        return str(architectures[0])
    return "unknown model"

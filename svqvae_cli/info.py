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

from svqvae_cli.arguments import Parser, path_or_url
from svqvae_cli.errors import one_line
from svqvae_cli.files import check_source
from svqvae_files.file_names import IMAGE_SUFFIXES, REPO_ID, TOKEN_SET_FILE
from svqvae_files.inputs import find_bundled, is_url
from svqvae_files.json_files import read_json_object

ADAPTER_FILE = "adapter_config.json"
ADAPTER_FACTS = ("base_model_name_or_path", "r", "lora_alpha", "target_modules")


def add_arguments(parser: Parser) -> None:
    """Adds the arguments."""
    help = "model, pipeline, LoRA adapter, checkpoint, token file, or folder or URL of a token set"
    parser.option("path", lambda text: find_bundled(path_or_url(text)), "PATH", help)


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
    check_source(source)
    return _model_facts(source)


def _folder_facts(path: Path) -> dict[str, Any]:
    is_started_set = (path / "parts" / "options.json").is_file()
    if (path / TOKEN_SET_FILE).is_file() or is_started_set:
        return _set_facts(str(path))
    if (path / ADAPTER_FILE).is_file():
        config = read_json_object(path / ADAPTER_FILE)
        facts: dict[str, Any] = {"kind": "LoRA adapter"}
        for name in ADAPTER_FACTS:
            facts[name] = config.get(name)
        return facts
    if not list(path.glob("*.json")):
        raise ValueError(f"`{path}` holds no model and no token set. info describes these, and files of tokens.")
    return _model_facts(str(path))


def _file_facts(path: Path) -> dict[str, Any]:
    from svqvae_hf.tokens.token_files import is_compressed, is_token_file

    if path.is_file():
        if is_compressed(path):
            return _compressed_file_facts(path)
        if is_token_file(path):
            return _token_file_facts(path)
    if path.suffix.lower() in IMAGE_SUFFIXES:
        raise ValueError(f"info describes models and tokens, got the image `{path}`. Encode it with `svqvae encode`.")
    return _checkpoint_facts(str(path))


def _compressed_file_facts(path: Path) -> dict[str, Any]:
    from svqvae_hf.tokens.token_files import load_compressed

    compressed = load_compressed(path)
    facts = {"kind": "compressed token file", "context model": f"sha256 {compressed.fingerprint}..."}
    bits = [8.0 * len(chunk) for chunk in compressed.chunks]
    return facts | _image_facts(compressed.record, bits)


def _token_file_facts(path: Path) -> dict[str, Any]:
    from svqvae_hf.tokens.token_files import load_tokens

    tokens = load_tokens(path)
    bits_per_id = math.log2(tokens.codebook_size)
    bits = [ids.numel() * bits_per_id for ids in tokens.ids]
    facts = {"kind": "token file", "codebook": _codebook(tokens)}
    return facts | _image_facts(vars(tokens), bits)


def _image_facts(record: Mapping[str, Any], bits: Sequence[float]) -> dict[str, Any]:
    """Facts about the image of a token file.

    Args:
        record (`Mapping[str, Any]`): Values of the file.
        bits (`Sequence[float]`): Bits of all its ids, per scale.
    """
    from svqvae_hf.models.resizing import grid_shape

    height = record["height"]
    width = record["width"]
    f = record["f"]
    facts = {"image": f"{width} x {height} pixels (width x height)", "f": f, "tiles": _tiles(record)}
    if any(scale != 1 for scale in record["scales"]):  # at scale 1 nothing is resized
        facts["scales from"] = record["scale_from"]
    for scale, bits_at_scale in zip(record["scales"], bits, strict=True):
        rows, columns = grid_shape(height, width, f, scale)
        per_token = bits_at_scale / (rows * columns)
        per_pixel = bits_at_scale / (height * width)
        rates = f"{per_token:.2f} bits/token, {per_pixel:.4f} bits/pixel"
        facts[f"scale {scale:g}"] = f"{columns} x {rows} = {rows * columns:,} tokens, {rates}"
    return facts


def _set_facts(source: str) -> dict[str, Any]:
    from svqvae_files.folders import Folder
    from svqvae_hf.token_sets.parts import describe_state, read_totals
    from svqvae_hf.token_sets.settings import read_settings

    folder = Folder(source)
    state = describe_state(source)  # raises if a file is missing, cut or foreign
    if folder.read(TOKEN_SET_FILE) is None:
        return {"kind": "token set", **state}
    settings = read_settings(source)
    totals = read_totals(folder) or {}
    return {
        "kind": "token set",
        "rows": totals.get("rows"),
        "ids": totals.get("ids"),
        "Parquet files": totals.get("files"),
        "model": settings.model,
        "crops": settings.crops,
        "resolution": settings.resolution or "of the images",
        "scales": ", ".join(f"{scale:g}" for scale in settings.scales),
        "scales from": settings.scale_from,
        "f": settings.f,
        "tiles": _tiles(vars(settings)),
        "codebook": _codebook(settings),
    }


def _tiles(record: Mapping[str, Any]) -> str:
    if record["tile_size"] is None:
        return "none"
    return f"{record['tile_size']} pixels, overlap {record['overlap']}"


def _codebook(tokens: Any) -> str:
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
        is_absent = value in (None, [None, None])  # the second stands for a component that a pipeline lacks
        if not name.startswith("_") and not is_absent:
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
    architectures = config.get("architectures")
    if config.get("_class_name"):
        return str(config["_class_name"])
    if isinstance(architectures, list) and architectures:
        return str(architectures[0])
    return "unknown model"

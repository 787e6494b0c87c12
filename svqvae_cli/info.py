"""Describes a model, pipeline, LoRA adapter, checkpoint, token file or token set.

Of a token set that is not complete, prints which parts are missing.

  svqvae info photo.safetensors
"""

import argparse
import json
import math
import re
from pathlib import Path
from typing import Any

from svqvae_cli.arguments import Parser, not_empty
from svqvae_cli.errors import one_line
from svqvae_cli.files import check_source
from svqvae_files.file_names import IMAGE_SUFFIXES, REPO_ID
from svqvae_files.inputs import find_bundled

ADAPTER_FACTS = ("base_model_name_or_path", "r", "lora_alpha", "target_modules")


def add_arguments(parser: Parser) -> None:
    """Adds the arguments."""
    help = "model, pipeline, LoRA adapter, checkpoint, token file, or folder or URL of a token set"
    parser.option("path", lambda text: find_bundled(not_empty(text)), "PATH", help)


def run(args: argparse.Namespace) -> None:
    """Prints facts about a model, a pipeline, an original checkpoint, token files or a token set."""
    path, is_url = Path(args.path), "://" in args.path
    is_hub_file = re.fullmatch(f"{REPO_ID}:.+", args.path)
    if not (path.exists() or is_url or is_hub_file):
        check_source(args.path)
    if path.is_dir() and not [*path.glob("*.json"), *path.glob("parts/options.json")]:
        raise ValueError(f"`{path}` holds no model and no token set. info describes these, and files of tokens.")
    from svqvae_hf import SVQVAE
    from svqvae_hf.loaders.checkpoints import read_checkpoint
    from svqvae_hf.token_sets.parts import OPTIONS_FILE
    from svqvae_hf.token_sets.settings import SETTINGS_FILE
    from svqvae_hf.tokens.token_files import is_compressed, is_token_file

    if is_url or (path / SETTINGS_FILE).is_file() or (path / OPTIONS_FILE).is_file():
        facts = _set_facts(args.path)
    elif path.is_file() and (is_compressed(path) or is_token_file(path)):
        facts = _file_facts(path)
    elif path.suffix.lower() in IMAGE_SUFFIXES:
        raise ValueError(f"info describes models and tokens, got the image `{path}`. Encode it with `svqvae encode`.")
    elif (path / "adapter_config.json").is_file():
        config = json.loads((path / "adapter_config.json").read_text())
        facts = {"kind": "LoRA adapter"} | {name: config.get(name) for name in ADAPTER_FACTS}
    elif path.is_file() or is_hub_file:
        checkpoint = read_checkpoint(args.path, SVQVAE)
        facts = {"kind": f"original checkpoint, {checkpoint.format.title}", **checkpoint.config}
    else:
        facts = _model_facts(args.path)
    facts = {one_line(name): one_line(str(value)) for name, value in facts.items()}
    width = max(map(len, facts))
    print(*(f"{name:<{width}}  {value}" for name, value in facts.items()), sep="\n")


def _file_facts(path: Path) -> dict[str, Any]:
    from svqvae_hf.models.resizing import grid_shape
    from svqvae_hf.tokens.token_files import is_compressed, load_compressed, load_tokens

    if is_compressed(path):
        compressed = load_compressed(path)
        record, bits = compressed.record, [8.0 * len(chunk) for chunk in compressed.chunks]
        origin = {"kind": "compressed token file", "context model": f"sha256 {compressed.fingerprint}..."}
    else:
        tokens = load_tokens(path)
        record, bits = vars(tokens), [ids.numel() * math.log2(tokens.codebook_size) for ids in tokens.ids]
        origin = {"kind": "token file", "codebook": _codebook(tokens)}
    height, width, f = (record[name] for name in ("height", "width", "f"))
    facts = {**origin, "image": f"{width} x {height} pixels (width x height)", "f": f}
    facts["tiles"] = _tiles(record)
    if set(record["scales"]) != {1}:  # at scale 1 nothing is resized
        facts["scales from"] = record["scale_from"]
    for scale, size in zip(record["scales"], bits, strict=True):
        rows, columns = grid_shape(height, width, f, scale)
        rates = f"{size / (rows * columns):.2f} bits/token, {size / (height * width):.4f} bits/pixel"
        facts[f"scale {scale:g}"] = f"{columns} x {rows} = {rows * columns:,} tokens, {rates}"
    return facts


def _set_facts(source: str) -> dict[str, Any]:
    from svqvae_files.folders import Folder
    from svqvae_hf.token_sets.parts import describe_state, read_totals
    from svqvae_hf.token_sets.settings import SETTINGS_FILE, read_settings

    folder = Folder(source)
    if folder.read(SETTINGS_FILE) is None:
        return {"kind": "token set", **describe_state(source)}
    settings, totals = read_settings(source), read_totals(folder) or {}
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


def _tiles(record: dict[str, Any]) -> str:
    return f"{record['tile_size']} pixels, overlap {record['overlap']}" if record["tile_size"] else "none"


def _codebook(tokens: Any) -> str:
    return f"{tokens.codebook_size} codes, sha256 {tokens.codebook_fingerprint}"


def _model_facts(source: str) -> dict[str, Any]:
    """Config values of a model or pipeline, by their own names."""
    from svqvae_cli.loading import explain_loading, load_model
    from svqvae_hf import SVQVAE
    from svqvae_hf.hub.repositories import from_hub
    from svqvae_hf.pipelines.repository_index import read_index

    check_source(source)
    with explain_loading(source):
        try:
            config = read_index(source)
        except OSError:  # no model_index.json
            config = from_hub(SVQVAE.load_config, source)
    facts = {"kind": config.get("_class_name") or (config.get("architectures") or ["unknown model"])[0]}
    if facts["kind"] == SVQVAE.__name__:
        model = load_model(source, "cpu", "float32")
        facts |= {"parameters": f"{model.num_parameters():,}", "f": model.f}
        facts["codebook sha256"] = model.codebook_fingerprint()
        config = model.config
    # [None, None] stands for a component that a pipeline lacks
    return facts | {key: each for key, each in config.items() if key[0] != "_" and each not in (None, [None, None])}

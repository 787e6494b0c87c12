"""`svqvae info`."""

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from svqvae_cli.arguments import Commands, add_command, option, path_or_name
from svqvae_cli.files import REPO_ID, check_source, search_folder

if TYPE_CHECKING:
    from svqvae_hf import SVQVAE
    from svqvae_hf.token_sets.settings import TokenSettings
    from svqvae_hf.tokens.compressed_tokens import CompressedTokens
    from svqvae_hf.tokens.image_tokens import TokenOrigin
    from svqvae_hf.tokens.token_files import ImageTokens


GENERATORS = ("language_model", "transformer")  # components of pipelines


def add_to(commands: Commands) -> None:
    """Adds the command and its arguments."""
    summary = "describe a model, pipeline, original checkpoint, token files or token set"
    parser = add_command(commands, "info", run, summary, "", "photo.safetensors")
    option(
        parser,
        "path",
        path_or_name,
        "PATH",
        "model, pipeline, checkpoint, token file, or folder of token files or a token set",
    )


def run(args: argparse.Namespace) -> None:
    """Prints facts about a model, a pipeline, an original checkpoint, token files or a token set."""
    path = Path(args.path)
    if not path.exists() and not re.fullmatch(f"{REPO_ID}(:.+)?", args.path):
        check_source(args.path)
    from svqvae_hf import SVQVAE
    from svqvae_hf.files.folders import Folder
    from svqvae_hf.loaders.checkpoints import read_checkpoint
    from svqvae_hf.models.image_processing_svqvae import IMAGE_SUFFIXES
    from svqvae_hf.token_sets.parts import read_totals
    from svqvae_hf.token_sets.settings import SETTINGS_FILE, read_settings
    from svqvae_hf.tokens.token_files import is_compressed, is_token_file, load_compressed, load_tokens

    if path.is_file() and is_compressed(path):
        facts = _compressed_facts(load_compressed(path))
    elif is_token_file(path):
        facts = _token_facts(load_tokens(path))
    elif path.is_dir() and (token_files := [*filter(is_token_file, search_folder(path, [".safetensors"]))]):
        facts = _folder_facts([load_tokens(file) for file in token_files])
    elif (path / SETTINGS_FILE).is_file():
        facts = _set_facts(read_settings(path), read_totals(Folder(path)) or {})
    elif path.suffix.lower() in IMAGE_SUFFIXES:
        raise ValueError(f"info describes models and tokens, got the image `{path}`. Encode it with `svqvae encode`.")
    elif path.is_file() or re.fullmatch(f"{REPO_ID}:.+", args.path):
        checkpoint = read_checkpoint(args.path, SVQVAE)
        facts = {"kind": f"original checkpoint, {checkpoint.format.title}", **checkpoint.config}
    else:
        facts = _folder_or_hub_facts(args.path)
    width = max(map(len, facts))
    for name, value in facts.items():
        print(f"{name:<{width}}  {value}")


def _token_facts(tokens: "ImageTokens") -> dict[str, Any]:
    from svqvae_hf.evaluation.reconstruction_table import token_count

    latents = max(-(-max(tokens.height, tokens.width) // tokens.f), *(max(ids.shape) for ids in tokens.ids))
    tiled = tokens.tile_size is not None and latents * tokens.f > tokens.tile_size
    facts = {
        "kind": "token file",
        "image": f"{tokens.width} x {tokens.height} pixels (width x height)",
        "f": tokens.f,
        "tiles": f"{tokens.tile_size} pixels, overlap {tokens.overlap}" if tiled else "none",
        "codebook": _codebook(tokens),
    }
    if set(tokens.scales) != {1}:
        facts["scales from"] = tokens.scale_from
    for index, (ids, scale) in enumerate(zip(tokens.ids, tokens.scales, strict=True)):
        grid = f"{ids.shape[1]} x {ids.shape[0]} = {token_count(ids.numel())}"
        facts[f"scale {scale:g}"] = f"{grid}, {tokens.bits_per_pixel(index):.4f} bits/pixel"
    return facts


def _compressed_facts(compressed: "CompressedTokens") -> dict[str, Any]:
    from svqvae_hf.models.image_processing_svqvae import grid_shape

    height, width, f = (compressed.record[name] for name in ("height", "width", "f"))
    facts = {
        "kind": "compressed token file",
        "image": f"{width} x {height} pixels (width x height)",
        "f": f,
        "context model": f"sha256 {compressed.fingerprint}...",
    }
    for scale, chunk in zip(compressed.record["scales"], compressed.chunks, strict=True):
        rows, columns = grid_shape(height, width, f, scale)
        bits = 8 * len(chunk)
        rates = f"{bits / (rows * columns):.2f} bits/token, {bits / (height * width):.4f} bits/pixel"
        facts[f"scale {scale:g}"] = f"{columns} x {rows} tokens, {rates}"
    return facts


def _folder_facts(files: "list[ImageTokens]") -> dict[str, Any]:
    return {
        "kind": "folder of token files",
        "files": len(files),
        "tokens": sum(ids.numel() for tokens in files for ids in tokens.ids),
        "scales": ", ".join(f"{scale:g}" for scale in sorted({scale for tokens in files for scale in tokens.scales})),
        "codebook": "; ".join(sorted({_codebook(tokens) for tokens in files})),
    }


def _set_facts(settings: "TokenSettings", totals: dict[str, int]) -> dict[str, Any]:
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
        "tiles": "none" if settings.tile_size is None else f"{settings.tile_size} pixels, overlap {settings.overlap}",
        "codebook": _codebook(settings),
    }


def _codebook(tokens: "TokenOrigin") -> str:
    return f"{tokens.codebook_size} codes, sha256 {tokens.codebook_fingerprint}"


def _folder_or_hub_facts(source: str) -> dict[str, Any]:
    from diffusers import DiffusionPipeline

    from svqvae_cli.loading import explain_loading, load_model
    from svqvae_hf import SVQVAE
    from svqvae_hf.hub.repositories import from_hub

    check_source(source)
    with explain_loading(source):
        try:
            config = from_hub(DiffusionPipeline.load_config, source)
        except OSError:  # no model_index.json
            config = from_hub(SVQVAE.load_config, source)
    kind = config.get("_class_name") or (config.get("architectures") or ["unknown model"])[0]
    if kind == SVQVAE.__name__:
        return _model_facts(load_model(source, "cpu", "float32"))
    values = {name: value for name, value in config.items() if not name.startswith("_")}
    if not kind.endswith("Pipeline"):
        return {"kind": kind, **values}
    parts = {name: value for name, value in values.items() if _is_component(name, value)}
    with explain_loading(source):
        configs = {name: SVQVAE.load_config(source, subfolder=name) for name in {*parts} & {*GENERATORS, "vqvae"}}
    return _pipeline_facts(kind, parts, values, configs)


def _is_component(name: str, value: Any) -> bool:
    is_pair = isinstance(value, list) and len(value) == 2 and all(isinstance(word, str) for word in value)
    return is_pair and name != "class_names"


def _pipeline_facts(
    kind: str, parts: dict[str, list[str]], values: dict[str, Any], configs: dict[str, Any]
) -> dict[str, Any]:
    generator: dict[str, Any] = next((configs[name] for name in GENERATORS if name in configs), {})
    facts = {"kind": f"pipeline, {kind}"}
    facts |= {name: f"{class_name} of {library}" for name, (library, class_name) in parts.items()}
    if "vqvae" in configs and "schedule" in values:
        f = 2 ** (len(configs["vqvae"]["encoder_ch_mult"]) - 1)
        values |= {name: side * f for name, side in zip(("height", "width"), values["schedule"][-1], strict=True)}
        values["schedule"] = ", ".join(f"{height} x {width}" for height, width in values["schedule"])
    if "height" in values:
        facts["images"] = f"{values.pop('width')} x {values.pop('height')} pixels (width x height)"
    if "num_classes" in {*values, *generator}:
        facts["classes"] = values.pop("num_classes", generator.get("num_classes"))
    return facts | {
        name: value for name, value in values.items() if name not in parts and value not in (None, [None, None])
    }


def _model_facts(model: "SVQVAE") -> dict[str, Any]:
    config = {key: value for key, value in model.config.items() if not key.startswith("_")}
    return {
        "kind": "SVQVAE model",
        "parameters": f"{model.num_parameters():,}",
        "f": model.f,
        "codebook sha256": model.codebook_fingerprint(),
        **config,
    }

"""`svqvae info`."""

import argparse
from typing import TYPE_CHECKING, Any

from svqvae_cli.arguments import Commands, add_command, path_or_name

if TYPE_CHECKING:
    from svqvae_hf import SVQVAE
    from svqvae_hf.tokens.token_files import ImageTokens


def add_to(commands: Commands) -> None:
    """Adds the command and its arguments."""
    summary = "describe a model, an original checkpoint or a token file"
    parser = add_command(commands, "info", run, summary, "", "photo.safetensors")
    parser.add_argument(
        "path",
        type=path_or_name,
        metavar="PATH",
        help="model folder, Hub id, checkpoint file, org/repo:file, or token file",
    )


def run(args: argparse.Namespace) -> None:
    """Prints facts about a model, an original checkpoint or a token file."""
    import re
    from pathlib import Path

    from svqvae_cli.loading import load_model
    from svqvae_hf import SVQVAE
    from svqvae_hf.hub.repositories import REPO_ID
    from svqvae_hf.loaders.checkpoints import read_checkpoint
    from svqvae_hf.tokens.token_files import is_token_file, load_tokens

    if is_token_file(args.path):
        facts = _token_facts(load_tokens(args.path))
    elif Path(args.path).is_file() or re.fullmatch(f"{REPO_ID}:.+", args.path):
        checkpoint = read_checkpoint(args.path, SVQVAE)
        facts = {"kind": f"original checkpoint, {checkpoint.format.title}", **checkpoint.config}
    else:
        facts = _model_facts(load_model(args.path, "cpu", "float32"))
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
        "codebook": f"{tokens.codebook_size} codes, sha256 {tokens.codebook_fingerprint}",
    }
    if set(tokens.scales) != {1}:
        facts["scales from"] = tokens.scale_from
    for index, (ids, scale) in enumerate(zip(tokens.ids, tokens.scales, strict=True)):
        grid = f"{ids.shape[1]} x {ids.shape[0]} = {token_count(ids.numel())}"
        facts[f"scale {scale:g}"] = f"{grid}, {tokens.bits_per_pixel(index):.4f} bits/pixel"
    return facts


def _model_facts(model: "SVQVAE") -> dict[str, Any]:
    config = {key: value for key, value in model.config.items() if not key.startswith("_")}
    return {
        "kind": "SVQVAE model",
        "parameters": f"{model.num_parameters():,}",
        "f": model.f,
        "codebook sha256": model.codebook_fingerprint(),
        **config,
    }

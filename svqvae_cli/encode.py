"""Encodes images to token files.

Writes one token file per image, NAME.safetensors, or NAME.svqz with --compress,
with the ids at all scales, in the subfolder that the image was found in. Images
that cannot be read, or are too large for memory, are named and skipped. The
same command resumes an interrupted run.

  svqvae encode 'photos/*.jpg' --output tokens --scales 1
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from svqvae_cli.arguments import Parser, check_large
from svqvae_cli.errors import prefix_errors
from svqvae_cli.files import InputFile, find_images
from svqvae_cli.runs import Run
from svqvae_files.file_names import IMAGE_SUFFIXES, TIFF_SUFFIXES, TOKEN_SUFFIXES


def add_arguments(parser: Parser) -> None:
    """Adds the arguments."""
    parser.add_encoding()
    parser.add_compress()
    parser.add_large()


def run(args: argparse.Namespace) -> None:
    """Writes one token file per image."""
    check_large(args)
    _check_output(args)
    image_suffixes: Sequence[str] = IMAGE_SUFFIXES
    if args.large:
        image_suffixes = TIFF_SUFFIXES
    inputs = find_images(args, image_suffixes)
    suffix = TOKEN_SUFFIXES[args.compress]
    targets = {file: [file.target(args.output, suffix)] for file in inputs}
    with Run(args, targets, "token files") as work:
        if not work.todo:
            return
        if args.large:
            _encode_large(args, work)
        else:
            _encode(args, work)


def _check_output(args: argparse.Namespace) -> None:
    """Raises ValueError if token files would lie in the folder of the model, where they would count as its weights."""
    if args.compress or args.model is None or not os.path.isdir(args.model):
        return
    model_folder = os.path.realpath(args.model)
    output_folder = os.path.realpath(args.output)
    if os.path.commonpath([model_folder, output_folder]) == model_folder:
        raise ValueError(f"`{args.output}` must not be in the folder of the model, `{args.model}`. Choose another.")


def _encode(args: argparse.Namespace, work: Run[InputFile]) -> None:
    """Encodes the images that are not encoded yet."""
    from svqvae_cli.loading import load_encoder
    from svqvae_hf.models.image_files import load_image
    from svqvae_hf.tokens.image_tokens import choose_tiles, encode_image
    from svqvae_hf.tokens.token_files import save_tokens

    model = load_encoder(args)
    context_model = _context_model(model, args)
    for file, image in work.read(load_image):  # skips files that cannot be read
        with work.attempt(file, ValueError):  # skips the image if a ValueError is raised here
            with prefix_errors(file.path):
                tiles = choose_tiles(model, image.height, image.width, args.scales, args.tile_size, args.overlap)
            tokens = encode_image(model, image, args.scales, args.scale_from, tiles)
            token_file = work.outputs(file)[0]  # the only one
            save_tokens(token_file, tokens, context_model)


def _encode_large(args: argparse.Namespace, work: Run[InputFile]) -> None:
    """Encodes images that are too large for memory, and are read one row of tiles at a time."""
    from svqvae_cli.loading import load_encoder
    from svqvae_hf.large.large_images import encode_large
    from svqvae_hf.tokens.token_files import save_tokens

    model = load_encoder(args)
    context_model = _context_model(model, args)
    for file, _ in work.read(_check_large_image):  # skips files that cannot be read
        with work.attempt(file, ValueError):  # skips the image if a ValueError is raised here
            tiles = model.tiles_of_call(args.tile_size, args.overlap)
            tokens = encode_large(model, file.path, tiles)
            token_file = work.outputs(file)[0]  # the only one
            save_tokens(token_file, tokens, context_model)


def _check_large_image(path: Path) -> None:
    """Raises OSError or ValueError if an image cannot be read as TIFF, by its first bytes and its first page."""
    from svqvae_hf.large.tiff_reader import open_large_image

    with open_large_image(path):
        pass


def _context_model(model: Any, args: argparse.Namespace) -> Any:
    """Context model that compresses the ids; `None` without `--compress`."""
    if not args.compress:
        return None

    from svqvae_cli.loading import require_context_model

    return require_context_model(model, args.model)

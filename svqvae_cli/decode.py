"""Decodes token files to images.

Writes one image per scale in the file, NAME_x1.png and so on, in the subfolder
that the file was found in. The model must have the codebook that the file was
encoded with. Files that cannot be read, or whose images are too large for
memory, are named and skipped. The same command resumes an interrupted run.

  svqvae decode tokens --output out
"""

import argparse
from functools import cache, partial
from pathlib import Path

from svqvae_cli.arguments import Parser
from svqvae_cli.errors import prefix_errors
from svqvae_cli.files import TOKEN_SUFFIXES, InputFile, check_output, check_source, find_inputs
from svqvae_cli.large import add_large, check_large
from svqvae_cli.runs import Run


def add_arguments(parser: Parser) -> None:
    """Adds the arguments."""
    parser.add_files("token files, folders of them, which are searched with their subfolders, or globs")
    parser.add_model()
    parser.add_tiles("as encoded", "as encoded")
    parser.flag("--full-size", "resize all images to the size of the original, and name them NAME_x0.5_full_size.png")
    add_large(parser)


def run(args: argparse.Namespace) -> None:
    """Writes the images of token files, with the tiles that they were encoded with."""
    check_large(args)
    check_source(args.model)
    check_output(args.output)
    inputs = find_inputs(args.inputs, TOKEN_SUFFIXES, args.output)

    from svqvae_cli.loading import load_model, require_context_model
    from svqvae_hf.files.outputs import save_png
    from svqvae_hf.tokens.image_tokens import check_same_codebook, choose_tiles, decode_image
    from svqvae_hf.tokens.token_files import ImageTokens, is_compressed, load_tokens

    load = cache(partial(load_model, args.model, args.device, args.dtype))

    def read(path: Path) -> ImageTokens:
        context_model = require_context_model(load(), args.model) if is_compressed(path) else None
        return load_tokens(path, context_model)

    with Run(args, {file: _targets(file, args) for file in inputs}, "images") as work:
        for file, tokens in work.read(read):
            model = load()
            with prefix_errors(file.path):
                check_same_codebook(model, tokens)
                tile_size = tokens.tile_size if args.tile_size is None else args.tile_size
                overlap = tokens.overlap if args.overlap is None else args.overlap
                asked = model.tiles_of_call(tile_size, overlap)
            with work.attempt(file, ValueError), prefix_errors(file.path):
                if args.large:
                    from svqvae_hf.large.large_images import decode_large

                    (path,) = work.outputs(file)
                    decode_large(model, tokens, path, asked)
                    continue
                tiles = choose_tiles(model, tokens.height, tokens.width, tokens.scales, *(asked or ()))
                images = decode_image(model, tokens, args.full_size, tiles)
                for image, path in zip(images, work.outputs(file), strict=True):
                    save_png(image, path)


def _targets(file: InputFile, args: argparse.Namespace) -> list[Path]:
    """Images of a token file; none if it cannot be read."""
    if args.large:
        return [file.target(args.output, "_x1.tif")]

    from svqvae_hf.files.outputs import scale_endings
    from svqvae_hf.tokens.token_files import load_scales

    try:
        endings = scale_endings(load_scales(file.path))
    except (OSError, ValueError):  # is raised again, and counted, when its turn comes
        return []
    if args.full_size:
        endings = [ending.replace(".png", "_full_size.png") for ending in endings]
    return [file.target(args.output, ending) for ending in endings]

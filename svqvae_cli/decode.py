"""Decodes token files or a token set to images.

Writes one image per scale: NAME_x1.png and so on, in the subfolder that the
token file was found in, or 00000000_x1.png for the first row of a token set.
The model must have the codebook that they were encoded with. Token files that
cannot be read, that do not fit the model or the tiles, or whose images are
too large for memory, are named and skipped. The same command resumes an
interrupted run.

  svqvae decode tokens --output out
"""

import argparse
from functools import partial
from pathlib import Path
from typing import Any

from svqvae_cli.arguments import Parser, forbid_options, not_empty, positive
from svqvae_cli.errors import prefix_errors
from svqvae_cli.files import TOKEN_SUFFIXES, InputFile, check_file, check_source, find_inputs, is_token_set
from svqvae_cli.large import add_large, check_large
from svqvae_cli.runs import Run


def add_arguments(parser: Parser) -> None:
    """Adds the arguments."""
    kinds = "token files, folders of them, which are searched with their subfolders, or globs; or one token set: its "
    parser.add_files(f"{kinds}folder, its URL or its name on the Hub", not_empty)
    parser.add_model()
    parser.add_tiles("as encoded", "as encoded")
    parser.option("--max-images", positive, "N", "stop after N rows of a token set (default: all)")
    add_large(parser)


def run(args: argparse.Namespace) -> None:
    """Writes the images of token files or of a token set, with the tiles that they were encoded with."""
    check_large(args)
    check_source(args.model)
    if any(map(is_token_set, args.inputs)):
        _decode_set(args)
    else:
        _decode_files(args)


def _decode_set(args: argparse.Namespace) -> None:
    if len(args.inputs) > 1:
        raise ValueError(f"a token set must be the only INPUT, got {len(args.inputs)}. Decode each on its own.")
    forbid_options(args, "is not for token sets", "tile_size", "overlap", "large")
    (source,) = args.inputs

    from svqvae_cli.loading import load_model, require_context_model
    from svqvae_files.outputs import scale_endings
    from svqvae_hf.models.checks import check_same_codebook
    from svqvae_hf.token_sets.decoding import detokenize_set
    from svqvae_hf.token_sets.settings import SETTINGS_FILE, read_settings

    settings = read_settings(source)  # fails before the model is loaded
    file = InputFile(Path(source, SETTINGS_FILE), Path(source), Path("00000000"))
    work = Run(args, {file: [file.target(args.output, ending) for ending in scale_endings(settings.scales)]}, "images")
    model = load_model(args.model, args.device, args.dtype)
    context_model = None if settings.context_model is None else require_context_model(model, args.model)
    options = {"max_images": args.max_images, "keep": partial(work.is_done, item=file)}
    with prefix_errors(source):
        check_same_codebook(model, settings)
        work.outputs(file)
        for old in args.output.glob("[0-9]" * 8 + "_x*.png") if args.overwrite else ():  # of another set
            old.unlink()
        written, kept = detokenize_set(model, source, args.output, context_model=context_model, **options)
    if kept:
        print(f"resumed: {kept:,} of {written + kept:,} images were there")
    print(f"written  {args.output} (images: {written})")


def _decode_files(args: argparse.Namespace) -> None:
    forbid_options(args, "is for token sets", "max_images")
    inputs = find_inputs(args.inputs, TOKEN_SUFFIXES, args.output)

    from svqvae_cli.loading import load_model, require_context_model
    from svqvae_files.outputs import save_png
    from svqvae_hf.models.checks import check_same_codebook
    from svqvae_hf.tokens.image_tokens import choose_tiles, decode_image
    from svqvae_hf.tokens.token_files import ImageTokens, is_compressed, load_compressed, load_tokens

    def tiles_of(*stored: int | None) -> tuple[int, int] | None:
        own = zip((args.tile_size, args.overlap), stored, strict=True)
        return model.tiles_of_call(*(old if new is None else new for new, old in own))

    def read(path: Path) -> ImageTokens:
        if not is_compressed(path):
            return load_tokens(path)
        record = load_compressed(path).record
        with prefix_errors(path):
            tiles = tiles_of(record["tile_size"], record["overlap"]) or ()
            if not args.large:
                choose_tiles(model, record["height"], record["width"], record["scales"], *tiles)  # before ids are read
        return load_tokens(path, require_context_model(model, args.model))

    with Run(args, {file: _targets(file, args) for file in inputs}, "images") as work:
        if not work.left:
            return
        model = load_model(args.model, args.device, args.dtype)
        for file, tokens in work.read(read):
            with work.attempt(file, ValueError), prefix_errors(file.path):
                check_same_codebook(model, tokens)
                asked = tiles_of(tokens.tile_size, tokens.overlap)
                if args.large:
                    from svqvae_hf.large.large_images import decode_large

                    (path,) = work.outputs(file)
                    decode_large(model, tokens, path, asked)
                    continue
                tiles = choose_tiles(model, tokens.height, tokens.width, tokens.scales, *(asked or ()))
                images = decode_image(model, tokens, tiles)
                for image, path in zip(images, work.outputs(file), strict=True):
                    save_png(image, path)


def _targets(file: Any, args: argparse.Namespace) -> list[Path]:
    """Images of a token file; none if it cannot be read."""
    if args.large:
        return [file.target(args.output, "_x1.tif")]

    from svqvae_files.outputs import scale_endings
    from svqvae_hf.tokens.token_files import load_scales

    try:
        check_file(file.path)
        endings = scale_endings(load_scales(file.path))
    except (OSError, ValueError):  # is raised again, and counted, when its turn comes
        return []
    return [file.target(args.output, ending) for ending in endings]

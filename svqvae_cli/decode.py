"""`svqvae decode`."""

import argparse

from svqvae_cli.arguments import Commands, add_command, add_files, add_model, add_tiles
from svqvae_cli.errors import Skipping, explain_resume, prefix_errors, require_extra
from svqvae_cli.large import RESUME, add_large, check_large, unfinished


def add_to(commands: Commands) -> None:
    """Adds the command and its arguments."""
    parser = add_command(
        commands,
        "decode",
        run,
        "decode token files to images",
        "Writes one image per scale in the file, NAME_x1.png and so on, in the subfolder\n"
        "that the file was found in. The model must have the codebook that the file was\n"
        "encoded with. Files that cannot be read, or whose images are too large for\n"
        "memory, are named and skipped.",
        "tokens --output out",
    )
    add_files(parser, "token files, folders of them, which are searched with their subfolders, or globs")
    add_model(parser)
    add_tiles(parser, "as encoded", "as encoded")
    parser.add_argument(
        "--full-size",
        action="store_true",
        help="resize images of all scales to the size of the original: bicubic below scale 1, by area above",
    )
    add_large(parser)


def run(args: argparse.Namespace) -> None:
    """Writes the images of token files, with the tiles that they were encoded with."""
    check_large(args)
    if args.large:
        _decode_large(args)
    else:
        _decode(args)


def _decode(args: argparse.Namespace) -> None:
    from functools import partial

    from svqvae_cli.loading import configure_decoding, load_model
    from svqvae_cli.progress import progress
    from svqvae_hf.files.inputs import find_inputs
    from svqvae_hf.files.outputs import check_output, check_targets, save_png, scale_endings
    from svqvae_hf.tokens.image_tokens import check_memory, check_same_codebook, decode_image
    from svqvae_hf.tokens.token_files import load_tokens

    check_output(args.output)
    inputs = find_inputs(args.inputs, [".safetensors"], args.output)
    skipping = Skipping(len(inputs))
    targets = {}
    for file, tokens in skipping.read(inputs, partial(load_tokens, mapped=True)):
        with prefix_errors(file.path):
            targets[file] = [file.target(args.output, ending) for ending in scale_endings(tokens.scales)]
    check_targets(targets, args.overwrite)
    model = load_model(args.model, args.device, args.dtype)
    with progress(list(targets)) as (files, on_tile):
        for file in files:
            tokens = load_tokens(file.path)
            with prefix_errors(file.path):
                check_same_codebook(model, tokens)
                configure_decoding(model, tokens, args, on_tile)
            with skipping.attempt(file.path, ValueError), prefix_errors(file.path):
                check_memory(
                    model, tokens.height, tokens.width, tokens.scales, encodes=False, full_size=args.full_size
                )
                for image, target in zip(decode_image(model, tokens, args.full_size), targets[file], strict=True):
                    save_png(image, target)
    skipping.finish()
    print(f"written  {args.output} (images: {sum(map(len, targets.values()))})")


def _decode_large(args: argparse.Namespace) -> None:
    with require_extra("--large", "large"):
        from svqvae_hf.large.large_images import decode_large, load_large_tokens
    from svqvae_cli.loading import configure_decoding, load_model
    from svqvae_cli.progress import progress
    from svqvae_hf.files.inputs import find_inputs
    from svqvae_hf.files.outputs import check_output, check_targets
    from svqvae_hf.tokens.image_tokens import check_same_codebook

    check_output(args.output)
    inputs = find_inputs(args.inputs, [".safetensors"], args.output)
    targets = {file: [file.target(args.output, "_x1.tif")] for file in inputs}
    check_targets(targets, args.overwrite or args.resume)
    model = load_model(args.model, args.device, args.dtype)
    skipping = Skipping(len(inputs))
    with progress(inputs) as (files, on_tile):
        for file, tokens in skipping.read(unfinished(files, targets, args.resume), load_large_tokens):
            (target,) = targets[file]
            with prefix_errors(file.path):
                check_same_codebook(model, tokens)
                configure_decoding(model, tokens, args)
            if not model.use_tiling:
                model.enable_tiling()
            with explain_resume(target, RESUME):
                decode_large(model, file.path, target, args.resume, on_tile)
    skipping.finish()
    print(f"written  {args.output} (images: {len(inputs)})")

"""`svqvae decode`."""

import argparse

from svqvae_cli.arguments import Commands, add_command, add_files, add_model, add_tiles
from svqvae_cli.errors import explain_resume, prefix_errors, require_extra
from svqvae_cli.large import add_large, check_large, unfinished


def add_to(commands: Commands) -> None:
    """Adds the command and its arguments."""
    parser = add_command(
        commands,
        "decode",
        run,
        "decode token files to images",
        "Writes one image per scale in the file, NAME_x1.png and so on. The model must\n"
        "have the codebook that the file was encoded with.",
        "tokens --output out",
    )
    add_files(parser, "token files, folders of them, or globs")
    add_model(parser)
    add_tiles(parser, "as encoded", "as encoded")
    add_large(parser)


def run(args: argparse.Namespace) -> None:
    """Writes the images of token files, with the tiles that they were encoded with."""
    check_large(args)
    if args.large:
        _decode_large(args)
    else:
        _decode(args)


def _decode(args: argparse.Namespace) -> None:
    from svqvae_cli.loading import configure_decoding, load_model
    from svqvae_cli.progress import progress
    from svqvae_hf.atomic_io import save_png
    from svqvae_hf.paths import check_output, check_targets, find_files, scale_endings
    from svqvae_hf.tokens.image_tokens import check_memory, decode_image
    from svqvae_hf.tokens.token_files import load_tokens

    inputs = find_files(args.inputs, [".safetensors"])
    check_output(inputs, args.output)
    model = load_model(args.model, args.device, args.dtype)
    with progress(inputs) as (paths, on_tile):
        for path in paths:
            tokens = load_tokens(path)
            with prefix_errors(path):
                endings = scale_endings(tokens.scales)
                check_targets([path], inputs, args.output, endings)
                configure_decoding(model, tokens, args, on_tile)
                check_memory(model, tokens.height, tokens.width, tokens.scales, encodes=False)
                images = decode_image(model, tokens)
            for image, ending in zip(images, endings, strict=True):
                save_png(image, args.output / f"{path.stem}{ending}")


def _decode_large(args: argparse.Namespace) -> None:
    with require_extra("--large", "large"):
        from svqvae_hf.large.large_images import decode_large
    from svqvae_cli.loading import configure_decoding, load_model
    from svqvae_cli.progress import progress
    from svqvae_hf.paths import check_output, check_targets, find_files
    from svqvae_hf.tokens.image_tokens import check_same_codebook
    from svqvae_hf.tokens.token_files import load_tokens

    inputs = find_files(args.inputs, [".safetensors"])
    check_output(inputs, args.output)
    check_targets(inputs, inputs, args.output, ["_x1.tif"])
    model = load_model(args.model, args.device, args.dtype)
    with progress(inputs) as (paths, on_tile):
        for path, target in unfinished(paths, args, "_x1.tif"):
            tokens = load_tokens(path, mapped=True)
            with prefix_errors(path):
                check_same_codebook(model, tokens)
                configure_decoding(model, tokens, args)
            if not model.use_tiling:
                model.enable_tiling()
            with explain_resume(target):
                decode_large(model, path, target, args.resume, on_tile)

"""`svqvae encode`."""

import argparse
from functools import partial

from svqvae_cli.arguments import Commands, add_command, add_images
from svqvae_cli.errors import Skipping, explain_resume, require_extra
from svqvae_cli.large import RESUME, add_large, check_large, unfinished


def add_to(commands: Commands) -> None:
    """Adds the command and its arguments."""
    parser = add_command(
        commands,
        "encode",
        run,
        "encode images to token files",
        "Writes one token file per image, NAME.safetensors, with the ids at all scales,\n"
        "in the subfolder that the image was found in. Images that cannot be read, or are\n"
        "too large for memory, are named and skipped.",
        "'photos/*.jpg' --output tokens --scales 1",
    )
    add_images(parser)
    add_large(parser)


def run(args: argparse.Namespace) -> None:
    """Writes one token file per image."""
    check_large(args)
    if args.large:
        _encode_large(args)
    else:
        _encode(args)


def _encode(args: argparse.Namespace) -> None:
    from svqvae_cli.loading import load_fitting_image, load_model
    from svqvae_cli.progress import progress
    from svqvae_hf.models.image_processing_svqvae import IMAGE_SUFFIXES
    from svqvae_hf.paths import check_output, check_targets, find_inputs
    from svqvae_hf.tokens.image_tokens import encode_image
    from svqvae_hf.tokens.token_files import save_tokens

    check_output(args.output)
    inputs = find_inputs(args.inputs, IMAGE_SUFFIXES, args.output)
    check_targets({file: [file.target(args.output, ".safetensors")] for file in inputs}, args.overwrite)
    skipping = Skipping(len(inputs))
    model = load_model(args.model, args.device, args.dtype)
    read = partial(load_fitting_image, model=model, args=args, decodes=False)
    with progress(inputs) as (files, on_tile):
        model.enable_tiling(args.tile_size, args.overlap, on_tile)
        for file, image in skipping.read(files, read):
            tokens = encode_image(model, image, args.scales, args.scale_from)
            target = file.target(args.output, ".safetensors")
            target.parent.mkdir(parents=True, exist_ok=True)
            save_tokens(target, tokens)
    skipping.finish()
    print(f"written  {args.output} (token files: {len(inputs)})")


def _encode_large(args: argparse.Namespace) -> None:
    with require_extra("--large", "large"):
        from svqvae_hf.large.large_images import encode_large
        from svqvae_hf.large.tiff_reader import TIFF_SUFFIXES, ImageError
    from svqvae_cli.loading import load_model
    from svqvae_cli.progress import progress
    from svqvae_hf.paths import check_output, check_targets, find_inputs

    check_output(args.output)
    inputs = find_inputs(args.inputs, TIFF_SUFFIXES, args.output)
    targets = {file: [file.target(args.output, ".safetensors")] for file in inputs}
    check_targets(targets, args.overwrite or args.resume)
    model = load_model(args.model, args.device, args.dtype)
    model.enable_tiling(args.tile_size, args.overlap)
    skipping = Skipping(len(inputs))
    with progress(inputs) as (files, on_tile):
        for file in unfinished(files, targets, args.resume):
            (target,) = targets[file]
            with skipping.attempt(ImageError, PermissionError), explain_resume(target, RESUME):
                encode_large(model, file.path, target, args.resume, on_tile)
    skipping.finish()
    print(f"written  {args.output} (token files: {len(inputs)})")

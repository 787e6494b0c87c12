"""`svqvae encode`."""

import argparse
from collections import Counter
from functools import partial

from svqvae_cli.arguments import Commands, add_command, add_images, add_scale_target, check_several
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
    add_scale_target(parser)
    add_large(parser)


def run(args: argparse.Namespace) -> None:
    """Writes one token file per image."""
    check_large(args)
    if args.min_psnr or args.max_bits:
        check_several(args.scales, "--min-psnr and --max-bits choose")
    if args.large:
        _encode_large(args)
    else:
        _encode(args)


def _encode(args: argparse.Namespace) -> None:
    from svqvae_cli.loading import load_fitting_image, load_model
    from svqvae_cli.progress import progress
    from svqvae_hf.files.inputs import find_inputs
    from svqvae_hf.files.outputs import check_output, check_targets
    from svqvae_hf.models.image_processing_svqvae import IMAGE_SUFFIXES
    from svqvae_hf.tokens.image_tokens import encode_image
    from svqvae_hf.tokens.scale_choice import encode_to_bits, encode_to_psnr
    from svqvae_hf.tokens.token_files import save_tokens

    check_output(args.output)
    inputs = find_inputs(args.inputs, IMAGE_SUFFIXES, args.output)
    check_targets({file: [file.target(args.output, ".safetensors")] for file in inputs}, args.overwrite)
    skipping = Skipping(len(inputs))
    model = load_model(args.model, args.device, args.dtype)
    read = partial(load_fitting_image, model=model, args=args, decodes=args.min_psnr is not None)
    chosen: Counter[float] = Counter()
    missed = 0
    with progress(inputs) as (files, on_tile):
        model.enable_tiling(args.tile_size, args.overlap, on_tile)
        for file, image in skipping.read(files, read):
            with skipping.attempt(file.path):
                reached = True
                if args.min_psnr is not None:
                    tokens, reached = encode_to_psnr(model, image, args.scales, args.min_psnr, args.scale_from)
                elif args.max_bits is not None:
                    tokens, reached = encode_to_bits(model, image, args.scales, args.max_bits, args.scale_from)
                else:
                    tokens = encode_image(model, image, args.scales, args.scale_from)
                chosen += Counter(tokens.scales)
                missed += not reached
                path = file.target(args.output, ".safetensors")
                path.parent.mkdir(parents=True, exist_ok=True)
                save_tokens(path, tokens)
    skipping.finish()
    print(f"written  {args.output} (token files: {len(inputs)})")
    if args.min_psnr is not None or args.max_bits is not None:
        print(f"images by scale: {', '.join(f'{scale:g}: {chosen[scale]}' for scale in sorted(chosen))}")
        print(f"images beyond the target at every scale: {missed}")


def _encode_large(args: argparse.Namespace) -> None:
    with require_extra("--large", "large"):
        from svqvae_hf.large.large_images import encode_large
        from svqvae_hf.large.tiff_reader import TIFF_SUFFIXES, ImageError
    from svqvae_cli.loading import load_model
    from svqvae_cli.progress import progress
    from svqvae_hf.files.inputs import find_inputs
    from svqvae_hf.files.outputs import check_output, check_targets

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
            with skipping.attempt(file.path, ImageError, PermissionError), explain_resume(target, RESUME):
                encode_large(model, file.path, target, args.resume, on_tile)
    skipping.finish()
    print(f"written  {args.output} (token files: {len(inputs)})")

"""`svqvae reconstruct`."""

import argparse
from functools import partial

from svqvae_cli.arguments import Commands, add_command, add_images
from svqvae_cli.errors import Skipping, explain_resume, require_extra
from svqvae_cli.large import RESUME, add_large, check_large, unfinished


def add_to(commands: Commands) -> None:
    """Adds the command and its arguments."""
    parser = add_command(
        commands,
        "reconstruct",
        run,
        "encode and decode images, and measure the difference",
        "Writes one image per scale, NAME_x0.5.png and so on, in the subfolder that the\n"
        "image was found in. Prints for each of them: tokens, bits per pixel of the\n"
        "original, PSNR against the original resized to that scale, and the fraction of\n"
        "the codebook that is used. For several images the last lines give totals and\n"
        "means, and the fraction of the codebook that all images together use. Images\n"
        "that cannot be read, or are too large for memory, are named and skipped.",
        "photo.jpg --output out --scales 0.25 0.5 1 --side-by-side",
    )
    add_images(parser)
    parser.add_argument(
        "--side-by-side", action="store_true", help="also write NAME_side_by_side.png with the original and all scales"
    )
    add_large(parser)


def run(args: argparse.Namespace) -> None:
    """Writes the reconstruction of each image at each scale, and prints how close it is."""
    check_large(args)
    if args.large:
        _reconstruct_large(args)
    else:
        _reconstruct(args)


def _reconstruct(args: argparse.Namespace) -> None:
    from svqvae_cli.loading import load_fitting_image, load_model
    from svqvae_cli.progress import progress
    from svqvae_cli.results import ResultTable
    from svqvae_hf.evaluation.reconstruction_table import measure_reconstructions, side_by_side
    from svqvae_hf.files.inputs import find_inputs
    from svqvae_hf.files.outputs import check_output, check_targets, save_png, scale_endings
    from svqvae_hf.models.image_processing_svqvae import IMAGE_SUFFIXES
    from svqvae_hf.tokens.image_tokens import decode_image, encode_image

    endings = [*scale_endings(args.scales), *(["_side_by_side.png"] if args.side_by_side else [])]
    check_output(args.output)
    inputs = find_inputs(args.inputs, IMAGE_SUFFIXES, args.output)
    targets = {file: [file.target(args.output, ending) for ending in endings] for file in inputs}
    check_targets(targets, args.overwrite)
    model = load_model(args.model, args.device, args.dtype)
    table = ResultTable([str(file.name) for file in inputs], model.config["codebook_size"])
    skipping = Skipping(len(inputs))
    read = partial(load_fitting_image, model=model, args=args)
    with progress(inputs) as (files, on_tile):
        model.enable_tiling(args.tile_size, args.overlap, on_tile)
        for file, original in skipping.read(files, read):
            with skipping.attempt(file.path):
                tokens = encode_image(model, original, args.scales, args.scale_from)
                images = decode_image(model, tokens)
                results = measure_reconstructions(original, tokens, images)
                sheet = [side_by_side(original, images, results)] if args.side_by_side else []
                for image, target in zip([*images, *sheet], targets[file], strict=True):
                    save_png(image, target)
                table.add(str(file.name), results)
    if len(inputs) > 1:
        table.add_totals()
    skipping.finish()


def _reconstruct_large(args: argparse.Namespace) -> None:
    with require_extra("--large", "large"):
        from svqvae_hf.large.large_images import reconstruct_large
        from svqvae_hf.large.tiff_reader import TIFF_SUFFIXES, ImageError
    from svqvae_cli.loading import load_model
    from svqvae_cli.progress import progress
    from svqvae_cli.results import ResultTable
    from svqvae_hf.files.inputs import find_inputs
    from svqvae_hf.files.outputs import check_output, check_targets

    check_output(args.output)
    inputs = find_inputs(args.inputs, TIFF_SUFFIXES, args.output)
    targets = {file: [file.target(args.output, "_x1.tif")] for file in inputs}
    check_targets(targets, args.overwrite or args.resume)
    model = load_model(args.model, args.device, args.dtype)
    model.enable_tiling(args.tile_size, args.overlap)
    table = ResultTable([str(file.name) for file in inputs], model.config["codebook_size"])
    skipping = Skipping(len(inputs))
    with progress(inputs) as (files, on_tile):
        for file in unfinished(files, targets, args.resume):
            (target,) = targets[file]
            with skipping.attempt(file.path, ImageError, PermissionError), explain_resume(target, RESUME):
                result = reconstruct_large(model, file.path, target, args.resume, on_tile)
                table.add(str(file.name), [result])
    skipping.finish()

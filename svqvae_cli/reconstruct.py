"""`svqvae reconstruct`."""

import argparse
from functools import partial

from svqvae_cli.arguments import Commands, add_command, add_images, flag
from svqvae_cli.files import InputFile, find_images
from svqvae_cli.runs import Run


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
        "the codebook that is used. For several images the last lines give totals, bits\n"
        "per pixel of all pixels, mean PSNR, and the fraction of the codebook that all\n"
        "images together use. Images that cannot be read, or are too large for memory,\n"
        "are named and skipped. The same command resumes an interrupted run.",
        "photo.jpg --output out --scales 0.25 0.5 1 --side-by-side",
    )
    add_images(parser)
    flag(parser, "--side-by-side", "also write NAME_side_by_side.png with the original and all scales")


def run(args: argparse.Namespace) -> None:
    """Writes the reconstruction of each image at each scale, and prints how close it is."""
    endings = [f"_x{scale:g}.png" for scale in args.scales]
    endings += ["_side_by_side.png"] * args.side_by_side
    inputs = find_images(args)
    targets = {file: [file.target(args.output, ending) for ending in endings] for file in inputs}
    with Run(args, targets, "images") as work:
        if work.left:
            _reconstruct(args, work)


def _reconstruct(args: argparse.Namespace, work: Run[InputFile]) -> None:
    from svqvae_cli.loading import load_fitting_image, load_tiled_model
    from svqvae_cli.results import printed_table
    from svqvae_hf.evaluation.reconstruction_table import measure_reconstructions, side_by_side
    from svqvae_hf.files.outputs import save_png
    from svqvae_hf.tokens.image_tokens import decode_image, encode_image

    model = load_tiled_model(args, work.on_tile)
    with printed_table(work, model) as table:
        for file, original in work.read(partial(load_fitting_image, model=model, args=args)):
            with work.attempt(file):
                tokens = encode_image(model, original, args.scales, args.scale_from)
                images = decode_image(model, tokens)
                results = measure_reconstructions(original, tokens, images)
                sheet = [side_by_side(original, images, results)] if args.side_by_side else []
                for image, path in zip([*images, *sheet], work.outputs(file), strict=True):
                    save_png(image, path)
                table.add(str(file.name), results)

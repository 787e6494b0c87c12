"""Encodes images to token files.

Writes one token file per image, NAME.safetensors, or NAME.svqz with --compress,
with the ids at all scales, in the subfolder that the image was found in. Images
that cannot be read, or are too large for memory, are named and skipped. The
same command resumes an interrupted run.

  svqvae encode 'photos/*.jpg' --output tokens --scales 1
"""

import argparse
from collections import Counter
from functools import partial

from svqvae_cli.arguments import Parser, scale
from svqvae_cli.files import IMAGE_SUFFIXES, TIFF_SUFFIXES, TOKEN_SUFFIXES, InputFile, find_images
from svqvae_cli.large import add_large, check_large, check_large_image
from svqvae_cli.runs import Run


def add_arguments(parser: Parser) -> None:
    """Adds the arguments."""
    parser.add_encoding()
    targets = parser.add_mutually_exclusive_group()
    help = "choose the smallest scale that reaches this PSNR at full size, or else the largest"
    targets.add_argument("--min-psnr", type=scale, metavar="DB", help=help)
    help = "choose the largest scale whose file has at most this many bits, or else the smallest"
    targets.add_argument("--max-bits", type=scale, metavar="BITS", help=help)
    parser.add_compress()
    add_large(parser)


def run(args: argparse.Namespace) -> None:
    """Writes one token file per image."""
    check_large(args)
    if (args.min_psnr or args.max_bits) and len(args.scales) < 2:
        raise ValueError(
            "--min-psnr and --max-bits choose among at least two scales. Pass them, such as --scales 0.25 0.5 1."
        )
    inputs = find_images(args, TIFF_SUFFIXES if args.large else IMAGE_SUFFIXES)
    suffix = TOKEN_SUFFIXES[args.compress]
    with Run(args, {file: [file.target(args.output, suffix)] for file in inputs}, "token files") as work:
        if work.left:
            (_encode_large if args.large else _encode)(args, work)


def _encode(args: argparse.Namespace, work: Run[InputFile]) -> None:
    from svqvae_cli.loading import load_fitting_image, load_tiled_model, require_context_model
    from svqvae_hf.tokens.image_tokens import encode_image
    from svqvae_hf.tokens.scale_choice import encode_to_bits, encode_to_psnr
    from svqvae_hf.tokens.token_files import save_tokens

    model = load_tiled_model(args)
    context_model = require_context_model(model, args.model) if args.compress else None
    chosen: Counter[float] = Counter()
    missed = 0
    try:
        for file, image in work.read(partial(load_fitting_image, model=model, args=args)):
            with work.attempt(file):
                reached = True
                if args.min_psnr is not None:
                    tokens, reached = encode_to_psnr(model, image, args.scales, args.min_psnr, args.scale_from)
                elif args.max_bits is not None:
                    bits, source = args.max_bits, args.scale_from
                    tokens, reached = encode_to_bits(model, image, args.scales, bits, source, context_model)
                else:
                    tokens = encode_image(model, image, args.scales, args.scale_from)
                (path,) = work.outputs(file)
                save_tokens(path, tokens, context_model)
                chosen += Counter(tokens.scales)
                missed += not reached
    finally:
        if chosen and (args.min_psnr or args.max_bits):
            print(f"images by scale: {', '.join(f'{scale:g}: {chosen[scale]}' for scale in sorted(chosen))}")
            print(f"images that miss the target at every scale: {missed}")


def _encode_large(args: argparse.Namespace, work: Run[InputFile]) -> None:
    from svqvae_cli.loading import load_tiled_model, require_context_model
    from svqvae_hf.large.large_images import encode_large
    from svqvae_hf.tokens.token_files import save_tokens

    model = load_tiled_model(args)
    context_model = require_context_model(model, args.model) if args.compress else None
    for file, _ in work.read(check_large_image):
        with work.attempt(file, ValueError, PermissionError):
            tokens = encode_large(model, file.path)
            (path,) = work.outputs(file)
            save_tokens(path, tokens, context_model)

"""Decodes a token set to images.

Writes one image per row and scale, 00000000_x1.png and so on. The model must
have the codebook that the token set was encoded with. On several machines, each
decodes a part.

  svqvae detokenize tokens --output out --max-images 16
"""

import argparse

from svqvae_cli.arguments import Parser, not_empty
from svqvae_cli.files import check_data, check_output


def add_arguments(parser: Parser) -> None:
    """Adds the arguments."""
    parser.option("tokens", not_empty, "TOKENS", "folder or URL of the token set, or its name on the Hub")
    parser.add_output()
    parser.flag("--overwrite", "decode existing images again (default: skip them)")
    parser.option("--max-images", int, "N", "stop after N rows (default: all)")
    parser.option("--part", int, "I", "decode only this part, counted from 0 (default: 0)", default=0)
    parser.option("--num-parts", int, "N", "number of parts (default: 1)", default=1)
    parser.add_model()


def run(args: argparse.Namespace) -> None:
    """Writes the images of a token set, with the tiles that they were encoded with."""
    check_data([args.tokens])
    check_output(args.output)
    from svqvae_cli.loading import load_model, require_context_model
    from svqvae_hf.token_sets.decoding import detokenize_set
    from svqvae_hf.token_sets.settings import read_settings

    settings = read_settings(args.tokens)  # fails before the model is loaded
    model = load_model(args.model, args.device, args.dtype)
    written, kept = detokenize_set(
        model,
        args.tokens,
        args.output,
        max_images=args.max_images,
        part=args.part,
        num_parts=args.num_parts,
        overwrite=args.overwrite,
        context_model=None if settings.context_model is None else require_context_model(model, args.model),
    )
    if kept:
        print(f"resumed: {kept:,} of {written + kept:,} images were there")
    print(f"written  {args.output} (images: {written})")

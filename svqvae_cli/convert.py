"""`svqvae convert`."""

import argparse

from svqvae_cli.arguments import Commands, add_command, add_push, not_empty, path, path_or_name


def add_to(commands: Commands) -> None:
    """Adds the command and its arguments."""
    parser = add_command(
        commands,
        "convert",
        run,
        "convert an original checkpoint to a Hub repository",
        "Reads checkpoints of SVQVAE, LlamaGen, FlexVAR, multi-scale Lightning training\n"
        "and taming-transformers. Writes model card, config and safetensors, and verifies\n"
        "them. With --tokenizer, SOURCE is FlexVAR's transformer, and OUT a pipeline that\n"
        "holds both.",
        "vq_ds8_c2i.pt llamagen-f8 --license mit --variant fp16",
    )
    parser.add_argument(
        "source", type=path_or_name, metavar="SOURCE", help="checkpoint file, or org/repo:file on the Hub"
    )
    parser.add_argument("out", type=path, metavar="OUT", help="folder to create")
    parser.add_argument(
        "--tokenizer",
        type=path_or_name,
        metavar="MODEL",
        help="tokenizer of the transformer: checkpoint file, org/repo:file, model folder or Hub id",
    )
    parser.add_argument(
        "--image-size",
        type=int,
        metavar="PIXELS",
        help="side of the images that the transformer was trained on (default: the tokenizer's)",
    )
    parser.add_argument("--use-ema", action="store_true", help="use the averaged weights of a LlamaGen file")
    parser.add_argument(
        "--network-range",
        nargs=2,
        type=float,
        metavar=("LOW", "HIGH"),
        help="values of black and white that the network was trained on (default: depends on the format)",
    )
    parser.add_argument(
        "--no-codebook-l2-norm",
        dest="codebook_l2_norm",
        action="store_false",
        default=None,
        help="do not normalise the codebook (default: depends on the format)",
    )
    parser.add_argument("--variant", choices=("fp16", "bf16"), help="also write half-precision weights")
    parser.add_argument(
        "--license", type=not_empty, help="licence of the source for the card, by its id on the Hub (default: unknown)"
    )
    add_push(parser, "the result")
    parser.add_argument("--create-pr", action="store_true", help="open a pull request instead of committing")


def run(args: argparse.Namespace) -> None:
    """Converts an original checkpoint to a Hub repository."""
    tokenizer_options = {
        "use_ema": args.use_ema or None,
        "network_range": args.network_range and tuple(args.network_range),
        "codebook_l2_norm": args.codebook_l2_norm,
    }
    given = {name: value for name, value in tokenizer_options.items() if value is not None}
    shared = {name: getattr(args, name) for name in ("variant", "license", "push_to_hub", "private", "create_pr")}
    if args.tokenizer is None:
        from svqvae_hf.conversion.convert import convert

        if args.image_size is not None:
            raise ValueError("--image-size needs --tokenizer. Leave it out for a tokenizer.")
        print(convert(args.source, args.out, **shared, **given))
    else:
        import diffusers

        from svqvae_hf.conversion.convert_next_scale import convert_next_scale

        diffusers.utils.logging.disable_progress_bar()  # while loading

        if given:
            raise ValueError(
                "--use-ema, --network-range and --no-codebook-l2-norm are for tokenizers. Convert the tokenizer with "
                "them first, and pass its folder as --tokenizer."
            )
        print(convert_next_scale(args.source, args.out, args.tokenizer, image_size=args.image_size, **shared))

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
        "them.",
        "vq_ds8_c2i.pt llamagen-f8 --license mit --variant fp16",
    )
    parser.add_argument(
        "source", type=path_or_name, metavar="SOURCE", help="checkpoint file, or org/repo:file on the Hub"
    )
    parser.add_argument("out", type=path, metavar="OUT", help="folder to create")
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
    from svqvae_hf.conversion.convert import convert

    config = {
        "network_range": args.network_range and tuple(args.network_range),
        "codebook_l2_norm": args.codebook_l2_norm,
    }
    report = convert(
        args.source,
        args.out,
        use_ema=args.use_ema,
        variant=args.variant,
        license=args.license,
        push_to_hub=args.push_to_hub,
        private=args.private,
        create_pr=args.create_pr,
        **{key: value for key, value in config.items() if value is not None},
    )
    print(report)

"""`svqvae convert`."""

import argparse
import os
import re

from svqvae_cli.arguments import Commands, add_command, flag, not_empty, option, path, path_or_name
from svqvae_cli.files import REPO_ID, check_new_folder


def add_to(commands: Commands) -> None:
    """Adds the command and its arguments."""
    parser = add_command(
        commands,
        "convert",
        run,
        "convert an original checkpoint to a Hub repository",
        "Reads checkpoints of SVQVAE, LlamaGen, FlexVAR, multi-scale Lightning training,\n"
        "taming-transformers and JanusVQVAE. Writes model card, config and safetensors,\n"
        "and verifies them. With --tokenizer, SOURCE is FlexVAR's transformer or\n"
        "LlamaGen's language model, and OUT a pipeline that holds both.",
        "vq_ds8_c2i.pt llamagen-f8 --license mit --variant fp16",
    )
    option(parser, "source", path_or_name, "SOURCE", "checkpoint file, or org/repo:file on the Hub")
    option(parser, "out", path, "OUT", "folder to create")
    option(
        parser, "--tokenizer", path_or_name, "MODEL", "tokenizer of a generator: file, org/repo:file, folder or Hub id"
    )
    option(parser, "--image-size", int, "PIXELS", "side of the training images of a generator; LlamaGen needs it")
    option(parser, "--num-heads", int, "COUNT", "heads of LlamaGen's model (default: as LlamaGen defines them)")
    option(parser, "--text-encoder", path_or_name, "MODEL", "T5 encoder of captions, such as google/flan-t5-xl")
    flag(parser, "--use-ema", "use the EMA weights of a LlamaGen file")
    option(
        parser,
        "--network-range",
        float,
        ("LOW", "HIGH"),
        "black and white in training (default: as in the format)",
        nargs=2,
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
    flag(parser, "--standalone", "also write the code of the models, for use without svqvae-hf")
    option(parser, "--push-to-hub", not_empty, "ORG/NAME", "upload the result to the Hub")
    parser.add_argument("--private", action="store_true", default=None, help="make a new repository private")
    flag(parser, "--create-pr", "open a pull request instead of committing")


def run(args: argparse.Namespace) -> None:
    """Converts an original checkpoint to a Hub repository."""
    of_tokenizers = {
        "network_range": args.network_range and tuple(args.network_range),
        "codebook_l2_norm": args.codebook_l2_norm,
    }
    of_tokenizers = {name: value for name, value in of_tokenizers.items() if value is not None}
    of_generators = {
        "image_size": args.image_size,
        "num_attention_heads": args.num_heads,
        "text_encoder": args.text_encoder,
    }
    names = ("use_ema", "variant", "license", "push_to_hub", "private", "create_pr", "standalone")
    shared = {name: getattr(args, name) for name in names}
    if args.tokenizer is None and any(value is not None for value in of_generators.values()):
        raise ValueError(
            "--image-size, --num-heads and --text-encoder need --tokenizer. Leave them out for a tokenizer."
        )
    if args.tokenizer is not None and of_tokenizers:
        raise ValueError(
            "--network-range and --no-codebook-l2-norm are for tokenizers. Convert the tokenizer with them first, and "
            "pass its folder as --tokenizer."
        )
    if not os.path.exists(args.source) and not re.fullmatch(f"{REPO_ID}:.+", args.source):
        raise ValueError(f"There is no file `{args.source}`. Pass an existing one, or `org/repo:file` on the Hub.")
    check_new_folder(args.out)
    if args.tokenizer is None:
        from svqvae_hf.conversion.convert import convert

        print(convert(args.source, args.out, **shared, **of_tokenizers))
        return
    from svqvae_cli.loading import hide_loading_bars
    from svqvae_hf.conversion.convert_generator import convert_generator

    hide_loading_bars()
    print(convert_generator(args.source, args.out, args.tokenizer, **shared, **of_generators))

"""Converts an original checkpoint to a Hub repository.

Reads checkpoints of SVQVAE, LlamaGen, FlexVAR, multi-scale Lightning training,
taming-transformers and JanusVQVAE. Writes model card, config and safetensors,
and verifies them. With --tokenizer, SOURCE is FlexVAR's transformer or
LlamaGen's language model, and the output a pipeline that holds both.

  svqvae convert vq_ds8_c2i.pt --output llamagen-f8 --license mit --variant fp16
"""

import argparse
import os
import re
from typing import Any

from svqvae_cli.arguments import Parser, model, not_empty, path_or_name
from svqvae_files.file_names import REPO_ID
from svqvae_files.outputs import check_new_folder


def add_arguments(parser: Parser) -> None:
    """Adds the arguments."""
    parser.option("source", path_or_name, "SOURCE", "checkpoint file, or org/repo:file on the Hub")
    parser.add_output("folder to create")
    tokenizer_help = "tokenizer of a generator: file, org/repo:file, folder or Hub id"
    parser.option("--tokenizer", model, "MODEL", tokenizer_help)
    parser.option("--image-size", int, "PIXELS", "side of the training images of a generator; LlamaGen needs it")
    num_heads_help = "heads of LlamaGen's model (default: as LlamaGen defines them)"
    parser.option("--num-heads", int, "COUNT", num_heads_help, dest="num_attention_heads")
    parser.option("--text-encoder", path_or_name, "MODEL", "T5 encoder of captions, such as google/flan-t5-xl")
    parser.flag("--use-ema", "use the EMA weights of a LlamaGen file")
    network_range_help = "black and white in training (default: as in the format)"
    parser.option("--network-range", float, ("LOW", "HIGH"), network_range_help, nargs=2)
    parser.flag("--no-codebook-l2-norm", "do not normalise the codebook (default: depends on the format)")
    parser.choice("--variant", ("fp16", "bf16"), "also write half-precision weights")
    license_help = "licence for the card, by its id on the Hub (default: from the sources' cards)"
    parser.option("--license", not_empty, "ID", license_help)
    parser.flag("--standalone", "also write the code of the models, for use without svqvae-hf")
    parser.option("--repo-id", not_empty, "ORG/NAME", "name on the Hub, for the card (default: the name of DIR)")


def run(args: argparse.Namespace) -> None:
    """Converts an original checkpoint to a Hub repository."""
    _check(args)

    from svqvae_cli.loading import hide_loading_bars
    from svqvae_hf.conversion.convert import convert

    hide_loading_bars()
    summary = convert(
        args.source,
        args.output,
        args.tokenizer,
        use_ema=args.use_ema,
        variant=args.variant,
        license=args.license,
        standalone=args.standalone,
        repo_id=args.repo_id,
        **_tokenizer_options(args),
        **_generator_options(args),
    )
    print(summary)


def _check(args: argparse.Namespace) -> None:
    """Raises ValueError for paths and options that are wrong, before anything slow is imported."""
    if args.tokenizer is None and _generator_options(args):
        raise ValueError("--image-size, --num-heads and --text-encoder are for generators, which need --tokenizer.")
    if args.tokenizer is not None and _tokenizer_options(args):
        raise ValueError("--network-range and --no-codebook-l2-norm are for tokenizers. Convert --tokenizer first.")
    is_file_on_hub = re.fullmatch(f"{REPO_ID}:.+", args.source) is not None
    if not os.path.isfile(args.source) and not is_file_on_hub:
        raise ValueError(f"There is no file `{args.source}`. Pass an existing one, or `org/repo:file` on the Hub.")
    check_new_folder(args.output)


def _tokenizer_options(args: argparse.Namespace) -> dict[str, Any]:
    """Options of the command line that apply to tokenizers alone."""
    options: dict[str, Any] = {}
    if args.no_codebook_l2_norm:
        options["codebook_l2_norm"] = False
    if args.network_range is not None:
        options["network_range"] = tuple(args.network_range)
    return options


def _generator_options(args: argparse.Namespace) -> dict[str, Any]:
    """Options of the command line that apply to generators alone."""
    options: dict[str, Any] = {}
    for name in ("image_size", "num_attention_heads", "text_encoder"):
        value = getattr(args, name)
        if value is not None:
            options[name] = value
    return options

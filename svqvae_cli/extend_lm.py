"""Adds image tokens to a causal language model.

Writes a folder with the language model, its tokenizer and chat template, a
processor for texts and images, and the image tokenizer in vqvae/. The rows of
the old tokens stay as they are.

  svqvae extend-lm org/lm --output lm-with-images
"""

import argparse

from svqvae_cli.arguments import Parser, grid, model, not_empty, seed
from svqvae_cli.files import check_source
from svqvae_files.file_names import BUNDLED
from svqvae_files.outputs import check_new_folder


def add_arguments(parser: Parser) -> None:
    """Adds the arguments."""
    parser.option("lm", model, "LM", "causal language model: folder or Hub id")
    parser.option("--vqvae", model, "MODEL", "image tokenizer: folder or Hub id (default: bundled)")
    parser.add_output("folder to create")
    parser.option("--grids", grid, "ROWSxCOLUMNS", "sizes of images in codes (default: the tokenizer's)", nargs="+")
    parser.option("--license", not_empty, "ID", "licence for the card (default: from the sources' cards)")
    parser.option("--seed", seed, "S", "seed of the new rows (default: 0)", default=0)


def run(args: argparse.Namespace) -> None:
    """Extends a language model."""
    vqvae = args.vqvae
    if vqvae is None:
        vqvae = BUNDLED["bundled"]
    for source in (args.lm, vqvae):
        check_source(source)
    check_new_folder(args.output)
    from svqvae_cli.loading import explain_loading, is_tokenizer, load_model
    from svqvae_hf.hub.repositories import bundled_name
    from svqvae_hf.language.extension import extend_language_model

    if is_tokenizer(args.lm):
        name = bundled_name(args.lm) or args.lm
        raise ValueError(
            f"LM must be a causal language model, but `{name}` is an image tokenizer. Pass it as --vqvae."
        )
    # Loads the image tokenizer once for its errors, which name --vqvae here. `extend_language_model` loads it again,
    # but all errors of that block name LM.
    load_model(vqvae, "cpu", "float32")
    with explain_loading(args.lm):
        vocabulary = extend_language_model(args.lm, args.output, vqvae, args.grids, args.seed, args.license)
    grids = ", ".join(f"{rows} x {columns}" for rows, columns in vocabulary.grids)
    tokens = f"image tokens {vocabulary.first_token} to {vocabulary.stop - 1}"
    print(f"written  {args.output} ({tokens}, grids {grids})")

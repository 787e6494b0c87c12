"""Exports a model to ONNX.

Writes one graph from images to ids and one from ids to images, for any batch
size, height and width. Compares them with the model before it keeps them.

  svqvae export org/svqvae --output graphs
"""

import argparse

from svqvae_cli.arguments import Parser, model
from svqvae_cli.errors import require_extra
from svqvae_cli.files import check_source
from svqvae_files.outputs import check_new_folder


def add_arguments(parser: Parser) -> None:
    """Adds the arguments."""
    parser.option("model", model, "MODEL", "model folder or Hub id")
    parser.add_output("folder to create")


def run(args: argparse.Namespace) -> None:
    """Writes a model as two graphs, and prints how close they are to it."""
    check_source(args.model)
    check_new_folder(args.output)
    with require_extra("export", "export"):
        from svqvae_hf.export.export import export_graphs
    from svqvae_cli.loading import load_model

    model = load_model(args.model, "cpu", "float32")
    print(export_graphs(model, args.output))

"""Exports a model to ONNX, or as a web page.

Writes one graph from images to ids and one from ids to images, for any batch
size, height and width. Compares them with the model before it keeps them.

With --web, writes a folder of static files instead: a page that runs a
language model, a tokenizer or one of each in the browser.

  svqvae export org/svqvae --output graphs
  svqvae export scenes bundled --web --output page
"""

import argparse
from typing import Any

from svqvae_cli.arguments import Parser, forbid_options, model, path
from svqvae_cli.errors import require_extra
from svqvae_cli.files import check_source
from svqvae_files.outputs import check_new_folder


def add_arguments(parser: Parser) -> None:
    """Adds the arguments."""
    parser.option("models", model, "MODEL", "model folder or Hub id; with --web up to two", nargs="+")
    parser.add_output("folder to create")
    parser.flag("--web", "write a web page")
    runtime_help = "folder with the two archives of the page's runtime (default: npm downloads them)"
    parser.option("--runtime", path, "DIR", runtime_help)


def run(args: argparse.Namespace) -> None:
    """Writes graphs or a page, and prints how close the graphs are to the models."""
    for source in args.models:
        check_source(source)
    check_new_folder(args.output)
    if args.web:
        _export_page(args)
        return
    forbid_options(args, "applies to --web alone", "runtime")
    if len(args.models) > 1:
        raise ValueError(f"MODEL must be one tokenizer without --web, got {len(args.models)}. Export them one by one.")
    with require_extra("export", extra="export"):
        from svqvae_hf.export.export import export_graphs
    from svqvae_cli.loading import load_model

    model = load_model(args.models[0], "cpu", "float32")
    print(export_graphs(model, args.output))


def _export_page(args: argparse.Namespace) -> None:
    """Writes a page with a language model, a tokenizer or both."""
    with require_extra("export", extra="export"):
        from svqvae_hf.export.web import DrawingModel, PhotographModel, export_page
    from svqvae_cli.loading import load_generator, load_model
    from svqvae_hf.hub.repositories import public_name
    from svqvae_hf.language.image_language_model import ImageLanguageModel

    drawing: DrawingModel | None = None
    photographs: PhotographModel | None = None
    for source in args.models:
        card = _read_metadata(source)
        name = public_name(source)
        license = str(card.get("license", "not stated"))
        if ImageLanguageModel.is_at(source):
            _check_only_one(drawing, "language model", args.models)
            language_model = load_generator(source, "cpu", "float32")
            drawing = DrawingModel(language_model, name, license, _example_prompts(card))
        else:
            _check_only_one(photographs, "tokenizer", args.models)
            tokenizer = load_model(source, "cpu", "float32")
            photographs = PhotographModel(tokenizer, name, license)
    print(export_page(args.output, drawing, photographs, args.runtime))


def _check_only_one(earlier_model: object, kind: str, sources: list[str]) -> None:
    """Raises if a model of this kind came before."""
    if earlier_model is not None:
        raise ValueError(f"MODEL must be at most one {kind}, got {' '.join(sources)}. Export them to two pages.")


def _read_metadata(source: str) -> dict[str, Any]:
    """Metadata of a model's card, such as its licence; empty without a card."""
    from svqvae_hf.hub.origin import read_card

    card = read_card(source)
    if card is None:
        return {}
    return card.data.to_dict()


def _example_prompts(card: dict[str, Any]) -> tuple[str, ...]:
    """Captions that a model's card proposes."""
    prompts = []
    for example in card.get("widget", []):
        if "text" in example:
            prompts.append(example["text"])
    return tuple(prompts)

"""Serves a web page that encodes and decodes photographs.

Shows original and reconstruction under one slider and the ids as a picture.
The page needs no network. With --generator, the page generates images instead:
they grow step by step, and painted parts are generated anew.

  svqvae demo --model org/svqvae
"""

import argparse
import threading

from svqvae_cli.arguments import Parser, model, not_empty, positive
from svqvae_cli.errors import require_extra
from svqvae_cli.files import check_source
from svqvae_files.file_names import DEFAULT_GENERATOR


def add_arguments(parser: Parser) -> None:
    """Adds the arguments."""
    parser.add_model()
    generator_help = "serve a page that generates images; folder or Hub id (without one: the bundled language model)"
    parser.option("--generator", model, "GENERATOR", generator_help, nargs="?", const=DEFAULT_GENERATOR)
    parser.option("--host", not_empty, "ADDRESS", "address to listen on (default: 127.0.0.1)", default="127.0.0.1")
    parser.option("--port", positive, "PORT", "port to listen on (default: the first free one from 7860)")


def run(args: argparse.Namespace) -> None:
    """Serves the page until it is interrupted."""
    if args.model and args.generator is not None:
        raise ValueError("--generator brings its own model. Leave out --model or --generator.")
    if args.port is not None and args.port > 65_535:
        raise ValueError(f"--port must be at most 65535, got {args.port}.")
    check_source(args.generator or args.model)
    # These imports take seconds. They follow the checks, so that a user's mistake is reported at once.
    with require_extra("demo", "demo"):
        from svqvae_hf.demo import generator_page
        from svqvae_hf.demo.hints import SCENES
        from svqvae_hf.demo.page import Page, build, serving
    from svqvae_cli.loading import load_generator, load_model

    if args.generator is None:
        model = load_model(args.model, args.device, args.dtype)
        blocks = build(Page(model))
    else:
        pipeline = load_generator(args.generator, args.device, args.dtype)
        is_bundled = args.generator == DEFAULT_GENERATOR
        hints = SCENES if is_bundled else None
        blocks = generator_page.build(generator_page.GeneratorPage(pipeline, hints))
    with serving(blocks, args.host, args.port) as address:
        print(f"{address} shows the page until Ctrl-C", flush=True)
        threading.Event().wait()  # without end, because nothing sets the event

"""Describes images with a language model that has image tokens.

Writes NAME.txt with a text for each image, by greedy decoding, in the subfolder
that the image was found in, and prints it. Images that cannot be read are
named and skipped. The same command resumes an interrupted run. A model knows
only what it was trained on: the bundled model `scenes` describes a photograph
as a scene of emoji.

  svqvae caption photos --model org/lm-with-images --output out
"""

import argparse
import sys
from typing import Any

from svqvae_cli.arguments import Parser, model, positive
from svqvae_cli.errors import one_line
from svqvae_cli.files import InputFile, check_trained, find_images
from svqvae_cli.runs import Run


def add_arguments(parser: Parser) -> None:
    """Adds the arguments."""
    parser.add_images()
    parser.option("--model", model, "LM", "language model: folder or Hub id", required=True)
    parser.option("--prompt", str, "TEXT", "text after each image (default: none)", default="")
    parser.option("--max-tokens", positive, "N", "largest number of tokens of a text (default: 64)", default=64)
    parser.add_device()
    parser.add_dtype()


def run(args: argparse.Namespace) -> None:
    """Writes and prints a text for each image."""
    check_trained(args.model)
    files = find_images(args)
    targets = {file: [file.target(args.output, ".txt")] for file in files}
    with Run(args, targets, "texts") as work:
        if work.todo:
            _caption(args, work)


def _caption(args: argparse.Namespace, work: Run[InputFile]) -> None:
    """Describes the images that are not described yet."""
    from svqvae_cli.loading import check_not_tokenizer, load_pretrained
    from svqvae_files.outputs import write_file
    from svqvae_hf.language.image_language_model import ImageLanguageModel
    from svqvae_hf.models.image_files import load_image

    check_not_tokenizer(args.model)
    model = load_pretrained(ImageLanguageModel, args.model, args.device, args.dtype)
    _warn_of_other_images(model)
    for file, image in work.read(load_image):
        with work.attempt(file):
            text = model.caption([image], args.prompt, args.max_tokens)[0]
            path = work.outputs(file)[0]
            write_file(path, f"{text}\n".encode())
            name = one_line(str(file.name))
            print(f"{name}: {text}")


def _warn_of_other_images(model: Any) -> None:
    """Says on stderr that a model that lists its objects describes other images wrongly."""
    if model.known_objects is None or not model.known_objects.objects:
        return
    num_objects = len(model.known_objects.objects)
    print(
        f"svqvae: the model knows only pictures of {num_objects} objects, so its captions of other images, such as "
        "photographs, are wrong",
        file=sys.stderr,
    )

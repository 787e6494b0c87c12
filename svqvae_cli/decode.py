"""Decodes token files or a token set to images.

Writes one image per scale: NAME_x1.png and so on, in the subfolder that the
token file was found in, or that the image of a row had. Rows without a name
of their own have their number, 00000012_x1.png.
The model must have the codebook that they were encoded with. Token files that
cannot be read, that do not fit the model or the tiles, or whose images are
too large for memory, are named and skipped. The same command resumes an
interrupted run.

  svqvae decode tokens --output out
"""

import argparse
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from svqvae_cli.arguments import Parser, check_large, forbid_options, not_empty, positive
from svqvae_cli.errors import prefix_errors
from svqvae_cli.files import InputFile, check_file, check_output, check_source, find_inputs, is_token_set
from svqvae_cli.output_folder import OutputFolder, Source
from svqvae_cli.runs import Run, print_leftovers
from svqvae_files.file_names import TOKEN_SUFFIXES
from svqvae_files.identity import InputIdentity

LARGE_ENDING = "_x1.tif"  # of an image that is too large for memory


def add_arguments(parser: Parser) -> None:
    """Adds the arguments."""
    inputs_help = (
        "token files, folders of them, which are searched with their subfolders, or globs; or one token set: its "
        "folder, its URL or its name on the Hub"
    )
    parser.add_files(inputs_help, not_empty)
    parser.add_model()
    parser.add_tiles(tile_size="as encoded", overlap="as encoded")
    parser.option("--max-images", positive, "N", "stop after N rows of a token set (default: all)")
    parser.add_large()


def run(args: argparse.Namespace) -> None:
    """Writes the images of token files or of a token set, with the tiles that they were encoded with."""
    check_large(args)
    check_source(args.model)
    if any(is_token_set(name) for name in args.inputs):
        _decode_set(args)
    else:
        _decode_files(args)


def _decode_set(args: argparse.Namespace) -> None:
    """Decodes the rows of a token set that are not decoded yet."""
    if len(args.inputs) > 1:
        raise ValueError(f"a token set must be the only INPUT, got {len(args.inputs)}. Decode each on its own.")
    forbid_options(args, "is not for token sets", "tile_size", "overlap", "large")
    check_output(args.output)
    name = args.inputs[0]

    from svqvae_cli.loading import load_model, require_context_model
    from svqvae_hf.models.checks import check_same_codebook
    from svqvae_hf.token_sets.decoding import detokenize_set, first_images
    from svqvae_hf.token_sets.settings import read_settings

    settings = read_settings(name)  # before the model is loaded, so that a wrong name is an error at once
    folder = OutputFolder(args)
    source = _source_of_set(name, folder)
    folder.holds(first_images(name, args.output), source)  # raises if the first images exist, but are not of this set
    model = load_model(args.model, args.device, args.dtype)
    context_model = None
    if settings.context_model is not None:
        context_model = require_context_model(model, args.model)
    with prefix_errors(name), closing(folder):
        check_same_codebook(model, settings, "--model")
        print_leftovers(folder.delete_versions_before(source))
        num_written, num_kept = detokenize_set(
            model,
            name,
            args.output,
            max_images=args.max_images,
            keep=partial(folder.holds, source=source),
            writing=partial(_recorded, folder=folder, source=source),
            context_model=context_model,
        )
    if num_kept:
        print(f"resumed: {num_kept:,} of {num_written + num_kept:,} images were there")
    print(f"written  {args.output} (images: {num_written})")


def _source_of_set(name: str, folder: OutputFolder) -> Source:
    """A token set as the source of images: its place and the digest of its settings and its files."""
    from svqvae_files.identity import value_digest
    from svqvae_hf.token_sets.manifest import MANIFEST_FILE
    from svqvae_hf.token_sets.settings import SETTINGS_FILE

    settings = _text_of_set_file(name, SETTINGS_FILE)
    manifest = _text_of_set_file(name, MANIFEST_FILE)
    digest = value_digest([settings, manifest])
    # The set as a whole is not a file in a folder, so it has no name there and no size. The digest identifies it.
    identity = InputIdentity(name="", size=0, version=digest)
    if Path(name).exists():
        return folder.source(Path(name), identity)
    return Source(folder=name, input=identity)  # the URL or the name on the Hub, in place of a folder


def _text_of_set_file(name: str, file: str) -> str | None:
    """Content of a file of a token set, as a text for a digest; `None` if the set has no such file."""
    from svqvae_hf.token_sets.settings import read_set_file

    content = read_set_file(name, file)
    if content is None:
        return None
    return content.decode(errors="replace")


@contextmanager
def _recorded(outputs: Sequence[Path], folder: OutputFolder, source: Source) -> Iterator[None]:
    """Records the images of a row, before and after the block writes them."""
    folder.begin(outputs, source, folder.recorded_outputs())
    yield
    folder.finish(outputs)


def _decode_files(args: argparse.Namespace) -> None:
    """Decodes token files that are not decoded yet."""
    forbid_options(args, "is for token sets", "max_images")
    inputs = find_inputs(args.inputs, TOKEN_SUFFIXES, args.output)
    targets = {file: _targets(file, args) for file in inputs}
    with Run(args, targets, "images") as work:
        if not work.todo:
            return

        from svqvae_cli.loading import load_model

        model = load_model(args.model, args.device, args.dtype)
        read_tokens = partial(_read_tokens, model=model, args=args)
        for file, tokens in work.read(read_tokens):  # skips files that cannot be read
            with work.attempt(file, ValueError):  # skips the file if a ValueError is raised here
                with prefix_errors(file.path):
                    _decode_file(file, tokens, model, args, work)


def _targets(file: InputFile, args: argparse.Namespace) -> list[Path]:
    """Paths of the images of a token file; none if the file cannot be read."""
    if args.large:  # encoded at scale 1 alone
        return [file.target(args.output, LARGE_ENDING)]

    from svqvae_files.outputs import scale_endings
    from svqvae_hf.tokens.token_files import load_scales

    try:
        check_file(file.path)
        endings = scale_endings(load_scales(file.path))
    except (OSError, ValueError):  # `Run.read` will report the error, and count the file as skipped
        return []
    return [file.target(args.output, ending) for ending in endings]


def _decode_file(file: InputFile, tokens: Any, model: Any, args: argparse.Namespace, work: Run[InputFile]) -> None:
    """Writes the images of a token file, from its content."""
    from svqvae_files.outputs import save_png
    from svqvae_hf.models.checks import check_same_codebook
    from svqvae_hf.tokens.image_tokens import choose_tiles, decode_image

    check_same_codebook(model, tokens, "--model")
    tile_options = _tile_options(args, tokens.tile_size, tokens.overlap)
    if args.large:
        _decode_large_file(file, tokens, model, tile_options, work)
        return
    tiles = choose_tiles(model, tokens.height, tokens.width, tokens.scales, **tile_options)
    images = decode_image(model, tokens, tiles)
    for image, path in zip(images, work.outputs(file), strict=True):
        save_png(image, path)


def _decode_large_file(
    file: InputFile, tokens: Any, model: Any, tile_options: dict[str, Any], work: Run[InputFile]
) -> None:
    """Writes the image of a token file as a TIFF file, row of tiles by row of tiles."""
    from svqvae_hf.large.large_images import decode_large

    tiles = model.tiles_of_call(**tile_options)
    path = work.outputs(file)[0]
    decode_large(model, tokens, path, tiles)


def _read_tokens(path: Path, model: Any, args: argparse.Namespace) -> Any:
    """Reads a token file, compressed or not."""
    from svqvae_hf.tokens.token_files import is_compressed, load_tokens

    if is_compressed(path):
        return _read_compressed(path, model, args)
    return load_tokens(path)


def _read_compressed(path: Path, model: Any, args: argparse.Namespace) -> Any:
    """Reads a compressed token file. Its tiles are checked before its ids are decoded, which takes long."""
    from svqvae_cli.loading import require_context_model
    from svqvae_hf.tokens.image_tokens import choose_tiles
    from svqvae_hf.tokens.token_files import load_compressed, load_tokens

    record = load_compressed(path).record  # sizes and scales, without the ids
    tile_options = _tile_options(args, record["tile_size"], record["overlap"])
    # The tiles are chosen again when the image is decoded. Here they are only checked: both calls raise if the tiles
    # do not fit.
    with prefix_errors(path):
        if args.large:
            model.tiles_of_call(**tile_options)
        else:
            choose_tiles(model, record["height"], record["width"], record["scales"], **tile_options)
    return load_tokens(path, require_context_model(model, args.model))


def _tile_options(
    args: argparse.Namespace, stored_tile_size: int | None, stored_overlap: int | None
) -> dict[str, Any]:
    """Tile size and overlap of the command line, or else the values that a token file stores."""
    tile_size = args.tile_size
    if tile_size is None:
        tile_size = stored_tile_size
    overlap = args.overlap
    if overlap is None:
        overlap = stored_overlap
    return {"tile_size": tile_size, "overlap": overlap}

"""Arguments that several commands share, and types of arguments."""

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

SCALE_SOURCES = ("latents", "image")  # as in `svqvae_hf.models.checks`
DTYPES = ("float32", "bfloat16", "float16")
TILE_SIZE = 256  # pixels, as in `SVQVAE.enable_tiling`
OVERLAP = 32  # pixels, as in `SVQVAE.enable_tiling`
TILES_DEFAULT = f"{TILE_SIZE} for images that would take more than 1 GiB as a whole, otherwise none"

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
Group: TypeAlias = "argparse._ActionsContainer"  # a parser, or a group of its options


class Scales(argparse.Action):
    """Stores scales. They must differ, because they name files."""

    def __call__(self, parser: argparse.ArgumentParser, args: argparse.Namespace, values: Any, _: Any = None) -> None:
        """Raises ValueError for two equal scales."""
        if len({f"{value:g}" for value in values}) < len(values):
            parser.error(f"--scales must differ within six digits, got {' '.join(map(str, values))}.")
        setattr(args, self.dest, values)


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps line breaks, with a wide column of options."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30)


def add_command(
    commands: Commands,
    name: str,
    run: Callable[[argparse.Namespace], None],
    summary: str,
    details: str,
    example: str,
) -> argparse.ArgumentParser:
    """Adds a command without arguments.

    Args:
        commands (`argparse._SubParsersAction`): Commands of the parser.
        name (`str`): Word on the command line.
        run (`Callable`): Body of the command.
        summary (`str`): One line, which `svqvae --help` shows too.
        details (`str`): Lines of at most 80 characters.
        example (`str`): Arguments of an example.
    """
    parser = commands.add_parser(
        name,
        help=summary,
        description=f"{summary}.\n{details}",
        epilog=f"example:\n  svqvae {name} {example}",
        formatter_class=HelpFormatter,
    )
    parser.set_defaults(run=run, parser=parser)
    return parser


def option(
    parser: Group,
    name: str,
    read: Callable[[str], Any],
    metavar: str | tuple[str, ...],
    help: str,
    **settings: Any,
) -> None:
    """Adds an option with a value, or a positional argument."""
    parser.add_argument(name, type=read, metavar=metavar, help=help, **settings)


def flag(parser: Group, name: str, help: str) -> None:
    """Adds an option without a value."""
    parser.add_argument(name, action="store_true", help=help)


def add_compress(parser: argparse.ArgumentParser) -> None:
    """Adds compression."""
    flag(parser, "--compress", "store likely ids in few bits; decoding needs the context model of MODEL as well")


def add_files(parser: argparse.ArgumentParser, kinds: str) -> None:
    """Adds input files, the folder for output files, and whether these may exist."""
    option(parser, "inputs", path_or_name, "INPUT", kinds, nargs="+")
    add_output(parser, "folder to write to; it is not searched for inputs")
    add_overwrite(parser)


def add_overwrite(parser: argparse.ArgumentParser) -> None:
    """Adds the choice between resuming and replacing."""
    flag(parser, "--overwrite", "replace output files (default: keep those made with the same options)")


def add_images(parser: argparse.ArgumentParser) -> None:
    """Adds everything about encoding image files: files, scales, model and tiles."""
    add_files(parser, "image files, folders of them, which are searched with their subfolders, or globs")
    add_scales(parser, [1.0])
    add_model(parser)
    add_tiles(parser, TILES_DEFAULT, str(OVERLAP))


def add_output(parser: argparse.ArgumentParser, help: str) -> None:
    """Adds the output folder."""
    option(parser, "--output", path, "DIR", help, required=True)


def add_scales(parser: argparse.ArgumentParser, default: list[float], sides: bool = False) -> None:
    """Adds options for the scales to encode at, optionally also as sides in ids, and for what is resized to them."""
    scales = parser.add_mutually_exclusive_group()
    if sides:
        option(scales, "--sides", positive, "IDS", "scales of square crops by their sides in ids", nargs="+")
    scales.add_argument(
        "--scales",
        nargs="+",
        type=scale,
        action=Scales,
        default=default,
        metavar="SCALE",
        help=f"output side over input side, one or more (default: {' '.join(f'{value:g}' for value in default)})",
    )
    parser.add_argument(
        "--scale-from", choices=SCALE_SOURCES, default="image", help="what is resized to each scale (default: image)"
    )


def add_tiles(parser: argparse.ArgumentParser, tile_default: str, overlap_default: str) -> None:
    """Adds tile size and overlap. `tile_default` and `overlap_default` describe the defaults in the help."""
    option(parser, "--tile-size", int, "PIXELS", f"side of a tile, a multiple of f (default: {tile_default})")
    option(parser, "--overlap", int, "PIXELS", f"pixels read beyond a tile's sides (default: {overlap_default})")


def add_model(parser: argparse.ArgumentParser) -> None:
    """Adds the model, its device and its precision."""
    parser.add_argument("--model", type=path_or_name, help="model folder or Hub id (default: the small bundled model)")
    add_device(parser)
    add_dtype(parser)


def add_device(parser: argparse.ArgumentParser) -> None:
    """Adds the device."""
    parser.add_argument(
        "--device", type=not_empty, help="cpu, cuda, cuda:1, mps or xpu (default: a GPU if there is one)"
    )


def add_dtype(parser: argparse.ArgumentParser) -> None:
    """Adds the precision of the weights."""
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="precision of weights (default: float32)")


def add_image_set(parser: argparse.ArgumentParser) -> None:
    """Adds a set of images, local or on the Hub."""
    option(
        parser,
        "data",
        path_or_url,
        "DATA",
        "images, tar or Parquet files, folders or patterns of these, also as URLs; or a set on the Hub",
        nargs="+",
    )
    option(parser, "--config", not_empty, "NAME", "configuration of the data set")
    option(parser, "--split", not_empty, "NAME", "split of the data set, required if it has several")
    option(
        parser,
        "--image-column",
        not_empty,
        "NAME",
        "column of the images, or their suffix in tar files (default: by type)",
    )
    option(parser, "--max-images", int, "N", "stop after N images (default: all)")


def image_set_options(args: argparse.Namespace) -> dict[str, Any]:
    """Options of [`add_image_set`], as the readers of image sets take them."""
    return {key: getattr(args, key) for key in ("config", "split", "image_column", "max_images")}


def path(text: str) -> Path:
    """Reads a path."""
    return Path(path_or_name(text))


def path_or_name(text: str) -> str:
    """Reads a path or a name on the Hub."""
    not_empty(text, " The current folder is `.`.")
    if "://" in text:
        raise argparse.ArgumentTypeError(
            f"`{text}` must be a local path or a name on the Hub, because URLs are not supported here. Copy or mount "
            "it first."
        )
    return text


def path_or_url(text: str) -> str:
    """Reads a path, a name on the Hub or a URL for `fsspec`."""
    return not_empty(text, " The current folder is `.`.")


def not_empty(text: str, advice: str = "") -> str:
    """Reads a string that must not be empty, as an unset shell variable would be."""
    if not text:
        raise argparse.ArgumentTypeError(f"must not be empty. If it is a shell variable, set it.{advice}")
    return text


def grid(text: str) -> tuple[int, int]:
    """Reads rows and columns of codes."""
    rows, separator, columns = text.partition("x")
    if not (separator and rows.isdecimal() and columns.isdecimal() and int(rows) and int(columns)):
        raise argparse.ArgumentTypeError(f"a grid must be rows x columns of codes, such as 16x24, got {text!r}.")
    return int(rows), int(columns)


def scale(text: str) -> float:
    """Reads a scale."""
    return _positive(text, "a scale")


def target(text: str) -> float:
    """Reads a PSNR or a number of bits to reach."""
    return _positive(text, "the target")


def _positive(text: str, what: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{what} must be a finite number above 0, got {text!r}.")
    return value


def positive(text: str) -> int:
    """Reads an integer above 0."""
    if not (text.isdecimal() and text.isascii() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"must be an integer above 0, got {text!r}.")
    return int(text)

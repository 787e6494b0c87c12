"""The parser of commands, with arguments that several of them share, and types of arguments."""

import argparse
import difflib
import logging
import math
import re
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from svqvae_cli.errors import require_extra
from svqvae_files.inputs import check_url, find_bundled, is_url

SCALE_SOURCES = ("image", "latents")
MAX_SCALE = 64
MAX_SEED = 2**62  # of a first image, so that the seeds of the images after it fit in 64 bits
DTYPES = ("float32", "bfloat16", "float16")
TILES = "256 for images that would take more than 1 GiB as a whole, otherwise none"  # as in `SVQVAE.enable_tiling`


class Parser(argparse.ArgumentParser):
    """Parser that keeps the line breaks of the help, and raises its errors."""

    def __init__(self, **settings: Any) -> None:
        formatter = partial(argparse.RawDescriptionHelpFormatter, max_help_position=30)
        super().__init__(formatter_class=formatter, **settings)

    def error(self, message: str) -> NoReturn:
        """Raises instead of printing usage and exiting, so that `main` prints one line."""
        raise ValueError(f"{message} (see `{self.prog} --help`)")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Raises for all options that the command does not have, before missing ones."""
        is_command = self.get_default("parser") is self
        if is_command:
            self._check_options(args or ())
        return super().parse_known_args(args, namespace)

    def _check_options(self, words: Sequence[str]) -> None:
        """Raises for options that the parser does not have.

        Like argparse, it also takes the start of an option, such as `--out` for `--output`.
        """
        options: list[str] = []
        for action in self._actions:
            options += action.option_strings
        faults = []
        for word in words:
            if word == "--":  # all words after it are inputs
                break
            name = word.partition("=")[0]
            if name.startswith("--"):
                faults += _faults_of_option(name, options)
        if faults:
            self.error(" ".join(faults))

    def option(
        self, name: str, read: Callable[[str], Any], metavar: str | tuple[str, ...], help: str, **settings: Any
    ) -> None:
        """Adds an option with a value, or a positional argument."""
        self.add_argument(name, type=read, metavar=metavar, help=help, **settings)

    def choice(self, name: str, choices: Sequence[str], help: str, default: str | None = None) -> None:
        """Adds an option with one of some values."""
        self.add_argument(name, choices=choices, default=default, help=help)

    def flag(self, name: str, help: str) -> None:
        """Adds an option without a value."""
        self.add_argument(name, action="store_true", help=help)

    def add_files(self, kinds: str, read: Callable[[str], str] | None = None) -> None:
        """Adds input files, the folder for output files, and whether these may exist."""
        self.option("inputs", read or path_or_name, "INPUT", kinds, nargs="+")
        self.add_output("folder to write to; it is not searched for inputs")
        self.flag("--overwrite", "replace output files (default: keep those made with the same options)")

    def add_images(self) -> None:
        """Adds image files."""
        self.add_files("image files, folders of them, which are searched with their subfolders, or globs")

    def add_encoding(self) -> None:
        """Adds everything about encoding image files: files, scales, model and tiles."""
        self.add_images()
        self.add_scales(default=[1.0])
        self.add_model()
        self.add_tiles()

    def add_output(self, help: str = "folder to write to") -> None:
        """Adds the output folder."""
        self.option("--output", path, "DIR", help, required=True)

    def add_scales(self, default: list[float]) -> None:
        """Adds the scales to encode at, and whether the image or its latents are resized to them."""
        shown = " ".join(f"{value:g}" for value in default)
        scales_help = f"output side over input side, one or more (default: {shown})"
        self.option("--scales", scale, "SCALE", scales_help, nargs="+", action=_Scales, default=default)
        self.choice("--scale-from", SCALE_SOURCES, "resize this to each scale (default: image)", "image")

    def add_tiles(self, tile_size: str = TILES, overlap: str = "32") -> None:
        """Adds tile size and overlap. The arguments describe the defaults in the help."""
        self.option("--tile-size", int, "PIXELS", f"side of a tile, a multiple of f (default: {tile_size})")
        self.option("--overlap", int, "PIXELS", f"pixels read beyond a tile's sides (default: {overlap})")

    def add_compress(self) -> None:
        """Adds compression."""
        self.flag("--compress", "store likely ids in few bits; decoding needs the context model of MODEL as well")

    def add_large(self) -> None:
        """Adds the option for images larger than memory, see [`check_large`]."""
        self.flag("--large", "process TIFF files by rows of tiles, so that memory does not grow with the image")

    def add_model(self) -> None:
        """Adds the model, its device and its precision."""
        self.option("--model", model, "MODEL", "folder or Hub id (default: bundled, the small model of the package)")
        self.add_device()
        self.add_dtype()

    def add_device(self) -> None:
        """Adds the device."""
        self.option("--device", not_empty, "DEVICE", "cpu, cuda, cuda:1, mps or xpu (default: a GPU if there is one)")

    def add_dtype(self) -> None:
        """Adds the precision of the weights."""
        self.choice("--dtype", DTYPES, "precision of weights (default: float32, often the fastest on CPUs)", "float32")

    def add_image_set(self) -> None:
        """Adds a set of images, local or on the Hub."""
        kinds = "images, tar or Parquet files, folders or patterns of these, also as URLs; or a set on the Hub"
        self.option("data", path_or_url, "DATA", kinds, nargs="+")
        self.option("--config", not_empty, "NAME", "configuration of the data set")
        self.option("--split", not_empty, "NAME", "split of the data set, required if it has several")
        column_help = "column of the images, or their suffix in tar files (default: by type)"
        self.option("--image-column", not_empty, "NAME", column_help)
        self.option("--max-images", int, "N", "read only the first N images, in a folder by name (default: all)")


def _faults_of_option(name: str, options: Sequence[str]) -> list[str]:
    """A sentence about an option that does not exist, or about the start of several options; otherwise none."""
    if name in options:
        return []
    matches = [option for option in options if option.startswith(name)]
    if len(matches) == 1:
        return []
    if not matches:
        return [f"There is no option `{name}`.{nearest(name, options)}"]
    listed = ", ".join(f"`{option}`" for option in matches)
    return [f"`{name}` is the start of several options: {listed}.{nearest(name, matches)}"]


def nearest(word: str, words: Iterable[str]) -> str:
    """A question that names the most similar of some words, if one is similar."""
    for similar_word in difflib.get_close_matches(word, words, 1):
        return f" Did you mean `{similar_word}`?"
    return ""


class _Scales(argparse.Action):
    """Stores scales. They must differ, because they name files."""

    def __call__(self, parser: argparse.ArgumentParser, args: argparse.Namespace, values: Any, _: Any = None) -> None:
        names = {f"{value:g}" for value in values}
        if len(names) < len(values):
            shown = " ".join(str(value) for value in values)
            parser.error(f"--scales must differ within six digits, got {shown}.")
        setattr(args, self.dest, values)


def image_set_options(args: argparse.Namespace) -> dict[str, Any]:
    """Options of [`Parser.add_image_set`], as the readers of image sets take them."""
    return {
        "config": args.config,
        "split": args.split,
        "image_column": args.image_column,
        "max_images": args.max_images,
    }


def forbid_options(args: argparse.Namespace, why: str, *names: str) -> None:
    """Raises ValueError for an option whose value is not the default.

    Args:
        args (`argparse.Namespace`): Parsed command line.
        why (`str`): Why the options are not allowed: the words after the name of the option in the error.
        *names (`str`): Options as attributes of `args`, such as `tile_size`.
    """
    for name in names:
        if getattr(args, name, None) != args.parser.get_default(name):
            raise ValueError(f"--{name.replace('_', '-')} {why}. Leave it out.")


def check_large(args: argparse.Namespace) -> None:
    """Raises ValueError for an option that `--large` excludes, or if its extra is missing."""
    if not args.large:
        return
    forbid_options(args, "is not for --large, which works at scale 1", "scales")
    with require_extra("--large", "large"):
        import tifffile  # noqa: F401
    logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # errors say what it would log


def path(text: str) -> Path:
    """Reads a path."""
    return Path(path_or_name(text))


def path_or_name(text: str) -> str:
    """Reads a path or a name on the Hub."""
    if is_url(text):
        raise argparse.ArgumentTypeError(
            f"`{text}` must be a local path or a name on the Hub, because URLs are not supported here. Copy or mount "
            "it first."
        )
    return not_empty(text)


def model(text: str) -> str:
    """Reads a model: folder, name on the Hub, or of a bundled model."""
    return bundled_folder(path_or_name(text))


def bundled_folder(text: str) -> str:
    """Replaces the name of a bundled model by its folder."""
    try:
        return find_bundled(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def path_or_url(text: str) -> str:
    """Reads a path, a name on the Hub or a URL."""
    try:
        return check_url(not_empty(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def not_empty(text: str) -> str:
    """Reads a string that must not be empty, as an unset shell variable would be."""
    if not text:
        raise argparse.ArgumentTypeError("must not be empty. If it is a shell variable, set it.")
    return text


def grid(text: str) -> tuple[int, int]:
    """Reads rows and columns of codes."""
    sides = re.fullmatch(r"0*([1-9][0-9]*)x0*([1-9][0-9]*)", text)
    if sides is None:
        raise argparse.ArgumentTypeError(f"a grid must be rows x columns of codes, such as 16x24, got {text!r}.")
    return int(sides[1]), int(sides[2])


def seed(text: str) -> int:
    """Reads the seed of a random generator."""
    if not re.fullmatch("-?[0-9]+", text) or abs(int(text)) > MAX_SEED:
        raise argparse.ArgumentTypeError(f"must be an integer of at most {MAX_SEED} (2**62), got {text!r}.")
    return int(text)


def scale(text: str) -> float:
    """Reads a scale."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value <= MAX_SCALE:
        raise argparse.ArgumentTypeError(f"must be a number above 0 and at most {MAX_SCALE}, got {text!r}.")
    return value


def positive(text: str) -> int:
    """Reads an integer above 0."""
    if not re.fullmatch("0*[1-9][0-9]*", text):
        raise argparse.ArgumentTypeError(f"must be an integer above 0, got {text!r}.")
    return int(text)

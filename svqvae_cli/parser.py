"""The command `svqvae`: its arguments and its errors. What the commands do is in `svqvae_cli.commands`.

It is beside the package, not in it, since the package imports diffusers, so that diffusers finds its models, and that
takes seconds. Help and faults of the command line wait for none of it.
"""

import argparse
import io
import math
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import NoReturn, TypeAlias

DTYPES = ("float32", "bfloat16", "float16")
CROPS = ("whole", "whole-flip", "centre", "centre-flip", "ten-crop")  # of `svqvae_hf.data.token_sets`


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        argv (`Sequence[str]`, *optional*): Arguments; those of the process if not given.

    Returns:
        `int`: Exit code: 0; 2 after a user's mistake or too little memory, which one line on stderr explains; 130
        after Ctrl-C; 141 if nobody reads stdout any more.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # removes temporary files on its way out
    if not sys.warnoptions:
        warnings.simplefilter("ignore")  # other libraries' advice to those who call them
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files may be any bytes
    try:
        args = _parse(argv)
        from svqvae_cli import commands

        getattr(commands, args.run)(args)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("svqvae: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        return 141
    except (ValueError, OSError) as error:
        return _fail(str(error))
    except (MemoryError, RuntimeError) as error:
        from svqvae_hf.tokens.image_tokens import is_out_of_memory

        if not is_out_of_memory(error):
            raise
        return _fail("there is not enough memory. Use smaller scales, smaller tiles or smaller images.")
    return 0


def _fail(message: str) -> int:
    # A broken file may put anything into a message, what a terminal obeys, too.
    line = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in " ".join(message.split()))
    print(f"svqvae: error: {line}", file=sys.stderr)
    return 2


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Leaves the printing to `main`, in one line."""
        raise ValueError(f"{message} (see `{self.prog} --help`)")


Commands: TypeAlias = "argparse._SubParsersAction[_Parser]"


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    args, unknown = _parser().parse_known_args(argv)
    if unknown:
        args.command.error(f"unrecognized arguments: {' '.join(unknown)}")
    return args


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="svqvae",
        description="SVQVAE, a multi-scale image tokenizer: images to tokens and back.",
        epilog="example:\n  svqvae reconstruct photo.jpg --output out\n\n`svqvae COMMAND --help` shows one for each.",
        formatter_class=_HelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"svqvae {version('svqvae-hf')}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in (
        _add_reconstruct,
        _add_encode,
        _add_decode,
        _add_tokenize,
        _add_detokenize,
        _add_evaluate,
        _add_convert,
        _add_export,
        _add_generate,
        _add_info,
        _add_demo,
    ):
        add(commands)
    return parser


def _add_reconstruct(commands: Commands) -> None:
    command = _add_command(
        commands,
        "reconstruct",
        "pass images through the model and write what comes back",
        "Writes NAME_x0.5.png and so on, one per scale, and prints for each: tokens, bits\n"
        "per pixel of the original, PSNR against the original resized to that scale, and\n"
        "the share of the codebook that is used. For several images the last lines give\n"
        "sum, means and the share that any of them uses.",
        "photo.jpg --output out --scales 0.5 1 2 --side-by-side",
    )
    _add_images(command)
    command.add_argument(
        "--side-by-side", action="store_true", help="also write NAME_side_by_side.png with the original and all scales"
    )
    _add_large(command, decodes=True)


def _add_encode(commands: Commands) -> None:
    command = _add_command(
        commands,
        "encode",
        "write images as token files",
        "Writes NAME.safetensors with the ids at all scales.",
        "'photos/*.jpg' --output tokens --scales 1",
    )
    _add_images(command)
    _add_large(command, decodes=False)


def _add_decode(commands: Commands) -> None:
    command = _add_command(
        commands,
        "decode",
        "write the images of token files",
        "Writes NAME_x1.png and so on, one per scale in the file. The model must have the\n"
        "codebook that the file was encoded with.",
        "tokens --output out",
    )
    _add_files(command, "token files, folders of them, or globs")
    _add_model(command, tile_size=None, overlap=None)
    _add_large(command, decodes=True)


def _add_tokenize(commands: Commands) -> None:
    command = _add_command(
        commands,
        "tokenize",
        "make a token set of an image set",
        "Writes the ids of all images as Parquet, which `datasets` reads. A run that was\n"
        "killed goes on when it is started again. On several GPUs:\n"
        "  accelerate launch -m svqvae_cli tokenize DATA OUT",
        "photos tokens --crops centre --resolution 256 --scales 0.5 1",
    )
    _add_image_set(command)
    command.add_argument("out", type=_path, metavar="OUT", help="folder to make")
    _add_scales(command, [1.0])
    command.add_argument(
        "--crops",
        choices=CROPS,
        default="whole",
        help="what of an image becomes a row: the whole or a crop, also flipped, or ten crops (default: whole)",
    )
    command.add_argument("--resolution", type=int, metavar="PIXELS", help="side of crops")
    command.add_argument(
        "--keep",
        nargs="+",
        type=_not_empty,
        default=[],
        metavar="NAME",
        help="more columns of the set to keep (default: label, caption and text, where they are there)",
    )
    command.add_argument(
        "--batch-size",
        type=int,
        default=1,
        metavar="N",
        help="crops of equal size encoded together; with more than 1 a few ids may differ, by rounding (default: 1)",
    )
    command.add_argument(
        "--shard-size", type=int, default=1000, metavar="N", help="images in a Parquet file (default: 1000)"
    )
    command.add_argument(
        "--workers", type=int, metavar="N", help="processes that read images (default: one a core, at most 4)"
    )
    command.add_argument("--license", type=_not_empty, help="licence of the images, as the Hub names it, for the card")
    command.add_argument("--push-to-hub", type=_not_empty, metavar="ORG/NAME", help="upload the set")
    command.add_argument("--private", action="store_true", default=None, help="make a new repository private")
    _add_model(command, tile_size=256, overlap=32)


def _add_detokenize(commands: Commands) -> None:
    command = _add_command(
        commands,
        "detokenize",
        "write the images of a token set",
        "Writes 00000000_x1.png and so on, one per row and scale. The model must have the\n"
        "codebook that the set was made with.",
        "tokens --output out --max-images 16",
    )
    command.add_argument(
        "tokens", type=_path_or_name, metavar="TOKENS", help="folder of the token set, or its name on the Hub"
    )
    command.add_argument("--output", required=True, type=_path, metavar="DIR", help="folder to write to")
    command.add_argument("--max-images", type=int, metavar="N", help="stop after so many rows (default: all)")
    _add_model_choice(command)


def _add_evaluate(commands: Commands) -> None:
    command = _add_command(
        commands,
        "evaluate",
        "measure a model on a set of images",
        "Writes report.json, report.md, plots and metadata of a card. On several GPUs:\n"
        "  accelerate launch -m svqvae_cli evaluate MODEL DATA --output DIR",
        "org/svqvae photos --output report --scales 1 0.5 0.25",
    )
    command.add_argument("model", type=_path_or_name, metavar="MODEL", help="model folder or Hub id")
    _add_image_set(command)
    command.add_argument("--output", required=True, type=_path, metavar="DIR", help="folder to write to")
    command.add_argument(
        "--resolution",
        type=int,
        metavar="PIXELS",
        help="resize the shorter side and crop the centre to this side (default: images as they are)",
    )
    _add_scales(command, [1.0, 0.5, 0.25])
    command.add_argument(
        "--modes",
        nargs="+",
        choices=("plain", "tiled"),
        default=["plain", "tiled"],
        help="images as a whole, by tiles, or both (default: both)",
    )
    _add_tiles(command, ("the model's sample_size", "32, or less where the tile is too small"))
    command.add_argument(
        "--lpips-weights", type=_path, metavar="FILE", help="weights of LPIPS's network, for LPIPS to be computed"
    )
    command.add_argument(
        "--lpips-net", choices=("alex", "vgg", "squeeze"), default="alex", help="which one it is (default: alex)"
    )
    command.add_argument(
        "--inception-weights", type=_path, metavar="FILE", help="weights of FID's network, for rFID to be computed"
    )
    _add_device(command)


def _add_convert(commands: Commands) -> None:
    command = _add_command(
        commands,
        "convert",
        "make a Hub repository of an original checkpoint",
        "Reads checkpoints of SVQVAE, LlamaGen, FlexVAR, multi-scale Lightning training\n"
        "and taming-transformers; writes card, config and safetensors, and checks them.",
        "vq_ds8_c2i.pt llamagen-f8 --license mit --variant fp16",
    )
    command.add_argument(
        "source", type=_path_or_name, metavar="SOURCE", help="checkpoint file, or org/repo:file on the Hub"
    )
    command.add_argument("out", type=_path, metavar="OUT", help="folder to make")
    command.add_argument("--use-ema", action="store_true", help="take the averaged weights of a LlamaGen file")
    command.add_argument(
        "--network-range",
        nargs=2,
        type=float,
        metavar=("LOW", "HIGH"),
        help="black and white of the images that it was trained on (default: those of its format)",
    )
    command.add_argument(
        "--no-codebook-l2-norm",
        dest="codebook_l2_norm",
        action="store_false",
        default=None,
        help="its codebook is not normalised (default: as in its format)",
    )
    command.add_argument("--variant", choices=("fp16", "bf16"), help="also write half precision weights")
    command.add_argument(
        "--license",
        type=_not_empty,
        help="licence of the source, as the Hub names it, for the card (default: unknown)",
    )
    command.add_argument("--push-to-hub", type=_not_empty, metavar="ORG/NAME", help="upload the result")
    command.add_argument("--private", action="store_true", default=None, help="make a new repository private")
    command.add_argument("--create-pr", action="store_true", help="open a pull request instead of a commit")


def _add_export(commands: Commands) -> None:
    command = _add_command(
        commands,
        "export",
        "write a model as graphs for ONNX or torch.export",
        "Writes one graph from images to ids and one from ids to images, for any batch,\n"
        "height and width, and compares them with the model before they are kept.",
        "org/svqvae --output graphs --dtype float16",
    )
    command.add_argument("model", type=_path_or_name, metavar="MODEL", help="model folder or Hub id")
    command.add_argument("--output", required=True, type=_path, metavar="DIR", help="folder to make")
    command.add_argument(
        "--format", choices=("onnx", "torch"), default="onnx", help="encoder.onnx or encoder.pt2 (default: onnx)"
    )
    command.add_argument(
        "--dtype", choices=("float32", "float16"), default="float32", help="of weights and images (default: float32)"
    )


def _add_generate(commands: Commands) -> None:
    command = _add_command(
        commands,
        "generate",
        "make new images by an autoregressive pipeline",
        "Writes class_N_0_x1.png and so on, or image_0_x1.png without --class, and all of\n"
        "them on sheet.png, a row for each class. All images are sampled as one batch.",
        "org/dreams --class 3 7 --num-images 4 --output out",
    )
    command.add_argument("model", type=_path_or_name, metavar="MODEL", help="folder or Hub id of the pipeline")
    command.add_argument("--output", required=True, type=_path, metavar="DIR", help="folder to write to")
    command.add_argument(
        "--class",
        dest="class_labels",
        nargs="+",
        type=int,
        metavar="N",
        help="labels, each for a row of images (default: images of no class)",
    )
    command.add_argument(
        "--num-images", type=int, default=1, metavar="COUNT", help="images of each class (default: 1)"
    )
    command.add_argument(
        "--scales", nargs="+", type=_scale, metavar="SCALE", help="of those trained (default: the finest)"
    )
    command.add_argument(
        "--guidance-scale",
        type=float,
        default=1.0,
        metavar="SCALE",
        help="of classifier-free guidance (default: 1)",
    )
    command.add_argument(
        "--temperature",
        type=float,
        default=1.0,
        metavar="T",
        help="of sampling; 0 takes the most likely ids (default: 1)",
    )
    command.add_argument("--top-k", type=int, default=0, metavar="K", help="likely ids to sample from (default: all)")
    command.add_argument(
        "--top-p", type=float, default=1.0, metavar="SHARE", help="of the probability to sample from (default: 1)"
    )
    command.add_argument(
        "--seed", type=int, default=0, metavar="S", help="of the first image; the next has the next (default: 0)"
    )
    _add_device(command)
    command.add_argument("--dtype", choices=DTYPES, default="float32", help="(default: float32)")


def _add_info(commands: Commands) -> None:
    summary = "print what a model, an original checkpoint or a token file is"
    command = _add_command(commands, "info", summary, "", "photo.safetensors")
    command.add_argument(
        "path",
        type=_path_or_name,
        metavar="PATH",
        help="model folder, Hub id, checkpoint file, org/repo:file, or token file",
    )


def _add_demo(commands: Commands) -> None:
    command = _add_command(
        commands,
        "demo",
        "show a page where photographs are encoded and decoded",
        "Original and result under one slider, the ids as a picture, token files up and\n"
        "down. The page needs no network. At a --host that is not of this machine alone,\n"
        "visitors may choose public models of the Hub, not folders or private models.",
        "--model org/svqvae",
    )
    _add_model_choice(command)
    command.add_argument(
        "--host",
        type=_not_empty,
        default="127.0.0.1",
        metavar="ADDRESS",
        help="address to listen at (default: 127.0.0.1)",
    )
    command.add_argument("--port", type=_port, help="port to listen at (default: the first free one from 7860)")


def _add_command(commands: Commands, run: str, summary: str, details: str, example: str) -> _Parser:
    command = commands.add_parser(
        run,
        help=summary,
        description=f"{summary}.\n{details}",
        epilog=f"example:\n  svqvae {run} {example}",
        formatter_class=_HelpFormatter,
    )
    command.set_defaults(run=run, command=command)
    return command


def _add_images(command: _Parser) -> None:
    """Arguments of what encodes images."""
    _add_files(command, "image files, folders of them, or globs")
    _add_scales(command, [1.0])
    _add_model(command, tile_size=256, overlap=32)


def _add_scales(command: _Parser, default: list[float]) -> None:
    command.add_argument(
        "--scales",
        nargs="+",
        type=_scale,
        default=default,
        metavar="SCALE",
        help=f"output side over input side, one or more (default: {' '.join(f'{scale:g}' for scale in default)})",
    )


def _add_large(command: _Parser, decodes: bool) -> None:
    """Arguments of images larger than memory."""
    command.add_argument(
        "--large",
        action="store_true",
        help="go by rows of tiles, in little memory whatever the size; images are TIFF files or Zarr arrays",
    )
    if decodes:
        command.add_argument(
            "--format", choices=("tif", "zarr"), help="with --large: BigTIFF or Zarr to write (default: tif)"
        )
    command.add_argument(
        "--resume",
        action="store_true",
        help="with --large: go on where an interrupted run of the same command stopped",
    )


def _add_image_set(command: _Parser) -> None:
    command.add_argument(
        "data",
        nargs="+",
        type=_path_or_name,
        metavar="DATA",
        help="image files, folders of them, or globs; or the name of a set on the Hub, which is streamed",
    )
    command.add_argument("--config", type=_not_empty, metavar="NAME", help="configuration of the set")
    command.add_argument("--split", type=_not_empty, metavar="NAME", help="split of the set, needed if it has several")
    command.add_argument(
        "--image-column",
        type=_not_empty,
        default="image",
        metavar="NAME",
        help="column of the set that holds images (default: image)",
    )
    command.add_argument("--max-images", type=int, metavar="N", help="stop after so many (default: all)")


def _add_files(command: _Parser, what: str) -> None:
    command.add_argument("inputs", nargs="+", type=_path_or_name, metavar="INPUT", help=what)
    command.add_argument("--output", required=True, type=_path, metavar="DIR", help="folder to write to")


def _add_model(command: _Parser, tile_size: int | None, overlap: int | None) -> None:
    """The model and how it works; with `None`, tiles are those of the token file."""
    _add_model_choice(command)
    _add_tiles(command, (tile_size or "as encoded", overlap or "as encoded"), tile_size, overlap)


def _add_model_choice(command: _Parser) -> None:
    command.add_argument(
        "--model", type=_path_or_name, help="model folder or Hub id (default: the small bundled model)"
    )
    _add_device(command)
    command.add_argument("--dtype", choices=DTYPES, default="float32", help="(default: float32)")


def _add_device(command: _Parser) -> None:
    command.add_argument(
        "--device", type=_not_empty, help="cpu, cuda, cuda:1, mps or xpu (default: a GPU if there is one)"
    )


def _add_tiles(
    command: _Parser, defaults: tuple[object, object], tile_size: int | None = None, overlap: int | None = None
) -> None:
    """The tiles; `defaults` says what the defaults come to."""
    command.add_argument(
        "--tile-size",
        type=int,
        default=tile_size,
        metavar="PIXELS",
        help=f"side of a tile, a multiple of f (default: {defaults[0]})",
    )
    command.add_argument(
        "--overlap",
        type=int,
        default=overlap,
        metavar="PIXELS",
        help=f"what a tile sees beyond each of its sides, a multiple of f (default: {defaults[1]})",
    )


def _path(text: str) -> Path:
    return Path(_path_or_name(text))


def _path_or_name(text: str) -> str:
    return _not_empty(text, "; the folder that you are in is `.`")


def _not_empty(text: str, of_paths: str = "") -> str:
    if not text:
        raise argparse.ArgumentTypeError(f"it must not be empty. If it is a variable of the shell, set it{of_paths}")
    return text


def _scale(text: str) -> float:
    try:
        scale = float(text)
    except ValueError:
        scale = math.nan
    if not 0 < scale < math.inf:
        raise argparse.ArgumentTypeError(f"a scale must be a finite number more than 0, but is {text!r}")
    return scale


def _port(text: str) -> int:
    if not text.isascii() or not text.isdecimal() or not 0 < int(text) < 2**16:
        raise argparse.ArgumentTypeError(f"a port must be a whole number from 1 to 65535, but is {text!r}")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())

"""The command `svqvae`."""

import argparse
import io
import logging
import math
import os
import re
import signal
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

import torch
from accelerate import PartialState
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors import SafetensorError
from tqdm import tqdm

from svqvae_hf import DEFAULT_MODEL, SVQVAE, __version__, conversion
from svqvae_hf.checkpoints import REPO_ID, hub_reason, read_checkpoint
from svqvae_hf.codec import check_memory, check_model, decode_image, encode_image
from svqvae_hf.files import check_output, check_targets, find_files, save_png, scale_endings
from svqvae_hf.image_processing_svqvae import IMAGE_SUFFIXES, load_image
from svqvae_hf.results import Result, header, measure, side_by_side, table_row, token_count
from svqvae_hf.tokens import ImageTokens, is_token_file, load_tokens, save_tokens

TOKEN_SUFFIX = ".safetensors"
DTYPES = ("float32", "bfloat16", "float16")
DEVICES = ("cuda", "mps", "xpu")  # beside the CPU; the first that is there is the default
NO_MEMORY = "allocate|out of memory"  # what torch's errors say then


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
        args.run(args)
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
        if isinstance(error, RuntimeError) and not re.search(NO_MEMORY, str(error)):
            raise
        return _fail("there is not enough memory. Use smaller scales, smaller tiles or smaller images.")
    return 0


def reconstruct(args: argparse.Namespace) -> None:
    """Writes each image as the model gives it back, at each scale, and prints how close it comes."""
    if _is_large(args):
        return _run_large(args)
    endings = scale_endings(args.scales)
    inputs = find_files(args.inputs, IMAGE_SUFFIXES)
    check_output(inputs, args.output)
    check_targets(inputs, inputs, args.output, [*endings, *(["_side_by_side.png"] if args.side_by_side else [])])
    model = _load_model(args.model, args.device, args.dtype)
    total_name = f"{len(inputs)} images"
    name_width = max(len(name) for name in [total_name, *(path.name for path in inputs)])
    results: list[list[Result]] = []
    with _progress(inputs) as (paths, on_tile):
        model.enable_tiling(args.tile_size, args.overlap, on_tile)
        for path in paths:
            original = load_image(path)
            with _naming(path):
                check_memory(model, original.height, original.width, args.scales)
            tokens = encode_image(model, original, args.scales)
            images = decode_image(model, tokens)
            for image, ending in zip(images, endings, strict=True):
                save_png(image, args.output / f"{path.stem}{ending}")
            if not results:
                tqdm.write(header(name_width))
            results.append(measure(original, tokens, images))
            if args.side_by_side:
                save_png(side_by_side(original, images, results[-1]), args.output / f"{path.stem}_side_by_side.png")
            for result in results[-1]:
                tqdm.write(table_row(name_width, path.name, [result], tokens.codebook_size))
    if len(inputs) > 1:
        for of_scale in zip(*results, strict=True):
            print(table_row(name_width, total_name, of_scale, model.config["codebook_size"]))


def encode(args: argparse.Namespace) -> None:
    """Writes each image as a token file."""
    if _is_large(args):
        return _run_large(args)
    inputs = find_files(args.inputs, IMAGE_SUFFIXES)
    check_output(inputs, args.output)
    check_targets(inputs, inputs, args.output, [TOKEN_SUFFIX])
    model = _load_model(args.model, args.device, args.dtype)
    with _progress(inputs) as (paths, on_tile):
        model.enable_tiling(args.tile_size, args.overlap, on_tile)
        for path in paths:
            image = load_image(path)
            with _naming(path):
                check_memory(model, image.height, image.width, args.scales, decodes=False)
            tokens = encode_image(model, image, args.scales)
            args.output.mkdir(parents=True, exist_ok=True)
            save_tokens(args.output / f"{path.stem}{TOKEN_SUFFIX}", tokens)


def decode(args: argparse.Namespace) -> None:
    """Writes the images of token files, in the tiles that they were encoded by."""
    if _is_large(args):
        return _run_large(args)
    inputs = find_files(args.inputs, (TOKEN_SUFFIX,))
    check_output(inputs, args.output)
    model = _load_model(args.model, args.device, args.dtype)
    with _progress(inputs) as (paths, on_tile):
        for path in paths:
            tokens = load_tokens(path)
            with _naming(path):
                endings = scale_endings(tokens.scales)
                check_targets([path], inputs, args.output, endings)
                _set_tiles(model, tokens, args, on_tile)
                check_memory(model, tokens.height, tokens.width, tokens.scales, encodes=False)
                images = decode_image(model, tokens)
            for image, ending in zip(images, endings, strict=True):
                save_png(image, args.output / f"{path.stem}{ending}")


def evaluate(args: argparse.Namespace) -> None:
    """Measures a model on a set of images, and writes numbers, tables and plots."""
    with _needing("evaluate", "eval"):
        from svqvae_hf import evaluation, evaluation_report, image_sets, perceptual
    check_output([], args.output)
    state = PartialState(cpu=_find_device(args.device).type == "cpu")
    given = {key: getattr(args, key) for key in ("config", "split", "image_column", "max_images")}
    lpips = perceptual.load_lpips(args.lpips_net, args.lpips_weights) if args.lpips_weights else None
    inception = perceptual.load_inception(args.inception_weights) if args.inception_weights else None
    report = evaluation.evaluate(
        _load_model(args.model, args.device or str(state.device), "float32"),
        image_sets.open_images(args.data, **given),
        scales=args.scales,
        modes=args.modes,
        tile_size=args.tile_size,
        overlap=args.overlap,
        resolution=args.resolution,
        lpips=lpips,
        inception=inception,
    )
    if state.is_main_process:
        report.settings |= {"model": args.model, "data": args.data, **given}
        report.settings |= {
            "lpips_net": args.lpips_net,
            "lpips_weights": args.lpips_weights and args.lpips_weights.name,
            "inception_weights": args.inception_weights and args.inception_weights.name,
        }
        evaluation_report.write_report(report, args.output)
        print(evaluation_report.summary(report))
    state.destroy_process_group()


def convert(args: argparse.Namespace) -> None:
    """Makes a Hub repository of an original checkpoint."""
    config = {
        "network_range": args.network_range and tuple(args.network_range),
        "codebook_l2_norm": args.codebook_l2_norm,
    }
    report = conversion.convert(
        args.source,
        args.out,
        use_ema=args.use_ema,
        variant=args.variant,
        license=args.license,
        push_to_hub=args.push_to_hub,
        private=args.private,
        create_pr=args.create_pr,
        **{key: value for key, value in config.items() if value is not None},
    )
    print(report)


def export(args: argparse.Namespace) -> None:
    """Writes a model as two graphs, and prints how close they are to it."""
    from svqvae_hf.export import export_graphs

    model = _load_model(args.model, "cpu", "float32")
    with _needing("export", "export"):
        print(export_graphs(model, args.output, format=args.format, dtype=args.dtype))


def info(args: argparse.Namespace) -> None:
    """Prints what a model, an original checkpoint or a token file is."""
    if is_token_file(args.path):
        facts = _token_facts(load_tokens(args.path))
    elif Path(args.path).is_file() or re.fullmatch(f"{REPO_ID}:.+", args.path):
        checkpoint = read_checkpoint(args.path)
        facts = {"kind": f"original checkpoint, {checkpoint.family.title}", **checkpoint.config}
    else:
        facts = _model_facts(_load_model(args.path, "cpu", "float32"))
    width = max(map(len, facts))
    for name, value in facts.items():
        print(f"{name:<{width}}  {value}")


@contextmanager
def _needing(what: str, extra: str) -> Iterator[None]:
    """Says which extra has a package that is missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise ValueError(
            f"`{what}` needs the package {error.name}. Install the extra that has it: "
            f"pip install 'svqvae-hf[{extra}]'."
        ) from error


def _is_large(args: argparse.Namespace) -> bool:
    decodes = args.run is not encode
    if not args.large and (args.resume or (decodes and args.format)):
        raise ValueError("--resume and --format are for large images. Add --large, or leave them out.")
    if args.large and args.run is not decode and args.scales != [1.0]:
        raise ValueError("--large works at scale 1 alone. Leave out --scales, or --large.")
    if args.large and args.run is reconstruct and args.side_by_side:
        raise ValueError("--side-by-side is for images that fit memory. Leave it out, or --large.")
    return args.large


def _run_large(args: argparse.Namespace) -> None:
    """Encodes, decodes or reconstructs by rows of tiles, from files to files."""
    with _needing("--large", "large"):
        from svqvae_hf import large_files, large_images
    logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # as for diffusers
    work = {
        encode: large_images.encode_large,
        decode: large_images.decode_large,
        reconstruct: large_images.reconstruct_large,
    }[args.run]
    decodes = args.run is decode
    inputs = find_files(args.inputs, (TOKEN_SUFFIX,)) if decodes else large_files.find_large_images(args.inputs)
    ending = TOKEN_SUFFIX if args.run is encode else f"_x1.{args.format or 'tif'}"
    check_output(inputs, args.output)
    check_targets(inputs, inputs, args.output, [ending])
    model = _load_model(args.model, args.device, args.dtype)
    name_width = max(len(path.name) for path in inputs)
    rows = [] if args.run is not reconstruct else [header(name_width)]
    with _progress(inputs) as (paths, on_tile):
        for path in paths:
            target = args.output / f"{path.stem}{ending}"
            if args.resume and target.exists() and not large_images.record_path(target).exists():
                continue  # it was whole before the run was interrupted
            _set_large_tiles(model, path, args)
            with _interruption(target):
                result = work(model, path, target, args.resume, on_tile)
            if result is not None:
                rows.append(table_row(name_width, path.name, [result], model.config["codebook_size"]))
                tqdm.write("\n".join(rows))
                rows.clear()


def _set_large_tiles(model: SVQVAE, path: Path, args: argparse.Namespace) -> None:
    """The tiles of the command line or, where it says nothing, of the token file, or the model's own."""
    if args.run is not decode:
        model.enable_tiling(args.tile_size, args.overlap)
        return
    tokens = load_tokens(path, mapped=True)
    with _naming(path):
        check_model(model, tokens)
        _set_tiles(model, tokens, args, None)
    if not model.use_tiling:
        model.enable_tiling()


@contextmanager
def _interruption(target: Path) -> Iterator[None]:
    """Says how to go on with an output whose run is interrupted."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        print(f"svqvae: `{target}` is not whole yet. The same command with --resume goes on with it.", file=sys.stderr)
        raise


def _fail(message: str) -> int:
    print(f"svqvae: error: {' '.join(message.split())}", file=sys.stderr)
    return 2


def _load_model(source: str, device: str | None, dtype: str) -> SVQVAE:
    path = Path(source)
    if path.is_file():
        raise ValueError(
            f"a model must be a folder or a Hub id, but `{source}` is a file. Use `svqvae convert` first."
        )
    if not path.is_dir() and not re.fullmatch(REPO_ID, source):
        raise ValueError(
            f"there is no file or folder `{source}`. On the Hub, a model is `org/repo`, and a checkpoint, which "
            "`convert` and `info` read, `org/repo:file`."
        )
    place = _find_device(device)
    for library in ("diffusers", "huggingface_hub"):
        logging.getLogger(library).setLevel(logging.CRITICAL)  # what is wrong is said once, by the error
    try:
        model = SVQVAE.from_pretrained(source, torch_dtype=getattr(torch, dtype), use_safetensors=True)
    except OSError as error:
        raise OSError(f"the model `{source}` cannot be loaded: {_loading_fault(error)}") from error
    return model.to(place).eval()


def _loading_fault(error: OSError) -> str:
    """What is behind an error of diffusers, which guesses."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, SafetensorError):
            return f"its weight file is empty, cut short or of another kind ({cause}). Download it again."
        if isinstance(cause, RepositoryNotFoundError | LocalEntryNotFoundError):
            return hub_reason(cause)
        cause = cause.__context__
    return str(error)


def _find_device(name: str | None) -> torch.device:
    counts = {kind: getattr(torch, kind).device_count() for kind in DEVICES}
    usable = [*(kind for kind in DEVICES if counts[kind]), "cpu"]
    single = [f"{kind}:{index}" for kind in usable[:-1] for index in range(counts[kind])]
    if name is not None and name not in usable + single:
        raise ValueError(f"--device must be one that torch finds here, {', '.join(usable + single)}, but is `{name}`.")
    return torch.device(name or usable[0])


def _set_tiles(
    model: SVQVAE, tokens: ImageTokens, args: argparse.Namespace, on_tile: Callable[[int, int], None] | None
) -> None:
    """The tiles of the command line or, where it says nothing, of the token file."""
    tile_size = tokens.tile_size if args.tile_size is None else args.tile_size
    overlap = tokens.overlap if args.overlap is None else args.overlap
    chosen = {key: value for key, value in (("tile_size", tile_size), ("overlap", overlap)) if value is not None}
    if chosen:
        model.enable_tiling(**chosen, on_tile=on_tile)
    else:
        model.disable_tiling()


@contextmanager
def _progress(inputs: Sequence[Path]) -> Iterator[tuple[Iterable[Path], Callable[[int, int], None]]]:
    """A bar over the inputs and, below it, one over the tiles at work; on a terminal only."""
    with (
        tqdm(inputs, unit="image", disable=None) as images,
        tqdm(unit="tile", position=1, leave=False, delay=1, disable=None) as tiles,
    ):

        def on_tile(done: int, total: int) -> None:
            if done != tiles.n + 1 or tiles.total != total:
                tiles.reset(total)
                tiles.initial = tiles.n = done - 1  # what an interrupted run did took no time of this one
            tiles.update()

        yield images, on_tile


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Puts the file's name before an error."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"`{path}`: {error}") from error


def _token_facts(tokens: ImageTokens) -> dict[str, Any]:
    rows = max(-(-max(tokens.height, tokens.width) // tokens.f), *(max(ids.shape) for ids in tokens.ids))
    tiled = tokens.tile_size is not None and rows * tokens.f > tokens.tile_size
    facts = {
        "kind": "token file",
        "image": f"{tokens.width} x {tokens.height} pixels (width x height)",
        "f": tokens.f,
        "tiles": f"{tokens.tile_size} pixels, overlap {tokens.overlap}" if tiled else "none",
        "codebook": f"{tokens.codebook_size} codes, sha256 {tokens.codebook_fingerprint}",
    }
    for index, (ids, scale) in enumerate(zip(tokens.ids, tokens.scales, strict=True)):
        grid = f"{ids.shape[1]} x {ids.shape[0]} = {token_count(ids.numel())}"
        facts[f"scale {scale:g}"] = f"{grid}, {tokens.bits_per_pixel(index):.4f} bits/pixel"
    return facts


def _model_facts(model: SVQVAE) -> dict[str, Any]:
    config = {key: value for key, value in model.config.items() if not key.startswith("_")}
    return {
        "kind": "SVQVAE model",
        "parameters": f"{model.num_parameters():,}",
        "f": model.f,
        "codebook sha256": model.codebook_fingerprint(),
        **config,
    }


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
    parser.add_argument("--version", action="version", version=f"svqvae {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in (_add_reconstruct, _add_encode, _add_decode, _add_evaluate, _add_convert, _add_export, _add_info):
        add(commands)
    return parser


def _add_reconstruct(commands: Commands) -> None:
    command = _add_command(
        commands,
        reconstruct,
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
        encode,
        "write images as token files",
        "Writes NAME.safetensors with the ids at all scales.",
        "'photos/*.jpg' --output tokens --scales 1",
    )
    _add_images(command)
    _add_large(command, decodes=False)


def _add_decode(commands: Commands) -> None:
    command = _add_command(
        commands,
        decode,
        "write the images of token files",
        "Writes NAME_x1.png and so on, one per scale in the file. The model must have the\n"
        "codebook that the file was encoded with.",
        "tokens --output out",
    )
    _add_files(command, "token files, folders of them, or globs")
    _add_model(command, tile_size=None, overlap=None)
    _add_large(command, decodes=True)


def _add_evaluate(commands: Commands) -> None:
    command = _add_command(
        commands,
        evaluate,
        "measure a model on a set of images",
        "Writes report.json, report.md, plots and metadata of a card. On several GPUs:\n"
        "  accelerate launch -m svqvae_hf.cli evaluate MODEL DATA --output DIR",
        "org/svqvae photos --output report --scales 1 0.5 0.25",
    )
    command.add_argument("model", type=_not_empty, metavar="MODEL", help="model folder or Hub id")
    command.add_argument(
        "data",
        nargs="+",
        type=_not_empty,
        metavar="DATA",
        help="image files, folders of them, or globs; or the name of a set on the Hub, which is streamed",
    )
    command.add_argument("--output", required=True, type=_path, metavar="DIR", help="folder to write to")
    command.add_argument("--config", metavar="NAME", help="configuration of the set")
    command.add_argument("--split", metavar="NAME", help="split of the set, needed if it has several")
    command.add_argument(
        "--image-column", default="image", metavar="NAME", help="column of the set that holds images (default: image)"
    )
    command.add_argument("--max-images", type=int, metavar="N", help="stop after so many (default: all)")
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
        convert,
        "make a Hub repository of an original checkpoint",
        "Reads checkpoints of SVQVAE, LlamaGen, FlexVAR, multi-scale Lightning training\n"
        "and taming-transformers; writes card, config and safetensors, and checks them.",
        "vq_ds8_c2i.pt llamagen-f8 --license mit --variant fp16",
    )
    command.add_argument("source", metavar="SOURCE", help="checkpoint file, or org/repo:file on the Hub")
    command.add_argument("out", type=_path, metavar="OUT", help="folder to make")
    command.add_argument("--use-ema", action="store_true", help="take the averaged weights of a LlamaGen file")
    command.add_argument(
        "--network-range",
        nargs=2,
        type=float,
        metavar=("LOW", "HIGH"),
        help="black and white of the images that it was trained on (default: those of its family)",
    )
    command.add_argument(
        "--no-codebook-l2-norm",
        dest="codebook_l2_norm",
        action="store_false",
        default=None,
        help="its codebook is not normalised (default: as in its family)",
    )
    command.add_argument("--variant", choices=tuple(conversion.VARIANTS), help="also write half precision weights")
    command.add_argument(
        "--license",
        help="licence of the source, as the Hub names it, for the card (default: unknown; not needed for the release "
        "in the Hub repository of the Open Model Initiative)",
    )
    command.add_argument("--push-to-hub", metavar="ORG/NAME", help="upload the result")
    command.add_argument("--private", action="store_true", default=None, help="make a new repository private")
    command.add_argument("--create-pr", action="store_true", help="open a pull request instead of a commit")


def _add_export(commands: Commands) -> None:
    command = _add_command(
        commands,
        export,
        "write a model as graphs for ONNX or torch.export",
        "Writes one graph from images to ids and one from ids to images, for any batch,\n"
        "height and width, and compares them with the model before they are kept.",
        "org/svqvae --output graphs --dtype float16",
    )
    command.add_argument("model", type=_not_empty, metavar="MODEL", help="model folder or Hub id")
    command.add_argument("--output", required=True, type=_path, metavar="DIR", help="folder to make")
    command.add_argument(
        "--format", choices=("onnx", "torch"), default="onnx", help="encoder.onnx or encoder.pt2 (default: onnx)"
    )
    command.add_argument(
        "--dtype", choices=("float32", "float16"), default="float32", help="of weights and images (default: float32)"
    )


def _add_info(commands: Commands) -> None:
    summary = "print what a model, an original checkpoint or a token file is"
    command = _add_command(commands, info, summary, "", "photo.safetensors")
    command.add_argument(
        "path", metavar="PATH", help="model folder, Hub id, checkpoint file, org/repo:file, or token file"
    )


def _add_command(
    commands: Commands, run: Callable[[argparse.Namespace], None], summary: str, details: str, example: str
) -> _Parser:
    command = commands.add_parser(
        run.__name__,
        help=summary,
        description=f"{summary}.\n{details}",
        epilog=f"example:\n  svqvae {run.__name__} {example}",
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


def _add_files(command: _Parser, what: str) -> None:
    command.add_argument("inputs", nargs="+", type=_not_empty, metavar="INPUT", help=what)
    command.add_argument("--output", required=True, type=_path, metavar="DIR", help="folder to write to")


def _add_model(command: _Parser, tile_size: int | None, overlap: int | None) -> None:
    """The model and how it works; with `None`, tiles are those of the token file."""
    command.add_argument(
        "--model", default=str(DEFAULT_MODEL), help="model folder or Hub id (default: the small bundled model)"
    )
    _add_device(command)
    command.add_argument("--dtype", choices=DTYPES, default="float32", help="(default: float32)")
    _add_tiles(command, (tile_size or "as encoded", overlap or "as encoded"), tile_size, overlap)


def _add_device(command: _Parser) -> None:
    command.add_argument("--device", help="cpu, cuda, cuda:1, mps or xpu (default: a GPU if there is one)")


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
    return Path(_not_empty(text))


def _not_empty(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("a path must not be empty. Use `.` for the folder that you are in")
    return text


def _scale(text: str) -> float:
    try:
        scale = float(text)
    except ValueError:
        scale = math.nan
    if not 0 < scale < math.inf:
        raise argparse.ArgumentTypeError(f"a scale must be a finite number more than 0, but is {text!r}")
    return scale


if __name__ == "__main__":
    sys.exit(main())

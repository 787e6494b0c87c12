"""The command `svqvae`. Modules that need torch are imported late: a mistake in the arguments is answered at once."""

import argparse
import glob
import io
import math
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import numpy as np
from PIL import Image
from tqdm import tqdm

from svqvae_hf import DEFAULT_MODEL

if TYPE_CHECKING:
    from svqvae_hf.modeling_svqvae import SVQVAE
    from svqvae_hf.tokens import ImageTokens

IMAGE_SUFFIXES = (".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
TOKEN_SUFFIX = ".safetensors"
HUB_ID = r"\w[\w.-]*/[\w.-]+"
DTYPES = ("float32", "bfloat16", "float16")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        argv (`Sequence[str]`, *optional*): Arguments; those of the process if not given.

    Returns:
        `int`: Exit code: 0; 2 after a user's mistake, which one line on stderr explains; 130 after Ctrl-C.
    """
    if not sys.warnoptions:
        warnings.simplefilter("ignore")  # other libraries' advice to those who call them
    try:
        args = _parser().parse_args(argv)
        args.run(args)
    except KeyboardInterrupt:
        print("svqvae: interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        print(f"svqvae: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


class Result(NamedTuple):
    """What one image came to at one scale."""

    scale: float
    width: int
    height: int
    ids: np.ndarray
    bits_per_pixel: float
    psnr: float


def reconstruct(args: argparse.Namespace) -> None:
    """Writes each image as the model gives it back, at each scale, and prints how close it comes."""
    from svqvae_hf.codec import check_memory, decode_image, encode_image
    from svqvae_hf.image_processing_svqvae import load_image

    endings = _scale_endings(args.scales)
    inputs = _find_files(args.inputs, IMAGE_SUFFIXES)
    _check_targets(inputs, args.output, [*endings, "_side_by_side.png"])
    model = _load_model(args.model, args.device, args.dtype)
    name_width = max(len(path.name) for path in inputs)
    results = []
    with _progress(inputs, model, args) as paths:
        tqdm.write(_row(name_width, "image", "scale", "size", "tokens", "bits/pixel", "PSNR dB", "codes used"))
        for path in paths:
            original = load_image(path)
            with _naming(path):
                check_memory(model, original.height, original.width, args.scales)
            tokens = encode_image(model, original, args.scales)
            images = decode_image(model, tokens)
            for image, ending in zip(images, endings, strict=True):
                _save_png(image, args.output / f"{path.stem}{ending}")
            results.append([_result(original, tokens, images, index) for index in range(len(images))])
            if args.side_by_side:
                _save_png(_side_by_side(original, images, results[-1]), args.output / f"{path.stem}_side_by_side.png")
            for result in results[-1]:
                tqdm.write(_result_row(name_width, path.name, [result], tokens.codebook_size))
    if len(inputs) > 1:
        for of_scale in zip(*results, strict=True):
            print(_result_row(name_width, f"{len(inputs)} images", of_scale, model.config["codebook_size"]))


def encode(args: argparse.Namespace) -> None:
    """Writes each image as a token file."""
    from svqvae_hf.codec import check_memory, encode_image
    from svqvae_hf.image_processing_svqvae import load_image
    from svqvae_hf.tokens import save_tokens

    inputs = _find_files(args.inputs, IMAGE_SUFFIXES)
    _check_targets(inputs, args.output, [TOKEN_SUFFIX])
    model = _load_model(args.model, args.device, args.dtype)
    with _progress(inputs, model, args) as paths:
        for path in paths:
            image = load_image(path)
            with _naming(path):
                check_memory(model, image.height, image.width, args.scales, decodes=False)
            tokens = encode_image(model, image, args.scales)
            args.output.mkdir(parents=True, exist_ok=True)
            save_tokens(args.output / f"{path.stem}{TOKEN_SUFFIX}", tokens)


def decode(args: argparse.Namespace) -> None:
    """Writes the images of token files."""
    from svqvae_hf.codec import check_memory, decode_image
    from svqvae_hf.tokens import load_tokens

    inputs = _find_files(args.inputs, (TOKEN_SUFFIX,))
    _check_targets(inputs, args.output, [".png"])
    model = _load_model(args.model, args.device, args.dtype)
    with _progress(inputs, model, args) as paths:
        for path in paths:
            tokens = load_tokens(path)
            with _naming(path):
                check_memory(model, tokens.height, tokens.width, tokens.scales, encodes=False)
                endings = _scale_endings(tokens.scales)
                images = decode_image(model, tokens)
            for image, ending in zip(images, endings, strict=True):
                _save_png(image, args.output / f"{path.stem}{ending}")


def convert(args: argparse.Namespace) -> None:
    """Makes a Hub repository of an original checkpoint."""
    from svqvae_hf import checkpoints

    report = checkpoints.convert(
        args.source,
        args.out,
        use_ema=args.use_ema,
        variant=args.variant,
        license=args.license,
        push_to_hub=args.push_to_hub,
        private=args.private,
        create_pr=args.create_pr,
    )
    print(report)


def info(args: argparse.Namespace) -> None:
    """Prints what a model, an original checkpoint or a token file is."""
    from svqvae_hf.tokens import is_token_file, load_tokens

    if is_token_file(args.path):
        facts = _token_facts(load_tokens(args.path))
    elif Path(args.path).is_file() or re.fullmatch(f"{HUB_ID}:.+", args.path):
        from svqvae_hf.checkpoints import read_checkpoint

        checkpoint = read_checkpoint(args.path)
        facts = {"kind": f"original checkpoint, {checkpoint.family.title}", **checkpoint.config}
    else:
        facts = _model_facts(_load_model(args.path, "cpu", "float32"))
    width = max(map(len, facts))
    for name, value in facts.items():
        print(f"{name:<{width}}  {value}")


def _find_files(patterns: Sequence[str], suffixes: Sequence[str]) -> list[Path]:
    """Files that the arguments name: files, folders (files of these kinds right in them) and globs."""
    found: list[Path] = []
    for pattern in patterns:
        path = Path(pattern)
        if path.is_dir():
            files = [
                each for each in sorted(path.iterdir()) if each.suffix.lower() in suffixes and each.name[0] != "."
            ]
            missing = f"the folder `{pattern}` has no file that ends in {', '.join(suffixes)}."
        elif path.exists():
            files = [path]
        else:
            files = [Path(each) for each in sorted(glob.glob(pattern, recursive=True)) if Path(each).is_file()]
            missing = f"there is no file, folder or match `{pattern}`."
        if not files:
            raise ValueError(missing)
        found += files
    return list(dict.fromkeys(found))


def _scale_endings(scales: Sequence[float]) -> list[str]:
    endings = [f"_x{scale:g}.png" for scale in scales]
    if len(set(endings)) < len(endings):
        raise ValueError(
            f"scales must differ in six digits, since they name files, but are {', '.join(map(str, scales))}."
        )
    return endings


def _check_targets(inputs: Sequence[Path], output: Path, endings: Sequence[str]) -> None:
    """Refuses an output folder that cannot be, and files that would overwrite an input or each other."""
    nearest = next(path for path in (output, *output.absolute().parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise ValueError(f"--output must be a folder that can be written, but `{nearest}` is not.")
    sources = {path.resolve() for path in inputs}
    writers: dict[str, Path] = {}
    for path in inputs:
        other = writers.setdefault(path.stem, path)
        if other != path:
            raise ValueError(f"`{other}` and `{path}` would write the same files. Rename one, or use two --output.")
        for ending in endings:
            target = output / f"{path.stem}{ending}"
            if target.resolve() in sources:
                raise ValueError(f"the input `{target}` would be overwritten. Use another --output.")


def _load_model(source: str, device: str | None, dtype: str) -> "SVQVAE":
    import torch
    from diffusers.utils import logging

    from svqvae_hf.modeling_svqvae import SVQVAE

    logging.set_verbosity_error()  # what is wrong with a model is said once, by the error
    if Path(source).is_file():
        raise ValueError(
            f"a model must be a folder or a Hub id, but `{source}` is a file. Use `svqvae convert` first."
        )
    if not Path(source).is_dir() and not re.fullmatch(HUB_ID, source):
        raise ValueError(
            f"there is no file or folder `{source}`, and a model on the Hub has an id of the form org/name."
        )
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # the latter where torch is built without it
        raise ValueError(f"--device {device} cannot be used here: {str(error).splitlines()[0]}") from error
    model = SVQVAE.from_pretrained(source, torch_dtype=getattr(torch, dtype), use_safetensors=True)
    return model.to(device).eval()


@contextmanager
def _progress(inputs: Sequence[Path], model: "SVQVAE", args: argparse.Namespace) -> Iterator[Iterator[Path]]:
    """A bar over the inputs and, below it, one over the tiles at work; on a terminal only."""
    with (
        tqdm(inputs, unit="image", disable=None) as images,
        tqdm(unit="tile", position=1, leave=False, delay=1, disable=None) as tiles,
    ):

        def on_tile(done: int, total: int) -> None:
            if done == 1:
                tiles.reset(total)
            tiles.update()

        model.enable_tiling(args.tile_size, args.overlap, on_tile)
        yield iter(images)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Puts the file's name before an error."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"`{path}`: {error}") from error


def _save_png(image: Image.Image, path: Path) -> None:
    from svqvae_hf.tokens import write_file

    content = io.BytesIO()
    image.save(content, "png")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, content.getvalue())


def _result(original: Image.Image, tokens: "ImageTokens", images: Sequence[Image.Image], index: int) -> Result:
    scale, image = tokens.scales[index], images[index]
    resampling = Image.Resampling.BOX if scale < 1 else Image.Resampling.BICUBIC
    reference = original.resize(image.size, resampling)
    error = np.square(np.asarray(image, np.float64) - np.asarray(reference, np.float64)).mean()
    psnr = 10 * math.log10(255**2 / error) if error else math.inf
    return Result(scale, *image.size, tokens.ids[index].numpy(), tokens.bits_per_pixel(index), psnr)


def _result_row(name_width: int, name: str, results: Sequence[Result], codebook_size: int) -> str:
    """One line for results of one scale: tokens in all, means of bits and PSNR, codes that any of them uses."""
    sizes = {f"{result.width}x{result.height}" for result in results}
    used = np.unique(np.concatenate([result.ids.ravel() for result in results])).size / codebook_size
    return _row(
        name_width,
        name,
        f"{results[0].scale:g}",
        sizes.pop() if len(sizes) == 1 else "",
        str(sum(result.ids.size for result in results)),
        f"{np.mean([result.bits_per_pixel for result in results]):.4f}",
        f"{np.mean([result.psnr for result in results]):.2f}",
        f"{used:.1%}",
    )


def _row(name_width: int, name: str, *cells: str) -> str:
    return "  ".join([f"{name:<{name_width}}", *(f"{cell:>10}" for cell in cells)])


def _side_by_side(original: Image.Image, images: Sequence[Image.Image], results: Sequence[Result]) -> Image.Image:
    from svqvae_hf.contact_sheet import Panel, contact_sheet

    panels = [Panel(original, "original", f"{original.width} x {original.height}")]
    for image, result in zip(images, results, strict=True):
        facts = [
            f"{result.width} x {result.height}",
            f"{result.ids.size} tokens",
            f"{result.bits_per_pixel:.3f} bits/pixel",
            f"{result.psnr:.2f} dB",
        ]
        panels.append(Panel(image, f"scale {result.scale:g}", " · ".join(facts)))
    return contact_sheet(panels)


def _token_facts(tokens: "ImageTokens") -> dict[str, Any]:
    facts = {
        "kind": "token file",
        "image": f"{tokens.width} x {tokens.height} pixels (width x height)",
        "f": tokens.f,
        "tiles": f"{tokens.tile_size} pixels, overlap {tokens.overlap}" if tokens.tile_size else "none",
        "codebook": f"{tokens.codebook_size} codes, sha256 {tokens.codebook_fingerprint}",
    }
    for index, (ids, scale) in enumerate(zip(tokens.ids, tokens.scales, strict=True)):
        facts[f"scale {scale:g}"] = (
            f"{ids.shape[1]} x {ids.shape[0]} = {ids.numel()} tokens, {tokens.bits_per_pixel(index):.4f} bits/pixel"
        )
    return facts


def _model_facts(model: "SVQVAE") -> dict[str, Any]:
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


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="svqvae",
        description="SVQVAE, a multi-scale image tokenizer: images to tokens and back.",
        epilog="example:\n  svqvae reconstruct photo.jpg --output out\n\n`svqvae COMMAND --help` shows one for each.",
        formatter_class=_HelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(run: Callable[[argparse.Namespace], None], summary: str, details: str, example: str) -> _Parser:
        command = commands.add_parser(
            run.__name__,
            help=summary,
            description=f"{summary}.\n{details}",
            epilog=f"example:\n  svqvae {run.__name__} {example}",
            formatter_class=_HelpFormatter,
        )
        command.set_defaults(run=run)
        return command

    command = add(
        reconstruct,
        "pass images through the model and write what comes back",
        "Writes NAME_x0.5.png and so on, one per scale, and prints for each: tokens, bits\n"
        "per pixel of the original, PSNR against the original resized to that scale, and\n"
        "the share of the codebook that is used. For several images the last lines give\n"
        "sum, means and the share that any of them uses.",
        "photo.jpg --output out --scales 0.5 1 2 --side-by-side",
    )
    _add_files(command, "image files, folders of them, or globs")
    _add_scales(command)
    command.add_argument(
        "--side-by-side", action="store_true", help="also write NAME_side_by_side.png with the original and all scales"
    )
    _add_model(command)

    command = add(
        encode,
        "write images as token files",
        "Writes NAME.safetensors with the ids at all scales.",
        "'photos/*.jpg' --output tokens --scales 1",
    )
    _add_files(command, "image files, folders of them, or globs")
    _add_scales(command)
    _add_model(command)

    command = add(
        decode,
        "write the images of token files",
        "Writes NAME_x1.png and so on, one per scale in the file. The model must have the\n"
        "codebook that the file was encoded with.",
        "tokens --output out",
    )
    _add_files(command, "token files, folders of them, or globs")
    _add_model(command)

    command = add(
        convert,
        "make a Hub repository of an original checkpoint",
        "Reads checkpoints of SVQVAE, LlamaGen, FlexVAR, multi-scale Lightning training and\n"
        "taming-transformers; writes card, config and safetensors, and checks them.",
        "vq_ds8_c2i.pt llamagen-f8 --license mit --variant fp16",
    )
    _add_conversion(command)

    command = add(
        info,
        "print what a model, an original checkpoint or a token file is",
        "",
        "photo.safetensors",
    )
    command.add_argument(
        "path", metavar="PATH", help="model folder, Hub id, checkpoint file, org/repo:file, or token file"
    )
    return parser


def _add_files(command: argparse.ArgumentParser, what: str) -> None:
    command.add_argument("inputs", nargs="+", metavar="INPUT", help=what)
    command.add_argument("--output", required=True, type=Path, metavar="DIR", help="folder to write to")


def _add_scales(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--scales",
        nargs="+",
        type=_scale,
        default=[1.0],
        metavar="SCALE",
        help="output side over input side, one or more (default: 1)",
    )


def _add_model(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--model", default=str(DEFAULT_MODEL), help="model folder or Hub id (default: the small bundled model)"
    )
    command.add_argument(
        "--tile-size", type=int, default=256, metavar="PIXELS", help="side of a tile, a multiple of f (default: 256)"
    )
    command.add_argument(
        "--overlap",
        type=int,
        default=32,
        metavar="PIXELS",
        help="what a tile sees beyond each of its sides, a multiple of f (default: 32)",
    )
    command.add_argument("--device", help="cpu, cuda, cuda:1, mps, ... (default: a GPU if there is one)")
    command.add_argument("--dtype", choices=DTYPES, default="float32", help="(default: float32)")


def _add_conversion(command: argparse.ArgumentParser) -> None:
    command.add_argument("source", metavar="SOURCE", help="checkpoint file, or org/repo:file on the Hub")
    command.add_argument("out", type=Path, metavar="OUT", help="folder to make")
    command.add_argument("--use-ema", action="store_true", help="take the averaged weights of a LlamaGen file")
    command.add_argument("--variant", choices=("fp16", "bf16"), help="also write the weights in half precision")
    command.add_argument("--license", help="licence of the source, as the Hub names it, for the card")
    command.add_argument("--push-to-hub", metavar="ORG/NAME", help="upload the result")
    command.add_argument("--private", action="store_true", default=None, help="make a new repository private")
    command.add_argument("--create-pr", action="store_true", help="open a pull request instead of a commit")


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

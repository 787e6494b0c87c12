"""What the commands of `svqvae` do, one function each; `svqvae_cli` reads their arguments."""

import argparse
import logging
import os
import re
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from accelerate import PartialState
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors import SafetensorError
from tqdm import tqdm

from svqvae_hf import DEFAULT_MODEL, SVQVAE, SVQVAEAutoregressivePipeline
from svqvae_hf.atomic_io import check_new_folder, save_png
from svqvae_hf.conversion import convert as conversion
from svqvae_hf.evaluation.reconstruction_table import (
    ReconstructionFigures,
    measure_reconstructions,
    side_by_side,
    table_header,
    table_row,
    token_count,
)
from svqvae_hf.hub.repositories import REPO_ID, hub_reason
from svqvae_hf.loaders.checkpoints import read_checkpoint
from svqvae_hf.models.image_processing_svqvae import IMAGE_SUFFIXES, load_image
from svqvae_hf.paths import check_output, check_targets, find_files, scale_endings
from svqvae_hf.tokens.image_tokens import (
    check_memory,
    check_same_codebook,
    configure_tiling,
    decode_image,
    encode_image,
)
from svqvae_hf.tokens.token_files import ImageTokens, is_token_file, load_tokens, save_tokens

TOKEN_SUFFIX = ".safetensors"
MAX_WORKERS = 4  # by default
DEVICES = ("cuda", "mps", "xpu")  # beside the CPU; the first that is there is the default


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
    results: list[list[ReconstructionFigures]] = []
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
                tqdm.write(table_header(name_width))
            results.append(measure_reconstructions(original, tokens, images))
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


def tokenize(args: argparse.Namespace) -> None:
    """Makes a token set of an image set."""
    from svqvae_hf.data.image_sets import is_hub_set, open_rows
    from svqvae_hf.data.token_set_writer import LABEL_COLUMNS, tokenize_set

    check_new_folder(args.out)
    # Processes wait for each other at the end, which may be hours apart.
    state = PartialState(cpu=_find_device(args.device).type == "cpu", timeout=timedelta(weeks=1))
    given = {key: getattr(args, key) for key in ("config", "split", "image_column", "max_images")}
    images = open_rows(args.data, columns=args.keep, optional_columns=LABEL_COLUMNS, **given)
    model = _load_model(args.model, _process_device(args.device, state), args.dtype)
    model.enable_tiling(args.tile_size, args.overlap)
    path = Path(args.model or DEFAULT_MODEL)
    options = ("scales", "crops", "resolution", "batch_size", "shard_size", "license", "push_to_hub", "private")
    report = tokenize_set(
        model,
        images,
        args.out,
        model_name=path.resolve().name if path.exists() else args.model,  # no folder of the user's in a public set
        source_set=args.data[0] if len(args.data) == 1 and is_hub_set(args.data[0]) else None,
        num_workers=min(MAX_WORKERS, os.cpu_count() or 1) if args.workers is None else args.workers,
        **{key: getattr(args, key) for key in options},
    )
    if state.is_main_process:
        print(report)
    state.destroy_process_group()


def detokenize(args: argparse.Namespace) -> None:
    """Writes the images of a token set, in the tiles that they were encoded by."""
    from svqvae_hf.data.token_sets import detokenize_set, read_settings

    check_output([], args.output)
    read_settings(args.tokens)  # before the model is loaded
    model = _load_model(args.model, args.device, args.dtype)
    detokenize_set(model, args.tokens, args.output, max_images=args.max_images)


def evaluate(args: argparse.Namespace) -> None:
    """Measures a model on a set of images, and writes numbers, tables and plots."""
    with _needing("evaluate", "eval"):
        from svqvae_hf.data import image_sets
        from svqvae_hf.evaluation import evaluate as evaluation
        from svqvae_hf.evaluation import perceptual
        from svqvae_hf.evaluation import report as evaluation_report
    check_output([], args.output)
    state = PartialState(cpu=_find_device(args.device).type == "cpu")
    given = {key: getattr(args, key) for key in ("config", "split", "image_column", "max_images")}
    lpips = perceptual.load_lpips(args.lpips_net, args.lpips_weights) if args.lpips_weights else None
    inception = perceptual.load_inception(args.inception_weights) if args.inception_weights else None
    report = evaluation.evaluate(
        _load_model(args.model, _process_device(args.device, state), "float32"),
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
    from svqvae_hf.conversion.export import export_graphs

    model = _load_model(args.model, "cpu", "float32")
    with _needing("export", "export"):
        print(export_graphs(model, args.output, format=args.format, dtype=args.dtype))


def generate(args: argparse.Namespace) -> None:
    """Samples images, and puts them on one sheet, a row for each class."""
    check_output([], args.output)
    for bars in (diffusers.utils.logging, transformers.utils.logging):
        bars.disable_progress_bar()  # of loading
    pipeline = _load(SVQVAEAutoregressivePipeline, args.model, args.device, args.dtype)
    pipeline.set_progress_bar_config(unit="row", disable=None)
    scales = args.scales or pipeline.layout.scales[-1:]
    endings = scale_endings(scales)
    labels = args.class_labels
    names = ["image"] if labels is None else [f"class_{label}" for label in labels]
    count = args.num_images
    images = pipeline(
        labels,
        scales=scales,
        guidance_scale=args.guidance_scale,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        generator=[torch.Generator().manual_seed(args.seed + index) for index in range(len(names) * count)],
        num_images_per_prompt=count,
    ).images
    for of_scale, ending in zip(images, endings, strict=True):
        for index, image in enumerate(of_scale):
            save_png(image, args.output / f"{names[index // count]}_{index % count}{ending}")
    finest = images[scales.index(max(scales))]
    save_png(diffusers.utils.make_image_grid(finest, rows=len(names), cols=count), args.output / "sheet.png")


def info(args: argparse.Namespace) -> None:
    """Prints what a model, an original checkpoint or a token file is."""
    if is_token_file(args.path):
        facts = _token_facts(load_tokens(args.path))
    elif Path(args.path).is_file() or re.fullmatch(f"{REPO_ID}:.+", args.path):
        checkpoint = read_checkpoint(args.path, SVQVAE)
        facts = {"kind": f"original checkpoint, {checkpoint.format.title}", **checkpoint.config}
    else:
        facts = _model_facts(_load_model(args.path, "cpu", "float32"))
    width = max(map(len, facts))
    for name, value in facts.items():
        print(f"{name:<{width}}  {value}")


def demo(args: argparse.Namespace) -> None:
    """Serves the page, until it is interrupted."""
    with _needing("demo", "demo"):
        from svqvae_hf.demo.page import serving
    load = partial(_load_model, device=args.device, dtype=args.dtype)
    with serving(load, args.model or "", args.host, args.port) as address:
        print(f"{address} shows the page until Ctrl-C", flush=True)
        threading.Event().wait()


@contextmanager
def _needing(what: str, extra: str) -> Iterator[None]:
    """Says which extra has a package that is missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise ValueError(
            f"`{what}` needs the package {error.name}. Install the extra that has it: "
            f"pip install 'svqvae-hf[{extra}]' or, in a checkout, '.[{extra}]'."
        ) from error


def _is_large(args: argparse.Namespace) -> bool:
    decodes = args.run != "encode"
    if not args.large and (args.resume or (decodes and args.format)):
        raise ValueError("--resume and --format are for large images. Add --large, or leave them out.")
    if args.large and args.run != "decode" and args.scales != [1.0]:
        raise ValueError("--large works at scale 1 alone. Leave out --scales, or --large.")
    if args.large and args.run == "reconstruct" and args.side_by_side:
        raise ValueError("--side-by-side is for images that fit memory. Leave it out, or --large.")
    return args.large


def _run_large(args: argparse.Namespace) -> None:
    """Encodes, decodes or reconstructs by rows of tiles, from files to files."""
    with _needing("--large", "large"):
        from svqvae_hf.large import large_files, large_images
    logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # as for diffusers
    work = {
        "encode": large_images.encode_large,
        "decode": large_images.decode_large,
        "reconstruct": large_images.reconstruct_large,
    }[args.run]
    decodes = args.run == "decode"
    inputs = find_files(args.inputs, (TOKEN_SUFFIX,)) if decodes else large_files.find_large_images(args.inputs)
    ending = TOKEN_SUFFIX if args.run == "encode" else f"_x1.{args.format or 'tif'}"
    check_output(inputs, args.output)
    check_targets(inputs, inputs, args.output, [ending])
    model = _load_model(args.model, args.device, args.dtype)
    name_width = max(len(path.name) for path in inputs)
    rows = [] if args.run != "reconstruct" else [table_header(name_width)]
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
    if args.run != "decode":
        model.enable_tiling(args.tile_size, args.overlap)
        return
    tokens = load_tokens(path, mapped=True)
    with _naming(path):
        check_same_codebook(model, tokens)
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


def _load_model(source: str | None, device: str | None, dtype: str, **hub: Any) -> SVQVAE:
    """The model of a folder or a Hub id; by default the small bundled one."""
    return _load(SVQVAE, source or str(DEFAULT_MODEL), device, dtype, **hub).eval()


def _load(cls: Any, source: str, device: str | None, dtype: str, **hub: Any) -> Any:
    """A model, or a pipeline, of a folder or a Hub id, with what `from_pretrained` takes for the latter."""
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
    for library in ("diffusers", "huggingface_hub", "transformers"):
        logging.getLogger(library).setLevel(logging.CRITICAL)  # what is wrong is said once, by the error
    try:
        model = cls.from_pretrained(source, dtype=getattr(torch, dtype), use_safetensors=True, **hub)
    except OSError as error:
        raise OSError(f"the model `{source}` cannot be loaded: {_loading_fault(error)}") from error
    return model.to(place)


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


def _process_device(name: str | None, state: PartialState) -> str:
    """Name of the device that was asked for, or of that of this process."""
    return name or ("cpu" if state.device.type == "cpu" else str(state.device))  # accelerate numbers CPUs, too


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
    configure_tiling(model, tile_size, overlap, on_tile)


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

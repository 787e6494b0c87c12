"""`svqvae evaluate`."""

import argparse
from typing import TYPE_CHECKING, Any

from svqvae_cli.arguments import (
    OVERLAP,
    TILE_SIZE,
    Commands,
    add_command,
    add_device,
    add_image_set,
    add_output,
    add_scales,
    add_tiles,
    check_several,
    image_set_options,
    path,
    path_or_name,
    target,
)
from svqvae_cli.errors import check_none_skipped, require_extra
from svqvae_cli.files import IMAGE_SUFFIXES, check_absent, check_output, check_source, find_inputs

if TYPE_CHECKING:
    import torch
    from accelerate import PartialState

    from svqvae_hf.evaluation.baselines.blocks import BlockBaseline
    from svqvae_hf.evaluation.tokenizers.protocol import Tokenizer

CLASSES = (
    "SVQVAE; VQModel, AutoencoderKL, AutoencoderTiny or AutoencoderDC of diffusers; Janus, Emu3 or Chameleon of "
    "transformers"
)
CODEC_NAMES = ("jpeg", "webp", "avif")  # in lower case, as in `svqvae_hf.evaluation.baselines.codecs`


def add_to(commands: Commands) -> None:
    """Adds the command and its arguments."""
    parser = add_command(
        commands,
        "evaluate",
        run,
        "measure a model on an image set",
        "Writes report.json, report.md, plots, and metadata for the model card. With\n"
        "--beside, or a MODEL of another class, writes one table of all tokenizers at\n"
        "the size of the images. On several GPUs:\n"
        "  accelerate launch -m svqvae_cli evaluate MODEL DATA --output DIR",
        "org/svqvae photos --output report --scales 1 0.5 0.25",
    )
    parser.add_argument("model", type=path_or_name, metavar="MODEL", help=f"model folder or Hub id: {CLASSES}")
    add_image_set(parser)
    add_output(parser, "folder to write to")
    parser.add_argument("--overwrite", action="store_true", help="replace a report that exists (default: an error)")
    parser.add_argument(
        "--beside",
        nargs="*",
        type=path_or_name,
        metavar="OTHER",
        help="make one table of MODEL, further models of any of these classes, and the baselines",
    )
    parser.add_argument(
        "--resolution",
        type=int,
        metavar="PIXELS",
        help="resize the shorter side and crop the centre to this side (default: images as they are)",
    )
    add_scales(parser, [1.0, 0.5, 0.25])
    parser.add_argument(
        "--min-psnr",
        nargs="+",
        type=target,
        metavar="DB",
        help="also measure each SVQVAE with every image at the smallest of the scales that reaches this PSNR, or else "
        "at the largest (default: whole dB for one SVQVAE alone, none with --beside)",
    )
    parser.add_argument(
        "--baselines",
        nargs="+",
        type=path_or_name,
        metavar="IMAGES",
        help="also measure k-means and principal components of blocks, fitted on these: image files, folders of them, "
        "or globs, other images than DATA",
    )
    parser.add_argument(
        "--modes",
        nargs="+",
        choices=("plain", "tiled"),
        default=["plain", "tiled"],
        help="encode images as a whole, by tiles, or both ways (default: both; once if no image is large enough for "
        "tiles)",
    )
    parser.add_argument(
        "--codecs",
        nargs="*",
        choices=CODEC_NAMES,
        default=CODEC_NAMES,
        metavar="CODEC",
        help="image files to compare with, among jpeg, webp and avif, which takes seconds per image; none if no name "
        "follows (default: all three)",
    )
    add_tiles(parser, str(TILE_SIZE), f"{OVERLAP}, or less if the tile is too small", TILE_SIZE)
    parser.add_argument(
        "--half-precision",
        action="store_true",
        help="also count the ids that change in bfloat16 and float16; encodes three times",
    )
    parser.add_argument(
        "--lpips-weights", type=path, metavar="FILE", help="weights of the LPIPS network, to add LPIPS"
    )
    parser.add_argument(
        "--lpips-net", choices=("alex", "vgg", "squeeze"), default="alex", help="LPIPS network (default: alex)"
    )
    parser.add_argument(
        "--inception-weights", type=path, metavar="FILE", help="weights of the FID network, to add rFID"
    )
    add_device(parser)


def run(args: argparse.Namespace) -> None:
    """Measures models on an image set, and writes numbers, tables and plots."""
    if args.min_psnr:
        check_several(args.scales, "--min-psnr chooses")
    for source in (args.model, *(args.beside or [])):
        check_source(source, subfolder=True)
    check_output(args.output)
    if not args.overwrite:
        check_absent(args.output / "report.json")
    with require_extra("evaluate", "eval"):
        from svqvae_hf.data.image_sets import open_images
        from svqvae_hf.evaluation.perceptual import load_inception, load_lpips
        from svqvae_hf.evaluation.tokenizers.loading import class_name
    from accelerate import PartialState

    from svqvae_cli.loading import explain_loading, find_device

    with explain_loading(args.model):
        compares = args.beside is not None or class_name(args.model) != "SVQVAE"
    if compares:
        _check_comparison(args)
    state = PartialState(cpu=find_device(args.device).type == "cpu")
    options = {
        "images": open_images(args.data, left_out=args.output, **image_set_options(args)),
        "resolution": args.resolution,
        "lpips": load_lpips(args.lpips_net, args.lpips_weights) if args.lpips_weights else None,
        "inception": load_inception(args.inception_weights) if args.inception_weights else None,
    }
    settings = {
        "data": args.data,
        "baselines": args.baselines,
        **image_set_options(args),
        "lpips_net": args.lpips_net,
        "lpips_weights": args.lpips_weights and args.lpips_weights.name,
        "inception_weights": args.inception_weights and args.inception_weights.name,
    }
    with require_extra("evaluate", "eval"):
        measured, skipped = (_compare if compares else _evaluate)(args, state, options, settings)
    state.destroy_process_group()
    if state.num_processes == 1:  # launchers take any other exit code than 0 for a crash
        check_none_skipped(skipped, measured + skipped)


def _check_comparison(args: argparse.Namespace) -> None:
    for name in ("modes", "tile_size", "overlap", "half_precision"):
        if getattr(args, name) != args.parser.get_default(name):
            raise ValueError(
                f"--{name.replace('_', '-')} is for one SVQVAE alone, because a comparison runs images as a whole in "
                "float32. Leave it out."
            )


def _evaluate(
    args: argparse.Namespace, state: "PartialState", options: dict[str, Any], settings: dict[str, Any]
) -> tuple[int, int]:
    """Measures one SVQVAE, whole and by tiles. Returns the number of images measured and skipped."""
    from svqvae_cli.loading import load_model, process_device
    from svqvae_hf.evaluation.baselines.codecs import CODECS
    from svqvae_hf.evaluation.evaluate import evaluate
    from svqvae_hf.evaluation.report import summary, write_report

    model = load_model(args.model, process_device(args.device, state), "float32")
    report = evaluate(
        model,
        scales=args.scales,
        scale_from=args.scale_from,
        min_psnr=args.min_psnr,
        modes=args.modes,
        tile_size=args.tile_size,
        overlap=args.overlap,
        half_precision=args.half_precision,
        block_baselines=_fit_baselines(
            args, model.f, model.config["codebook_size"], model.config["codebook_embed_dim"], model.device
        )
        if args.baselines
        else [],
        codecs=[name for name in CODECS if name.lower() in args.codecs],
        **options,
    )
    if state.is_main_process:
        report.settings |= {"model": args.model, **settings}
        write_report(report, args.output)
        print(summary(report))
    return len(report.images), len(report.skipped)


def _compare(
    args: argparse.Namespace, state: "PartialState", options: dict[str, Any], settings: dict[str, Any]
) -> tuple[int, int]:
    """Measures all tokenizers by one protocol. Returns the number of images measured and skipped."""
    import torch

    from svqvae_cli.loading import explain_loading, process_device
    from svqvae_hf.evaluation.baselines.blocks import KMeans, LinearDecoder
    from svqvae_hf.evaluation.baselines.codecs import CODECS
    from svqvae_hf.evaluation.comparison import QUALITIES
    from svqvae_hf.evaluation.tokenizers.baselines import BlockTokenizer, CodecTokenizer
    from svqvae_hf.evaluation.tokenizers.compare import compare_tokenizers
    from svqvae_hf.evaluation.tokenizers.loading import load_tokenizers
    from svqvae_hf.evaluation.tokenizers.table import comparison_table, write_comparison

    device = torch.device(process_device(args.device, state))
    tokenizers: list[Tokenizer] = []
    for source in (args.model, *(args.beside or [])):
        with explain_loading(source):
            tokenizers += load_tokenizers(source, device, args.scales, args.scale_from, args.min_psnr or ())
    if args.baselines:
        shape = next(((each.f, each.codebook_size) for each in tokenizers if each.codebook_size), None)
        if shape is None:
            raise ValueError("--baselines needs a model with a codebook, whose f and number of codes k-means takes.")
        fitted = _fit_baselines(args, *shape, 1, device)
        tokenizers += [BlockTokenizer(each) for each in fitted if isinstance(each, KMeans | LinearDecoder)]
    codecs = [name for name in CODECS if name.lower() in args.codecs]
    tokenizers += [CodecTokenizer(codec, quality) for codec in codecs for quality in QUALITIES]
    comparison = compare_tokenizers(tokenizers, device=device, **options)
    if state.is_main_process:
        comparison.settings |= {"models": [args.model, *(args.beside or [])], **settings}
        write_comparison(comparison, args.output)
        print("\n".join([*comparison_table(comparison.rows), "", *comparison.notes]))
    return len(comparison.images), len(comparison.skipped)


def _fit_baselines(
    args: argparse.Namespace, f: int, codebook_size: int, dim: int, device: "torch.device"
) -> "list[BlockBaseline]":
    from svqvae_hf.evaluation.baselines.blocks import fit_block_baselines, read_fit_images

    images = read_fit_images([file.path for file in find_inputs(args.baselines, IMAGE_SUFFIXES)], f, device)
    return fit_block_baselines(images, f, codebook_size, dim)

"""Measures a model on an image set.

Writes report.json, report.md and pictures. With --beside, --codecs or a MODEL
of another class, writes one table of all tokenizers at the size of the images,
and a plot. With --generated, writes how far the generated images are from DATA.
On several GPUs:
  accelerate launch -m svqvae_cli evaluate MODEL DATA --output DIR

  svqvae evaluate org/svqvae photos --output report --scales 1 0.5 0.25
"""

import argparse
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from svqvae_cli.arguments import Parser, image_set_options, path, path_or_name
from svqvae_cli.errors import check_none_skipped, require_extra
from svqvae_cli.files import IMAGE_SUFFIXES, check_absent, check_data, check_output, check_source, find_inputs

CLASSES = "SVQVAE, or VQModel or AutoencoderKL of diffusers"
# A report, how it is written to a folder, and the lines of its main table
Measured: TypeAlias = tuple[Any, Callable[[Any, Path], None], Callable[[Any], list[str]]]
NO_SAMPLES = ("/sheet.png", "_steps.png")  # pictures of `svqvae generate` that show several images
CODEC_NAMES = ("jpeg", "webp", "avif")  # in lower case, as in `svqvae_hf.evaluation.codecs`


def add_arguments(parser: Parser) -> None:
    """Adds the arguments."""
    parser.option("model", path_or_name, "MODEL", f"model folder or Hub id: {CLASSES}")
    parser.flag("--generated", "MODEL is a folder of generated images, to be compared with DATA")
    parser.add_image_set()
    parser.add_output()
    parser.flag("--overwrite", "replace a report that exists (default: an error)")
    parser.option("--beside", path_or_name, "OTHER", "one table of MODEL, further models and image files", nargs="*")
    help = "resize the shorter side and crop the centre (default: images as they are)"
    parser.option("--resolution", int, "PIXELS", help)
    parser.add_scales([1.0, 0.5, 0.25])
    help = "image files to compare with: jpeg, webp, avif, or none (default: all three, where tokenizers are compared)"
    parser.add_argument("--codecs", nargs="*", choices=CODEC_NAMES, metavar="CODEC", help=help)
    parser.add_tiles()
    parser.option("--lpips-weights", path, "FILE", "weights of the LPIPS network, to add LPIPS")
    parser.choice("--lpips-net", ("alex", "vgg", "squeeze"), "LPIPS network (default: alex)", "alex")
    parser.option("--inception-weights", path, "FILE", "weights of the FID network, to add rFID or FID")
    parser.add_device()


def run(args: argparse.Namespace) -> None:
    """Measures models or generated images on an image set, and writes numbers, tables and plots."""
    if args.generated:
        find_inputs([args.model], IMAGE_SUFFIXES, args.output)
    else:
        for source in (args.model, *(args.beside or [])):
            check_source(source, subfolder=True)
    for weights in filter(None, (args.lpips_weights, args.inception_weights)):
        if not weights.is_file():
            raise ValueError(f"there is no file `{weights}`. docs/evaluation.md says where the weights are.")
    check_data(args.data)
    check_output(args.output)
    if not args.overwrite:
        check_absent(args.output / "report.json")
    is_comparison = args.beside is not None or args.codecs is not None
    _check_options(args, is_comparison)
    with require_extra("evaluate", "eval"):
        from svqvae_hf.data.image_sets import open_images
        from svqvae_hf.evaluation.perceptual import load_inception, load_lpips
        from svqvae_hf.evaluation.tokenizers.auto import class_name
    from accelerate import PartialState

    from svqvae_cli.loading import explain_loading, find_device

    state = PartialState(cpu=find_device(args.device).type == "cpu")
    if args.device is None:  # accelerate numbers CPUs, torch does not
        args.device = "cpu" if state.device.type == "cpu" else str(state.device)
    with explain_loading(args.model):
        is_comparison |= not args.generated and class_name(args.model) != "SVQVAE"
    networks = {
        "lpips": load_lpips(args.lpips_net, args.lpips_weights) if args.lpips_weights else None,
        "inception": load_inception(args.inception_weights) if args.inception_weights else None,
    }
    images = open_images(args.data, left_out=args.output, **image_set_options(args))
    measure = _judge if args.generated else _compare if is_comparison else _evaluate
    report, write, table = measure(args, images, networks)
    if state.is_main_process:
        report.settings |= {
            "data": args.data,
            **image_set_options(args),
            "lpips_net": args.lpips_net,
            "lpips_weights": args.lpips_weights and args.lpips_weights.name,
            "inception_weights": args.inception_weights and args.inception_weights.name,
        }
        write(report, args.output)
        skipped_line = [f"{len(report.skipped)} skipped: see the report."] if report.skipped else []
        print("\n".join([*table(report), "", *skipped_line, *report.notes]))
    state.destroy_process_group()
    if state.num_processes == 1:  # launchers take any other exit code than 0 for a crash
        skipped = len(report.skipped)
        check_none_skipped(skipped, skipped + len(getattr(report, "images", ())))


def _check_options(args: argparse.Namespace, is_comparison: bool) -> None:
    """Raises ValueError for options that do not apply."""
    excluded, reason = ["tile_size", "overlap"] * is_comparison, "is for one SVQVAE alone"
    if args.generated:
        excluded, reason = ["beside", "codecs", "tile_size", "overlap", "lpips_weights"], "is not for generated images"
    for name in excluded:
        if getattr(args, name) != args.parser.get_default(name):
            raise ValueError(f"--{name.replace('_', '-')} {reason}. Leave it out.")


def _evaluate(args: argparse.Namespace, images: Any, networks: dict[str, Any]) -> Measured:
    """Measures one SVQVAE."""
    from svqvae_cli.loading import load_model
    from svqvae_hf.evaluation.evaluate import evaluate
    from svqvae_hf.evaluation.report import SUMMARY, results_table, write_report

    names = ("scales", "scale_from", "tile_size", "overlap", "resolution")
    model = load_model(args.model, args.device, "float32")
    options = {name: getattr(args, name) for name in names}
    report = evaluate(model, images, **options, **networks, context_model=model.context_model)
    report.settings["model"] = args.model
    return report, write_report, partial(results_table, keys=SUMMARY)


def _compare(args: argparse.Namespace, images: Any, networks: dict[str, Any]) -> Measured:
    """Measures all tokenizers by one protocol."""
    from svqvae_cli.loading import explain_loading
    from svqvae_hf.evaluation.codecs import CODECS, QUALITIES, CodecTokenizer
    from svqvae_hf.evaluation.tokenizer_comparison import compare_tokenizers, comparison_table, write_comparison
    from svqvae_hf.evaluation.tokenizers.auto import load_tokenizers
    from svqvae_hf.evaluation.tokenizers.protocol import Tokenizer

    tokenizers: list[Tokenizer] = []
    for source in (args.model, *(args.beside or [])):
        with explain_loading(source):
            tokenizers += load_tokenizers(source, args.device, args.scales, args.scale_from)
    chosen = CODEC_NAMES if args.codecs is None else args.codecs
    codecs = [name for name in CODECS if name.lower() in chosen]
    tokenizers += [CodecTokenizer(codec, quality) for codec in codecs for quality in QUALITIES]
    report = compare_tokenizers(tokenizers, images, resolution=args.resolution, device=args.device, **networks)
    report.settings["models"] = [args.model, *(args.beside or [])]
    return report, write_comparison, lambda report: comparison_table(report.rows)


def _judge(args: argparse.Namespace, images: Any, networks: dict[str, Any]) -> Measured:
    """Compares generated images with the set."""
    from svqvae_cli.loading import load_model
    from svqvae_hf.data.image_sets import open_images
    from svqvae_hf.evaluation.generated import TokenizerFeatures, compare_generated, generated_table, write_generated

    features = TokenizerFeatures(load_model(None, args.device, "float32"))
    named = {features.title: features}
    if networks["inception"] is not None:
        named["Inception (FID)"] = networks["inception"].to(args.device)
    files = [os.fspath(file.path) for file in find_inputs([args.model], IMAGE_SUFFIXES, args.output)]
    samples = [file for file in files if not file.endswith(NO_SAMPLES)]
    report = compare_generated(open_images(samples), images, named, resolution=args.resolution, device=args.device)
    report.settings["generated"] = args.model
    return report, write_generated, lambda report: generated_table(report.rows)

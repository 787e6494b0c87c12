"""Measures a model on an image set.

Writes report.json and report.md. With --beside, --codecs or a MODEL
of another class, all tokenizers are compared at the size of the images. With
--generated, writes how far the generated images are from DATA, which may
then be a reference batch of published evaluations (.npz).
On several GPUs:
  accelerate launch -m svqvae_cli evaluate DATA --model MODEL --output DIR

  svqvae evaluate photos --model org/svqvae --output report --scales 1 0.5 0.25
"""

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from svqvae_cli.arguments import Parser, forbid_options, image_set_options, model, path, path_or_name
from svqvae_cli.errors import check_none_skipped, require_extra
from svqvae_cli.files import check_absent, check_data, check_output, check_source, find_inputs
from svqvae_cli.logs import lines_in_log
from svqvae_files.file_names import DEFAULT_MODEL, IMAGE_SUFFIXES

REFERENCE_SUFFIX = ".npz"
FID_NETWORK = "Inception (FID)"
CODEC_NAMES = ("jpeg", "webp", "avif")  # in lower case, as in `svqvae_hf.evaluation.codecs`
OPTIONS_OF_SVQVAES = ("scales", "scale_from", "tile_size", "overlap")
OPTIONS_OF_MODELS = (*OPTIONS_OF_SVQVAES, "model", "beside", "codecs", "lpips_weights", "lpips_net")


def add_arguments(parser: Parser) -> None:
    """Adds the arguments."""
    parser.add_image_set()
    model_help = "folder or Hub id: SVQVAE, or VQModel or AutoencoderKL of diffusers (default: bundled)"
    parser.option("--model", model, "MODEL", model_help)
    parser.add_output()
    parser.option("--generated", path_or_name, "DIR", "compare DATA with the generated images in this folder instead")
    parser.flag("--overwrite", "replace an existing report (default: an error)")
    parser.option("--beside", model, "OTHER", "also measure further models", nargs="*")
    resolution_help = "resize the shorter side and crop the centre (default: images as they are)"
    parser.option("--resolution", int, "PIXELS", resolution_help)
    parser.add_scales(default=[1.0, 0.5, 0.25])
    codecs_help = "also measure image files of these kinds: jpeg, webp, avif (default: none)"
    parser.add_argument("--codecs", nargs="+", choices=CODEC_NAMES, default=[], metavar="CODEC", help=codecs_help)
    parser.add_tiles()
    parser.option("--lpips-weights", path, "FILE", "weights of the LPIPS network, to add LPIPS")
    parser.choice("--lpips-net", ("alex", "vgg", "squeeze"), "LPIPS network (default: alex)", "alex")
    parser.option("--inception-weights", path, "FILE", "weights of the FID network, to add rFID or FID")
    parser.add_device()


def run(args: argparse.Namespace) -> None:
    """Measures models or generated images on an image set, and writes numbers and a table."""
    _check(args)
    with require_extra("evaluate", extra="eval"):
        from svqvae_hf.data.image_sets import open_images
        from svqvae_hf.evaluation.perceptual import load_inception, load_lpips

    process = _start_process(args)
    if args.device is None:
        args.device = _device_of_process(process.device)
    networks: dict[str, Any] = {"lpips": None, "inception": None}
    if args.lpips_weights is not None:
        networks["lpips"] = load_lpips(args.lpips_net, args.lpips_weights)
    if args.inception_weights is not None:
        networks["inception"] = load_inception(args.inception_weights)
    with lines_in_log("svqvae_hf.evaluation.measuring"):
        if args.generated is not None:
            report = _evaluate_generated(args, networks)
        else:
            images = open_images(args.data, keep_labels=False, results=args.output, **image_set_options(args))
            report = _evaluate(args, images, networks)
    if process.is_main_process:
        _write(args, report)
    process.destroy_process_group()
    # Skipped images set the exit code 1. A launcher of several processes would report a crash.
    is_launched = process.num_processes > 1
    if not is_launched:
        _check_none_skipped(report)


def _start_process(args: argparse.Namespace) -> Any:
    """Tells accelerate to set up this process, which may be one of several.

    Returns:
        `accelerate.PartialState`: Number and device of this process, and the number of processes.
    """
    from accelerate import PartialState

    from svqvae_cli.loading import find_device

    uses_cpu = find_device(args.device).type == "cpu"
    return PartialState(cpu=uses_cpu)


def _check_none_skipped(report: Any) -> None:
    """Raises SkippedError, which sets the exit code, if images of a report were skipped."""
    num_skipped = len(report.skipped)
    num_read = report.settings["images"] + report.settings.get("generated_images", 0)
    check_none_skipped(num_skipped, num_read + num_skipped)


def _device_of_process(device: Any) -> str:
    """Name of the device that accelerate has chosen for this process. It numbers CPUs, too."""
    if device.type == "cpu":
        return "cpu"
    return str(device)


def _check(args: argparse.Namespace) -> None:
    """Raises ValueError for paths and options that are wrong, before anything slow is imported."""
    if args.generated is not None:
        forbid_options(args, "is not for generated images", *OPTIONS_OF_MODELS)
        find_inputs([args.generated], IMAGE_SUFFIXES, args.output)  # raises if there are no images
    else:
        for source in _models(args):
            check_source(source, allow_subfolder=True)
    for weights in (args.lpips_weights, args.inception_weights):
        if weights is not None and not weights.is_file():
            raise ValueError(f"there is no file `{weights}`. docs/evaluation.md says where the weights are.")
    check_data(args.data)
    check_output(args.output)
    if not args.overwrite:
        check_absent(args.output / "report.json")


def _models(args: argparse.Namespace) -> list[str]:
    """All models to be measured."""
    models = [args.model or DEFAULT_MODEL]
    if args.beside is not None:
        models += args.beside
    return models


def _write(args: argparse.Namespace, report: Any) -> None:
    """Writes the report and prints its tables."""
    from svqvae_hf.evaluation.report import ALL_ROWS_TITLE, SAME_BITS_TITLE
    from svqvae_hf.evaluation.report_files import write_report

    report.settings["data"] = args.data
    report.settings |= image_set_options(args)
    report.settings["lpips_net"] = None if args.lpips_weights is None else args.lpips_net
    report.settings["lpips_weights"] = _file_name(args.lpips_weights)
    report.settings["inception_weights"] = _file_name(args.inception_weights)
    report.notes += _first_images_notes(args.max_images, report)
    write_report(report, args.output)
    lines = []
    if report.same_bits:
        lines += [f"{SAME_BITS_TITLE}:", "", *report.table_at_same_bits(), ""]
        lines += [f"{ALL_ROWS_TITLE}:", ""]
    lines += [*report.table(), ""]
    if report.skipped:
        lines.append(f"{len(report.skipped)} skipped: see the report.")
    lines += report.notes
    print("\n".join(lines))


def _first_images_notes(max_images: int | None, report: Any) -> list[str]:
    """Says that the images are the first of a set that may be longer."""
    num_read = report.settings["images"] + len(report.skipped)
    if max_images is None or num_read < max_images:
        return []
    return [
        f"Only the first {max_images} images were read (--max-images): in a folder, the first by name. They are not a "
        "random sample, and may all be of one class."
    ]


def _file_name(path: Path | None) -> str | None:
    """Name of a file without its folders, if there is a file."""
    if path is None:
        return None
    return path.name


def _evaluate(args: argparse.Namespace, images: Any, networks: dict[str, Any]) -> Any:
    """Measures one SVQVAE at the sizes of its scales, or several tokenizers at the size of the images."""
    from svqvae_cli.loading import explain_loading
    from svqvae_hf.evaluation.evaluate import evaluate
    from svqvae_hf.evaluation.tokenizers.auto import class_name, load_tokenizers, tokenizer_titles

    sources = _models(args)
    titles = tokenizer_titles(sources)
    options = {name: getattr(args, name) for name in OPTIONS_OF_SVQVAES}
    tokenizers = []
    class_names = []
    for source, title in zip(sources, titles, strict=True):
        with explain_loading(source):
            class_names.append(class_name(source))
            tokenizers += load_tokenizers(source, args.device, title=title, **options)
    if "SVQVAE" not in class_names:
        forbid_options(args, "is for SVQVAEs", *OPTIONS_OF_SVQVAES)
    measures_one_svqvae = class_names == ["SVQVAE"] and args.beside is None and not args.codecs
    tokenizers += _codec_tokenizers(args.codecs)
    report = evaluate(
        tokenizers,
        images,
        own_size=measures_one_svqvae,
        resolution=args.resolution,
        device=args.device,
        **networks,
    )
    report.settings |= {"models": titles, **options}
    return report


def _codec_tokenizers(names: Sequence[str]) -> list[Any]:
    """Image files at several qualities, as tokenizers. The names of their codecs are in lower case, such as `jpeg`."""
    from svqvae_hf.evaluation.codecs import CODECS, QUALITIES, CodecTokenizer

    tokenizers = []
    for codec in CODECS:
        if codec.lower() in names:
            for quality in QUALITIES:
                tokenizers.append(CodecTokenizer(codec, quality))
    return tokenizers


def _evaluate_generated(args: argparse.Namespace, networks: dict[str, Any]) -> Any:
    """Compares generated images with the set, or with a reference batch of published evaluations."""
    from svqvae_cli.loading import load_model
    from svqvae_hf.data.image_sets import open_images
    from svqvae_hf.evaluation.generated import TokenizerFeatures, compare_generated

    reference = _open_reference(args)
    bundled_features = TokenizerFeatures(load_model(None, args.device, "float32"))
    feature_networks = {bundled_features.title: bundled_features}
    if networks["inception"] is not None:
        feature_networks[FID_NETWORK] = networks["inception"].to(args.device)
    generated_files = find_inputs([args.generated], IMAGE_SUFFIXES, args.output)
    generated_images = open_images([os.fspath(file.path) for file in generated_files])
    report = compare_generated(
        generated_images,
        reference.images,
        feature_networks,
        resolution=reference.resolution,
        statistics=reference.statistics,
        device=args.device,
    )
    report.settings["generated"] = args.generated
    return report


@dataclass(frozen=True)
class _Reference:
    """What generated images are compared with.

    Args:
        images: An image set, or the images of a reference batch.
        resolution (`int`, *optional*): Side in pixels to which all images are resized.
        statistics (`dict[str, Any]`): Statistics of features that a reference batch holds, by the name of the network.
    """

    images: Any
    resolution: int | None
    statistics: dict[str, Any]


def _open_reference(args: argparse.Namespace) -> _Reference:
    """Opens DATA: an image set, or a reference batch of published evaluations."""
    from svqvae_hf.data.image_sets import open_images
    from svqvae_hf.evaluation.reference_batch import ReferenceBatch

    options_of_set = image_set_options(args)  # values by the names of the options, such as `split`
    is_reference_batch = len(args.data) == 1 and args.data[0].endswith(REFERENCE_SUFFIX)
    if is_reference_batch:
        forbid_options(args, "is not for a reference batch", "resolution", *options_of_set)
        batch = ReferenceBatch(Path(args.data[0]))
        return _Reference(batch, batch.side, statistics={FID_NETWORK: batch.statistics})
    # `open_images` raises if the results would lie in the set.
    images = open_images(args.data, keep_labels=False, results=args.output, **options_of_set)
    return _Reference(images, args.resolution, statistics={})

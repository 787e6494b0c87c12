"""`svqvae evaluate`."""

import argparse

from svqvae_cli.arguments import (
    OVERLAP,
    Commands,
    add_command,
    add_device,
    add_image_set,
    add_output,
    add_scales,
    add_tiles,
    image_set_options,
    path,
    path_or_name,
)
from svqvae_cli.errors import check_none_skipped, require_extra

CODEC_NAMES = ("jpeg", "webp", "avif")  # in lower case, as in `svqvae_hf.evaluation.baselines.codecs`


def add_to(commands: Commands) -> None:
    """Adds the command and its arguments."""
    parser = add_command(
        commands,
        "evaluate",
        run,
        "measure a model on an image set",
        "Writes report.json, report.md, plots, and metadata for the model card. On\n"
        "several GPUs:\n"
        "  accelerate launch -m svqvae_cli evaluate MODEL DATA --output DIR",
        "org/svqvae photos --output report --scales 1 0.5 0.25",
    )
    parser.add_argument("model", type=path_or_name, metavar="MODEL", help="model folder or Hub id")
    add_image_set(parser)
    add_output(parser, "folder to write to")
    parser.add_argument(
        "--resolution",
        type=int,
        metavar="PIXELS",
        help="resize the shorter side and crop the centre to this side (default: images as they are)",
    )
    add_scales(parser, [1.0, 0.5, 0.25])
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
    add_tiles(parser, "the model's sample_size", f"{OVERLAP}, or less if the tile is too small")
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
    """Measures a model on an image set, and writes numbers, tables and plots."""
    with require_extra("evaluate", "eval"):
        from svqvae_hf.data.image_sets import open_images
        from svqvae_hf.evaluation.baselines.blocks import BlockBaseline, fit_block_baselines, read_fit_images
        from svqvae_hf.evaluation.baselines.codecs import CODECS
        from svqvae_hf.evaluation.evaluate import evaluate
        from svqvae_hf.evaluation.perceptual import load_inception, load_lpips
        from svqvae_hf.evaluation.report import summary, write_report
    from accelerate import PartialState

    from svqvae_cli.loading import find_device, load_model, process_device
    from svqvae_hf.models.image_processing_svqvae import IMAGE_SUFFIXES
    from svqvae_hf.paths import check_output, find_files

    check_output(args.output)
    state = PartialState(cpu=find_device(args.device).type == "cpu")
    images = open_images(args.data, **image_set_options(args))
    lpips = load_lpips(args.lpips_net, args.lpips_weights) if args.lpips_weights else None
    inception = load_inception(args.inception_weights) if args.inception_weights else None
    model = load_model(args.model, process_device(args.device, state), "float32")
    block_baselines: list[BlockBaseline] = []
    if args.baselines:
        fit_images = read_fit_images(find_files(args.baselines, IMAGE_SUFFIXES), model.f, model.device)
        codebook_size, dim = model.config["codebook_size"], model.config["codebook_embed_dim"]
        block_baselines = fit_block_baselines(fit_images, model.f, codebook_size, dim)
    report = evaluate(
        model,
        images,
        scales=args.scales,
        scale_from=args.scale_from,
        modes=args.modes,
        tile_size=args.tile_size,
        overlap=args.overlap,
        resolution=args.resolution,
        half_precision=args.half_precision,
        lpips=lpips,
        inception=inception,
        block_baselines=block_baselines,
        codecs=[name for name in CODECS if name.lower() in args.codecs],
    )
    if state.is_main_process:
        report.settings |= {"model": args.model, "data": args.data, "baselines": args.baselines}
        report.settings |= image_set_options(args)
        report.settings |= {
            "lpips_net": args.lpips_net,
            "lpips_weights": args.lpips_weights and args.lpips_weights.name,
            "inception_weights": args.inception_weights and args.inception_weights.name,
        }
        write_report(report, args.output)
        print(summary(report))
    state.destroy_process_group()
    if state.num_processes == 1:  # launchers take any other exit code than 0 for a crash
        check_none_skipped(len(report.skipped), len(report.images) + len(report.skipped))

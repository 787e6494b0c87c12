"""Images learned by heart: `python benchmarks/by_heart.py PIPELINE PHOTOS`.

The pipeline is one of `training/train_next_scale.py`, trained on the folder of photographs, one per subfolder, each
a class of its own. At temperature 0 it samples each class, fills a masked quarter of each photograph, and refines the
ids of scales up to a quarter of the last one. The ids are compared with the photographs' own at every scale, and the
images with the photographs.

It also samples each class on a canvas twice as wide. At a seam, the codes of neighbouring columns would be further
apart than elsewhere. The photographs are stretched there, so columns come in pairs, and the middle lies between two of
them. The cosine distance across the middle is compared with the distances between other pairs.
"""

import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from measuring import Row, describe_machine, make_parser, report
from PIL import Image

from svqvae_hf import SVQVAENextScalePipeline
from svqvae_hf.evaluation.metrics import psnr
from svqvae_hf.models.image_processing_svqvae import load_image
from svqvae_hf.token_sets.crops import make_crops


def sample(pipeline: SVQVAENextScalePipeline, labels: list[int], **editing: Any) -> list[torch.Tensor]:
    """Ids of all scales, `(images, h, w)` each."""
    grids: list[torch.Tensor] = []
    pipeline(
        labels,
        temperature=0,
        output_type="latent",
        callback_on_step_end=lambda *step: grids.append(step[-1]["ids"]),
        **editing,
    )
    return grids


def measure_seam(pipeline: SVQVAENextScalePipeline, labels: list[int]) -> Row:
    """Samples a canvas of 2 : 1, and compares its middle with the other borders of pairs of columns."""
    height, width = (side * pipeline.vqvae.f for side in pipeline.trained_schedule[-1])
    ids = sample(pipeline, labels, height=height, width=2 * width)[-1]
    codes = pipeline.vqvae.quantize.get_codebook_entry(ids)  # (images, rows, columns, codebook_embed_dim)
    distances = 1 - F.cosine_similarity(codes[:, :, 1:], codes[:, :, :-1], dim=-1).mean((0, 1))
    middle = len(distances) // 2
    others = torch.cat([distances[middle % 2 : middle : 2], distances[middle + 2 :: 2]])
    return {
        "canvas": f"{2 * width} x {height}",
        "images": len(ids),
        "distance across the middle": distances[middle].item(),
        "mean between other pairs": others.mean().item(),
        "least": others.min().item(),
        "largest": others.max().item(),
    }


def main() -> None:
    """Reads the arguments, compares ids and reports."""
    parser = make_parser(__doc__, rounds=1)
    parser.add_argument("pipeline", help="folder of the pipeline")
    parser.add_argument("photos", type=Path, help="folder with a subfolder per class")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    pipeline = SVQVAENextScalePipeline.from_pretrained(options.pipeline).to(options.device)
    pipeline.set_progress_bar_config(disable=True)
    classes = pipeline.config["class_names"]
    side = pipeline.trained_schedule[-1][0] * pipeline.vqvae.f
    photos = [
        make_crops(load_image(path), "centre", side)[0]
        for name in classes
        for path in (options.photos / name).iterdir()
    ]
    labels = list(range(len(classes)))
    mask = Image.new("L", (side, side))
    mask.paste(255, (0, 0, side // 2, side // 2))
    tasks = {
        "sample a class": {},
        "fill a quarter": {"image": photos, "mask_image": mask},
        "refine from a quarter": {"image": photos, "image_scale": 0.25},
    }
    own = sample(pipeline, labels, image=photos, image_scale=1)
    pixels = pipeline.image_processor(photos)["pixel_values"].to(pipeline.device)
    black, white = pipeline.vqvae.config["pixel_range"]
    rows: list[Row] = []
    for task, editing in tasks.items():
        start = time.perf_counter()
        found = sample(pipeline, labels, **editing)
        equal = torch.cat([(a == b).flatten(1) for a, b in zip(found, own, strict=True)], dim=1).cpu()
        seconds = time.perf_counter() - start  # after the GPU is done
        images = pipeline.vqvae.decode_tokens(found[-1])
        rows.append(
            {
                "task": task,
                "images": len(photos),
                "images with all ids": int(equal.all(1).sum()),
                "fraction of equal ids": equal.double().mean().item(),
                "PSNR, dB": psnr(images, pixels, data_range=white - black).mean().item(),
                "seconds per image": seconds / len(photos),
            }
        )
    tables = {"Ids that come back": rows, "Seam": [measure_seam(pipeline, labels)]}
    report(options, describe_machine(options.device, options.threads), tables)


if __name__ == "__main__":
    main()

"""Measures `scaling_factor` over an image set, and stores it in the model's config.

python training/measure_scaling_factor.py MODEL DATA [--num_images 1000] [--resolution 256] [--split train]

The factor is 1 / the standard deviation of latents before quantisation, over all channels and positions. A denoiser is
trained on latents times this factor, whose variance is near 1.
"""

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from svqvae_hf import SVQVAE
from svqvae_hf.data.image_sets import open_images
from svqvae_hf.files.outputs import write_file
from svqvae_hf.trainer.data.crop_loader import CropLoader
from svqvae_hf.trainer.data.crops import CropPolicy
from svqvae_hf.trainer.run import one_line_errors

BATCH_SIZE = 8


@torch.no_grad()
def measure_scaling_factor(vqvae: SVQVAE, batches: Iterable[torch.Tensor]) -> float:
    """Computes 1 / the standard deviation of latents.

    Args:
        vqvae ([`SVQVAE`]): Model.
        batches (`Iterable[torch.Tensor]`): Images `(batch, 3, height, width)` in the model's `pixel_range`.

    Raises:
        ValueError: If all latents are equal.
    """
    count, total, squares = 0, 0.0, 0.0
    for batch in batches:
        latents = vqvae.encode(batch.to(vqvae.device)).latents.double()
        count += latents.numel()
        total += latents.sum().item()
        squares += latents.square().sum().item()
    variance = squares / count - (total / count) ** 2
    if not variance > 0:
        raise ValueError("Latents must differ, but all are equal. Use other images, or a trained model.")
    return variance**-0.5


def read_crops(
    data: str, num_images: int, resolution: int, pixel_range: tuple[float, float], **selection: Any
) -> CropLoader:
    """Makes a loader of centre crops of an image set, with options of `open_images`."""
    if min(num_images, resolution) < 1:
        raise ValueError(f"`--num_images` and `--resolution` must be at least 1, but are {num_images}, {resolution}.")
    images = open_images([data], **selection)
    count = min(num_images, images.length or num_images)
    batch_size = min(BATCH_SIZE, count)
    policy = CropPolicy([resolution], batch_size, center_crop=True, random_flip=False, resize_range=(1.0, 1.0))
    return CropLoader(
        images,
        policy,
        pixel_range,
        seed=0,
        num_workers=2,
        process_index=0,
        num_processes=1,
        num_batches=count // batch_size,
    )


def main() -> None:
    """Measures, prints and stores the factor."""
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", metavar="MODEL", help="folder of the model, whose config.json is changed")
    parser.add_argument("data", metavar="DATA", help="folder of images, or image set on the Hub, which is streamed")
    parser.add_argument(
        "--num_images", type=int, default=1000, help="maximum number of images; each gives its centre crop"
    )
    parser.add_argument("--resolution", type=int, default=256, help="side of the crops in pixels")
    parser.add_argument("--split", help="split of the set, required if it has several")
    parser.add_argument("--image_column", help="column of the images (default: found by its type)")
    args = parser.parse_args()
    config_file = Path(args.model, "config.json")
    if not config_file.is_file():
        raise ValueError(f"MODEL must be the folder of a model, but `{args.model}` has no config.json.")
    vqvae = SVQVAE.from_pretrained(args.model).to("cuda" if torch.cuda.is_available() else "cpu")
    selection = {"split": args.split, "image_column": args.image_column}
    loader = read_crops(args.data, args.num_images, args.resolution, vqvae.config["pixel_range"], **selection)
    progress = tqdm(loader, total=loader.num_batches, unit="batch", disable=not sys.stderr.isatty())
    factor = measure_scaling_factor(vqvae, (batch.sample for batch in progress))
    config = json.loads(config_file.read_text(encoding="utf-8")) | {"scaling_factor": factor}
    write_file(config_file, (json.dumps(config, indent=2, sort_keys=True) + "\n").encode())
    print(f"scaling_factor {factor:.6g}, over {loader.num_batches * loader.policy.batch_size:,} images")


if __name__ == "__main__":
    with one_line_errors():
        main()

"""Measures `scaling_factor` over an image set, and stores it in the model's config.

python training/measure_scaling_factor.py MODEL DATA [--num_images 1000] [--resolution 256] [--split train]

The factor is 1 / the standard deviation of latents before quantisation, over all channels and positions. A denoiser is
trained on latents times this factor, whose variance is near 1.
"""

import json
from collections.abc import Iterable
from pathlib import Path

import torch

from svqvae_hf import SVQVAE
from svqvae_hf.data.image_sets import open_images
from svqvae_hf.files.outputs import write_file
from svqvae_hf.trainer.data.crops import centre_crops
from svqvae_hf.trainer.run import one_line_errors, script_parser
from svqvae_hf.trainer.tracking import progress

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
    latents = torch.cat([vqvae.encode(batch.to(vqvae.device)).latents.cpu() for batch in batches])
    deviation = latents.double().std(correction=0).item()
    if not deviation > 0:
        raise ValueError("Latents must differ, but all are equal. Use other images, or a trained model.")
    return 1 / deviation


def main() -> None:
    """Measures, prints and stores the factor."""
    parser = script_parser(__doc__)
    parser.add_argument("model", metavar="MODEL", help="folder of the model, whose config.json is changed")
    parser.add_argument("data", metavar="DATA", help="folder of images, or image set on the Hub, which is streamed")
    parser.add_argument("--num_images", type=int, default=1000, help="maximum number of images, held in memory")
    parser.add_argument("--resolution", type=int, default=256, help="side of their centre crops in pixels")
    parser.add_argument("--split", help="split of the set, required if it has several")
    parser.add_argument("--image_column", help="column of the images (default: found by its type)")
    args = parser.parse_args()
    config_file = Path(args.model, "config.json")
    if not config_file.is_file():
        raise ValueError(f"MODEL must be the folder of a model, but `{args.model}` has no config.json.")
    if min(args.num_images, args.resolution) < 1:
        raise ValueError(
            f"`--num_images` and `--resolution` must be at least 1, but are {args.num_images}, {args.resolution}."
        )
    vqvae = SVQVAE.from_pretrained(args.model).to("cuda" if torch.cuda.is_available() else "cpu")
    images = open_images([args.data], split=args.split, image_column=args.image_column)
    crops = centre_crops(images, args.num_images, args.resolution, vqvae.config["pixel_range"])
    batches = crops.split(BATCH_SIZE)
    factor = measure_scaling_factor(vqvae, progress(batches, "latents", len(batches)))
    config = json.loads(config_file.read_text(encoding="utf-8")) | {"scaling_factor": factor}
    write_file(config_file, (json.dumps(config, indent=2, sort_keys=True) + "\n").encode())
    print(f"scaling_factor {factor:.6g}, over {len(crops):,} images")


if __name__ == "__main__":
    with one_line_errors():
        main()

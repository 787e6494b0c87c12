"""Gives a model codes for flat colours: `python training/bundled/add_colours.py MODEL IMAGES OUT`.

A flat area has one code, so its colour is only as exact as the codes for colours are dense. Photographs alone make
some 200 such codes. This replaces the codes that IMAGES use least by the latents of colours on a lattice of the RGB
cube.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from svqvae_hf import SVQVAE, SVQVAEImageProcessor
from svqvae_hf.data.image_rows import ImageRow, read_image
from svqvae_hf.data.image_sets import open_images
from svqvae_hf.evaluation.metrics import count_codes
from svqvae_hf.trainer.scripts import one_line_errors, script_parser

LEVELS = 13  # values of red, of green and of blue
SIDE = 64  # pixels of a flat image
SCALES = (1.0, 0.5, 0.25)  # at which the use of codes is counted
BATCH = 49
COUNTED_IMAGES = 200  # images in which the use of codes is counted, spread over the set


def colour_latents(model: SVQVAE, levels: int) -> torch.Tensor:
    """Encodes colours that are spread evenly over the RGB cube.

    Each colour is encoded as a flat image. Its latent is read at the centre, away from the edges.

    Args:
        model ([`SVQVAE`]): Model that encodes.
        levels (`int`): Number of values of red, of green and of blue.

    Returns:
        `torch.Tensor`: A latent of length 1 for each colour, `(levels**3, C)`. Codes are compared at this length.
    """
    levels_of_channel = (torch.arange(levels) + 0.5) / levels  # between 0 and 1
    colours = torch.cartesian_prod(levels_of_channel, levels_of_channel, levels_of_channel)  # (levels**3, 3)
    centre = SIDE // 2 // model.f  # row and column of a latent
    latents_at_centre = []
    for batch in tqdm(colours.split(BATCH), desc="colours"):
        sample = batch[..., None, None].expand(-1, -1, SIDE, SIDE)  # (B, 3, SIDE, SIDE)
        latents = model.encode(sample).latents  # (B, C, h, w)
        latents_at_centre.append(latents[..., centre, centre])  # (B, C)
    latents_of_colours = torch.cat(latents_at_centre).float()  # (levels**3, C)
    return F.normalize(latents_of_colours, dim=-1)


def count_uses(model: SVQVAE, rows: list[ImageRow]) -> torch.Tensor:
    """How often each code is used in some images of a set, at several scales."""
    processor = SVQVAEImageProcessor()
    num_codes = model.config["codebook_size"]
    counts = torch.zeros(num_codes, dtype=torch.int64)
    step = max(1, len(rows) // COUNTED_IMAGES)
    for row in tqdm(rows[::step], desc="images"):
        sample = processor(read_image(row))["pixel_values"]
        for ids in model.encode_tokens(sample, scales=SCALES):
            counts += count_codes(ids, num_codes)
    return counts


@torch.inference_mode()
def main() -> None:
    """Reads the arguments and writes the model."""
    parser = script_parser(__doc__)
    parser.add_argument("model", help="model folder")
    parser.add_argument("images", help="folder of images like those that the model is for")
    parser.add_argument("out", type=Path, help="folder to write")
    options = parser.parse_args()
    if options.out.exists():
        raise ValueError(f"OUT must be a new folder, but `{options.out}` exists. Choose another.")
    model = SVQVAE.from_pretrained(options.model, torch_dtype=torch.float32).eval()
    weight = model.quantize.embedding.weight
    if len(weight) <= LEVELS**3:
        raise ValueError(f"MODEL must have more than {LEVELS**3:,} codes, one per colour, got {len(weight)}.")
    counts = count_uses(model, list(open_images([options.images])))
    colours = colour_latents(model, LEVELS)
    rarest = counts.argsort(stable=True)[: len(colours)]
    weight[rarest] = colours
    model.save_pretrained(options.out)


if __name__ == "__main__":
    with one_line_errors():
        main()

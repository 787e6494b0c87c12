"""Compares this package with the original code on the same weights.

python conversion/compare.py ORIGINAL_CHECKOUT CHECKPOINT [--images photo.jpg ...]

ORIGINAL_CHECKOUT is a checkout of Open-Model-Initiative/SVQVAE. Its code runs unchanged. The exit code is 1 if the two
differ by more than rounding.
"""

import argparse
import importlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from svqvae_hf import SVQVAE
from svqvae_hf.loaders.checkpoint_files import Checkpoint
from svqvae_hf.loaders.checkpoints import read_checkpoint
from svqvae_hf.models.image_processing_svqvae import SVQVAEImageProcessor

SCALES = (1.0, 0.5, 0.25, 2.0)
CELL_LATENTS = 4  # sides are multiples of this many latents, because each scale needs whole latents
RANDOM_LATENTS = ((32, 32), (12, 20))
MAX_LATENTS = 48  # side of crops: the memory of the original's untiled attention grows with the fourth power
LATENT_TOLERANCE = 1e-4
TIE = 1e-5  # difference of two cosines whose order rounding can change
SAMPLE_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Comparison:
    """Differences between two models on one image at one scale.

    Args:
        latents (`float`): Largest difference of the latents.
        ids (`int`): Number of ids.
        ties (`int`): Number of unequal ids that are ties: their codes are equally near, up to `TIE`.
        unequal (`int`): Number of other unequal ids.
        sample (`float`): Largest difference of the samples decoded from the original's ids.
    """

    latents: float
    ids: int
    ties: int
    unequal: int
    sample: float

    @property
    def passed(self) -> bool:
        """Whether the models differ by no more than rounding."""
        return self.latents <= LATENT_TOLERANCE and self.unequal == 0 and self.sample <= SAMPLE_TOLERANCE

    def __str__(self) -> str:
        equal_fraction = 1 - (self.ties + self.unequal) / self.ids
        verdict = "ok" if self.passed else "DIFFERS"
        return (
            f"latents {self.latents:.1e}  ids {equal_fraction:8.3%} equal, {self.ties} near ties, {self.unequal} "
            f"others  sample {self.sample:.1e}  {verdict}"
        )


def load_original(checkout: Path, checkpoint: Checkpoint) -> nn.Module:
    """Loads a checkpoint of format svqvae with the original code."""
    if not (checkout / "svqvae.py").is_file():
        raise FileNotFoundError(
            f"`{checkout}` must be a checkout of Open-Model-Initiative/SVQVAE, but has no svqvae.py."
        )
    if checkpoint.format.name != "svqvae":
        raise ValueError(f"`{checkpoint.path}` must have the format svqvae, but has {checkpoint.format.name}.")
    sys.path.insert(0, str(checkout))
    original = importlib.import_module("svqvae")
    config = checkpoint.config
    # The original's constructor leaves these two at their defaults.
    sizes = {"ch": config["base_channels"], "num_res_blocks": config["num_res_blocks"]}
    original.Encoder = partial(original.Encoder, **sizes)
    original.Decoder = partial(original.Decoder, **sizes)
    args = original.ModelArgs(
        codebook_size=config["codebook_size"],
        codebook_embed_dim=config["codebook_embed_dim"],
        encoder_ch_mult=config["encoder_ch_mult"],
        decoder_ch_mult=config["decoder_ch_mult"],
        z_channels=config["z_channels"],
    )
    return original.ScalableVQVAE.load(str(checkpoint.path), args)


def samples(images: list[Path], f: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields names and samples `(1, 3, height, width)` in [0, 1]: crops of the images, or random ones."""
    if not images:
        generator = torch.Generator().manual_seed(0)
        for h, w in RANDOM_LATENTS:
            yield f"random {w * f} x {h * f}", torch.rand(1, 3, h * f, w * f, generator=generator)
    processor = SVQVAEImageProcessor()
    for image in images:
        sample = processor(image)["pixel_values"]
        height = side_of_crop(sample.shape[-2], f)
        width = side_of_crop(sample.shape[-1], f)
        if height == 0 or width == 0:
            raise ValueError(
                f"Images must have sides of at least {CELL_LATENTS * f} pixels, but `{image}` is smaller."
            )
        yield image.name, sample[..., :height, :width]


def side_of_crop(side: int, f: int) -> int:
    """Largest side of a crop in pixels that each scale takes; 0 if the image is too small."""
    cell = CELL_LATENTS * f
    return min(side // cell * cell, MAX_LATENTS * f)


def compare(original: nn.Module, ours: SVQVAE, sample: torch.Tensor, scale: float) -> Comparison:
    """Compares both models on one sample `(1, 3, height, width)` in [0, 1], untiled."""
    # The original
    unscaled_latents = original.quant_conv(original.encoder(sample))  # (1, codebook_embed_dim, h, w)
    original_latents = resize(unscaled_latents, scale)
    quantized, _, (_, _, flat_ids) = original.quantize(original_latents)
    original_sample = original.decode(quantized).clamp(0, 1)

    # This package
    latents = ours.encode(sample).latents
    ids = ours.encode_tokens(sample, [scale], scale_from="latents")[0]  # (1, h, w)
    original_ids = flat_ids.view(ids.shape)
    decoded = ours.decode_tokens(original_ids)

    is_unequal = ids != original_ids
    vectors = original_latents.movedim(1, -1)  # (1, h, w, codebook_embed_dim)
    ties = count_ties(ours, vectors[is_unequal], ids[is_unequal], original_ids[is_unequal])
    return Comparison(
        latents=(latents - unscaled_latents).abs().max().item(),
        ids=ids.numel(),
        ties=ties,
        unequal=int(is_unequal.sum()) - ties,
        sample=(decoded - original_sample).abs().max().item(),
    )


def resize(latents: torch.Tensor, scale: float) -> torch.Tensor:
    """Latents `(1, codebook_embed_dim, h, w)` at a scale, resized as the original does it."""
    if scale == 1:
        return latents
    size = [round(scale * side) for side in latents.shape[-2:]]
    mode = "area" if scale < 1 else "bilinear"
    return F.interpolate(latents, size, mode=mode)


def count_ties(model: SVQVAE, latents: torch.Tensor, ids: torch.Tensor, other_ids: torch.Tensor) -> int:
    """How many latents `(n, codebook_embed_dim)` are as near to the code of one id as to the code of the other one.

    Args:
        model ([`SVQVAE`]): Model that holds the codes.
        latents (`torch.Tensor` of shape `(n, codebook_embed_dim)`): Latents.
        ids (`torch.Tensor` of shape `(n,)`): Ids of one model.
        other_ids (`torch.Tensor` of shape `(n,)`): Ids of the other model.
    """
    directions = F.normalize(latents, dim=-1)
    codes = model.quantize.get_codebook_entry(ids)  # (n, codebook_embed_dim)
    other_codes = model.quantize.get_codebook_entry(other_ids)
    cosine_differences = (directions * (codes - other_codes)).sum(-1)  # (n,)
    return int((cosine_differences.abs() < TIE).sum())


@torch.no_grad()
def main() -> int:
    """Runs the script and returns its exit code."""
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("original_checkout", type=Path, help="folder with the original's svqvae.py and modules.py")
    parser.add_argument("checkpoint", help=".safetensors file of the original, local or `org/repo:file` on the Hub")
    parser.add_argument(
        "--images", type=Path, nargs="+", default=[], help="images to crop and compare on, instead of random ones"
    )
    args = parser.parse_args()
    try:
        checkpoint = read_checkpoint(args.checkpoint, SVQVAE)
        original = load_original(args.original_checkout, checkpoint)
        ours = checkpoint.model(SVQVAE)
        passed = True
        for name, sample in samples(args.images, ours.f):
            for scale in SCALES:
                comparison = compare(original, ours, sample, scale)
                print(f"{name}  scale {scale:<4}  {comparison}")
                passed &= comparison.passed
    except (OSError, ValueError) as error:
        parser.error(str(error))
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())

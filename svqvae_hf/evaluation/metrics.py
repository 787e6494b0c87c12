"""Numbers of images, ids, codes and latents: pure functions."""

import math

import torch
import torch.nn.functional as F
from torchmetrics.functional.image import (
    multiscale_structural_similarity_index_measure,
    peak_signal_noise_ratio,
    structural_similarity_index_measure,
)

SSIM_SIDE = 11  # pixels of the shorter side that SSIM needs: its window
SSIM_BAND = 256  # rows of places measured at once, for the memory that they take
MS_SSIM_SIDE = 176  # likewise, for five scales, as torchmetrics counts
SEARCH_SCORES = 1 << 22  # cosines held at once: 16 MiB in float32


def psnr(sample: torch.Tensor, target: torch.Tensor, data_range: float = 255.0) -> torch.Tensor:
    """Peak signal-to-noise ratio of each image: `10 log10(data_range^2 / mean((sample - target)^2))`.

    Args:
        sample (`torch.Tensor` of shape `(batch, channels, height, width)`): Images, uint8 or floating point.
        target (`torch.Tensor` of shape `(batch, channels, height, width)`): Their references.
        data_range (`float`, defaults to 255.0): White minus black.

    Returns:
        `torch.Tensor` of shape `(batch,)`: In dB, float32; infinite for equal images.
    """
    return peak_signal_noise_ratio(
        sample.float(), target.float(), data_range=data_range, reduction="none", dim=(1, 2, 3)
    )


def ssim(sample: torch.Tensor, target: torch.Tensor, data_range: float = 255.0) -> torch.Tensor:
    """Structural similarity of each image, by Gaussian windows of 11 pixels with a sigma of 1.5.

    Args:
        sample (`torch.Tensor` of shape `(batch, channels, height, width)`): Images, sides of at least `SSIM_SIDE`.
        target (`torch.Tensor` of shape `(batch, channels, height, width)`): Their references.
        data_range (`float`, defaults to 255.0): White minus black.

    Returns:
        `torch.Tensor` of shape `(batch,)`: Mean over places where the window fits and over channels; 1 at best.

    Source: Wang et al., Image quality assessment, 2004, with its constants 0.01 and 0.03.
    """
    border = SSIM_SIDE // 2
    places = sample.shape[-2] - 2 * border
    total = torch.zeros(len(sample), device=sample.device)
    for top in range(0, places, SSIM_BAND):
        rows = slice(top, min(top + SSIM_BAND, places) + 2 * border)
        values = structural_similarity_index_measure(
            sample[..., rows, :].float(),
            target[..., rows, :].float(),
            sigma=1.5,
            data_range=data_range,
            reduction="none",
            return_full_image=True,
        )[1]
        inside = values[..., border : values.shape[-2] - border, border : values.shape[-1] - border]
        total += inside.mean((1, 2, 3)) * inside.shape[-2]
    return total / places


def ms_ssim(sample: torch.Tensor, target: torch.Tensor, data_range: float = 255.0) -> torch.Tensor:
    """Structural similarity of each image over five halvings of its size.

    Args:
        sample (`torch.Tensor` of shape `(batch, channels, height, width)`): Images, sides of at least `MS_SSIM_SIDE`.
        target (`torch.Tensor` of shape `(batch, channels, height, width)`): Their references.
        data_range (`float`, defaults to 255.0): White minus black.

    Returns:
        `torch.Tensor` of shape `(batch,)`: 1 at best; 0 where a scale has negative correlation.

    Source: Wang et al., Multi-scale structural similarity, 2003, with its weights.
    """
    return multiscale_structural_similarity_index_measure(
        sample.float(), target.float(), sigma=1.5, data_range=data_range, reduction="none", normalize="relu"
    )


def count_codes(ids: torch.Tensor, codebook_size: int) -> torch.Tensor:
    """How often each code occurs: `(codebook_size,)`, int64, for ids of any shape."""
    return torch.bincount(ids.flatten(), minlength=codebook_size)


def usage(counts: torch.Tensor) -> float:
    """Share of the codebook that occurs at all, from the counts of [`count_codes`]."""
    return (counts > 0).sum().item() / counts.numel()


def entropy(counts: torch.Tensor) -> float:
    """Bits per id, `-sum(p log2 p)` with p the shares of the codes: what an ideal code by their frequency takes."""
    share = counts.cpu().double()  # some devices have no float64
    share /= share.sum()
    return abs(torch.special.xlogy(share, share).sum().item()) / math.log(2)


def perplexity(counts: torch.Tensor) -> float:
    """As many equally frequent codes would have the same entropy: `2 ** entropy`, from 1 to the codebook size."""
    return 2 ** entropy(counts)


def bits_per_pixel(ids: int, bits_per_id: float, pixels: int) -> float:
    """Bits of an image's ids per pixel of the image: `ids * bits_per_id / pixels`."""
    return ids * bits_per_id / pixels


def redundancy(codes: torch.Tensor) -> float:
    """Mean cosine of each code and the nearest of the others: near 1 if codes repeat each other.

    Args:
        codes (`torch.Tensor` of shape `(codebook_size, dim)`): At least two codes, of any length.
    """
    unit = F.normalize(codes.float(), dim=-1)
    nearest = []
    for rows in torch.arange(len(unit), device=unit.device).split(max(1, SEARCH_SCORES // len(unit))):
        cosines = unit[rows] @ unit.T
        cosines[torch.arange(len(rows)), rows] = -math.inf
        nearest.append(cosines.amax(-1))
    return torch.cat(nearest).cpu().double().mean().item()


def mean_cosine(latent_sum: torch.Tensor, count: int) -> float:
    """Mean cosine of all pairs of latents, each with itself too: the squared length of their mean.

    Args:
        latent_sum (`torch.Tensor` of shape `(dim,)`): Sum of the latents, each normalised to length 1.
        count (`int`): How many there are.

    Returns:
        `float`: 0 for latents spread evenly over the sphere, 1 for equal ones.
    """
    return (latent_sum.cpu().double() / count).square().sum().item()


def share_changed(ids: torch.Tensor, reference: torch.Tensor) -> float:
    """Share of ids that differ from those of a reference of the same shape."""
    return (ids != reference).sum().item() / ids.numel()

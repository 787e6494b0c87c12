"""Metrics of images, ids and codes, as pure functions."""

import math

import torch
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

SSIM_SIDE = 11  # smallest side for SSIM in pixels, its window
SSIM_BAND = 256  # rows of window positions per pass, to bound memory


def psnr(sample: torch.Tensor, target: torch.Tensor, data_range: float = 255.0) -> torch.Tensor:
    """Peak signal-to-noise ratio per image: `10 log10(data_range^2 / mean((sample - target)^2))`.

    Args:
        sample (`torch.Tensor` of shape `(batch, channels, height, width)`): Images, uint8 or floating point.
        target (`torch.Tensor` of shape `(batch, channels, height, width)`): Their references.
        data_range (`float`, defaults to 255.0): White minus black.

    Returns:
        `torch.Tensor` of shape `(batch,)`: PSNR in dB, float32; infinite for equal images.
    """
    return peak_signal_noise_ratio(
        sample.float(), target.float(), data_range=data_range, reduction="none", dim=(1, 2, 3)
    )


def ssim(sample: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Structural similarity per image, with Gaussian windows of 11 pixels and a sigma of 1.5.

    Args:
        sample (`torch.Tensor` of shape `(batch, channels, height, width)`): Images, sides at least `SSIM_SIDE`.
        target (`torch.Tensor` of shape `(batch, channels, height, width)`): Their references.

    Returns:
        `torch.Tensor` of shape `(batch,)`: Mean over channels and over all positions where the window fits; 1 at best.

    Source: Wang et al., Image quality assessment, 2004, with its constants 0.01 and 0.03.
    """
    height = sample.shape[-2]
    num_positions = height - SSIM_SIDE + 1  # rows of window positions
    border = SSIM_SIDE // 2  # 5 pixels, from the centre of a window of 11 pixels to its side
    total = torch.zeros(len(sample), device=sample.device)  # (batch,)
    # In bands of positions, to bound the memory. The window at position p covers the rows p to p + 10 of pixels, so a
    # band of n positions covers n + 10 rows of pixels.
    for start in range(0, num_positions, SSIM_BAND):
        stop = min(start + SSIM_BAND, num_positions)
        last_position = stop - 1
        pixel_rows = slice(start, last_position + SSIM_SIDE)  # all rows under the windows of the band
        _, similarity = structural_similarity_index_measure(
            sample[..., pixel_rows, :].float(),
            target[..., pixel_rows, :].float(),
            sigma=1.5,
            data_range=255.0,
            reduction="none",
            return_full_image=True,
        )  # (batch, channels, rows, width), a value for the window around each pixel
        # The windows around the 5 pixels at each border reach beyond the band. Without these pixels, n of the n + 10
        # rows are left, one for each position.
        inside = similarity[..., border:-border, border:-border]  # (batch, channels, stop - start, width - 10)
        mean_of_band = inside.mean((1, 2, 3))  # (batch,)
        total += mean_of_band * (stop - start)
    return total / num_positions


def count_codes(ids: torch.Tensor, codebook_size: int) -> torch.Tensor:
    """Occurrences of each code in ids of any shape: `(codebook_size,)`, int64."""
    return torch.bincount(ids.flatten(), minlength=codebook_size)


def usage(counts: torch.Tensor) -> float:
    """Fraction of the codebook in use, from the counts of [`count_codes`]."""
    return (counts > 0).sum().item() / counts.numel()


def entropy(counts: torch.Tensor) -> float:
    """Entropy in bits per id, `-sum(p log2 p)` over the frequencies of codes: the rate of an ideal entropy coder."""
    occurrences = counts.cpu().double()  # some devices have no float64
    frequencies = occurrences / occurrences.sum()
    nats = torch.special.xlogy(frequencies, frequencies).sum().item()
    return abs(nats) / math.log(2)


def perplexity(counts: torch.Tensor) -> float:
    """Number of equally frequent codes with the same entropy: `2 ** entropy`, from 1 to the codebook size."""
    return 2 ** entropy(counts)

"""Measures one tokenizer: the values of each image, and their sums and means over all images and processes."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import gather_object
from PIL import Image
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance

from svqvae_hf.evaluation import metrics
from svqvae_hf.evaluation.measuring import Records, image_metrics, to_image, to_tensor
from svqvae_hf.evaluation.perceptual import LPIPS
from svqvae_hf.evaluation.tokenizers.protocol import Codes, Tokenizer, count, stored_bits
from svqvae_hf.models.resizing import pad_to_multiple
from svqvae_hf.tokens.image_tokens import resize_image

MEANS = ("tokens", "psnr", "ssim", "lpips", "psnr_full_size")  # metrics that are averaged over images


@dataclass(frozen=True, eq=False)
class MeasuredImage:
    """An image and its reconstruction.

    Args:
        values (`dict[str, Any]`): Values by the names of metrics.
        code_counts (`torch.Tensor` of shape `(codebook_size,)`): How often each code occurs; no entries without ids.
        reconstruction (`PIL.Image.Image`): Reconstruction in 8 bits.
        reference (`PIL.Image.Image`): The image that it is compared with, of the same size.
    """

    values: dict[str, Any]
    code_counts: torch.Tensor
    reconstruction: Image.Image
    reference: Image.Image


class Meter:
    """Measures one tokenizer, and sums up over the images of this process.

    Args:
        tokenizer ([`Tokenizer`]): Tokenizer on `device`.
        own_size (`bool`): Compare reconstructions at their own size, instead of the size of the image.
        lpips ([`LPIPS`], *optional*): Network of LPIPS on `device`.
        inception (`nn.Module`, *optional*): Network of FID.
        device (`torch.device`): Device to work on.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        own_size: bool,
        lpips: LPIPS | None,
        inception: nn.Module | None,
        device: torch.device,
    ):
        self.tokenizer = tokenizer
        self.own_size = own_size
        self.lpips = lpips
        self.device = device
        codebook_size = tokenizer.codebook_size
        if codebook_size is None:  # the codes of the tokenizer are not ids, so there is nothing to count
            codebook_size = 0
        self.code_counts = torch.zeros(codebook_size, dtype=torch.int64)
        self.fid = None
        if inception is not None:
            self.fid = _frechet_distance(inception, device)

    @torch.no_grad()
    def measure(self, image: Image.Image) -> MeasuredImage:
        """Encodes and decodes an image, and measures the result."""
        pixels = to_tensor(image, self.device) / 127.5 - 1  # (1, 3, height, width) in [-1, 1]
        sample = pad_to_multiple(pixels, self.tokenizer.f)
        codes = self.tokenizer.encode(sample)
        code_count = count(codes, self.tokenizer.codebook_size)
        occurrences = self._occurrences(code_count.ids)
        reconstruction = self._reconstruct(codes, image, sample)  # smaller than the image at a scale below 1
        reference = resize_image(image, reconstruction.size)
        values: dict[str, Any] = {
            "tokens": code_count.tokens,
            "bits": code_count.bits,
            "stored_bits": stored_bits(self.tokenizer, codes),
        }
        reconstruction_pixels = to_tensor(reconstruction, self.device)
        reference_pixels = to_tensor(reference, self.device)
        values |= image_metrics(reconstruction_pixels, reference_pixels, self.lpips)
        if self.own_size:
            # The metrics above compare the reconstruction with the image resized to its size. This PSNR compares the
            # resized reconstruction with the image.
            enlarged = resize_image(reconstruction, image.size)
            values["psnr_full_size"] = metrics.psnr(to_tensor(enlarged), to_tensor(image)).item()
        return MeasuredImage(values, occurrences, reconstruction, reference)

    def add(self, measured: MeasuredImage) -> None:
        """Adds an image to the sums."""
        self.code_counts += measured.code_counts
        if self.fid is not None:
            reconstruction_pixels = to_tensor(measured.reconstruction, self.fid.device)
            reference_pixels = to_tensor(measured.reference, self.fid.device)
            self.fid.update(reconstruction_pixels, real=False)
            self.fid.update(reference_pixels, real=True)

    def row(self, results: Records, num_pixels: int) -> dict[str, Any]:
        """Row of the table, of the images of all processes.

        Args:
            results (`list[dict[str, Any]]`): Values of each image.
            num_pixels (`int`): Pixels of all images.
        """
        row: dict[str, Any] = {"title": self.tokenizer.title}
        for metric in MEANS:
            row[metric] = mean(values.get(metric) for values in results)  # of the images that have the metric
        row["rfid"] = None
        if self.fid is not None and len(results) > 1:  # a single image has no covariance
            row["rfid"] = self.fid.compute().item()
        row |= self._codebook_values()
        bits = sum(values["bits"] for values in results)
        bits_stored = sum(values["stored_bits"] for values in results)
        row["bits_per_pixel"] = bits / num_pixels
        row["bits_per_pixel_stored"] = bits_stored / num_pixels
        return row

    def _reconstruct(self, codes: Codes, image: Image.Image, sample: torch.Tensor) -> Image.Image:
        """Decodes codes, and crops the padding that the sample has at the right and at the bottom of the image."""
        padded_height, padded_width = sample.shape[-2:]
        decoded = to_image(self.tokenizer.decode(codes))
        if not self.own_size:
            decoded = resize_image(decoded, (padded_width, padded_height))
        # A tokenizer may decode to another size than the sample has, so the size of the image is scaled alike.
        horizontal_scale = decoded.width / padded_width
        vertical_scale = decoded.height / padded_height
        width = round(horizontal_scale * image.width)
        height = round(vertical_scale * image.height)
        return decoded.crop((0, 0, width, height))

    def _occurrences(self, ids: torch.Tensor | None) -> torch.Tensor:
        """How often each code occurs in ids."""
        codebook_size = len(self.code_counts)
        if ids is None:
            return torch.zeros_like(self.code_counts)
        largest_id = int(ids.max())
        if largest_id >= codebook_size:
            raise ValueError(
                f"`encode` of {self.tokenizer.title} must return ids under {codebook_size}, got {largest_id}."
            )
        return metrics.count_codes(ids.cpu(), codebook_size)

    def _codebook_values(self) -> dict[str, float | None]:
        """Usage and perplexity of the codebook over the images of all processes; None without a codebook."""
        counts_of_processes = torch.stack(gather_object([self.code_counts]))  # (processes, codebook_size)
        counts = counts_of_processes.sum(0)  # (codebook_size,)
        if len(counts) == 0:
            return {"usage": None, "perplexity": None}
        return {"usage": metrics.usage(counts), "perplexity": metrics.perplexity(counts)}


def mean(values: Iterable[float | None]) -> float | None:
    """Mean of the available values. Infinite PSNRs (exact images) are excluded unless all are infinite."""
    finite_values = []
    has_infinite_value = False
    for value in values:
        if value == math.inf:
            has_infinite_value = True
        elif value is not None:
            finite_values.append(value)
    if finite_values:
        return math.fsum(finite_values) / len(finite_values)
    if has_infinite_value:
        return math.inf
    return None


def _frechet_distance(inception: nn.Module, device: torch.device) -> FrechetInceptionDistance:
    """Fréchet distance by a network, on a device."""
    distance = FrechetInceptionDistance(inception)
    # torchmetrics sets the dtype at the first image, but a process of many may have no image.
    distance.orig_dtype = torch.float32
    if device.type == "mps":
        return distance.to("cpu")  # mps has no float64
    return distance.to(device)

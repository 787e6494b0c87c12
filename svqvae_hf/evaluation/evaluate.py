"""Measures tokenizers in the same way: on the same images, with the same reference, in one row each."""

from collections.abc import Sequence
from typing import Any

import torch
from accelerate import PartialState
from PIL import Image
from torch import nn

from svqvae_hf.evaluation.measuring import Images, Records, measure_images
from svqvae_hf.evaluation.meter import Meter
from svqvae_hf.evaluation.notes import (
    codebook_notes,
    codec_notes,
    context_model_notes,
    difference_notes,
    lpips_notes,
    rfid_notes,
    tokenizer_notes,
)
from svqvae_hf.evaluation.perceptual import LPIPS
from svqvae_hf.evaluation.report import Report
from svqvae_hf.evaluation.same_bits import compare_with_codecs
from svqvae_hf.evaluation.tokenizers.protocol import Tokenizer


def evaluate(
    tokenizers: Sequence[Tokenizer],
    images: Images,
    *,
    own_size: bool = False,
    resolution: int | None = None,
    lpips: LPIPS | None = None,
    inception: nn.Module | None = None,
    device: str | torch.device = "cpu",
) -> Report:
    """Encodes and decodes each image of a set with each tokenizer, and compares the result with the image in 8 bits.

    An image is padded to multiples of `f` by repeating its last row and column, and the reconstruction is cropped.
    With several processes (`accelerate launch`), each process takes every n-th image, and all return the whole report.

    Args:
        tokenizers (`Sequence[Tokenizer]`): Tokenizers with different titles, on `device`.
        images (`Iterable`): As in [`measure_images`]. Read one by one; images that cannot be read or are too large
            for memory are skipped and named in the report.
        own_size (`bool`, defaults to `False`): Compare a reconstruction at its own size, with the image resized to it:
            by area if smaller, otherwise bicubic. By default the reconstruction is resized to the image.
        resolution (`int`, *optional*): As in [`measure_images`].
        lpips ([`LPIPS`], *optional*): Network of LPIPS, from [`load_lpips`]. Moved to the device.
        inception (`nn.Module`, *optional*): Network of FID, from [`load_inception`]: maps uint8 images `(batch, 3,
            height, width)` to features `(batch, n)`. Moved to the device.
        device (`str` or `torch.device`, defaults to `"cpu"`): Device to work on.

    Raises:
        ValueError: If an option is out of range, titles are equal, or all images are skipped.
    """
    _check_titles(tokenizers)
    device = torch.device(device)
    processes = PartialState(cpu=device.type == "cpu")
    if lpips is not None:
        lpips = lpips.to(device)
    meters = [Meter(tokenizer, own_size, lpips, inception, device) for tokenizer in tokenizers]

    def measure(image: Image.Image, index: int, name: str) -> dict[str, Any]:
        """Measures an image with all tokenizers, whose values are its `results`."""
        # Sums grow only after all tokenizers have measured the image, because one of them may run out of memory.
        measured_images = [meter.measure(image) for meter in meters]
        for meter, measured_image in zip(meters, measured_images, strict=True):
            meter.add(measured_image)
        results = [measured_image.values for measured_image in measured_images]
        return {"width": image.width, "height": image.height, "results": results}

    records, skipped = measure_images(measure, images, resolution, processes)
    num_images = len(records)
    num_pixels = sum(record["width"] * record["height"] for record in records)
    rows: Records = []
    notes = lpips_notes(lpips) + rfid_notes(inception is not None, num_images)
    for number, meter in enumerate(meters):
        results_of_tokenizer = [record["results"][number] for record in records]
        rows.append(meter.row(results_of_tokenizer, num_pixels))
        notes += tokenizer_notes(meter.tokenizer.title, results_of_tokenizer, lpips)
    notes += context_model_notes(tokenizers)
    notes += codebook_notes(rows, tokenizers, num_images)
    same_bits: Records = []
    if not own_size:  # reconstructions at their own size are compared with smaller images than image files are
        same_bits = compare_with_codecs(rows, tokenizers)
        notes += difference_notes(tokenizers, records)
    notes += codec_notes(tokenizers, same_bits)
    return Report(
        title="Evaluation",
        settings={"images": num_images, "resolution": resolution, "device": device.type},
        rows=rows,
        images=records,
        skipped=skipped,
        notes=notes,
        same_bits=same_bits,
    )


def _check_titles(tokenizers: Sequence[Tokenizer]) -> None:
    """Raises ValueError unless there are tokenizers, all with different titles."""
    titles = [tokenizer.title for tokenizer in tokenizers]
    has_duplicates = len(set(titles)) < len(titles)
    if not titles or has_duplicates:
        raise ValueError(f"`tokenizers` must be one or more with different titles, got {titles}.")

"""Measures tokenizers in the same way: on the same images, with the same reference, in one row each."""

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from PIL import Image
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance

from svqvae_hf.evaluation import metrics
from svqvae_hf.evaluation.codecs import CODECS
from svqvae_hf.evaluation.measuring import Images, Records, image_metrics, measure_images, to_image, to_tensor
from svqvae_hf.evaluation.perceptual import LPIPS
from svqvae_hf.evaluation.report import MANY_IMAGES, METRICS, Report
from svqvae_hf.evaluation.tokenizers.protocol import Tokenizer, count
from svqvae_hf.models.resizing import pad_to_multiple
from svqvae_hf.tokens.image_tokens import resize_image

IDS_PER_CODE = 10  # with fewer, the frequencies of codes say little


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
    device = torch.device(device)
    titles = [each.title for each in tokenizers]
    if not titles or len(set(titles)) < len(titles):
        raise ValueError(f"`tokenizers` must be one or more with different titles, got {titles}.")
    state = PartialState(cpu=device.type == "cpu")
    lpips = lpips.to(device) if lpips is not None else None
    meters = [_Meter(each, own_size, lpips, inception, device) for each in tokenizers]

    def measure(image: Image.Image, index: int, name: str) -> dict[str, Any]:
        measured = [meter.measure(image) for meter in meters]
        for meter, each in zip(meters, measured, strict=True):
            meter.add(each)  # only now, because a tokenizer may run out of memory
        return {"width": image.width, "height": image.height, "results": [each.values for each in measured]}

    records, skipped = measure_images(measure, images, resolution, state)
    rows = [meter.row([record["results"][index] for record in records], records) for index, meter in enumerate(meters)]
    if not own_size:
        add_image_files(rows)
    return Report(
        title="Evaluation",
        settings={"images": len(records), "resolution": resolution, "device": device.type},
        rows=rows,
        images=records,
        skipped=skipped,
        notes=_notes(meters, rows, records),
    )


class _Measured(NamedTuple):
    """Values of an image, how often each code occurs, its reconstruction, and the image that this is compared with."""

    values: dict[str, Any]
    counts: torch.Tensor
    reconstruction: Image.Image
    reference: Image.Image


class _Meter:
    """One tokenizer, and its sums over the images of this process."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        own_size: bool,
        lpips: LPIPS | None,
        inception: nn.Module | None,
        device: torch.device,
    ):
        self.tokenizer, self.own_size, self.lpips, self.device = tokenizer, own_size, lpips, device
        self.counts = torch.zeros(tokenizer.codebook_size or 0, dtype=torch.int64)
        self.fid = None
        if inception is not None:
            self.fid = FrechetInceptionDistance(inception)
            self.fid.orig_dtype = torch.float32  # otherwise set by the first image, but a process may have none
            self.fid = self.fid.to("cpu" if device.type == "mps" else device)  # mps has no float64

    @torch.no_grad()
    def measure(self, image: Image.Image) -> _Measured:
        """Encodes and decodes an image, and measures the result."""
        tokenizer = self.tokenizer
        sample = pad_to_multiple(to_tensor(image, self.device) / 127.5 - 1, tokenizer.f)
        codes = tokenizer.encode(sample)
        tokens, bits, ids = count(codes, tokenizer.codebook_size)
        counts = torch.zeros_like(self.counts) if ids is None else metrics.count_codes(ids.cpu(), len(self.counts))
        if len(counts) > len(self.counts):
            raise ValueError(
                f"`encode` of {tokenizer.title} must return ids under {len(self.counts)}, got {len(counts) - 1}."
            )
        decoded, (padded_height, padded_width) = to_image(tokenizer.decode(codes)), sample.shape[-2:]
        decoded = decoded if self.own_size else resize_image(decoded, (padded_width, padded_height))
        width = round(decoded.width / padded_width * image.width)
        height = round(decoded.height / padded_height * image.height)
        reconstruction = decoded.crop((0, 0, width, height))
        reference = resize_image(image, (width, height))
        stored_bits = getattr(tokenizer, "stored_bits", lambda codes: bits)(codes)
        values: dict[str, Any] = {"tokens": tokens, "bits": bits, "stored_bits": stored_bits}
        values |= image_metrics(to_tensor(reconstruction, self.device), to_tensor(reference, self.device), self.lpips)
        if self.own_size:
            full_size = to_tensor(resize_image(reconstruction, image.size))
            values["psnr_full_size"] = metrics.psnr(full_size, to_tensor(image)).item()
        return _Measured(values, counts, reconstruction, reference)

    def add(self, measured: _Measured) -> None:
        """Adds an image to the sums."""
        self.counts += measured.counts
        if self.fid is not None:
            for image, is_real in ((measured.reconstruction, False), (measured.reference, True)):
                self.fid.update(to_tensor(image, self.fid.device), real=is_real)

    def row(self, results: Records, records: Records) -> dict[str, Any]:
        """Means and sums over the images of all processes."""
        counts = torch.stack(gather_object([self.counts])).sum(0)
        pixels = sum(record["width"] * record["height"] for record in records)
        keys = ("tokens", "psnr", "ssim", "lpips", "psnr_full_size")
        return {
            "title": self.tokenizer.title,
            **{key: _mean(each.get(key) for each in results) for key in keys},
            "rfid": self.fid.compute().item() if self.fid is not None and len(records) > 1 else None,
            "usage": metrics.usage(counts) if len(counts) else None,
            "perplexity": metrics.perplexity(counts) if len(counts) else None,
            "bits_per_pixel": sum(each["bits"] for each in results) / pixels,
            "bits_per_pixel_stored": sum(each["stored_bits"] for each in results) / pixels,
        }


def _mean(values: Iterable[float | None]) -> float | None:
    """Mean of the available values. Infinite PSNRs (exact images) are excluded unless all are infinite."""
    present = [value for value in values if value is not None]
    counted = [value for value in present if value != math.inf] or present
    return math.fsum(counted) / len(counted) if counted else None


def add_image_files(rows: Records) -> None:
    """Adds the PSNR of image files of as many stored bits to the rows of models, interpolated between qualities."""
    files = {row["title"]: codec for row in rows for codec in CODECS if row["title"].startswith(f"{codec}, ")}
    for codec in dict.fromkeys(files.values()):
        points = [(row["bits_per_pixel_stored"], row["psnr"]) for row in rows if files.get(row["title"]) == codec]
        bits, psnr = zip(*sorted(points), strict=True)
        for row in rows:
            if row["title"] not in files and bits[0] <= row["bits_per_pixel_stored"] <= bits[-1]:
                at_rate = np.interp(math.log(row["bits_per_pixel_stored"]), np.log(bits), psnr)
                row[f"as_{codec.lower()}"] = float(at_rate)


def _notes(meters: Sequence[_Meter], rows: Records, records: Records) -> list[str]:
    """Sentences about values that are missing, or mean little because the set or its images are small."""
    notes, lpips = [], meters[0].lpips
    if lpips is None:
        notes.append("LPIPS was not computed. Pass --lpips-weights, the weights of its network.")
    if meters[0].fid is None:
        notes.append("rFID was not computed. Pass --inception-weights, the weights of its network.")
    elif len(records) == 1:
        notes.append("rFID was not computed: it needs at least two images.")
    elif len(records) < MANY_IMAGES:
        notes.append(f"rFID of {len(records)} images is far too high to be compared with published values.")
    for number, title in enumerate(meter.tokenizer.title for meter in meters):
        results = [record["results"][number] for record in records]
        for key, least in {"ssim": metrics.SSIM_SIDE, "lpips": lpips.min_side if lpips else 0}.items():
            if least and (small := sum(each[key] is None for each in results)):
                notes.append(
                    f"{METRICS[key][0]} of {title} was not computed for {small} of {len(records)} images. It needs "
                    f"sides of at least {least} pixels."
                )
        if exact := sum(each["psnr"] == math.inf for each in results):
            notes.append(
                f"PSNR of {title} is infinite for {exact} of {len(records)} images: their reconstruction is exact. "
                "Means exclude them, unless all are exact."
            )
    sizes = [meter.tokenizer.codebook_size for meter in meters]
    counted = ((row, size) for row, size in zip(rows, sizes, strict=True) if size)
    few = [row["title"] for row, size in counted if row["tokens"] * len(records) < IDS_PER_CODE * size]
    if few:
        notes.append(
            f"The set has fewer than {IDS_PER_CODE} ids per code for {', '.join(few)}. Codes used and perplexity "
            "would be higher on a larger set."
        )
    return notes

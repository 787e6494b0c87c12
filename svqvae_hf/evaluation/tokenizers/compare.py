"""Measures tokenizers side by side: the same images, the same reference, one row each."""

import platform
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from PIL import Image
from torch import nn

from svqvae_hf.data.image_rows import ImageRow, ImageSource
from svqvae_hf.evaluation import metrics
from svqvae_hf.evaluation.comparison import image_metrics, to_tensor
from svqvae_hf.evaluation.evaluate import LIBRARIES, measure_images, new_fid
from svqvae_hf.evaluation.perceptual import LPIPS
from svqvae_hf.evaluation.results import IDS_PER_CODE, MANY_IMAGES, NOT_COMPUTED, mean
from svqvae_hf.evaluation.tokenizers.baselines import to_image
from svqvae_hf.evaluation.tokenizers.memory import PeakMemory
from svqvae_hf.evaluation.tokenizers.protocol import Codes, Tokenizer, count_bits, count_tokens
from svqvae_hf.models.image_processing_svqvae import pad_to_multiple
from svqvae_hf.tokens.image_tokens import resize_image

MEGA = 1_000_000
MIB = 1 << 20
QUALITY = ("psnr", "ssim", "ms_ssim", "lpips")
PER_IMAGE = ("tokens", "bits_per_pixel", *QUALITY)

Result = TypeVar("Result")


@dataclass
class Comparison:
    """Results of [`compare_tokenizers`].

    Args:
        settings (`dict[str, Any]`): Options of the comparison.
        versions (`dict[str, str]`): Versions of Python and of the libraries that affect the values.
        rows (`list[dict[str, Any]]`): Values of each tokenizer by the names of `COLUMNS` in
            [`svqvae_hf.evaluation.tokenizers.table`]; `None` if a value could not be computed.
        images (`list[dict[str, Any]]`): Measured images in the order of the set: `index`, `name`, `width`, `height`
            and `results`, the values of the image for each tokenizer.
        skipped (`list[dict[str, Any]]`): Skipped images: `index`, `name`, `reason`.
        notes (`list[str]`): Sentences about values that are missing or need care.
    """

    settings: dict[str, Any]
    versions: dict[str, str]
    rows: list[dict[str, Any]]
    images: list[dict[str, Any]]
    skipped: list[dict[str, Any]]
    notes: list[str]


def compare_tokenizers(
    tokenizers: Sequence[Tokenizer],
    images: Iterable[ImageSource | ImageRow],
    *,
    resolution: int | None = None,
    lpips: LPIPS | None = None,
    inception: nn.Module | None = None,
    device: str | torch.device = "cpu",
) -> Comparison:
    """Codes and decodes each image of a set by each tokenizer, and compares the result with the image in 8 bits.

    An image is padded to multiples of `f` by repeating its last row and column, and the reconstruction is cropped.
    Before the first image is timed, each tokenizer runs on it once, and its peak memory is measured.

    Args:
        tokenizers (`Sequence[Tokenizer]`): Tokenizers with different titles, on `device`.
        images (`Iterable`): As in [`evaluate`].
        resolution (`int`, *optional*): As in [`evaluate`].
        lpips ([`LPIPS`], *optional*): As in [`evaluate`].
        inception (`nn.Module`, *optional*): As in [`evaluate`].
        device (`str` or `torch.device`, defaults to `"cpu"`): Device to work on.

    Raises:
        ValueError: If an option is out of range, titles are equal, or all images are skipped.
    """
    device = torch.device(device)
    titles = [each.title for each in tokenizers]
    if not titles or len(set(titles)) < len(titles):
        raise ValueError(f"`tokenizers` must be one or more with different titles, got {titles}.")
    if resolution is not None and resolution < 1:
        raise ValueError(f"`resolution` must be at least 1, got {resolution}.")
    state = PartialState(cpu=device.type == "cpu")
    lpips = lpips.to(device) if lpips is not None else None
    meters = [_Meter(each, lpips, inception, device) for each in tokenizers]

    def measure(image: Image.Image, **identity: Any) -> dict[str, Any]:
        target = to_tensor(image, device)
        measured = [meter.measure(target) for meter in meters]
        for meter, (values, counts, reconstruction) in zip(meters, measured, strict=True):
            meter.add(values, counts, reconstruction, target)  # only now, because a tokenizer may run out of memory
        return {"width": image.width, "height": image.height, "results": [values for values, _, _ in measured]}

    records, skipped = measure_images(measure, images, resolution, state)
    rows = [meter.row([record["results"][index] for record in records], records) for index, meter in enumerate(meters)]
    return Comparison(
        settings={"resolution": resolution, "device": device.type},
        versions={"python": platform.python_version()} | {name: version(name) for name in LIBRARIES},
        rows=rows,
        images=records,
        skipped=skipped,
        notes=_write_notes(meters, rows, records, lpips, inception),
    )


class _Meter:
    """One tokenizer, and its sums over the images of this process."""

    def __init__(self, tokenizer: Tokenizer, lpips: LPIPS | None, inception: nn.Module | None, device: torch.device):
        self.tokenizer = tokenizer
        self.lpips = lpips
        self.device = device
        self.counts = torch.zeros(tokenizer.codebook_size or 0, dtype=torch.int64)
        self.fid = new_fid(inception, device) if inception is not None else None
        self.peak_memory: int | None = None

    @torch.no_grad()
    def measure(self, target: torch.Tensor) -> tuple[dict[str, Any], torch.Tensor, torch.Tensor | None]:
        """Values, counts of codes, and reconstruction of an image `(1, 3, height, width)` in uint8."""
        tokenizer, (height, width) = self.tokenizer, target.shape[-2:]
        sample = pad_to_multiple(target / 127.5 - 1, tokenizer.f)
        peak_memory = self.peak_memory
        if peak_memory is None:
            with PeakMemory() as memory:
                tokenizer.decode(tokenizer.encode(sample))
            peak_memory = memory.peak
        codes, encode_seconds = self._timed(lambda: tokenizer.encode(sample))
        decoded, decode_seconds = self._timed(lambda: tokenizer.decode(codes))
        values: dict[str, Any] = {
            "tokens": count_tokens(codes, tokenizer.codebook_size),
            "bits_per_pixel": count_bits(codes, tokenizer.codebook_size) / (height * width),
            "encode_seconds": encode_seconds,
            "decode_seconds": decode_seconds,
            "memory": None if isinstance(codes, bytes) else peak_memory,
            **dict.fromkeys(QUALITY),
        }
        counts = self._count_codes(codes)
        if decoded is None:
            return values, counts, None
        image = resize_image(to_image(decoded), (sample.shape[-1], sample.shape[-2]))
        reconstruction = to_tensor(image.crop((0, 0, width, height)), self.device)
        return values | image_metrics(reconstruction, target, self.lpips), counts, reconstruction

    def add(
        self, values: dict[str, Any], counts: torch.Tensor, reconstruction: torch.Tensor | None, target: torch.Tensor
    ) -> None:
        """Adds a measured image to the sums."""
        self.peak_memory = values["memory"] or 0
        self.counts += counts
        if self.fid is not None and reconstruction is not None:
            self.fid.update(reconstruction.to(self.fid.device), real=False)
            self.fid.update(target.to(self.fid.device), real=True)

    def row(self, results: Sequence[dict[str, Any]], records: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Means and sums over the images of all processes."""
        counts = torch.stack(gather_object([self.counts])).sum(0)
        decodes = results[0]["psnr"] is not None
        megapixels = sum(record["width"] * record["height"] for record in records) / MEGA
        seconds = {key: sum(each[f"{key}_seconds"] for each in results) for key in ("encode", "decode")}
        fid = self.fid.compute().item() if self.fid is not None and decodes and len(records) > 1 else None
        return {
            "title": self.tokenizer.title,
            **{key: mean([each[key] for each in results]) for key in PER_IMAGE},
            "rfid": fid,
            "usage": metrics.usage(counts) if len(counts) else None,
            "perplexity": metrics.perplexity(counts) if len(counts) else None,
            "encode_speed": megapixels / seconds["encode"],
            "decode_speed": megapixels / seconds["decode"] if decodes else None,
            "memory": results[0]["memory"] and results[0]["memory"] / MIB,
        }

    def _count_codes(self, codes: Codes) -> torch.Tensor:
        if isinstance(codes, bytes) or not len(self.counts):
            return torch.zeros_like(self.counts)
        counts = metrics.count_codes(codes, len(self.counts)).cpu()
        if len(counts) > len(self.counts):
            raise ValueError(
                f"`encode` of {self.tokenizer.title} must return ids under {len(self.counts)}, its `codebook_size`, "
                f"got {len(counts) - 1}."
            )
        return counts

    def _timed(self, run: Callable[[], Result]) -> tuple[Result, float]:
        self._wait()
        begun = time.perf_counter()
        result = run()
        self._wait()
        return result, time.perf_counter() - begun

    def _wait(self) -> None:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)


def _write_notes(
    meters: Sequence[_Meter],
    rows: Sequence[dict[str, Any]],
    records: Sequence[dict[str, Any]],
    lpips: LPIPS | None,
    inception: nn.Module | None,
) -> list[str]:
    notes = [NOT_COMPUTED[key] for key, network in (("lpips", lpips), ("rfid", inception)) if network is None]
    if inception is not None and len(records) == 1:
        notes.append("rFID was not computed: it needs at least two images.")
    elif inception is not None and len(records) < MANY_IMAGES:
        notes.append(f"rFID of {len(records)} images is far too high to be compared with published values.")
    sides = {"SSIM": metrics.SSIM_SIDE, "MS-SSIM": metrics.MS_SSIM_SIDE}
    if lpips is not None:
        sides["LPIPS"] = lpips.min_side
    for title, side in sides.items():
        small = sum(min(record["width"], record["height"]) < side for record in records)
        if small:
            notes.append(
                f"{title} was not computed for {small} of {len(records)} images. It needs sides of at least {side} "
                "pixels."
            )
    if any(row["tokens"] is None for row in rows):
        notes.append("Image files have no tokens. The memory of their encoders and decoders was not measured.")
    latents = [row["title"] for row in rows if row["tokens"] is not None and row["usage"] is None]
    if latents:
        notes.append(f"Codes used and perplexity need ids. {', '.join(latents)} code latents.")
    few = [
        meter.tokenizer.title
        for meter, row in zip(meters, rows, strict=True)
        if len(meter.counts) and row["tokens"] * len(records) < IDS_PER_CODE * len(meter.counts)
    ]
    if few:
        notes.append(
            f"The set has fewer than {IDS_PER_CODE} ids per code for {', '.join(few)}. Codes used and perplexity "
            "would be higher on a larger set."
        )
    no_decoder = [row["title"] for row in rows if row["decode_speed"] is None]
    if no_decoder:
        notes.append(f"{', '.join(no_decoder)}: this class has no decoder, so nothing is compared with the image.")
    return notes

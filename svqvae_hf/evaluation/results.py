"""Results of an evaluation: the report that `evaluate` returns, and the notes in it."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import numpy as np
from PIL import Image
from torch import nn

from svqvae_hf.evaluation import metrics
from svqvae_hf.evaluation.perceptual import LPIPS

MANY_IMAGES = 10_000  # papers report FID on at least this many
IDS_PER_CODE = 10  # with fewer, the frequencies of codes say little
NOT_COMPUTED = {
    "lpips": "LPIPS was not computed. Pass --lpips-weights, the weights of its network.",
    "rfid": "rFID was not computed. Pass --inception-weights, the weights of its network.",
}


@dataclass
class ScaleResult:
    """Values of one mode and scale over the whole set.

    Args:
        mode (`str`): `"plain"`, images as a whole, or `"tiled"`.
        scale (`float`): Output side over input side.
        values (`dict[str, float | None]`): Values by the names of `METRICS` in [`svqvae_hf.evaluation.report`]. `None`
            if a value could not be computed.
        counts (`np.ndarray` of shape `(codebook_size,)`): Occurrences of each code.
    """

    mode: str
    scale: float
    values: dict[str, float | None]
    counts: np.ndarray


class TargetResult(NamedTuple):
    """Means over the set if each image is stored at the smallest scale that reaches a PSNR.

    Args:
        min_psnr (`float`): The target in dB, at full size.
        reached (`int`): Images that reach it. The others are stored at the largest scale.
        psnr (`float`): Mean PSNR at full size, without exact images.
        ssim (`float`, *optional*): Mean SSIM at full size; `None` if an image is too small.
        ids (`float`): Ids per image.
        bits_per_pixel (`float`): Mean bits per pixel, not entropy-coded.
        fixed_scale (`float`): One scale for all images by which as many reach the target.
        fixed_ids (`float`): Ids per image at this scale.
    """

    min_psnr: float
    reached: int
    psnr: float
    ssim: float | None
    ids: float
    bits_per_pixel: float
    fixed_scale: float
    fixed_ids: float


@dataclass
class Example:
    """An image of the set with its reconstructions in the first mode.

    Args:
        psnr (`list[float]`): One value per scale.
        index (`int`): Position of the image in the set.
        name (`str`): Name of the image.
        size (`tuple[int, int]`): Width and height of the image in pixels.
        original (`PIL.Image.Image`): The image, made smaller for display.
        reconstructions (`list[PIL.Image.Image]`): One per scale, made smaller for display.
        baselines (`list[tuple[str, PIL.Image.Image, float]]`): Title, reconstruction and PSNR of each baseline at the
            first scale.
    """

    psnr: list[float]
    index: int
    name: str
    size: tuple[int, int]
    original: Image.Image
    reconstructions: list[Image.Image]
    baselines: list[tuple[str, Image.Image, float]]


@dataclass
class Report:
    """All results of an evaluation.

    Args:
        settings (`dict[str, Any]`): Options of the evaluation.
        versions (`dict[str, str]`): Versions of Python and of the libraries that affect the values.
        codebook (`dict[str, Any]`): `size`, `dim`, `fingerprint`, and `redundancy` from [`metrics.redundancy`].
        results (`list[ScaleResult]`): One per mode and scale, grouped by mode.
        codecs (`list[dict[str, Any]]`): Means for JPEG, WebP and AVIF at each quality: `codec`, `quality`,
            `bits_per_pixel`, `psnr`, `ssim`, and `exact`, the number of images without any loss.
        targets (`list[TargetResult]`): The first mode with a scale for each image, by PSNR; empty with one scale.
        baselines (`list[dict[str, Any]]`): Means for each baseline at each scale, at the bits of the model:
            `baseline`, `scale`, `bits_per_pixel` (of the image as a whole), `psnr`, `ssim`, `ms_ssim`, `lpips`,
            `images`, and `exceeds`, the number of images for which it needs more bits than the model.
        images (`list[dict[str, Any]]`): Measured images in the order of the set: `index`, `name`, `width`, `height`,
            `results`, `baselines` and `codecs`.
        skipped (`list[dict[str, Any]]`): Skipped images: `index`, `name`, `reason`.
        notes (`list[str]`): Sentences about values that are missing or need care.
        worst (`list[Example]`): Images with the lowest PSNR at the first scale, lowest first.
        best (`list[Example]`): Images with the highest PSNR at the first scale, highest first.
    """

    settings: dict[str, Any]
    versions: dict[str, str]
    codebook: dict[str, Any]
    results: list[ScaleResult]
    targets: list[TargetResult]
    codecs: list[dict[str, Any]]
    baselines: list[dict[str, Any]]
    images: list[dict[str, Any]]
    skipped: list[dict[str, Any]]
    notes: list[str]
    worst: list[Example]
    best: list[Example]


def mean(values: Sequence[float | None]) -> float | None:
    """Mean of the available values. Infinite PSNRs (exact images) are excluded unless all are infinite."""
    present = [value for value in values if value is not None]
    counted = [value for value in present if value != math.inf] or present
    return math.fsum(counted) / len(counted) if counted else None


def choose_scales(
    records: Sequence[dict[str, Any]], scales: Sequence[float], targets: Sequence[float] | None = None
) -> list[TargetResult]:
    """Stores each image at the smallest scale that reaches a PSNR at full size, or else at the largest.

    Args:
        records (`Sequence[dict[str, Any]]`): `images` of [`Report`], of which the first mode is used.
        scales (`Sequence[float]`): As in [`evaluate`].
        targets (`Sequence[float]`, *optional*): PSNR in dB. By default whole dB, from the mean PSNR of the smallest
            scale to the mean PSNR of the largest.
    """
    by_scale = sorted(range(len(scales)), key=scales.__getitem__)
    if len(scales) < 2:
        return []
    if targets is None:
        low, high = (
            cast(float, mean([record["results"][index]["psnr_full_size"] for record in records]))
            for index in (by_scale[0], by_scale[-1])
        )
        targets = range(math.ceil(low), math.floor(high) + 1) if math.isfinite(low + high) else []
    results = []
    for min_psnr in targets:
        chosen = []
        for record in records:
            in_order = [record["results"][index] for index in by_scale]
            chosen.append(next((each for each in in_order if each["psnr_full_size"] >= min_psnr), in_order[-1]))
        fixed_scale = max(each["scale"] for each in chosen)
        ssim = [each["ssim_full_size"] for each in chosen]
        fixed = [record["results"][list(scales).index(fixed_scale)] for record in records]
        results.append(
            TargetResult(
                min_psnr=min_psnr,
                reached=sum(each["psnr_full_size"] >= min_psnr for each in chosen),
                psnr=cast(float, mean([each["psnr_full_size"] for each in chosen])),
                ssim=None if None in ssim else math.fsum(ssim) / len(records),
                ids=sum(each["ids"] for each in chosen) / len(records),
                bits_per_pixel=math.fsum(each["bits_per_pixel"] for each in chosen) / len(records),
                fixed_scale=fixed_scale,
                fixed_ids=sum(each["ids"] for each in fixed) / len(records),
            )
        )
    return results


def write_notes(
    results: Sequence[ScaleResult],
    baselines: Sequence[dict[str, Any]],
    records: Sequence[dict[str, Any]],
    lpips: LPIPS | None,
    inception: nn.Module | None,
) -> list[str]:
    """Writes the notes of a report: values that are missing, doubtful because the set is small, or not at equal bits.

    Args:
        results (`Sequence[ScaleResult]`): As in [`Report`].
        baselines (`Sequence[dict[str, Any]]`): As in [`Report`].
        records (`Sequence[dict[str, Any]]`): `images` of [`Report`].
        lpips ([`LPIPS`], *optional*): Network of LPIPS; None if absent.
        inception (`nn.Module`, *optional*): Network of FID; None if absent.
    """
    first_mode = [result for result in results if result.mode == results[0].mode]
    notes = [NOT_COMPUTED[key] for key, network in (("lpips", lpips), ("rfid", inception)) if network is None]
    if inception is not None and len(records) == 1:
        notes.append("rFID was not computed: it needs at least two images.")
    elif inception is not None and len(records) < MANY_IMAGES:
        notes.append(f"rFID of {len(records)} images is far too high to be compared with published values.")
    notes += _notes_on_small_images(first_mode, records, lpips)
    notes += _notes_on_exact_images(results, records)
    few = [f"{each.scale:g}" for each in first_mode if each.counts.sum() < IDS_PER_CODE * len(each.counts)]
    if few:
        notes.append(
            f"The set has fewer than {IDS_PER_CODE} ids per code (scale {', '.join(few)}). Codes used, perplexity, "
            "entropy and entropy-coded bits would be higher on a larger set."
        )
    notes += [
        f"{each['baseline']} at scale {each['scale']:g} takes more bits than the model for {each['exceeds']} of "
        f"{each['images']} images: {each['bits_per_pixel']:.4f} bits per pixel of the image on average."
        for each in baselines
        if each["exceeds"]
    ]
    return notes


def _notes_on_small_images(
    first_mode: Sequence[ScaleResult], records: Sequence[dict[str, Any]], lpips: LPIPS | None
) -> Iterator[str]:
    sides = {"ssim": ("SSIM", metrics.SSIM_SIDE), "ms_ssim": ("MS-SSIM", metrics.MS_SSIM_SIDE)}
    if lpips is not None:
        sides["lpips"] = ("LPIPS", lpips.min_side)
    for index, result in enumerate(first_mode):
        for key, (title, side) in sides.items():
            measured = sum(record["results"][index][key] is not None for record in records)
            if measured < len(records):
                yield (
                    f"{title} at scale {result.scale:g} was computed for {measured} of {len(records)} images. It "
                    f"needs sides of at least {side} pixels."
                )


def _notes_on_exact_images(results: Sequence[ScaleResult], records: Sequence[dict[str, Any]]) -> Iterator[str]:
    for index, result in enumerate(results):
        exact, exact_full_size = (
            sum(record["results"][index][key] == np.inf for record in records) for key in ("psnr", "psnr_full_size")
        )
        if exact or exact_full_size:
            yield (
                f"PSNR ({result.mode}, scale {result.scale:g}) is infinite for {exact} of {len(records)} images, and "
                f"at full size for {exact_full_size}: their reconstruction is exact. Means exclude them, unless all "
                "are exact."
            )

"""Results of an evaluation: the report that `evaluate` returns, and the notes in it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

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
        baselines (`list[dict[str, Any]]`): Means for each baseline at each scale, at the bits of the model:
            `baseline`, `scale`, `bits_per_pixel` (of the image as a whole), `psnr`, `ssim`, `ms_ssim`, `lpips`,
            `images`, and `exceeds`, the number of images for which it needs more bits than the model.
        images (`list[dict[str, Any]]`): Readable images in the order of the set: `index`, `name`, `width`, `height`,
            `results`, `baselines` and `codecs`.
        skipped (`list[dict[str, Any]]`): Unreadable images: `index`, `name`, `reason`.
        notes (`list[str]`): Sentences about values that are missing or need care.
        worst (`list[Example]`): Images with the lowest PSNR at the first scale, lowest first.
        best (`list[Example]`): Images with the highest PSNR at the first scale, highest first.
    """

    settings: dict[str, Any]
    versions: dict[str, str]
    codebook: dict[str, Any]
    results: list[ScaleResult]
    codecs: list[dict[str, Any]]
    baselines: list[dict[str, Any]]
    images: list[dict[str, Any]]
    skipped: list[dict[str, Any]]
    notes: list[str]
    worst: list[Example]
    best: list[Example]


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

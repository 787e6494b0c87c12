"""Evaluates an SVQVAE on an image set in one pass, split over all processes.

The *reference* of a reconstruction is its image, resized to the size of the reconstruction.
"""

import copy
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from PIL import Image
from torch import nn

from svqvae_hf.data.image_rows import ImageRow, ImageSource
from svqvae_hf.evaluation import metrics
from svqvae_hf.evaluation.measuring import (
    IDS_PER_CODE,
    Records,
    Totals,
    image_metrics,
    library_versions,
    mean,
    measure_images,
    missing_notes,
    to_tensor,
)
from svqvae_hf.evaluation.perceptual import LPIPS
from svqvae_hf.models.checks import check_scale_from
from svqvae_hf.models.context_model import ContextModel
from svqvae_hf.models.image_processing_svqvae import SVQVAEImageProcessor
from svqvae_hf.models.modeling_svqvae import SVQVAE
from svqvae_hf.tokens.image_tokens import check_memory, image_tokens, resize_image
from svqvae_hf.tokens.token_files import token_file_content

SCALES = (1.0, 0.5, 0.25)
NUM_EXAMPLES = 4
EXAMPLE_SIDE = 512  # pixels of the longer side of an example


@dataclass
class ScaleResult:
    """Values of one scale over the whole set.

    Args:
        scale (`float`): Output side over input side.
        values (`dict[str, float | None]`): Values by the names of `METRICS` in [`svqvae_hf.evaluation.report`]. `None`
            if a value could not be computed.
        counts (`np.ndarray` of shape `(codebook_size,)`): Occurrences of each code.
    """

    scale: float
    values: dict[str, float | None]
    counts: np.ndarray


@dataclass
class Example:
    """An image of the set with its reconstructions.

    Args:
        psnr (`list[float]`): One value per scale.
        index (`int`): Position of the image in the set.
        name (`str`): Name of the image.
        size (`tuple[int, int]`): Width and height of the image in pixels.
        original (`PIL.Image.Image`): The image, made smaller for display.
        reconstructions (`list[PIL.Image.Image]`): One per scale, made smaller for display.
    """

    psnr: list[float]
    index: int
    name: str
    size: tuple[int, int]
    original: Image.Image
    reconstructions: list[Image.Image]


@dataclass
class Report:
    """All results of an evaluation.

    Args:
        settings (`dict[str, Any]`): Options of the evaluation.
        versions (`dict[str, str]`): Versions of Python and of the libraries that affect the values.
        codebook (`dict[str, Any]`): `size`, `dim` and `fingerprint`.
        results (`list[ScaleResult]`): One per scale.
        images (`list[dict[str, Any]]`): Measured images in the order of the set: `index`, `name`, `width`, `height`
            and `results`, the values of the image at each scale.
        skipped (`list[dict[str, Any]]`): Skipped images: `index`, `name`, `reason`.
        notes (`list[str]`): Sentences about values that are missing or need care.
        worst (`list[Example]`): Images with the lowest PSNR at the first scale, lowest first.
    """

    settings: dict[str, Any]
    versions: dict[str, str]
    codebook: dict[str, Any]
    results: list[ScaleResult]
    images: Records
    skipped: Records
    notes: list[str]
    worst: list[Example]


def evaluate(
    model: SVQVAE,
    images: Iterable[ImageSource | ImageRow],
    *,
    scales: Sequence[float] = SCALES,
    scale_from: str = "image",
    tile_size: int | None = None,
    overlap: int | None = None,
    resolution: int | None = None,
    lpips: LPIPS | None = None,
    inception: nn.Module | None = None,
    context_model: ContextModel | None = None,
) -> Report:
    """Reconstructs a set of images and measures the reconstructions.

    With several processes (`accelerate launch`), each process takes every n-th image, and all return the whole report.
    The model is not changed, because a copy of it does the work.

    Args:
        model ([`SVQVAE`]): Model on the device to work on. Its copy runs in float32.
        images (`Iterable`): As in [`measure_images`]. Read one by one; images that cannot be read or are too large
            for memory are skipped and named in the report.
        scales (`Sequence[float]`, defaults to `(1.0, 0.5, 0.25)`): Output side over input side. The reference at a
            scale is the image resized by area below 1, bicubic above.
        scale_from (`str`, defaults to `"image"`): What is resized to a scale, see [`SVQVAE.encode_scales`].
        tile_size (`int`, *optional*): As in [`SVQVAE.tile_if_large`], which chooses tiles for each image.
        overlap (`int`, *optional*): As in [`SVQVAE.tile_if_large`].
        resolution (`int`, *optional*): As in [`measure_images`].
        lpips ([`LPIPS`], *optional*): Network of LPIPS, from [`load_lpips`]. Moved to the model's device.
        inception (`nn.Module`, *optional*): Network of FID, from [`load_inception`]: maps uint8 images `(batch, 3,
            height, width)` to features `(batch, n)`. Moved to the model's device.
        context_model ([`ContextModel`], *optional*): Context model that compresses token files, whose bits are
            counted. Without it they are not compressed.

    Raises:
        ValueError: If an option is out of range, or all images are skipped.
    """
    if not scales or len(set(scales)) < len(scales) or not all(0 < scale < math.inf for scale in scales):
        raise ValueError(f"`scales` must be distinct finite numbers above 0, got {list(scales)}.")
    check_scale_from(scale_from)
    state = PartialState(cpu=model.device.type == "cpu")
    evaluator = _Evaluator(model, scales, scale_from, (tile_size, overlap), lpips, inception, context_model)
    records, skipped = measure_images(evaluator.measure, images, resolution, state)
    results = [evaluator.result(index, records) for index in range(len(scales))]
    return Report(
        settings={
            "scales": list(scales),
            "scale_from": scale_from,
            "tile_size": tile_size,
            "overlap": overlap,
            "resolution": resolution,
            "compressed": context_model is not None,
            "device": model.device.type,
        },
        versions=library_versions(),
        codebook={
            "size": model.config["codebook_size"],
            "dim": model.config["codebook_embed_dim"],
            "fingerprint": model.codebook_fingerprint(),
        },
        results=results,
        images=records,
        skipped=skipped,
        notes=[*missing_notes(records, lpips, inception, min(scales)), *_notes(results, records)],
        worst=_lowest_psnr(gather_object(evaluator.worst)),
    )


class _Evaluator:
    """Copies of the model, and the sums and examples of this process."""

    def __init__(
        self,
        model: SVQVAE,
        scales: Sequence[float],
        scale_from: str,
        tiles: tuple[int | None, int | None],
        lpips: LPIPS | None,
        inception: nn.Module | None,
        context_model: ContextModel | None,
    ):
        self.context_model = context_model
        # `nn.Module.to`, because diffusers' own warns about the codebook, which stays float32 by itself.
        self.model = nn.Module.to(copy.deepcopy(model), torch.float32).eval()
        self.processor = SVQVAEImageProcessor(pixel_range=model.config["pixel_range"])
        self.scales = list(scales)
        self.scale_from = scale_from
        self.tiles = tiles
        self.lpips = lpips.to(model.device) if lpips is not None else None
        size = model.config["codebook_size"]
        self.totals = [Totals(size, inception, model.device) for _ in scales]
        self.worst: list[Example] = []

    @torch.inference_mode()
    def measure(self, image: Image.Image, index: int, name: str) -> dict[str, Any]:
        """Measures an image at all scales, adds it to the sums, and returns its values."""
        largest = max(1, *self.scales)
        size = largest * image.height, largest * image.width
        self.model.tile_if_large(*size, *self.tiles)
        check_memory(self.model, *size)
        pixel_values = self.processor(image)["pixel_values"].to(self.model.device)
        latents = self.model.encode_scales(pixel_values, self.scales, self.scale_from)
        results, reconstructions, additions = [], [], []
        for number, scale in enumerate(self.scales):
            ids = self.model.quantize.nearest_ids(latents[number])
            decoded = self.model.resize_to_image(self.model.decode(ids).sample, (image.height, image.width), scale)
            reconstruction = self.processor.postprocess(decoded)[0]
            sample, target, full_sample, full_target = (
                to_tensor(each, self.model.device)
                for each in (
                    reconstruction,
                    resize_image(image, reconstruction.size),
                    resize_image(reconstruction, image.size),
                    image,
                )
            )
            tokens = image_tokens(self.model, [ids[0].cpu()], image.height, image.width, [scale], self.scale_from)
            content = token_file_content(tokens, self.context_model)
            full_size = image_metrics(full_sample, full_target)
            counts = metrics.count_codes(ids, tokens.codebook_size)
            bits = {"bits": ids.numel() * math.log2(len(counts)), "stored_bits": 8 * len(content)}
            results.append(
                {"scale": scale, "ids": ids.numel()}
                | bits
                | image_metrics(sample, target, self.lpips)
                | {f"{key}_full_size": full_size[key] for key in ("psnr", "ssim")}
            )
            reconstructions.append(reconstruction)
            additions.append((counts, sample, target))
        for totals, tensors in zip(self.totals, additions, strict=True):  # only now: memory may run out before
            totals.add(*tensors)
        psnr = [values["psnr"] for values in results]
        self._keep_example(Example(psnr, index, name, image.size, image, reconstructions))
        return {"width": image.width, "height": image.height, "results": results}

    def result(self, index: int, records: Records) -> ScaleResult:
        """Result at a scale, from the sums of all processes and the values of all images."""
        per_image = [record["results"][index] for record in records]
        totals = self.totals[index]
        values = totals.values(per_image, records)
        values |= {key: mean(each[key] for each in per_image) for key in ("ids", "psnr_full_size", "ssim_full_size")}
        return ScaleResult(
            self.scales[index], values | {"entropy": metrics.entropy(totals.counts)}, totals.counts.numpy()
        )

    def _keep_example(self, example: Example) -> None:
        self.worst = _lowest_psnr([*self.worst, example])
        if any(each is example for each in self.worst):
            example.original = example.original.copy()  # the image belongs to the caller
            for image in (example.original, *example.reconstructions):
                image.thumbnail((EXAMPLE_SIDE, EXAMPLE_SIDE))


def _lowest_psnr(examples: Iterable[Example]) -> list[Example]:
    return sorted(examples, key=lambda example: (example.psnr[0], example.index))[:NUM_EXAMPLES]


def _notes(results: Sequence[ScaleResult], records: Records) -> list[str]:
    """Notes on exact images, and on too few ids."""
    notes = []
    for index, result in enumerate(results):
        exact = sum(record["results"][index]["psnr"] == math.inf for record in records)
        if exact:
            notes.append(
                f"PSNR at scale {result.scale:g} is infinite for {exact} of {len(records)} images: their "
                "reconstruction is exact. Means exclude them, unless all are exact."
            )
    few = [f"{each.scale:g}" for each in results if each.counts.sum() < IDS_PER_CODE * len(each.counts)]
    if few:
        notes.append(
            f"The set has fewer than {IDS_PER_CODE} ids per code (scale {', '.join(few)}). Codes used, perplexity "
            "and entropy would be higher on a larger set."
        )
    return notes

"""Evaluates an SVQVAE on an image set in one pass, split over all processes.

In *mode* `"plain"` the model takes an image as a whole, in mode `"tiled"` by tiles. A *record* holds the values of one
image as a dictionary. The *reference* of a reconstruction is its image, resized to the size of the reconstruction.
"""

import copy
import itertools
import math
import platform
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import version
from operator import length_hint
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import PartialState
from accelerate.utils import gather_object
from PIL import Image, ImageOps
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance
from tqdm import tqdm

from svqvae_hf.data.image_rows import ImageRow, ImageSource, fault_of, image_name, read_image
from svqvae_hf.evaluation import metrics
from svqvae_hf.evaluation.baselines.blocks import BlockBaseline
from svqvae_hf.evaluation.baselines.codecs import CODECS
from svqvae_hf.evaluation.comparison import (
    codec_metrics,
    full_size_metrics,
    image_metrics,
    reconstruct_by_baselines,
    to_tensor,
)
from svqvae_hf.evaluation.perceptual import LPIPS
from svqvae_hf.evaluation.results import Example, Report, ScaleResult, choose_scales, mean, write_notes
from svqvae_hf.models.checks import check_scale_from
from svqvae_hf.models.image_processing_svqvae import SVQVAEImageProcessor
from svqvae_hf.models.modeling_svqvae import SVQVAE
from svqvae_hf.tokens.image_tokens import (
    OUT_OF_MEMORY,
    TooLargeError,
    check_memory,
    is_out_of_memory,
    resize_image,
)

MODES = ("plain", "tiled")
SCALES = (1.0, 0.5, 0.25)
BASELINE_VALUES = ("bits_per_pixel", "psnr", "ssim", "ms_ssim", "lpips")
HALF_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
NUM_EXAMPLES = 4
EXAMPLE_SIDE = 512  # pixels of the longer side of an example
LIBRARIES = ("svqvae-hf", "torch", "diffusers", "torchmetrics", "lpips", "torch-fidelity", "pillow", "numpy")


def evaluate(
    model: SVQVAE,
    images: Iterable[ImageSource | ImageRow],
    *,
    scales: Sequence[float] = SCALES,
    scale_from: str = "image",
    min_psnr: Sequence[float] | None = None,
    modes: Sequence[str] = MODES,
    tile_size: int = 256,
    overlap: int | None = None,
    resolution: int | None = None,
    half_precision: bool = False,
    lpips: LPIPS | None = None,
    inception: nn.Module | None = None,
    block_baselines: Sequence[BlockBaseline] = (),
    codecs: Sequence[str] = tuple(CODECS),
) -> Report:
    """Reconstructs a set of images and measures the reconstructions.

    With several processes (`accelerate launch`), each process takes every n-th image, and all return the whole report.
    The model is not changed, because a copy of it does the work.

    Args:
        model ([`SVQVAE`]): Model on the device to work on. Its copy runs in float32.
        images (`Iterable`): An [`ImageSet`], or other inputs of [`read_image`]: images, paths, undecoded rows of
            `datasets`. Read one by one; images that cannot be read or are too large for memory are skipped and named
            in the report.
        scales (`Sequence[float]`, defaults to `(1.0, 0.5, 0.25)`): Output side over input side. The reference at a
            scale is the image resized by area below 1, bicubic above.
        scale_from (`str`, defaults to `"image"`): What is resized to a scale, see [`SVQVAE.encode_scales`].
        min_psnr (`Sequence[float]`, *optional*): Targets in dB, for each of which the report says what images at the
            smallest scale that reaches it take. By default whole dB between the means of the scales.
        modes (`Sequence[str]`, defaults to `("plain", "tiled")`): Images as a whole, by tiles, or both. Both are run
            only for images that are large enough for tiles. If none is, the report has the first mode alone.
        tile_size (`int`, defaults to 256): Largest side of a tile in pixels, as in [`SVQVAE.enable_tiling`].
        overlap (`int`, *optional*): Overlap (halo) of a tile in pixels; 32 if not given, or less for a small tile.
        resolution (`int`, *optional*): Side in pixels. The shorter side of each image is resized to it (bicubic) and
            the centre cropped. Images keep their size if not given.
        half_precision (`bool`, defaults to `False`): Also encode in bfloat16 and float16, and count the ids that
            change. This needs two more copies of the model and three times the encoding.
        lpips ([`LPIPS`], *optional*): Network of LPIPS, from [`load_lpips`]. Moved to the model's device.
        inception (`nn.Module`, *optional*): Network of FID, from [`load_inception`]: maps uint8 images `(batch, 3,
            height, width)` to features `(batch, n)`. Moved to the model's device.
        block_baselines (`Sequence[BlockBaseline]`): From [`fit_block_baselines`], on the model's device. They are
            measured beside the codecs, which need no fit.
        codecs (`Sequence[str]`, defaults to `("JPEG", "WebP", "AVIF")`): Image files to compare with. AVIF takes
            seconds per image.

    Raises:
        ValueError: If an option is out of range, or all images are skipped.
    """
    _check_options(scales, modes, resolution)
    check_scale_from(scale_from)
    state = PartialState(cpu=model.device.type == "cpu")
    evaluator = _Evaluator(
        model, scales, scale_from, modes, tile_size, overlap, half_precision, lpips, inception, block_baselines, codecs
    )
    records, skipped = measure_images(evaluator.measure, images, resolution, state)
    shown = modes if any(record["tiled"] for record in records) else modes[:1]
    results, baselines = evaluator.results(records, shown), _baseline_means(records)
    notes = write_notes(results, baselines, records, lpips, inception)
    if len(shown) < len(modes):
        notes.append("No image is large enough for tiles, so images as a whole and by tiles are the same.")
    worst, best = evaluator.examples()
    return Report(
        settings={
            "scales": list(scales),
            "scale_from": scale_from,
            "modes": list(shown),
            "tile_size": evaluator.model.tile_size,
            "overlap": evaluator.model.overlap,
            "resolution": resolution,
            "half_precision": half_precision,
            "device": model.device.type,
        },
        versions={"python": platform.python_version()} | {name: version(name) for name in LIBRARIES},
        codebook=_describe_codebook(model),
        results=results,
        targets=choose_scales(records, scales, min_psnr),
        codecs=_codec_means(records),
        baselines=baselines,
        images=records,
        skipped=skipped,
        notes=notes,
        worst=worst,
        best=best,
    )


def _check_options(scales: Sequence[float], modes: Sequence[str], resolution: int | None) -> None:
    if not modes or set(modes) - set(MODES) or len(set(modes)) < len(modes):
        raise ValueError(f"`modes` must be distinct values of {', '.join(MODES)}, got {', '.join(modes) or 'none'}.")
    if not scales or len(set(scales)) < len(scales) or not all(0 < scale < math.inf for scale in scales):
        raise ValueError(f"`scales` must be distinct finite numbers above 0, got {list(scales)}.")
    if resolution is not None and resolution < 1:
        raise ValueError(f"`resolution` must be at least 1, got {resolution}.")


def measure_images(
    measure: Callable[..., dict[str, Any]],
    images: Iterable[ImageSource | ImageRow],
    resolution: int | None,
    state: PartialState,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Measures every n-th image of a set in each of n processes.

    Args:
        measure (`Callable`): Called with an image, its `index` and its `name`; returns its values.
        images (`Iterable`): As in [`evaluate`].
        resolution (`int`, *optional*): As in [`evaluate`].
        state (`PartialState`): The processes.

    Returns:
        `tuple[list[dict], list[dict]]`: Records of the measured images and of the skipped ones, from all processes, in
        the order of the set. Images are skipped that cannot be read or are too large for memory.

    Raises:
        ValueError: All images are skipped.
    """
    records: list[dict[str, Any]] = []
    skipped: list[dict[str, Any]] = []
    total = length_hint(images) or None
    bar = tqdm(images, total=total, unit="image", disable=None if state.is_main_process else True)
    for index, source in enumerate(bar):
        if index % state.num_processes != state.process_index:
            continue
        identity: dict[str, Any] = {"index": index, "name": image_name(source, index)}
        try:
            image = _read_crop(source, resolution)
            records.append(identity | measure(image, **identity))
        except (_UnreadableError, TooLargeError) as error:
            skipped.append(identity | {"reason": str(error)})
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            skipped.append(identity | {"reason": OUT_OF_MEMORY})
    records, skipped = _gather_records(records), _gather_records(skipped)
    if not records:
        first = f" The first, `{skipped[0]['name']}`: {skipped[0]['reason']}" if skipped else ""
        raise ValueError(f"At least one image must be usable, but none of {len(skipped)} is.{first}")
    return records, skipped


class _UnreadableError(Exception):
    """An image cannot be read."""


def _read_crop(source: ImageSource | ImageRow, resolution: int | None) -> Image.Image:
    try:
        image = read_image(source)
    except (OSError, ValueError) as error:
        raise _UnreadableError(fault_of(error)) from error
    if resolution is None:
        return image
    return ImageOps.fit(image, (resolution, resolution), Image.Resampling.BICUBIC)


def new_fid(inception: nn.Module, device: torch.device) -> FrechetInceptionDistance:
    """Accumulator of rFID with this network, as in [`evaluate`]."""
    fid = FrechetInceptionDistance(inception)
    fid.orig_dtype = torch.float32  # otherwise set by the first image, but a process may have none
    return fid.to("cpu" if device.type == "mps" else device)  # mps has no float64


class _ScaleTotals:
    """Sums over the images of this process, for one mode and scale."""

    def __init__(self, mode: str, scale: float, model: SVQVAE, inception: nn.Module | None):
        self.mode = mode
        self.scale = scale
        self.counts = torch.zeros(model.config["codebook_size"], dtype=torch.int64)
        self.latent_sum = torch.zeros(model.config["codebook_embed_dim"], dtype=torch.float64)
        self.fid = new_fid(inception, model.device) if inception is not None else None

    def add(self, ids: torch.Tensor, latents: torch.Tensor, sample: torch.Tensor, target: torch.Tensor) -> None:
        """Adds one image: its ids, its latents before quantisation, its reconstruction and its reference."""
        self.counts += metrics.count_codes(ids, len(self.counts)).cpu()
        self.latent_sum += F.normalize(latents.float(), dim=1).cpu().double().sum((0, 2, 3))
        if self.fid is not None:
            self.fid.update(sample.to(self.fid.device), real=False)
            self.fid.update(target.to(self.fid.device), real=True)


class _Evaluator:
    """Copies of the model, and the sums and examples of this process."""

    def __init__(
        self,
        model: SVQVAE,
        scales: Sequence[float],
        scale_from: str,
        modes: Sequence[str],
        tile_size: int,
        overlap: int | None,
        half_precision: bool,
        lpips: LPIPS | None,
        inception: nn.Module | None,
        block_baselines: Sequence[BlockBaseline],
        codecs: Sequence[str],
    ):
        # `nn.Module.to`, because diffusers' own warns about the codebook, which stays float32 by itself.
        self.model = nn.Module.to(copy.deepcopy(model), torch.float32).eval()
        self.model.enable_tiling(tile_size, overlap)
        self.half_models = {
            name: nn.Module.to(copy.deepcopy(self.model), dtype)
            for name, dtype in (HALF_DTYPES if half_precision else {}).items()
        }
        self.processor = SVQVAEImageProcessor(pixel_range=model.config["pixel_range"])
        self.scales = list(scales)
        self.scale_from = scale_from
        self.lpips = lpips.to(model.device) if lpips is not None else None
        self.block_baselines = block_baselines
        self.codecs = codecs
        self.totals = {mode: [_ScaleTotals(mode, scale, model, inception) for scale in scales] for mode in modes}
        self.pending: list[tuple[_ScaleTotals, tuple[torch.Tensor, ...]]] = []  # of the image that is being measured
        self.worst: list[Example] = []
        self.best: list[Example] = []

    @torch.inference_mode()
    def measure(self, image: Image.Image, index: int, name: str) -> dict[str, Any]:
        """Measures an image at all scales in all modes, adds it to the sums, and returns its values."""
        sample = self.processor(image)["pixel_values"].to(self.model.device)
        results, baselines = [], []
        self.pending = []
        tiled = self._needs_tiles(image)
        for mode in self.totals if tiled else [next(iter(self.totals))]:  # without tiles, modes do not differ
            self._set_tiling(mode == "tiled")
            check_memory(self.model, *self._largest(image))
            latents = self._encode(self.model, sample)
            half_latents = {key: self._encode(half, sample) for key, half in self.half_models.items()}
            per_scale = []
            for number in range(len(self.scales)):
                totals = [self.totals[each][number] for each in ([mode] if tiled else self.totals)]
                half_of_scale = {key: half[number] for key, half in half_latents.items()}
                per_scale.append(self._measure_scale(totals, image, latents[number], half_of_scale))
            results += [values for values, _ in per_scale]
            if mode == next(iter(self.totals)):
                psnr = [values["psnr"] for values, _ in per_scale]
                reconstructions = [reconstruction for _, reconstruction in per_scale]
                measured = [self._measure_baselines(image, *each) for each in per_scale]
                baselines = [values for _, values in itertools.chain(*measured)]
                beside = [(values["baseline"], each, values["psnr"]) for each, values in measured[0]]
                self._keep_example(Example(psnr, index, name, image.size, image, reconstructions, beside))
        if not tiled:
            results = [{**values, "mode": mode} for mode in self.totals for values in results]
        codecs = codec_metrics(image, self.codecs, self.model.device)
        for sums, tensors in self.pending:  # only now, because the image may run out of memory before
            sums.add(*tensors)
        record = {"width": image.width, "height": image.height, "tiled": tiled, "results": results}
        return record | {"baselines": baselines, "codecs": codecs}

    def _encode(self, model: SVQVAE, sample: torch.Tensor) -> list[torch.Tensor]:
        """Latents of each scale, before quantisation."""
        return model.encode_scales(sample.to(model.dtype), self.scales, self.scale_from)

    def _needs_tiles(self, image: Image.Image) -> bool:
        """Whether a tile does not hold the image, or its largest scale."""
        return max(self._largest(image)) > self.model.tile_size

    def _largest(self, image: Image.Image) -> tuple[float, float]:
        """Height and width in pixels of the image, or of its largest scale."""
        largest = max(1, *self.scales)
        return largest * image.height, largest * image.width

    def _set_tiling(self, tiled: bool) -> None:
        for model in (self.model, *self.half_models.values()):
            if tiled:
                model.enable_tiling(model.tile_size, model.overlap)
            else:
                model.disable_tiling()

    def _measure_scale(
        self,
        totals: Sequence[_ScaleTotals],
        image: Image.Image,
        latents: torch.Tensor,
        half_latents: dict[str, torch.Tensor],
    ) -> tuple[dict[str, Any], Image.Image]:
        """Values and reconstruction of an image at one scale, which [`measure`] adds to the sums at its end."""
        model, device, scale = self.model, self.model.device, totals[0].scale
        ids = model.quantize.nearest_ids(latents)
        decoded = model.resize_to_image(model.decode(ids).sample, (image.height, image.width), scale)
        reconstruction = self.processor.postprocess(decoded)[0]
        sample = to_tensor(reconstruction, device)
        target = to_tensor(resize_image(image, reconstruction.size), device)
        self.pending += [(each, (ids, latents, sample, target)) for each in totals]
        values: dict[str, Any] = {"mode": totals[0].mode, "scale": scale, "ids": ids.numel()}
        values |= image_metrics(sample, target, self.lpips)
        full_size = full_size_metrics(reconstruction, image, device)
        values |= {f"{key}_full_size": value for key, value in full_size.items()}
        for key, half in half_latents.items():
            half_ids = model.quantize.nearest_ids(half)
            values[f"ids_changed_{key}"] = metrics.fraction_changed(half_ids, ids)
        bits, pixels = math.log2(model.config["codebook_size"]), image.width * image.height
        values["bits_per_pixel"] = metrics.bits_per_pixel(ids.numel(), bits, pixels)
        return values, reconstruction

    def _measure_baselines(
        self, image: Image.Image, result: dict[str, Any], reconstruction: Image.Image
    ) -> list[tuple[Image.Image, dict[str, Any]]]:
        """Reconstructions by the baselines at the scale of a reconstruction by the model, and their values."""
        device, pixels = self.model.device, image.width * image.height
        target = resize_image(image, reconstruction.size)
        bits = result["ids"] * math.log2(self.model.config["codebook_size"])
        measured = []
        for title, baseline_bits, each in reconstruct_by_baselines(
            target, bits, self.block_baselines, self.codecs, device
        ):
            values: dict[str, Any] = {"baseline": title, "scale": result["scale"]}
            values["bits_per_pixel"] = None if baseline_bits is None else baseline_bits / pixels
            values["exceeds"] = baseline_bits is not None and baseline_bits > bits
            values |= image_metrics(to_tensor(each, device), to_tensor(target, device), self.lpips)
            measured.append((each, values))
        return measured

    def results(self, records: Sequence[dict[str, Any]], modes: Sequence[str]) -> list[ScaleResult]:
        """Means and sums over the images of all processes, one result per mode and scale."""
        all_totals = [each for mode in modes for each in self.totals[mode]]
        return [
            _scale_result(totals, [record["results"][index] for record in records], records)
            for index, totals in enumerate(all_totals)
        ]

    def examples(self) -> tuple[list[Example], list[Example]]:
        """Worst and best images of all processes."""
        return _lowest_psnr(gather_object(self.worst)), _highest_psnr(gather_object(self.best))

    def _keep_example(self, example: Example) -> None:
        self.worst = _lowest_psnr([*self.worst, example])
        self.best = _highest_psnr([*self.best, example])
        if any(each is example for each in (*self.worst, *self.best)):
            example.original = example.original.copy()  # the image belongs to the caller
            for image in (example.original, *example.reconstructions, *(each for _, each, _ in example.baselines)):
                image.thumbnail((EXAMPLE_SIDE, EXAMPLE_SIDE))


def _scale_result(
    totals: _ScaleTotals, per_image: Sequence[dict[str, Any]], records: Sequence[dict[str, Any]]
) -> ScaleResult:
    """Result of one mode and scale from the sums of all processes and the values of all images."""
    ids = sum(values["ids"] for values in per_image)
    counts = torch.stack(gather_object([totals.counts])).sum(0)
    latent_sum = torch.stack(gather_object([totals.latent_sum])).sum(0)
    entropy = metrics.entropy(counts)
    entropy_rates = [
        metrics.bits_per_pixel(values["ids"], entropy, record["width"] * record["height"])
        for values, record in zip(per_image, records, strict=True)
    ]
    means = {
        key: mean([values[key] for values in per_image]) for key in per_image[0] if key not in ("mode", "scale", "ids")
    }
    over_set = {
        "rfid": totals.fid.compute().item() if totals.fid is not None and len(records) > 1 else None,
        "usage": metrics.usage(counts),
        "perplexity": metrics.perplexity(counts),
        "entropy": entropy,
        "bits_per_pixel_entropy": mean(entropy_rates),
        "latent_cosine": metrics.mean_cosine(latent_sum, ids),
    }
    return ScaleResult(totals.mode, totals.scale, {"ids": ids / len(records), **means, **over_set}, counts.numpy())


def _describe_codebook(model: SVQVAE) -> dict[str, Any]:
    codes = model.quantize.embedding.stored().detach()
    return {
        "size": len(codes),
        "dim": codes.shape[1],
        "fingerprint": model.codebook_fingerprint(),
        "redundancy": metrics.redundancy(codes) if len(codes) > 1 else None,
    }


def _lowest_psnr(examples: Iterable[Example]) -> list[Example]:
    return sorted(examples, key=lambda example: (example.psnr[0], example.index))[:NUM_EXAMPLES]


def _highest_psnr(examples: Iterable[Example]) -> list[Example]:
    return sorted(examples, key=lambda example: (-example.psnr[0], example.index))[:NUM_EXAMPLES]


def _gather_records(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(gather_object(records), key=lambda record: record["index"])


def _codec_means(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for point in (each for record in records for each in record["codecs"]):
        groups.setdefault((point["codec"], point["quality"]), []).append(point)
    return [
        {"codec": codec, "quality": quality}
        | {key: mean([point[key] for point in group]) for key in ("bits_per_pixel", "psnr", "ssim")}
        | {"exact": sum(point["psnr"] == math.inf for point in group)}
        for (codec, quality), group in groups.items()
    ]


def _baseline_means(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    groups: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for point in (each for record in records for each in record["baselines"]):
        groups.setdefault((point["baseline"], point["scale"]), []).append(point)
    return [
        {"baseline": baseline, "scale": scale}
        | {key: mean([point[key] for point in group]) for key in BASELINE_VALUES}
        | {"exceeds": sum(point["exceeds"] for point in group), "images": len(group)}
        for (baseline, scale), group in groups.items()
    ]

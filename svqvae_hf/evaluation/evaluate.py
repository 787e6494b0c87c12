"""What an SVQVAE comes to on a set of images, in numbers: one pass over the set, shared by all processes."""

import copy
import math
import platform
from collections.abc import Iterable, Sequence, Sized
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import PartialState
from accelerate.utils import gather_object
from PIL import Image, ImageOps
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance
from tqdm import tqdm

from svqvae_hf.data.image_sets import ImageSource, image_name, read_image
from svqvae_hf.evaluation import metrics
from svqvae_hf.evaluation.comparison import codec_metrics, full_size_metrics, image_metrics, to_tensor
from svqvae_hf.evaluation.perceptual import LPIPS
from svqvae_hf.evaluation.resizing import resize_image
from svqvae_hf.models.image_processing_svqvae import SVQVAEImageProcessor
from svqvae_hf.models.modeling_svqvae import SVQVAE, resize_latents
from svqvae_hf.tokens.image_tokens import check_memory

MODES = ("plain", "tiled")
SCALES = (1.0, 0.5, 0.25)
OVERLAP = 32  # pixels of a tile's halo
HALF_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
NUM_EXAMPLES = 4
MANY_IMAGES = 10_000  # from which on FID is commonly reported
IDS_PER_CODE = 10  # from which on their frequencies say something
EXAMPLE_SIDE = 512  # pixels of the longer side at which examples are kept
LIBRARIES = ("svqvae-hf", "torch", "diffusers", "torchmetrics", "lpips", "torch-fidelity", "pillow", "numpy")
NEEDS = {
    "lpips": "LPIPS was not computed: give --lpips-weights, the file of its network's weights.",
    "rfid": "rFID was not computed: give --inception-weights, the file of its network's weights.",
}


@dataclass
class Result:
    """What one mode and scale came to.

    Args:
        mode (`str`): `"plain"`, images as a whole, or `"tiled"`.
        scale (`float`): Output side over input side.
        values (`dict[str, float | None]`): Numbers by the names of [`METRICS`][svqvae_hf.evaluation.report]; `None`
            where one could not be computed.
        counts (`np.ndarray` of shape `(codebook_size,)`): How often each code occurs in the whole set.
    """

    mode: str
    scale: float
    values: dict[str, float | None]
    counts: np.ndarray


@dataclass
class Example:
    """An image and its reconstructions, one per scale in the first mode, shown no larger than `EXAMPLE_SIDE`.

    `psnr` is that of each scale, `place` the place in the set, `size` the image's own width and height.
    """

    psnr: list[float]
    place: int
    name: str
    size: tuple[int, int]
    original: Image.Image
    reconstructions: list[Image.Image]


@dataclass
class Report:
    """What [`evaluate`] found.

    Args:
        settings (`dict[str, Any]`): What was asked for.
        versions (`dict[str, str]`): Of the libraries that the numbers depend on.
        codebook (`dict[str, Any]`): `size`, `dim`, `fingerprint`, and `redundancy` of [`metrics.redundancy`].
        results (`list[Result]`): One per mode and scale, scales of the first mode first.
        codecs (`list[dict[str, Any]]`): Means of JPEG and WebP at each quality: `codec`, `quality`, `bits_per_pixel`,
            `psnr`, `ssim`, and `exact`, how many images came back exactly.
        images (`list[dict[str, Any]]`): Each image that was read, in the order of the set: `place`, `name`, `width`,
            `height`, `results` and `codecs`.
        skipped (`list[dict[str, Any]]`): Each image that could not be read: `place`, `name`, `reason`.
        notes (`list[str]`): Sentences on what was not computed, or is to be read with care.
        worst (`list[Example]`): Images of the lowest PSNR at the first scale, lowest first.
        best (`list[Example]`): Those of the highest, highest first.
    """

    settings: dict[str, Any]
    versions: dict[str, str]
    codebook: dict[str, Any]
    results: list[Result]
    codecs: list[dict[str, Any]]
    images: list[dict[str, Any]]
    skipped: list[dict[str, Any]]
    notes: list[str]
    worst: list[Example]
    best: list[Example]


def evaluate(
    model: SVQVAE,
    images: Iterable[ImageSource],
    *,
    scales: Sequence[float] = SCALES,
    modes: Sequence[str] = MODES,
    tile_size: int | None = None,
    overlap: int | None = None,
    resolution: int | None = None,
    lpips: LPIPS | None = None,
    inception: nn.Module | None = None,
) -> Report:
    """Reconstructs a set of images and compares each with what was reconstructed.

    In a run of several processes (`accelerate launch`) each takes every n-th image, and all get the whole report. The
    model itself is left as it is: copies of it do the work.

    Args:
        model ([`SVQVAE`]): Model on the device to work on; it is run in float32.
        images (`Iterable`): For [`read_image`]: images, paths, undecoded rows of `datasets`. Read one by one; what
            cannot be read is skipped and named.
        scales (`Sequence[float]`, defaults to `(1.0, 0.5, 0.25)`): Output side over input side. The reference at a
            scale is the image resized to it, by area below 1 and bicubic above.
        modes (`Sequence[str]`, defaults to `("plain", "tiled")`): Images as a whole, or by tiles.
        tile_size (`int`, *optional*): Largest side of a tile in pixels; the model's `sample_size` if not given.
        overlap (`int`, *optional*): Halo of a tile in pixels; 32 if not given, less where the tile is too small.
        resolution (`int`, *optional*): Side in pixels to which each image is brought first, its shorter side resized
            (bicubic) and the centre cropped; as it is if not given.
        lpips ([`LPIPS`], *optional*): As [`load_lpips`] gives it.
        inception (`nn.Module`, *optional*): Features `(batch, n)` of images `(batch, 3, height, width)` in uint8, as
            [`load_inception`] gives it; it is moved to the model's device, as is `lpips`.

    Raises:
        ValueError: An option does not fit, no image can be read, or one would take more memory than is free.
    """
    if not modes or set(modes) - set(MODES) or len(set(modes)) < len(modes):
        raise ValueError(f"`modes` must be of {', '.join(MODES)}, each once, but are {', '.join(modes)}.")
    if not scales or len(set(scales)) < len(scales) or not all(0 < scale < math.inf for scale in scales):
        raise ValueError(f"`scales` must be finite numbers above 0, each once, but are {list(scales)}.")
    if resolution is not None and resolution < 1:
        raise ValueError(f"`resolution` must be at least 1, but is {resolution}.")
    state = PartialState(cpu=model.device.type == "cpu")
    tile_size = model.config["sample_size"] if tile_size is None else tile_size
    if overlap is None:
        overlap = max(0, min(OVERLAP // model.f, (tile_size // model.f - 1) // 2)) * model.f
    evaluator = _Evaluator(model, scales, modes, tile_size, overlap, lpips, inception)
    records: list[dict[str, Any]] = []
    skipped: list[dict[str, Any]] = []
    total = len(images) if isinstance(images, Sized) else None
    bar = tqdm(images, total=total, unit="image", disable=None if state.is_main_process else True)
    for place, source in enumerate(bar):
        if place % state.num_processes != state.process_index:
            continue
        about: dict[str, Any] = {"place": place, "name": image_name(source, place)}
        try:
            image = read_image(source)
        except (OSError, ValueError) as error:
            skipped.append(about | {"reason": str(error)})
            continue
        if resolution is not None:
            image = ImageOps.fit(image, (resolution, resolution), Image.Resampling.BICUBIC)
        records.append(about | evaluator.measure(image, **about))
    records, skipped = (_gather(each) for each in (records, skipped))
    if not records:
        first = f" The first, `{skipped[0]['name']}`: {skipped[0]['reason']}" if skipped else ""
        raise ValueError(f"at least one image must be readable, but none of {len(skipped)} is.{first}")
    results = evaluator.results(records)
    worst, best = evaluator.examples()
    codes = model.quantize.embedding().detach()
    return Report(
        settings={
            "scales": list(scales),
            "modes": list(modes),
            "tile_size": tile_size,
            "overlap": overlap,
            "resolution": resolution,
            "device": model.device.type,
        },
        versions={"python": platform.python_version()} | {name: version(name) for name in LIBRARIES},
        codebook={
            "size": len(codes),
            "dim": codes.shape[1],
            "fingerprint": model.codebook_fingerprint(),
            "redundancy": metrics.redundancy(codes) if len(codes) > 1 else None,
        },
        results=results,
        codecs=_codec_means(records),
        images=records,
        skipped=skipped,
        notes=_notes(results, records, lpips, inception),
        worst=worst,
        best=best,
    )


class _Pass:
    """One mode and scale, with its sums over the set."""

    def __init__(self, mode: str, scale: float, model: SVQVAE, inception: nn.Module | None):
        self.mode = mode
        self.scale = scale
        self.counts = torch.zeros(model.config["codebook_size"], dtype=torch.int64)
        self.latent_sum = torch.zeros(model.config["codebook_embed_dim"], dtype=torch.float64)
        self.fid: FrechetInceptionDistance | None = None
        if inception is not None:
            self.fid = FrechetInceptionDistance(inception)
            self.fid.orig_dtype = torch.float32  # set by an image otherwise, of which a process may have none
            self.fid.to("cpu" if model.device.type == "mps" else model.device)  # the former has no float64

    def add(self, ids: torch.Tensor, latents: torch.Tensor, sample: torch.Tensor, target: torch.Tensor) -> None:
        """Adds an image: its ids, its latents before quantisation, its reconstruction and its reference."""
        self.counts += metrics.count_codes(ids, len(self.counts)).cpu()
        self.latent_sum += F.normalize(latents.float(), dim=1).cpu().double().sum((0, 2, 3))
        if self.fid is not None:
            self.fid.update(sample.to(self.fid.device), real=False)
            self.fid.update(target.to(self.fid.device), real=True)


class _Evaluator:
    """The model in all precisions, and what it came to so far in this process."""

    def __init__(
        self,
        model: SVQVAE,
        scales: Sequence[float],
        modes: Sequence[str],
        tile_size: int,
        overlap: int,
        lpips: LPIPS | None,
        inception: nn.Module | None,
    ):
        self.model = nn.Module.to(copy.deepcopy(model), torch.float32).eval()
        self.half_models = {name: _half_model(self.model, dtype) for name, dtype in HALF_DTYPES.items()}
        self.model.enable_tiling(tile_size, overlap)  # refuses what does not fit
        self.processor = SVQVAEImageProcessor(pixel_range=model.config["pixel_range"])
        self.scales = list(scales)
        self.tiles = (tile_size, overlap)
        self.lpips = lpips.to(model.device) if lpips is not None else None
        self.passes = {mode: [_Pass(mode, scale, model, inception) for scale in scales] for mode in modes}
        self.worst: list[Example] = []
        self.best: list[Example] = []

    @torch.inference_mode()
    def measure(self, image: Image.Image, place: int, name: str) -> dict[str, Any]:
        """Adds an image and gives its own numbers."""
        sample = self.processor(image)["pixel_values"]
        results = []
        for mode, passes in self.passes.items():
            self._set_mode(mode)
            try:
                check_memory(self.model, image.height, image.width, self.scales)
            except ValueError as error:
                raise ValueError(f"`{name}`: {error}") from error
            latents = self._encode(self.model, sample, torch.float32)
            half_latents = {
                key: self._encode(half, sample, HALF_DTYPES[key]) for key, half in self.half_models.items()
            }
            of_mode = [self._measure_scale(each, image, latents, half_latents) for each in passes]
            results += [values for values, _ in of_mode]
            if mode == next(iter(self.passes)):
                psnr = [values["psnr"] for values, _ in of_mode]
                reconstructions = [reconstruction for _, reconstruction in of_mode]
                self._keep(Example(psnr, place, name, image.size, image, reconstructions))
        return {
            "width": image.width,
            "height": image.height,
            "results": results,
            "codecs": codec_metrics(image, self.model.device),
        }

    def _measure_scale(
        self, each: _Pass, image: Image.Image, latents: torch.Tensor, half_latents: dict[str, torch.Tensor]
    ) -> tuple[dict[str, Any], Image.Image]:
        model, device = self.model, self.model.device
        scaled = resize_latents(latents, each.scale)
        ids = model.quantize.nearest_ids(scaled)
        decoded = model.resize_to_image(model.decode(ids).sample, (image.height, image.width), each.scale)
        reconstruction = self.processor.postprocess(decoded)[0]
        sample, target = (
            to_tensor(shown, device) for shown in (reconstruction, resize_image(image, reconstruction.size))
        )
        each.add(ids, scaled, sample, target)
        values: dict[str, Any] = {"mode": each.mode, "scale": each.scale, "ids": ids.numel()}
        values |= image_metrics(sample, target, self.lpips)
        at_full_size = full_size_metrics(reconstruction, image, device)
        values |= {f"{key}_full_size": value for key, value in at_full_size.items()}
        for key, half in half_latents.items():
            half_ids = model.quantize.nearest_ids(resize_latents(half, each.scale))
            values[f"ids_changed_{key}"] = metrics.share_changed(half_ids, ids)
        bits, pixels = math.log2(model.config["codebook_size"]), image.width * image.height
        values["bits_per_pixel"] = metrics.bits_per_pixel(ids.numel(), bits, pixels)
        return values, reconstruction

    def results(self, records: Sequence[dict[str, Any]]) -> list[Result]:
        """Means and sums over the images of all processes."""
        results = []
        passes = [each for passes in self.passes.values() for each in passes]
        for number, each in enumerate(passes):
            of_images = [record["results"][number] for record in records]
            ids = sum(result["ids"] for result in of_images)
            keys = [key for key in of_images[0] if key not in ("mode", "scale", "ids")]
            values: dict[str, float | None] = {"ids": ids / len(records)}
            values |= {key: _mean([result[key] for result in of_images]) for key in keys}
            counts = torch.stack(gather_object([each.counts])).sum(0)
            latent_sum = torch.stack(gather_object([each.latent_sum])).sum(0)
            entropy = metrics.entropy(counts)
            values |= {
                "rfid": each.fid.compute().item() if each.fid is not None and len(records) > 1 else None,
                "usage": metrics.usage(counts),
                "perplexity": metrics.perplexity(counts),
                "entropy": entropy,
                "bits_per_pixel_entropy": _mean(
                    [
                        metrics.bits_per_pixel(result["ids"], entropy, record["width"] * record["height"])
                        for result, record in zip(of_images, records, strict=True)
                    ]
                ),
                "latent_cosine": metrics.mean_cosine(latent_sum, ids),
            }
            results.append(Result(each.mode, each.scale, values, counts.numpy()))
        return results

    def examples(self) -> tuple[list[Example], list[Example]]:
        """The worst and the best images of all processes."""
        return _first(gather_object(self.worst), 1), _first(gather_object(self.best), -1)

    def _set_mode(self, mode: str) -> None:
        for model in (self.model, *self.half_models.values()):
            if mode == "tiled":
                model.enable_tiling(*self.tiles)
            else:
                model.disable_tiling()

    def _encode(self, model: SVQVAE, sample: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return model.encode(sample.to(model.device, dtype).to(model.dtype)).latents

    def _keep(self, example: Example) -> None:
        self.worst = _first([*self.worst, example], 1)
        self.best = _first([*self.best, example], -1)
        if any(each is example for each in (*self.worst, *self.best)):
            example.original = example.original.copy()  # the caller's goes on
            for image in (example.original, *example.reconstructions):
                image.thumbnail((EXAMPLE_SIDE, EXAMPLE_SIDE))


def _half_model(model: SVQVAE, dtype: torch.dtype) -> SVQVAE:
    half = copy.deepcopy(model)
    nn.Module.to(half, dtype)  # diffusers' own `to` warns of the codebook, which keeps its type by itself
    if dtype == torch.float16 and model.device.type == "cpu":
        # torch's convolution is 40 times slower in float16 than in float32 there. In float32, from and to float16, it
        # gives what a GPU gives, which adds up in float32.
        for module in half.modules():
            if isinstance(module, nn.Conv2d):
                module.float()
                module.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))
                module.register_forward_hook(lambda _, inputs, output: output.half())
    return half


def _first(examples: Iterable[Example], sign: int) -> list[Example]:
    return sorted(examples, key=lambda example: (sign * example.psnr[0], example.place))[:NUM_EXAMPLES]


def _gather(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those of all processes in the order of the set."""
    return sorted(gather_object(records), key=lambda record: record["place"])


def _mean(values: Sequence[float | None]) -> float | None:
    """The mean of what is there; of PSNR, without images that came back exactly unless all did."""
    present = [value for value in values if value is not None]
    counted = [value for value in present if value != math.inf] or present
    return math.fsum(counted) / len(counted) if counted else None


def _codec_means(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    results: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for result in (each for record in records for each in record["codecs"]):
        results.setdefault((result["codec"], result["quality"]), []).append(result)
    return [
        {"codec": codec, "quality": quality}
        | {key: _mean([each[key] for each in group]) for key in ("bits_per_pixel", "psnr", "ssim")}
        | {"exact": sum(each["psnr"] == math.inf for each in group)}
        for (codec, quality), group in results.items()
    ]


def _notes(
    results: Sequence[Result], records: Sequence[dict[str, Any]], lpips: LPIPS | None, inception: nn.Module | None
) -> list[str]:
    """What was not computed, and what a small set makes doubtful."""
    notes = [NEEDS[key] for key, network in (("lpips", lpips), ("rfid", inception)) if network is None]
    if inception is not None and len(records) < MANY_IMAGES:
        notes.append(
            f"rFID of {len(records)} images is far from that of many, and cannot be compared with published numbers."
            if len(records) > 1
            else "rFID was not computed: it needs at least two images."
        )
    sides = {"ssim": ("SSIM", metrics.SSIM_SIDE), "ms_ssim": ("MS-SSIM", metrics.MS_SSIM_SIDE)}
    if lpips is not None:
        sides["lpips"] = ("LPIPS", lpips.min_side)
    of_mode = [result for result in results if result.mode == results[0].mode]
    for number, result in enumerate(of_mode):
        for key, (title, side) in sides.items():
            fitting = sum(record["results"][number][key] is not None for record in records)
            if fitting < len(records):
                notes.append(
                    f"{title} at scale {result.scale:g} is of {fitting} of {len(records)} images: it needs sides of "
                    f"at least {side} pixels."
                )
    for number, result in enumerate(results):
        exact, at_full_size = (
            sum(record["results"][number][key] == math.inf for record in records) for key in ("psnr", "psnr_full_size")
        )
        if exact or at_full_size:
            notes.append(
                f"PSNR ({result.mode}, scale {result.scale:g}) is infinite for {exact} of {len(records)} images, at "
                f"full size for {at_full_size}: they came back exactly. The means are of the others, if there are any."
            )
    few = [f"{each.scale:g}" for each in of_mode if each.counts.sum() < IDS_PER_CODE * len(each.counts)]
    if few:
        notes.append(
            f"The set gives fewer than {IDS_PER_CODE} ids a code (scale {', '.join(few)}): codes used, perplexity, "
            "entropy and entropy-coded bits would be higher on a larger one."
        )
    return notes

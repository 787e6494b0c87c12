"""Compares generated images with an image set: Fréchet distance, precision and recall."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import PartialState
from PIL import Image, ImageOps
from torch import nn
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_prc import calculate_precision_recall_part

from svqvae_hf.evaluation.measuring import Images, Records, measure_images, to_tensor
from svqvae_hf.evaluation.reference_batch import FeatureStatistics
from svqvae_hf.evaluation.report import MANY_IMAGES, Report
from svqvae_hf.models.image_processing_svqvae import SVQVAEImageProcessor
from svqvae_hf.models.modeling_svqvae import SVQVAE

POOLED_SIDE = 4  # cells of latents per side
NEIGHBOURS = 3  # of precision and recall


class TokenizerFeatures(nn.Module):
    """Features of images from a tokenizer: its latents before quantisation, averaged over 4 x 4 cells.

    They need no download. Distances between them are comparable only for the same tokenizer, and are not an FID.
    Precision and recall are not computed from them, because latents of white noise lie among those of photographs.

    Args:
        model ([`SVQVAE`]): Tokenizer in evaluation mode.
    """

    title = "latents of the tokenizer"

    def __init__(self, model: SVQVAE):
        super().__init__()
        self.model = model
        self.processor = SVQVAEImageProcessor(pixel_range=model.config["pixel_range"])

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Features `(batch, n)` of uint8 images `(batch, 3, height, width)`."""
        pixel_values = self.processor(images)["pixel_values"].to(self.model.device)
        latents = self.model.encode(pixel_values).latents  # (batch, channels, h, w)
        pooled = F.adaptive_avg_pool2d(latents, POOLED_SIDE)  # (batch, channels, 4, 4)
        return pooled.flatten(1)  # (batch, channels * 16)


class _FeatureReader:
    """Measures the features of images, which it makes square and resizes to one side.

    Args:
        networks (`Mapping[str, nn.Module]`): Networks by their titles, as in [`compare_generated`].
        side (`int`, *optional*): Side in pixels; by default the shorter side of the first image.
        device (`str` or `torch.device`): Device of the networks.
    """

    def __init__(self, networks: Mapping[str, nn.Module], side: int | None, device: str | torch.device):
        self.networks = networks
        self.side = side
        self.device = device

    def measure(self, image: Image.Image, index: int, name: str) -> dict[str, Any]:
        """Features of an image from each network, by its title. `measure_images` also passes an index and a name."""
        if self.side is None:
            self.side = min(image.size)
        square = ImageOps.fit(image, (self.side, self.side), Image.Resampling.BICUBIC)
        pixels = to_tensor(square, self.device)  # (1, 3, side, side)
        features = {}
        for title, network in self.networks.items():
            features[title] = network(pixels)[0].float().cpu()  # (dim,)
        return features


@torch.inference_mode()
def compare_generated(
    generated: Images,
    images: Images,
    networks: Mapping[str, nn.Module],
    *,
    resolution: int | None = None,
    statistics: Mapping[str, FeatureStatistics] | None = None,
    device: str | torch.device = "cpu",
) -> Report:
    """Compares a set of generated images with an image set.

    Args:
        generated (`Iterable`): Generated images, as in [`measure_images`].
        images (`Iterable`): Images to compare with. Their shorter side is resized to the generated images (bicubic),
            and the centre is cropped.
        networks (`Mapping[str, nn.Module]`): Names and networks that map uint8 images `(batch, 3, height, width)` to
            features `(batch, n)`.
        resolution (`int`, *optional*): Side to which both are resized and cropped; by default the shorter side of the
            first generated image.
        statistics (`Mapping[str, FeatureStatistics]`, *optional*): Statistics of the features of a larger set, by the
            names of networks, from which the Fréchet distance is computed instead of from `images`. See
            [`~svqvae_hf.evaluation.reference_batch.ReferenceBatch`].
        device (`str` or `torch.device`, defaults to `"cpu"`): Device to work on.

    Raises:
        ValueError: A set has no more images than neighbours, 3, or `resolution` is out of range, or missing on
            several processes.

    Source: precision and recall by 3 nearest neighbours, arXiv 1904.06991; the Fréchet distance, arXiv 1706.08500.
    """
    processes = PartialState(cpu=torch.device(device).type == "cpu")
    if resolution is None and processes.num_processes > 1:
        raise ValueError("`resolution` (`--resolution`) must be given on several processes.")
    reader = _FeatureReader(networks, resolution, device)
    generated_records, skipped_generated = measure_images(reader.measure, generated, resolution, processes)
    side = reader.side  # if `resolution` is left out, from the first generated image
    real_records, skipped_real = measure_images(reader.measure, images, side, processes)
    num_generated = len(generated_records)
    num_real = len(real_records)
    if min(num_generated, num_real) <= NEIGHBOURS:
        raise ValueError(f"both sets must have more than {NEIGHBOURS} images, got {num_generated} and {num_real}.")
    rows = []
    for title, network in networks.items():
        generated_features = _stacked_features(generated_records, title)  # (generated images, dim)
        real_features = _stacked_features(real_records, title)  # (images, dim)
        generated_statistics = _statistics_of(generated_features)
        if statistics is not None and title in statistics:
            real_statistics = statistics[title]
        else:
            real_statistics = _statistics_of(real_features)
        distance = _frechet_distance(generated_statistics, real_statistics)
        row: dict[str, Any] = {"title": title, "frechet_distance": distance, "precision": None, "recall": None}
        if not isinstance(network, TokenizerFeatures):
            row |= _precision_and_recall(generated_features, real_features)
        rows.append(row)
    return Report(
        title="Generated images",
        settings={"resolution": side, "generated_images": num_generated, "images": num_real},
        rows=rows,
        images=[],
        skipped=skipped_generated + skipped_real,
        notes=_notes(networks, num_generated, num_real),
    )


def _stacked_features(records: Records, title: str) -> torch.Tensor:
    """Features `(n, dim)` of all images, from the network with this title."""
    return torch.stack([record[title] for record in records])


def _statistics_of(features: torch.Tensor) -> FeatureStatistics:
    """Statistics of features `(n, dim)`."""
    statistics = fid_features_to_statistics(features.double())
    return FeatureStatistics(statistics["mu"], statistics["sigma"])


def _frechet_distance(generated: FeatureStatistics, real: FeatureStatistics) -> float:
    """Fréchet distance between two sets of features; 0 if rounding makes it negative."""
    if generated.mean.shape != real.mean.shape:
        raise ValueError(
            f"the statistics must be of features with {len(generated.mean)} dimensions, got {len(real.mean)}. Compute "
            "them with the same network."
        )
    result = fid_statistics_to_metric(
        {"mu": generated.mean, "sigma": generated.covariance},
        {"mu": real.mean, "sigma": real.covariance},
        verbose=False,
    )
    return max(0.0, result[KEY_METRIC_FID])


def _precision_and_recall(generated: torch.Tensor, real: torch.Tensor) -> dict[str, float]:
    """Precision and recall of two sets of features `(n, dim)`."""
    precision, recall = calculate_precision_recall_part(generated, real, NEIGHBOURS)
    return {"precision": precision, "recall": recall}


def _notes(networks: Mapping[str, nn.Module], num_generated: int, num_real: int) -> list[str]:
    """Sentences about values that are missing or mean little."""
    notes = []
    has_features_of_tokenizer = any(isinstance(network, TokenizerFeatures) for network in networks.values())
    if has_features_of_tokenizer:
        notes.append(
            f"Precision and recall are left out for {TokenizerFeatures.title}, by which white noise would have a "
            "precision of 1. Pass --inception-weights to compute them."
        )
    if min(num_generated, num_real) < MANY_IMAGES:
        notes.append(
            f"The Fréchet distance of {num_generated} and {num_real} images is too high to be compared with published "
            f"values, which take at least {MANY_IMAGES:,}. Compare it only at the same numbers of images."
        )
    return notes

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

from svqvae_hf.evaluation.measuring import Images, measure_images, to_tensor
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
        self.model, self.processor = model, SVQVAEImageProcessor(pixel_range=model.config["pixel_range"])

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Features `(batch, n)` of uint8 images `(batch, 3, height, width)`."""
        pixel_values = self.processor(images)["pixel_values"].to(self.model.device)
        return F.adaptive_avg_pool2d(self.model.encode(pixel_values).latents, POOLED_SIDE).flatten(1)


@torch.inference_mode()
def compare_generated(
    generated: Images,
    images: Images,
    networks: Mapping[str, nn.Module],
    *,
    resolution: int | None = None,
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
        device (`str` or `torch.device`, defaults to `"cpu"`): Device to work on.

    Raises:
        ValueError: A set has no more images than neighbours, 3, or `resolution` is out of range, or missing on
            several processes.

    Source: precision and recall by 3 nearest neighbours, arXiv 1904.06991; the Fréchet distance, arXiv 1706.08500.
    """
    state = PartialState(cpu=torch.device(device).type == "cpu")
    side = resolution
    if side is None and state.num_processes > 1:
        raise ValueError("`resolution` (`--resolution`) must be given on several processes.")

    def measure(image: Image.Image, index: int, name: str) -> dict[str, Any]:
        nonlocal side
        side = side or min(image.size)
        pixels = to_tensor(ImageOps.fit(image, (side, side), Image.Resampling.BICUBIC), device)
        return {name: network(pixels)[0].float().cpu() for name, network in networks.items()}

    found, skipped = measure_images(measure, generated, resolution, state)
    real, also_skipped = measure_images(measure, images, side, state)
    if min(len(found), len(real)) <= NEIGHBOURS:
        raise ValueError(f"both sets must have more than {NEIGHBOURS} images, got {len(found)} and {len(real)}.")
    notes = []
    if any(isinstance(network, TokenizerFeatures) for network in networks.values()):
        notes.append(
            f"Precision and recall are left out for {TokenizerFeatures.title}, by which white noise would have a "
            "precision of 1. Pass --inception-weights to compute them."
        )
    if min(len(found), len(real)) < MANY_IMAGES:
        notes.append(
            f"The Fréchet distance of {len(found)} and {len(real)} images is too high to be compared with published "
            f"values, which take at least {MANY_IMAGES:,}. Compare it only at the same numbers of images."
        )
    return Report(
        title="Generated images",
        settings={"resolution": side, "generated_images": len(found), "images": len(real)},
        rows=[
            _compare(name, network, *(torch.stack([record[name] for record in records]) for records in (found, real)))
            for name, network in networks.items()
        ],
        images=[],
        skipped=[*skipped, *also_skipped],
        notes=notes,
    )


def _compare(name: str, network: nn.Module, generated: torch.Tensor, real: torch.Tensor) -> dict[str, Any]:
    """Values of two sets of features `(n, dim)`."""
    statistics = [fid_features_to_statistics(each.double()) for each in (generated, real)]
    precision = recall = None
    if not isinstance(network, TokenizerFeatures):
        precision, recall = calculate_precision_recall_part(generated, real, NEIGHBOURS)
    distance = fid_statistics_to_metric(*statistics, verbose=False)[KEY_METRIC_FID]
    return {"title": name, "frechet_distance": max(0.0, distance), "precision": precision, "recall": recall}

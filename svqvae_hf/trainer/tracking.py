"""Numbers and pictures of a run: statistics per scale, rows of images, progress."""

import math
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TypeVar

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from PIL import Image
from torchvision.utils import make_grid
from tqdm import tqdm

from svqvae_files.outputs import save_png
from svqvae_hf.evaluation.metrics import count_codes, perplexity, psnr, usage
from svqvae_hf.trainer.losses.objective import Pair

Item = TypeVar("Item")


class ScaleStatistics:
    """PSNR (mean over images), codebook usage and perplexity per scale.

    Args:
        codebook_size (`int`): Number of codes.
        by_octave (`bool`): Round each scale to the nearest power of two, for scales that are drawn at random.
    """

    def __init__(self, codebook_size: int, by_octave: bool):
        self.codebook_size = codebook_size
        self.by_octave = by_octave
        self._psnr: dict[float, list[torch.Tensor]] = defaultdict(list)
        self._counts: dict[float, torch.Tensor] = {}

    def add(self, scales: Sequence[float], pairs: Sequence[Pair], ids: Sequence[torch.Tensor]) -> None:
        """Adds a batch.

        Args:
            scales (`Sequence[float]`): Scales of the batch.
            pairs (`Sequence[Pair]`): Target and reconstruction at each scale.
            ids (`Sequence[torch.Tensor]`): Ids at each scale; empty if nothing was quantised.
        """
        keys = [2.0 ** round(math.log2(scale)) if self.by_octave else scale for scale in scales]
        for key, pair in zip(keys, pairs, strict=True):
            with torch.no_grad():
                self._psnr[key].append(psnr(pair.output, pair.target, data_range=1.0).clamp(max=100))  # not infinite
        for key, scale_ids in zip(keys, ids, strict=False):
            counts = count_codes(scale_ids, self.codebook_size)
            self._counts[key] = self._counts[key] + counts if key in self._counts else counts

    def summary(self, reduce: Callable[[torch.Tensor, str], torch.Tensor]) -> dict[str, float]:
        """Means over all processes and all steps since the last call. All processes must have added the same scales.

        Args:
            reduce (`Callable`): Reduces a tensor over processes, by `"mean"` or `"sum"`.
        """
        numbers = {}
        for key in sorted(self._psnr):
            numbers[f"psnr@{key:g}"] = reduce(torch.cat(self._psnr[key]).mean(), "mean").item()
        for key in sorted(self._counts):
            counts = reduce(self._counts[key], "sum")
            numbers[f"usage@{key:g}"] = usage(counts)
            numbers[f"perplexity@{key:g}"] = perplexity(counts)
        self._psnr.clear()
        self._counts.clear()
        return numbers


def rows_of_images(pairs: Sequence[Pair]) -> torch.Tensor:
    """Images beside their reconstructions, one row per image: first the image, then each scale.

    Args:
        pairs (`Sequence[Pair]`): One batch at several scales.

    Returns:
        `torch.Tensor` of shape `(batch * columns, 3, height, width)`: Smaller scales are enlarged without smoothing.
    """
    largest = max((pair.target for pair in pairs), key=torch.Tensor.numel)
    columns = [largest, *(F.interpolate(pair.output, largest.shape[-2:], mode="nearest") for pair in pairs)]
    return torch.stack(columns, dim=1).flatten(0, 1)


def log_images(accelerator: Accelerator, images: torch.Tensor, columns: int, folder: Path, step: int) -> None:
    """Writes images `(n, 3, height, width)` in [0, 1] to `folder` as one picture, and sends it to the trackers."""
    grid = make_grid(images.clamp(0, 1), nrow=columns, padding=4, pad_value=1.0)
    pixels = (grid.permute(1, 2, 0) * 255).round().byte().cpu().numpy()
    save_png(Image.fromarray(pixels), folder / f"step-{step:07}.png")
    for tracker in accelerator.trackers:
        if hasattr(tracker, "log_images"):
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({"samples": pixels[None]}, step=step, **layout)


def progress(batches: Iterable[Item], what: str, total: int) -> Iterable[Item]:
    """Shows how many batches are done, on a terminal at once, in a log file every half minute."""
    return tqdm(batches, desc=what, total=total, mininterval=0.5 if sys.stderr.isatty() else 30, leave=False)

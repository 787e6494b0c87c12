"""Numbers and pictures of a run: statistics per scale, labelled images, progress."""

import math
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TypeVar

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from PIL import Image, ImageDraw, ImageFont
from torchvision.transforms.functional import pil_to_tensor
from torchvision.utils import make_grid
from tqdm import tqdm

from svqvae_files.outputs import save_png
from svqvae_hf.evaluation.metrics import count_codes, perplexity, psnr, usage
from svqvae_hf.trainer.losses.objective import Pair

MAX_PSNR = 100.0  # of equal images, whose PSNR is infinite
LABEL_HEIGHT = 14  # pixels
PADDING = 4  # pixels between images
SECONDS_PER_LINE = 30  # of a progress bar in a log file

Item = TypeVar("Item")


class ScaleStatistics:
    """PSNR (mean over images), codebook usage and perplexity per scale.

    Args:
        codebook_size (`int`): Number of codes.
        by_octave (`bool`): Count each scale under the nearest power of two, for scales that are drawn at random.
    """

    def __init__(self, codebook_size: int, by_octave: bool):
        self.codebook_size = codebook_size
        self.by_octave = by_octave
        self._psnr_of_batches: dict[float, list[torch.Tensor]] = defaultdict(list)  # (batch,) each, by scale
        self._code_counts: dict[float, torch.Tensor] = {}  # (codebook_size,), by scale

    def add(self, scales: Sequence[float], pairs: Sequence[Pair], ids: Sequence[torch.Tensor]) -> None:
        """Adds a batch.

        Args:
            scales (`Sequence[float]`): Scales of the batch.
            pairs (`Sequence[Pair]`): Target and reconstruction at each scale.
            ids (`Sequence[torch.Tensor]`): Ids at each scale; empty if nothing was quantised.
        """
        # With `by_octave`, a scale of 0.47 counts under 0.5.
        counted_scales = [self._counted_scale(scale) for scale in scales]
        for scale, pair in zip(counted_scales, pairs, strict=True):
            with torch.no_grad():
                psnr_of_images = psnr(pair.output, pair.target, data_range=1.0)  # (B,)
            self._psnr_of_batches[scale].append(psnr_of_images.clamp(max=MAX_PSNR))
        if not ids:  # nothing was quantised
            return
        for scale, ids_of_scale in zip(counted_scales, ids, strict=True):
            counts = count_codes(ids_of_scale, self.codebook_size)
            if scale in self._code_counts:
                counts = self._code_counts[scale] + counts
            self._code_counts[scale] = counts

    def _counted_scale(self, scale: float) -> float:
        """Scale under which a scale is counted: itself or, with `by_octave`, the nearest power of two."""
        if self.by_octave:
            return 2.0 ** round(math.log2(scale))
        return scale

    def summary(self, reduce: Callable[[torch.Tensor, str], torch.Tensor]) -> dict[str, float]:
        """Means over all processes and all steps since the last call. All processes must have added the same scales.

        Args:
            reduce (`Callable`): Reduces a tensor over processes, by `"mean"` or `"sum"`.
        """
        numbers = {}
        for scale in sorted(self._psnr_of_batches):
            mean_psnr = torch.cat(self._psnr_of_batches[scale]).mean()  # of this process
            numbers[f"psnr@{scale:g}"] = reduce(mean_psnr, "mean").item()
        for scale in sorted(self._code_counts):
            counts = reduce(self._code_counts[scale], "sum")
            numbers[f"usage@{scale:g}"] = usage(counts)
            numbers[f"perplexity@{scale:g}"] = perplexity(counts)
        self._psnr_of_batches.clear()
        self._code_counts.clear()
        return numbers


def rows_of_images(pairs: Sequence[Pair]) -> torch.Tensor:
    """Images beside their reconstructions, one row per image: first the image, then each scale.

    Args:
        pairs (`Sequence[Pair]`): One batch at several scales.

    Returns:
        `torch.Tensor` of shape `(batch * columns, 3, height, width)`: Smaller scales are enlarged without smoothing.
    """
    targets = [pair.target for pair in pairs]
    largest_target = max(targets, key=torch.Tensor.numel)  # (B, 3, H, W)
    columns = [largest_target]
    for pair in pairs:
        enlarged_output = F.interpolate(pair.output, largest_target.shape[-2:], mode="nearest")
        columns.append(enlarged_output)
    rows = torch.stack(columns, dim=1)  # (B, columns, 3, H, W)
    return rows.flatten(0, 1)  # (B * columns, 3, H, W)


def log_images(
    accelerator: Accelerator, images: torch.Tensor, labels: Sequence[str], columns: int, folder: Path, step: int
) -> None:
    """Writes images to a folder as one picture with labels, and sends it to the trackers.

    Args:
        accelerator (`Accelerator`): Accelerator with the trackers.
        images (`torch.Tensor` of shape `(n, 3, height, width)`): Images in [0, 1].
        labels (`Sequence[str]`): A label per image, which stands above it; shortened to its width.
        columns (`int`): Images in a row.
        folder (`Path`): Folder of the pictures.
        step (`int`): Steps done, for the name of the picture.
    """
    cells = []
    images = images.clamp(0, 1).float().cpu()
    for image, label in zip(images, labels, strict=True):
        strip = label_image(label, width=image.shape[-1])  # (3, LABEL_HEIGHT, W)
        cells.append(torch.cat([strip, image], dim=1))  # (3, LABEL_HEIGHT + H, W)
    grid = make_grid(cells, nrow=columns, padding=PADDING, pad_value=1.0)  # (3, H, W)
    pixels = (grid.permute(1, 2, 0) * 255).round().byte().numpy()  # (H, W, 3)
    save_png(Image.fromarray(pixels), folder / f"step-{step:07}.png")
    batch = {"samples": pixels[None]}  # (1, H, W, 3)
    for tracker in accelerator.trackers:
        if not hasattr(tracker, "log_images"):
            continue
        if tracker.name == "tensorboard":
            tracker.log_images(batch, step=step, dataformats="NHWC")
        else:
            tracker.log_images(batch, step=step)


def label_image(label: str, width: int) -> torch.Tensor:
    """Draws a label in black on white, as far as it fits.

    Returns:
        `torch.Tensor` of shape `(3, LABEL_HEIGHT, width)`: Values in [0, 1].
    """
    strip = Image.new("RGB", (width, LABEL_HEIGHT), "white")
    printable = label.encode("ascii", "replace").decode()  # the font has no other letters
    ImageDraw.Draw(strip).text((1, 1), printable, fill="black", font=ImageFont.load_default())
    return pil_to_tensor(strip) / 255


def progress(batches: Iterable[Item], title: str, total: int) -> Iterable[Item]:
    """Shows how many batches are done, on a terminal at once, in a log file every half minute."""
    seconds = 0.5 if sys.stderr.isatty() else SECONDS_PER_LINE
    return tqdm(batches, desc=title, total=total, mininterval=seconds, leave=False)

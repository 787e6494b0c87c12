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
        names = [self._name(scale) for scale in scales]
        for name, pair in zip(names, pairs, strict=True):
            with torch.no_grad():
                values = psnr(pair.output, pair.target, data_range=1.0)
            self._psnr[name].append(values.clamp(max=MAX_PSNR))
        for name, scale_ids in zip(names, ids, strict=False):
            counts = count_codes(scale_ids, self.codebook_size)
            if name in self._counts:
                counts = self._counts[name] + counts
            self._counts[name] = counts

    def _name(self, scale: float) -> float:
        """Scale under which another one is counted."""
        if self.by_octave:
            return 2.0 ** round(math.log2(scale))
        return scale

    def summary(self, reduce: Callable[[torch.Tensor, str], torch.Tensor]) -> dict[str, float]:
        """Means over all processes and all steps since the last call. All processes must have added the same scales.

        Args:
            reduce (`Callable`): Reduces a tensor over processes, by `"mean"` or `"sum"`.
        """
        numbers = {}
        for scale in sorted(self._psnr):
            mean = torch.cat(self._psnr[scale]).mean()
            numbers[f"psnr@{scale:g}"] = reduce(mean, "mean").item()
        for scale in sorted(self._counts):
            counts = reduce(self._counts[scale], "sum")
            numbers[f"usage@{scale:g}"] = usage(counts)
            numbers[f"perplexity@{scale:g}"] = perplexity(counts)
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
    columns = [largest]
    for pair in pairs:
        enlarged = F.interpolate(pair.output, largest.shape[-2:], mode="nearest")
        columns.append(enlarged)
    return torch.stack(columns, dim=1).flatten(0, 1)  # (B * columns, 3, H, W)


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
    for image, label in zip(images.clamp(0, 1).float().cpu(), labels, strict=True):
        cells.append(torch.cat([label_image(label, image.shape[-1]), image], dim=1))  # (3, label + H, W)
    grid = make_grid(cells, nrow=columns, padding=PADDING, pad_value=1.0)
    pixels = (grid.permute(1, 2, 0) * 255).round().byte().numpy()  # (H, W, 3)
    save_png(Image.fromarray(pixels), folder / f"step-{step:07}.png")
    for tracker in accelerator.trackers:
        if hasattr(tracker, "log_images"):
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({"samples": pixels[None]}, step=step, **layout)


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

"""Quality of what a model should beat at the same bits: `python benchmarks/baselines.py SETS --fit IMAGES`.

k-means of blocks, the same codes with a linear decoder, principal components, JPEG, WebP and AVIF. A block has f x f
pixels, as an id has, and k-means has as many codes as the codebook, so it takes the model's bits. There is a table per
set, with means over its images. At a scale, the resized image is coded, and bits are per pixel of the full image.
"""

import argparse
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from measuring import Row, make_parser, parse_options, report
from PIL import Image
from tqdm import tqdm

from svqvae_cli.files import find_inputs
from svqvae_files.file_names import IMAGE_SUFFIXES
from svqvae_hf.data.image_rows import read_image
from svqvae_hf.evaluation.codecs import CODECS, open_image, save_image
from svqvae_hf.evaluation.measuring import image_metrics, to_tensor
from svqvae_hf.models.quantizer import find_nearest
from svqvae_hf.tokens.image_tokens import resize_image

MAX_BLOCKS = 1 << 20  # at most, that k-means is fitted on: more of them gain more than more iterations
ITERATIONS = 4
SEARCH_DIM = 32  # leading components by which blocks find their codes while k-means is fitted: 99 % of the variance
REGRESSION_BLOCKS = 1 << 18  # at most, that a linear map is fitted on
RIDGE = 1e-3  # relative to the mean square of the inputs
COLUMNS = {"psnr": "PSNR, dB", "ssim": "SSIM"}
BEST_QUALITY = 95  # Pillow's advice for JPEG: higher ones grow without a gain

Decoder = Callable[[torch.Tensor], torch.Tensor]  # blocks `(1, 3 * f * f, h, w)`, values from 0 to 255, after coding


def read_blocks(path: Path, f: int, count: int) -> torch.Tensor:
    """At most `count` blocks of the centre of an image, `(1, 3 * f * f, h, w)`."""
    pixels = torch.from_numpy(np.array(read_image(path))).movedim(-1, 0)  # (3, height, width)
    _, height, width = pixels.shape
    rows = min(height // f, math.isqrt(count))
    columns = min(width // f, count // max(1, rows))
    top = (height - rows * f) // 2
    left = (width - columns * f) // 2
    centre = pixels[None, :, top : top + rows * f, left : left + columns * f]
    return F.pixel_unshuffle(centre.float(), f)


def components_of(blocks: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean `(dim,)` of blocks `(n, dim)`, and their leading principal components as columns `(dim, count)`."""
    vectors = blocks[:: math.ceil(len(blocks) / REGRESSION_BLOCKS)]
    mean = vectors.mean(0)
    covariance = (vectors - mean).T.cov()
    components = torch.linalg.eigh(covariance).eigenvectors  # from the least to the largest variance
    return mean, components.flip(-1)[:, :count]


def fit_kmeans(blocks: torch.Tensor, size: int) -> torch.Tensor:
    """Codes `(size, dim)` by a few iterations of Lloyd from random blocks; a code without blocks restarts at one."""
    if len(blocks) < size:
        raise ValueError(f"--fit must have at least {size} blocks, as many as codes, got {len(blocks)}. Add images.")
    generator = torch.Generator().manual_seed(0)
    mean, components = components_of(blocks, min(SEARCH_DIM, blocks.shape[1]))
    shortened = (blocks - mean) @ components
    codes = blocks[torch.randperm(len(blocks), generator=generator)[:size]]
    for _ in range(ITERATIONS):
        ids = find_nearest(shortened, (codes - mean) @ components, l2_norm=False)
        sums = torch.zeros_like(codes).index_add_(0, ids, blocks)
        counts = torch.bincount(ids, minlength=size).unsqueeze(-1)
        restarts = blocks[torch.randperm(len(blocks), generator=generator)[:size]]
        codes = torch.where(counts > 0, sums / counts.clamp(min=1), restarts)
    return codes


def fit_baselines(grids: Sequence[torch.Tensor], codes: int, components: int) -> dict[str, Decoder]:
    """Fits the baselines of blocks on the blocks of images, `(1, dim, h, w)` each."""
    blocks = torch.cat([vectors_of(grid) for grid in grids])  # (n, dim)
    kmeans = KMeans(fit_kmeans(blocks, codes))
    sample = grids[:: math.ceil(len(blocks) / REGRESSION_BLOCKS)]
    return {
        "k-means of blocks": kmeans,
        "k-means with a linear 3 x 3 decoder": LinearDecoder(kmeans, sample),
        f"{components} principal components, not quantised": Projection(*components_of(blocks, components)),
    }


def vectors_of(grid: torch.Tensor) -> torch.Tensor:
    """Blocks `(h * w, dim)` of an image `(1, dim, h, w)`."""
    return grid.flatten(2)[0].T


class KMeans:
    """Replaces each block by its nearest code.

    Args:
        codebook (`torch.Tensor` of shape `(codes, dim)`): Codes.
    """

    def __init__(self, codebook: torch.Tensor):
        self.codebook = codebook
        self.centre = codebook.mean(0)  # subtracted, because distances of small numbers are more exact

    def __call__(self, grid: torch.Tensor) -> torch.Tensor:
        """Coded blocks `(1, dim, h, w)`."""
        ids = find_nearest(vectors_of(grid) - self.centre, self.codebook - self.centre, l2_norm=False)
        return self.codebook[ids].T.view(grid.shape)


class LinearDecoder:
    """Adds to each coded block what a linear map predicts from it and from its eight neighbours.

    Args:
        kmeans ([`KMeans`]): Coder of the blocks.
        grids (`Sequence[torch.Tensor]`, each `(1, dim, h, w)`): Blocks to fit the map on, by ridge regression.
    """

    def __init__(self, kmeans: KMeans, grids: Sequence[torch.Tensor]):
        self.kmeans = kmeans
        dim = kmeans.codebook.shape[1]
        products = torch.zeros(9 * dim, 9 * dim, dtype=torch.float64)
        targets = torch.zeros(9 * dim, dim, dtype=torch.float64)
        for grid in grids:
            coded = kmeans(grid)
            inputs = F.unfold(self._inputs(coded), 3)[0]  # (9 * dim, h * w)
            products += inputs @ inputs.T
            targets += inputs @ vectors_of(grid - coded)
        products.diagonal().add_(RIDGE * products.diagonal().mean())
        self.weight = torch.linalg.solve(products, targets).T.float().reshape(dim, dim, 3, 3)

    def __call__(self, grid: torch.Tensor) -> torch.Tensor:
        """Decoded blocks `(1, dim, h, w)`."""
        coded = self.kmeans(grid)
        return coded + F.conv2d(self._inputs(coded), self.weight)

    def _inputs(self, coded: torch.Tensor) -> torch.Tensor:
        """Blocks with a border that repeats the outermost ones, `(1, dim, h + 2, w + 2)`."""
        return F.pad(coded - self.kmeans.centre[:, None, None], (1, 1, 1, 1), mode="replicate")


class Projection:
    """Keeps the leading principal components of each block.

    Args:
        mean (`torch.Tensor` of shape `(dim,)`): Mean of blocks.
        components (`torch.Tensor` of shape `(dim, count)`): Components as columns.
    """

    def __init__(self, mean: torch.Tensor, components: torch.Tensor):
        self.mean = mean
        self.components = components

    def __call__(self, grid: torch.Tensor) -> torch.Tensor:
        """Projected blocks `(1, dim, h, w)`."""
        centred = grid.movedim(1, -1) - self.mean  # (1, h, w, dim)
        projected = centred @ self.components @ self.components.T + self.mean
        return projected.movedim(-1, 1)


def save_within(image: Image.Image, codec: str, bits: float) -> bytes:
    """Content of the image file with the highest quality whose size is at most `bits`, or of the lowest quality."""
    low = 1 if codec == "JPEG" else 0
    high = BEST_QUALITY
    best = save_image(image, codec, low)
    while low < high:  # halves the range, because a higher quality makes a larger file
        quality = (low + high + 1) // 2
        content = save_image(image, codec, quality)
        if 8 * len(content) <= bits:
            low = quality
            best = content
        else:
            high = quality - 1
    return best


class Coded(NamedTuple):
    """Title of a baseline, the bits that it takes for an image (`None` if not quantised), and its reconstruction."""

    title: str
    bits: float | None
    reconstruction: Image.Image


def code(image: Image.Image, bits: float, baselines: Mapping[str, Decoder], f: int) -> Iterator[Coded]:
    """Codes an image by each baseline at these bits."""
    pixels = torch.from_numpy(np.array(image)).movedim(-1, 0)[None].float()  # (1, 3, height, width)
    padded = F.pad(pixels, (0, -image.width % f, 0, -image.height % f), mode="replicate")
    for title, decode in baselines.items():
        decoded = decode(F.pixel_unshuffle(padded, f))  # (1, 3 * f * f, h, w)
        output = F.pixel_shuffle(decoded, f)[0, :, : image.height, : image.width]  # (3, height, width)
        array = output.clamp(0, 255).round().byte().movedim(0, -1).numpy()
        bits_of_baseline = None if isinstance(decode, Projection) else bits
        yield Coded(title, bits_of_baseline, Image.fromarray(array))
    for codec in CODECS:
        content = save_within(image, codec, bits)
        yield Coded(codec, 8 * len(content), open_image(content))


def measure(path: Path, scale: float, baselines: Mapping[str, Decoder], options: argparse.Namespace) -> Iterator[Row]:
    """Measures all baselines on one image at one scale."""
    image = read_image(path)
    width = max(1, round(scale * image.width))
    height = max(1, round(scale * image.height))
    target = resize_image(image, (width, height))
    num_ids = math.ceil(width / options.side) * math.ceil(height / options.side)
    bits = num_ids * math.log2(options.codes)
    for coded in code(target, bits, baselines, options.side):
        row: dict[str, Any] = {"coded by": coded.title, "scale": scale, "bits per pixel": None}
        if coded.bits is not None:
            row["bits per pixel"] = coded.bits / (image.width * image.height)
        values = image_metrics(to_tensor(coded.reconstruction), to_tensor(target))
        for metric, column in COLUMNS.items():
            row[column] = values[metric]
        row["images of more bits"] = int(coded.bits is not None and coded.bits > bits)
        yield row


def mean_row(rows: Sequence[Row]) -> Row:
    """Means of the rows of one baseline at one scale."""
    means = dict(rows[0])
    for column in ("bits per pixel", *COLUMNS.values()):
        values = [row[column] for row in rows if row[column] is not None]
        means[column] = round(statistics.fmean(values), 4) if values else None
    means["images of more bits"] = sum(row["images of more bits"] for row in rows)
    return means


@torch.inference_mode()
def main() -> None:
    """Reads the arguments, fits the baselines, measures and reports."""
    parser = make_parser(__doc__, rounds=1)
    parser.add_argument("sets", nargs="+", metavar="SET", help="image file, folder or glob; each gets a table")
    parser.add_argument("--fit", nargs="+", required=True, metavar="IMAGES", help="images to fit the baselines on")
    parser.add_argument("--scales", nargs="+", type=float, default=[1.0, 0.5, 0.25], help="default: 1 0.5 0.25")
    parser.add_argument("--side", type=int, default=8, help="side of a block in pixels, f (default: %(default)s)")
    parser.add_argument("--codes", type=int, default=16_384, help="size of the codebook (default: %(default)s)")
    parser.add_argument("--components", type=int, default=8, help="dimension of a code (default: %(default)s)")
    options, machine = parse_options(parser, "cpu")
    fit_paths = [file.path for file in find_inputs(options.fit, IMAGE_SUFFIXES)]
    blocks_per_image = max(1, MAX_BLOCKS // len(fit_paths))
    grids = [read_blocks(path, options.side, blocks_per_image) for path in fit_paths]
    baselines = fit_baselines(grids, options.codes, options.components)
    tables = {}
    for name in options.sets:
        groups: dict[tuple[str, float], list[Row]] = {}
        paths = [file.path for file in find_inputs([name], IMAGE_SUFFIXES)]
        for scale in options.scales:
            for path in tqdm(paths, desc=f"{Path(name).name}, scale {scale:g}", disable=None):
                for row in measure(path, scale, baselines, options):
                    groups.setdefault((row["coded by"], scale), []).append(row)
        tables[f"{name}, {len(paths)} images"] = [mean_row(rows) for rows in groups.values()]
    report(options, machine, tables)


if __name__ == "__main__":
    main()

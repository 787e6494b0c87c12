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
    pixels = torch.from_numpy(np.array(read_image(path))).movedim(-1, 0)
    rows = min(pixels.shape[1] // f, math.isqrt(count))
    columns = min(pixels.shape[2] // f, count // max(1, rows))
    top, left = (pixels.shape[1] - rows * f) // 2, (pixels.shape[2] - columns * f) // 2
    return F.pixel_unshuffle(pixels[None, :, top : top + rows * f, left : left + columns * f].float(), f)


def components_of(blocks: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean `(dim,)` of blocks `(n, dim)`, and their leading principal components as columns `(dim, count)`."""
    vectors = blocks[:: math.ceil(len(blocks) / REGRESSION_BLOCKS)]
    components = torch.linalg.eigh((vectors - vectors.mean(0)).T.cov()).eigenvectors
    return vectors.mean(0), components.flip(-1)[:, :count]


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
    blocks = torch.cat([grid.flatten(2)[0].T for grid in grids])
    codebook, dim = fit_kmeans(blocks, codes), blocks.shape[1]
    centre = codebook.mean(0)[:, None, None]

    def kmeans(grid: torch.Tensor) -> torch.Tensor:
        ids = find_nearest(grid.flatten(2)[0].T - centre.flatten(), codebook - centre.flatten(), l2_norm=False)
        return codebook[ids].T.view(grid.shape)

    def neighbours(coded: torch.Tensor) -> torch.Tensor:
        return F.pad(coded - centre, (1, 1, 1, 1), mode="replicate")

    products, targets = (torch.zeros(9 * dim, n, dtype=torch.float64) for n in (9 * dim, dim))
    for grid in grids[:: math.ceil(len(blocks) / REGRESSION_BLOCKS)]:
        coded = kmeans(grid)
        inputs = F.unfold(neighbours(coded), 3)[0]  # (9 * dim, h * w)
        products += inputs @ inputs.T
        targets += inputs @ (grid - coded).flatten(2)[0].T
    products.diagonal().add_(RIDGE * products.diagonal().mean())
    weight = torch.linalg.solve(products, targets).T.float().reshape(dim, dim, 3, 3)

    def with_decoder(grid: torch.Tensor) -> torch.Tensor:
        coded = kmeans(grid)
        return coded + F.conv2d(neighbours(coded), weight)

    mean, leading = components_of(blocks, components)

    def project(grid: torch.Tensor) -> torch.Tensor:
        return ((grid.movedim(1, -1) - mean) @ leading @ leading.T + mean).movedim(-1, 1)

    title = f"{components} principal components, not quantised"
    return {"k-means of blocks": kmeans, "k-means with a linear 3 x 3 decoder": with_decoder, title: project}


def save_within(image: Image.Image, codec: str, bits: float) -> bytes:
    """Content of the image file with the highest quality whose size is at most `bits`, or of the lowest quality."""
    low, high = int(codec == "JPEG"), BEST_QUALITY
    best = save_image(image, codec, low)
    while low < high:  # halves the range, because a higher quality makes a larger file
        quality = (low + high + 1) // 2
        content = save_image(image, codec, quality)
        if 8 * len(content) <= bits:
            low, best = quality, content
        else:
            high = quality - 1
    return best


def code(
    image: Image.Image, bits: float, baselines: Mapping[str, Decoder], f: int
) -> Iterator[tuple[str, float | None, Image.Image]]:
    """Yields title, bits (`None` if not quantised) and reconstruction of an image by each baseline at these bits."""
    pixels = torch.from_numpy(np.array(image)).movedim(-1, 0)[None].float()
    padded = F.pad(pixels, (0, -image.width % f, 0, -image.height % f), mode="replicate")
    for title, decode in baselines.items():
        output = F.pixel_shuffle(decode(F.pixel_unshuffle(padded, f)), f)[0, :, : image.height, : image.width]
        array = output.clamp(0, 255).round().byte().movedim(0, -1).numpy()
        yield title, bits if title.startswith("k-means") else None, Image.fromarray(array)
    for codec in CODECS:
        content = save_within(image, codec, bits)
        yield codec, 8 * len(content), open_image(content)


def measure(path: Path, scale: float, baselines: Mapping[str, Decoder], options: argparse.Namespace) -> Iterator[Row]:
    """Measures all baselines on one image at one scale."""
    image = read_image(path)
    target = resize_image(image, (max(1, round(scale * image.width)), max(1, round(scale * image.height))))
    ids = math.ceil(target.width / options.side) * math.ceil(target.height / options.side)
    bits = ids * math.log2(options.codes)
    for title, taken, reconstruction in code(target, bits, baselines, options.side):
        values = image_metrics(to_tensor(reconstruction), to_tensor(target))
        rate = None if taken is None else taken / (image.width * image.height)
        row = {"coded by": title, "scale": scale, "bits per pixel": rate}
        row |= {column: values[key] for key, column in COLUMNS.items()}
        yield row | {"images of more bits": int(taken is not None and taken > bits)}


def mean_row(rows: Sequence[Row]) -> Row:
    """Means of the rows of one baseline at one scale."""
    row = dict(rows[0])
    for column in ("bits per pixel", *COLUMNS.values()):
        values = [each[column] for each in rows if each[column] is not None]
        row[column] = round(statistics.fmean(values), 4) if values else None
    return row | {"images of more bits": sum(each["images of more bits"] for each in rows)}


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
    paths = [file.path for file in find_inputs(options.fit, IMAGE_SUFFIXES)]
    grids = [read_blocks(path, options.side, max(1, MAX_BLOCKS // len(paths))) for path in paths]
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

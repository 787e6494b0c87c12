"""Quality of what a model should beat at the same bits: `python benchmarks/baselines.py SETS --fit IMAGES`.

k-means of blocks, the same codes with a linear decoder, principal components, JPEG, WebP and AVIF. There is a table
per set, with means over its images. At a scale, the image is resized and coded as an image of its own; bits are per
pixel of the image before.
"""

import math
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from block_baselines import KMeans, fit_block_baselines, principal_components, read_fit_images, take_blocks
from measuring import Row, describe_machine, make_parser, report
from PIL import Image
from tqdm import tqdm

from svqvae_cli.files import IMAGE_SUFFIXES, find_inputs
from svqvae_hf.data.image_rows import read_image
from svqvae_hf.evaluation.codecs import CODECS, open_image, save_image
from svqvae_hf.evaluation.measuring import image_metrics, to_tensor
from svqvae_hf.tokens.image_tokens import resize_image

COLUMNS = {"psnr": "PSNR, dB", "ssim": "SSIM"}
BEST_QUALITY = 95  # Pillow's advice for JPEG: higher ones grow without a gain


class PrincipalComponents:
    """Keeps the leading components of blocks of f x f pixels, not quantised: the best linear code of so many numbers.

    Args:
        blocks (`torch.Tensor` of shape `(n, 3 * f * f)`): Blocks to fit it on.
        count (`int`): Number of components.
    """

    def __init__(self, blocks: torch.Tensor, count: int):
        self.title = f"{count} principal components, not quantised"
        self.mean, self.components = principal_components(blocks, count)
        self.f = math.isqrt(len(self.mean) // 3)

    def reconstruct(self, sample: torch.Tensor) -> torch.Tensor:
        """Projects the blocks of images on the components, as [`KMeans.reconstruct`] replaces them."""
        height, width = sample.shape[-2:]
        padded = F.pad(sample.float(), (0, -width % self.f, 0, -height % self.f), mode="replicate")
        blocks = F.pixel_unshuffle(padded, self.f).movedim(1, -1)
        decoded = (blocks - self.mean) @ self.components @ self.components.T + self.mean
        return F.pixel_shuffle(decoded.movedim(-1, 1), self.f)[..., :height, :width]


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


def reconstruct_by_baselines(
    image: Image.Image, bits: float, baselines: Sequence[KMeans | PrincipalComponents], device: torch.device
) -> Iterator[tuple[str, float | None, Image.Image]]:
    """Yields title, bits (`None` if not quantised) and reconstruction of an image by each baseline at these bits."""
    sample = to_tensor(image, device)
    for baseline in baselines:
        pixels = baseline.reconstruct(sample)[0].clamp(0, 255).round().byte()
        taken = bits if isinstance(baseline, KMeans) else None
        yield baseline.title, taken, Image.fromarray(pixels.movedim(0, -1).cpu().numpy())
    for codec in CODECS:
        content = save_within(image, codec, bits)
        yield codec, 8 * len(content), open_image(content)


def measure(
    path: Path,
    scale: float,
    side: int,
    codes: int,
    baselines: Sequence[KMeans | PrincipalComponents],
    device: torch.device,
) -> list[Row]:
    """Measures all baselines on one image at one scale."""
    image = read_image(path)
    pixels = image.width * image.height
    target = resize_image(image, (max(1, round(scale * image.width)), max(1, round(scale * image.height))))
    bits = math.ceil(target.width / side) * math.ceil(target.height / side) * math.log2(codes)
    rows = []
    for title, taken, reconstruction in reconstruct_by_baselines(target, bits, baselines, device):
        values = image_metrics(to_tensor(reconstruction, device), to_tensor(target, device))
        row: dict[str, object] = {"coded by": title, "scale": scale}
        row["bits per pixel"] = None if taken is None else taken / pixels
        row |= {column: values[key] for key, column in COLUMNS.items()}
        rows.append(row | {"images of more bits": int(taken is not None and taken > bits)})
    return rows


def mean_row(rows: Sequence[Row]) -> Row:
    """Means of the rows of one baseline at one scale, in whose text and scale they agree."""
    columns = ("bits per pixel", *COLUMNS.values())
    values = {column: [row[column] for row in rows if row[column] is not None] for column in columns}
    means = {column: round(statistics.fmean(each), 4) if each else None for column, each in values.items()}
    more = sum(row["images of more bits"] for row in rows)
    return {"coded by": rows[0]["coded by"], "scale": rows[0]["scale"], **means, "images of more bits": more}


def main() -> None:
    """Reads the arguments, fits the baselines, measures and reports."""
    parser = make_parser(__doc__, rounds=1)
    parser.add_argument("sets", nargs="+", metavar="SET", help="image file, folder or glob; each gets a table")
    parser.add_argument("--fit", nargs="+", required=True, metavar="IMAGES", help="images to fit the baselines on")
    parser.add_argument("--scales", nargs="+", type=float, default=[1.0, 0.5, 0.25], help="default: 1 0.5 0.25")
    parser.add_argument("--side", type=int, default=8, help="side of a block in pixels, f (default: %(default)s)")
    parser.add_argument("--codes", type=int, default=16_384, help="size of the codebook (default: %(default)s)")
    parser.add_argument("--components", type=int, default=8, help="dimension of a code (default: %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    machine = describe_machine(options.device, options.threads)
    device = torch.device(options.device)
    begun = time.perf_counter()
    images = read_fit_images([file.path for file in find_inputs(options.fit, IMAGE_SUFFIXES)], options.side, device)
    components = PrincipalComponents(take_blocks(images, options.side), options.components)
    baselines = [*fit_block_baselines(images, options.side, options.codes), components]
    blocks = sum(image[0].numel() for image in images) // options.side**2
    fit = {"images": len(images), "blocks": blocks, "codes": options.codes, "seconds": time.perf_counter() - begun}
    tables = {"Fit": [fit]}
    for name in options.sets:
        groups: dict[tuple[str, float], list[Row]] = {}
        paths = [file.path for file in find_inputs([name], IMAGE_SUFFIXES)]
        for scale in options.scales:
            for path in tqdm(paths, desc=f"{Path(name).name}, scale {scale:g}", disable=None):
                for row in measure(path, scale, options.side, options.codes, baselines, device):
                    groups.setdefault((row["coded by"], scale), []).append(row)
        tables[f"{Path(name).name}, {len(paths)} images"] = [mean_row(rows) for rows in groups.values()]
    report(options, machine, tables)


if __name__ == "__main__":
    main()

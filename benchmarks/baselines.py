"""Quality of what a model should beat at the same bits: `python benchmarks/baselines.py SETS --fit IMAGES`.

k-means of blocks, the same codes with a linear decoder, principal components, JPEG, WebP and AVIF, as `svqvae
evaluate` measures them beside a model. There is a table per set, with means over its images. At a scale, the image is
resized and coded as an image of its own; bits are per pixel of the image before.
"""

import math
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from measuring import Row, describe_machine, make_parser, report
from tqdm import tqdm

from svqvae_cli.files import IMAGE_SUFFIXES, find_inputs
from svqvae_hf.data.image_rows import read_image
from svqvae_hf.evaluation.baselines.blocks import BlockBaseline, fit_block_baselines, read_fit_images
from svqvae_hf.evaluation.baselines.codecs import CODECS
from svqvae_hf.evaluation.comparison import image_metrics, reconstruct_by_baselines, to_tensor
from svqvae_hf.tokens.image_tokens import resize_image

COLUMNS = {"psnr": "PSNR, dB", "ssim": "SSIM", "ms_ssim": "MS-SSIM"}


def measure(
    path: Path, scale: float, side: int, codes: int, baselines: Sequence[BlockBaseline], device: torch.device
) -> list[Row]:
    """Measures all baselines on one image at one scale."""
    image = read_image(path)
    pixels = image.width * image.height
    target = resize_image(image, (max(1, round(scale * image.width)), max(1, round(scale * image.height))))
    bits = math.ceil(target.width / side) * math.ceil(target.height / side) * math.log2(codes)
    rows = []
    for title, taken, reconstruction in reconstruct_by_baselines(target, bits, baselines, tuple(CODECS), device):
        values = image_metrics(to_tensor(reconstruction, device), to_tensor(target, device), None)
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
    baselines = fit_block_baselines(images, options.side, options.codes, options.components)
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

"""How easily a generator learns the ids of a tokenizer: `python benchmarks/learnable.py TOKENIZER IMAGES`.

TOKENIZER is anything with ids that `svqvae evaluate` loads, and IMAGES any image set. Every tenth image is held out. A
causal transformer, of one size for all tokenizers, learns the ids of random crops in raster order, each crop once.
The table has the bits that it then needs for the ids of held-out crops. It has a row for each seed of weights and
batches. PSNR is the mean of the held-out crops. The place of an id is plain if the standard deviation of the grey
levels there is below `PLAIN`.
"""

import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from measuring import Row, make_parser, parse_options, report
from torch import nn

from svqvae_hf.data.image_rows import ImageRow, read_image
from svqvae_hf.data.image_sets import open_images
from svqvae_hf.evaluation.measuring import to_image, to_tensor
from svqvae_hf.evaluation.metrics import psnr
from svqvae_hf.evaluation.tokenizers.auto import load_tokenizers
from svqvae_hf.evaluation.tokenizers.protocol import Tokenizer, count

HELD_OUT_EVERY = 10  # images
BATCH = 16
LAYERS = 4
WIDTH = 128
HEADS = 4
LEARNING_RATE = 1e-3  # constant after the warm-up, so that each printed step is comparable
WARM_UP = 20  # steps
PLAIN = 8.0  # levels of 255


class Learner(nn.Module):
    """Causal transformer whose inputs are the ids to the left and above.

    Args:
        codebook_size (`int`): Number of different ids.
        rows (`int`): Rows of a grid of ids.
        columns (`int`): Columns of a grid of ids.
    """

    def __init__(self, codebook_size: int, rows: int, columns: int):
        super().__init__()
        self.left = nn.Embedding(codebook_size + 1, WIDTH)  # the last one stands for the outside
        self.above = nn.Embedding(codebook_size + 1, WIDTH)
        self.row = nn.Parameter(0.02 * torch.randn(rows, WIDTH))
        self.column = nn.Parameter(0.02 * torch.randn(columns, WIDTH))
        layer = nn.TransformerEncoderLayer(
            WIDTH, HEADS, 4 * WIDTH, dropout=0, activation="gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, LAYERS, nn.LayerNorm(WIDTH), enable_nested_tensor=False)
        self.logits = nn.Linear(WIDTH, codebook_size)
        for embedding in (self.left, self.above):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Bits of each id, for ids `(batch, rows, columns)`."""
        outside = self.left.num_embeddings - 1
        left = F.pad(ids, (1, 0), value=outside)[..., :-1]  # (batch, rows, columns)
        above = F.pad(ids, (0, 0, 1, 0), value=outside)[:, :-1]
        inputs = self.left(left) + self.above(above) + self.row[:, None] + self.column  # (batch, rows, columns, WIDTH)
        mask = nn.Transformer.generate_square_subsequent_mask(ids[0].numel(), device=ids.device)
        hidden = self.layers(inputs.flatten(1, 2), mask, is_causal=True)  # (batch, rows * columns, WIDTH)
        logits = self.logits(hidden).flatten(0, 1).float()  # (batch * rows * columns, codebook_size)
        nats = F.cross_entropy(logits, ids.flatten(), reduction="none")
        return nats.view(ids.shape) / math.log(2)


def draw_crops(rows: Sequence[ImageRow], side: int, number: int) -> Iterator[torch.Tensor]:
    """Yields crops `(1, 3, side, side)` of images in turn, at random places, in levels of 255."""
    random = np.random.default_rng(0)
    for index in range(number):
        image = read_image(rows[index % len(rows)])
        if min(image.size) < side:
            raise ValueError(f"images must have sides of at least {side} pixels, but one has {image.size}.")
        x = int(random.integers(image.width - side + 1))
        y = int(random.integers(image.height - side + 1))
        yield to_tensor(image.crop((x, y, x + side, y + side)))


def encode(tokenizer: Tokenizer, crop: torch.Tensor) -> tuple[Any, torch.Tensor]:
    """Codes of a crop, and their ids `(rows, columns)` on the CPU, which trains the transformer."""
    codes = tokenizer.encode(crop / 127.5 - 1)
    ids = count(codes, tokenizer.codebook_size).ids
    if ids is None:
        raise ValueError(f"TOKENIZER must encode images as ids, but {tokenizer.title} does not.")
    return codes, ids.cpu().view(-1, ids.shape[-1])


def is_plain(crop: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Which places `(rows, columns)` of a crop are plain."""
    grey = crop[0].float().mean(0)  # (height, width)
    blocks = grey.unflatten(0, (rows, -1)).unflatten(2, (columns, -1))  # (rows, f, columns, f)
    return blocks.std((1, 3)) < PLAIN


def learn(
    ids: torch.Tensor, held_out: torch.Tensor, codebook_size: int, steps: Sequence[int], seed: int
) -> list[torch.Tensor]:
    """Trains a learner on ids, and returns the bits of each held-out id after each of some steps."""
    torch.manual_seed(seed)
    _, rows, columns = ids.shape
    learner = Learner(codebook_size, rows, columns)
    bits_after_steps = []
    optimizer = torch.optim.AdamW(learner.parameters(), LEARNING_RATE, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / WARM_UP))
    for step, batch in enumerate(ids[torch.randperm(len(ids))].split(BATCH), start=1):
        loss = learner(batch).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(learner.parameters(), 1)
        optimizer.step()
        schedule.step()
        if step in steps:
            with torch.no_grad():
                bits = [learner(held_out_batch) for held_out_batch in held_out.split(BATCH)]
            bits_after_steps.append(torch.cat(bits))
    return bits_after_steps


@dataclass
class HeldOut:
    """Held-out crops.

    Args:
        ids (`torch.Tensor` of shape `(crops, rows, columns)`): Their ids.
        is_plain (`torch.Tensor` of shape `(crops, rows, columns)`): Which places are plain.
        psnr (`float`): Mean PSNR in dB of the crops that the ids decode to.
    """

    ids: torch.Tensor
    is_plain: torch.Tensor
    psnr: float


@torch.inference_mode()
def read_held_out(tokenizer: Tokenizer, images: Sequence[ImageRow], options: argparse.Namespace) -> HeldOut:
    """Encodes and decodes the held-out crops."""
    ids = []
    plain_places = []
    decibels = []
    for crop in draw_crops(images, options.side, options.held_out):
        codes, grid = encode(tokenizer, crop.to(options.device))
        rows, columns = grid.shape
        decoded = to_tensor(to_image(tokenizer.decode(codes)))
        ids.append(grid)
        plain_places.append(is_plain(crop, rows, columns))
        decibels.append(psnr(decoded, crop).item())
    return HeldOut(torch.stack(ids), torch.stack(plain_places), float(np.mean(decibels)))


@torch.inference_mode()
def read_ids(tokenizer: Tokenizer, images: Sequence[ImageRow], options: argparse.Namespace) -> torch.Tensor:
    """Ids `(crops, rows, columns)` to learn from."""
    grids = []
    for crop in draw_crops(images, options.side, BATCH * max(options.steps)):
        _, grid = encode(tokenizer, crop.to(options.device))
        grids.append(grid)
    return torch.stack(grids)


def bits_row(bits_after_steps: Sequence[torch.Tensor], held_out: HeldOut, steps: Sequence[int]) -> dict[str, float]:
    """Figures of one learner."""
    row = {}
    for step, bits in zip(steps, bits_after_steps, strict=True):
        row[f"bits per id, step {step}"] = bits.mean().item()
    final = bits_after_steps[-1]
    row["plain places"] = final[held_out.is_plain].mean().item()
    row["busy places"] = final[~held_out.is_plain].mean().item()
    row["bits per crop"] = final.sum((1, 2)).mean().item()
    return row


def summary_row(title: str, summarise: Callable[[list[float]], Any], rows: Sequence[dict[str, float]]) -> Row:
    """Summary of the figures of all learners."""
    summary: dict[str, Any] = {"seed": title}
    for figure in rows[0]:
        summary[figure] = float(summarise([row[figure] for row in rows]))
    return summary


def main() -> None:
    """Reads the arguments, encodes crops, trains the learners and reports."""
    parser = make_parser(__doc__, rounds=1)
    parser.add_argument("tokenizer", help="folder or Hub id")
    parser.add_argument("images", help="image set")
    parser.add_argument("--side", type=int, default=128, help="side of a crop in pixels (default: %(default)s)")
    parser.add_argument("--steps", type=int, nargs="+", default=[100, 200, 300], help="default: 100 200 300")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="default: 0 1")
    parser.add_argument("--held-out", type=int, default=256, help="held-out crops (default: %(default)s)")
    options, machine = parse_options(parser)
    options.steps.sort()
    (tokenizer,) = load_tokenizers(options.tokenizer, options.device)
    images = list(open_images([options.images]))
    images_to_learn = [image for index, image in enumerate(images) if index % HELD_OUT_EVERY]
    held_out_images = images[::HELD_OUT_EVERY]
    ids = read_ids(tokenizer, images_to_learn, options)
    held_out = read_held_out(tokenizer, held_out_images, options)
    figures = []
    rows: list[Row] = []
    for seed in options.seeds:
        # Copies, because tensors of inference mode have no gradients.
        bits = learn(ids.clone(), held_out.ids.clone(), tokenizer.codebook_size, options.steps, seed)
        figures_of_seed = bits_row(bits, held_out, options.steps)
        figures.append(figures_of_seed)
        rows.append({"seed": str(seed), **figures_of_seed})
    rows.append(summary_row("mean", np.mean, figures))
    rows.append(summary_row("spread", np.ptp, figures))
    crops_row = {
        "PSNR, dB": held_out.psnr,
        "ids per crop": ids[0].numel(),
        "plain places": held_out.is_plain.float().mean().item(),
    }
    report(options, machine, {"Crops": [crops_row], "Bits": rows})


if __name__ == "__main__":
    main()

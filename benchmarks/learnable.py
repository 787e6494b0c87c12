"""How easily a generator learns the ids of a tokenizer: `python benchmarks/learnable.py TOKENIZER IMAGES`.

TOKENIZER is anything with ids that `svqvae evaluate` loads, and IMAGES any image set. Every tenth image is held out. A
causal transformer, of one size for all tokenizers, learns the ids of random crops in raster order, each crop once.
The table has the bits that it then needs for the ids of held-out crops. It has a row for each seed of weights and
batches. PSNR is the mean of the held-out crops. The place of an id is plain if the standard deviation of the grey
levels there is below `PLAIN`.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from measuring import make_parser, parse_options, report
from torch import nn

from svqvae_hf.data.image_rows import ImageRow, read_image
from svqvae_hf.data.image_sets import open_images
from svqvae_hf.evaluation.measuring import to_image, to_tensor
from svqvae_hf.evaluation.metrics import psnr
from svqvae_hf.evaluation.tokenizers.auto import load_tokenizers
from svqvae_hf.evaluation.tokenizers.protocol import Tokenizer, count

HELD_OUT_EVERY = 10  # images
BATCH, LAYERS, WIDTH, HEADS = 16, 4, 128, 4
LEARNING_RATE, WARM_UP = 1e-3, 20  # a constant rate after the warm-up, so that each printed step is comparable
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
        self.left, self.above = (nn.Embedding(codebook_size + 1, WIDTH) for _ in range(2))  # the last is the outside
        self.row, self.column = (nn.Parameter(0.02 * torch.randn(n, WIDTH)) for n in (rows, columns))
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
        left = F.pad(ids, (1, 0), value=outside)[..., :-1]
        above = F.pad(ids, (0, 0, 1, 0), value=outside)[:, :-1]
        hidden = self.left(left) + self.above(above) + self.row[:, None] + self.column
        mask = nn.Transformer.generate_square_subsequent_mask(ids[0].numel(), device=ids.device)
        hidden = self.layers(hidden.flatten(1, 2), mask, is_causal=True)
        nats = F.cross_entropy(self.logits(hidden).flatten(0, 1).float(), ids.flatten(), reduction="none")
        return nats.view(ids.shape) / math.log(2)


def draw_crops(rows: Sequence[ImageRow], side: int, number: int) -> Iterator[torch.Tensor]:
    """Yields crops `(1, 3, side, side)` of images in turn, at random places, in levels of 255."""
    random = np.random.default_rng(0)
    for index in range(number):
        image = read_image(rows[index % len(rows)])
        if min(image.size) < side:
            raise ValueError(f"images must have sides of at least {side} pixels, but one has {image.size}.")
        x, y = (int(random.integers(length - side + 1)) for length in image.size)
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
    blocks = crop[0].float().mean(0).unflatten(0, (rows, -1)).unflatten(2, (columns, -1))
    return blocks.std((1, 3)) < PLAIN  # of (rows, height, columns, width)


def learn(
    ids: torch.Tensor, held_out: torch.Tensor, codebook_size: int, steps: Sequence[int], seed: int
) -> list[torch.Tensor]:
    """Trains a learner on ids, and returns the bits of each held-out id after each of some steps."""
    torch.manual_seed(seed)
    learner, measured = Learner(codebook_size, *ids.shape[1:]), []
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
                measured.append(torch.cat([learner(each) for each in held_out.split(BATCH)]))
    return measured


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
    learned_from = [image for index, image in enumerate(images) if index % HELD_OUT_EVERY]
    grids, plain, decibels = [], [], []
    with torch.inference_mode():
        crops = draw_crops(learned_from, options.side, BATCH * max(options.steps))
        ids = torch.stack([encode(tokenizer, crop.to(options.device))[1] for crop in crops])
        for crop in draw_crops(images[::HELD_OUT_EVERY], options.side, options.held_out):
            codes, grid = encode(tokenizer, crop.to(options.device))
            grids.append(grid)
            plain.append(is_plain(crop, *grid.shape))
            decibels.append(psnr(to_tensor(to_image(tokenizer.decode(codes))), crop).item())
    held_out, is_place_plain = torch.stack(grids), torch.stack(plain)
    table = []
    for seed in options.seeds:
        bits = learn(ids.clone(), held_out.clone(), tokenizer.codebook_size, options.steps, seed)
        figures = {f"bits per id, step {step}": each.mean() for step, each in zip(options.steps, bits, strict=True)}
        figures |= {"plain places": bits[-1][is_place_plain].mean(), "busy places": bits[-1][~is_place_plain].mean()}
        figures["bits per crop"] = bits[-1].sum((1, 2)).mean()
        table.append({name: value.item() for name, value in figures.items()})
    rows = [{"seed": str(seed), **figures} for seed, figures in zip(options.seeds, table, strict=True)]
    for name, summarise in (("mean", np.mean), ("spread", np.ptp)):
        rows.append({"seed": name} | {key: float(summarise([each[key] for each in table])) for key in table[0]})
    share = is_place_plain.float().mean().item()
    crops_row = {"PSNR, dB": float(np.mean(decibels)), "ids per crop": ids[0].numel(), "plain places": share}
    report(options, machine, {"Crops": [crops_row], "Bits": rows})


if __name__ == "__main__":
    main()

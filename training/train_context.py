"""Trains the context model of an SVQVAE, which compresses its ids, and saves it in the folder of the model.

    python training/train_context.py MODEL TOKEN_SET... --held_out TOKEN_SET...

A model keeps its context model, because files that were compressed by one cannot be read by another: `--overwrite`
replaces it.

The integers of the context model are rounded from floats in each forward pass, and gradients pass straight through.
The network stands here a second time, because the one that reads files has integers and no gradients, in NumPy. Both
share their constants, and a test holds them equal.
"""

import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from svqvae_hf import SVQVAE
from svqvae_hf.token_sets.manifest import TokenSet
from svqvae_hf.token_sets.settings import read_settings, row_tokens
from svqvae_hf.tokens.context_model import (
    COARSE,
    FILE,
    LIMIT,
    LOGIT_SHIFT,
    MARGIN,
    NEIGHBOURS,
    NEVER,
    SHIFTS,
    STEPS_PER_NAT,
    ContextModel,
    code_inputs,
    context,
    pad_ids,
)
from svqvae_hf.trainer.scripts import one_line_errors, script_parser

NAT = STEPS_PER_NAT << LOGIT_SHIFT  # one nat in integer logits
# One, in integers
WEIGHTS = {"weight_1": 256, "weight_2": 256, "weight_member": 256, "weight_group": 64, "weight_code": 64}
BIASES = {"bias_1": 256 * 64, "bias_2": 256 * 64, "bias_member": 256 * 64, "bias_group": NAT, "bias_code": NAT}
SMOOTHING = 0.3  # occurrences of an id that never occurs
GRIDS, IDS_PER_GRID = 64, 24  # of a batch
FINEST_SHARE, COARSE_SHARE = 0.7, 0.35  # of grids at the finest scale, and of grids with a coarser one
WARM_UP = 100  # steps

Pyramid = list[np.ndarray]  # padded ids of an image, from the coarsest scale to the finest


class ContextNetwork(nn.Module):
    """Network of a [`ContextModel`] with weights in floats.

    Args:
        codes (`torch.Tensor` of shape `(codes, dim)`): Codebook, at unit length.
        counts (`torch.Tensor` of shape `(codes,)`): Occurrences of each id, for the initial frequencies.
        hidden (`int`): Width of both hidden layers.
        features (`int`): Width of the layer before the members of a group.
    """

    order: torch.Tensor
    rank: torch.Tensor
    codes: torch.Tensor

    def __init__(self, codes: torch.Tensor, counts: torch.Tensor, hidden: int, features: int):
        super().__init__()
        groups = 2 ** round(math.log2(len(codes)) / 2)
        self.members = -(-len(codes) // groups)
        groups = -(-len(codes) // self.members)
        order = torch.from_numpy(order_codes(codes.numpy(), self.members))
        self.register_buffer("codes", (codes * LIMIT).round())
        self.register_buffer("order", order)
        self.register_buffer("rank", order.argsort())
        inputs = (len(NEIGHBOURS) + len(COARSE)) * (codes.shape[1] + 1) + 2
        for name, size in {
            "weight_1": (inputs, hidden),
            "weight_2": (hidden, hidden),
            "weight_group": (hidden, groups),
            "weight_member": (hidden, features),
        }.items():
            setattr(self, name, nn.Parameter(torch.randn(size) * math.sqrt(2 / size[0])))
        self.weight_code = nn.Parameter(0.25 * codes[order] @ torch.randn(codes.shape[1], features))
        frequencies = F.pad(counts[order] + SMOOTHING, (0, groups * self.members - len(codes))).view(groups, -1)
        self.bias_1, self.bias_2 = (nn.Parameter(torch.zeros(hidden)) for _ in range(2))
        self.bias_member = nn.Parameter(0.1 * torch.randn(groups, features))
        self.bias_group = nn.Parameter((frequencies.sum(1) / frequencies.sum()).log())
        self.bias_code = nn.Parameter((frequencies / frequencies.sum(1, keepdim=True)).flatten()[: len(codes)].log())

    def forward(self, inputs: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Bits of ids `(n,)` given their inputs `(n, inputs)`, which [`context`] makes."""
        group, member = self.rank[ids] // self.members, self.rank[ids] % self.members
        group_logits, member_logits = self.logits(inputs, group)
        nats = F.cross_entropy(group_logits / NAT, group, reduction="none")
        nats = nats + F.cross_entropy(member_logits / NAT, member, reduction="none")
        return nats / math.log(2)

    def logits(self, inputs: torch.Tensor, group: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Integer logits of the groups, and of the members of the group of each id."""
        hidden = self.activate(inputs @ self.weight("weight_1") + self.bias("bias_1"), "1")
        hidden = self.activate(hidden @ self.weight("weight_2") + self.bias("bias_2"), "2")
        group_logits = hidden @ self.weight("weight_group") + self.bias("bias_group")
        features = self.activate(hidden @ self.weight("weight_member") + self.bias("bias_member")[group], "member")
        groups = len(self.bias_member)
        missing = groups * self.members - len(self.rank)
        table = F.pad(self.weight("weight_code"), (0, 0, 0, missing)).unflatten(0, (groups, self.members))
        bias = F.pad(self.bias("bias_code"), (0, missing), value=NEVER).unflatten(0, (groups, self.members))
        # Ids of a group are multiplied by its part of the table together, which is much faster than a table per id.
        slot = F.one_hot(group, groups).cumsum(0).gather(1, group[:, None])[:, 0] - 1  # number within the group
        sorted_features = features.new_zeros(groups, int(slot.max()) + 1, features.shape[1])
        sorted_features = sorted_features.index_put((group, slot), features)
        member_logits = sorted_features @ table.transpose(1, 2) + bias[:, None]
        return group_logits, member_logits[group, slot]

    def weight(self, name: str) -> torch.Tensor:
        """Weights of a layer as integers of at most `LIMIT`."""
        return straight_through((getattr(self, name) * WEIGHTS[name]).clamp(-LIMIT, LIMIT), torch.round)

    def bias(self, name: str) -> torch.Tensor:
        """Bias of a layer as integers."""
        return straight_through(getattr(self, name) * BIASES[name], torch.round)

    def activate(self, summed: torch.Tensor, layer: str) -> torch.Tensor:
        """Drops bits of the sums of a layer and limits them, as the function of the same name in numpy."""
        dropped = straight_through(summed / 2 ** SHIFTS[layer], torch.floor)
        return dropped.clamp(-LIMIT if layer == "member" else 0, LIMIT)

    @torch.no_grad()
    def to_integers(self, codebook_fingerprint: str) -> ContextModel:
        """Returns the context model in integers."""
        tensors = {"codes": self.codes.to(torch.int8), "order": self.order.to(torch.int32)}
        tensors |= {name: self.weight(name).to(torch.int8) for name in WEIGHTS}
        tensors |= {name: self.bias(name).to(torch.int32) for name in BIASES}
        return ContextModel({name: tensor.numpy() for name, tensor in tensors.items()}, codebook_fingerprint)


def straight_through(values: torch.Tensor, rounding: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Rounds values; the gradient passes straight through."""
    return values + (rounding(values) - values).detach()


def order_codes(codes: np.ndarray, members: int) -> np.ndarray:
    """Orders codes so that each run of `members` holds similar ones, by halving along principal components."""

    def halve(chosen: np.ndarray) -> list[np.ndarray]:
        runs = -(-len(chosen) // members)
        if runs <= 1:
            return [chosen]
        centred = codes[chosen] - codes[chosen].mean(0)
        direction = np.linalg.eigh(centred.T @ centred)[1][:, -1]
        chosen = chosen[np.argsort(centred @ direction, kind="stable")]
        middle = runs // 2 * members
        return halve(chosen[:middle]) + halve(chosen[middle:])

    return np.concatenate(halve(np.arange(len(codes))))


def read_pyramids(token_set: str, model: SVQVAE) -> list[Pyramid]:
    """Reads the ids of all images of a token set."""
    settings = read_settings(token_set)
    if settings.codebook_fingerprint != model.codebook_fingerprint():
        raise ValueError(f"`{token_set}` must hold ids of MODEL, but has others. Make it with `svqvae tokenize`.")
    pyramids = []
    for row in TokenSet(token_set).rows():
        grids = sorted((ids.numpy() for ids in row_tokens(row, settings).ids), key=np.size)
        pyramids.append([pad_ids(ids, settings.codebook_size) for ids in grids])
    return pyramids


def unpad(padded: np.ndarray) -> np.ndarray:
    """Ids without the margin of [`pad_ids`]."""
    return padded[MARGIN:-MARGIN, MARGIN:-MARGIN]


def draw_batches(pyramids: list[Pyramid], codes: np.ndarray, seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yields inputs and ids of random places."""
    random, inputs = np.random.default_rng(seed), code_inputs(codes)
    while True:
        batch, targets = [], []
        for number in random.integers(len(pyramids), size=GRIDS):
            pyramid = pyramids[number]
            level = len(pyramid) - 1 if random.random() < FINEST_SHARE else random.integers(len(pyramid))
            coarse = pyramid[level - 1] if level and random.random() < COARSE_SHARE else None
            ids = unpad(pyramid[level])
            rows, columns = (random.integers(side, size=IDS_PER_GRID) for side in ids.shape)
            batch.append(context(inputs, pyramid[level], coarse, rows, columns))
            targets.append(ids[rows, columns])
        yield torch.from_numpy(np.concatenate(batch)), torch.from_numpy(np.concatenate(targets))


def bits_per_id(context_model: ContextModel, pyramids: list[Pyramid]) -> str:
    """Bits per id of the finest scale alone, and of each scale given the coarser one."""
    stored = [[unpad(each) for each in pyramid] for pyramid in pyramids]
    chunks: dict[str, list[tuple[np.ndarray, np.ndarray | None]]]
    chunks = {"finest alone": [(grids[-1], None) for grids in stored]}
    for level in range(len(stored[0])):
        chunks[f"scale {level}"] = [(grids[level], grids[level - 1] if level else None) for grids in stored]
    rates = {
        name: 8 * sum(len(context_model.compress(*each)) for each in pairs) / sum(ids.size for ids, _ in pairs)
        for name, pairs in chunks.items()
    }
    return ", ".join(f"{name} {rate:.3f}" for name, rate in rates.items())


def check_no_context_model(model: str) -> None:
    """Raises if a model has a context model, without which the files that it compressed cannot be read.

    Raises:
        ValueError: The folder has one, even a damaged one or one of another codebook.
    """
    path = Path(model, FILE)
    if path.exists():
        raise ValueError(
            f"MODEL must not have a context model, but `{path}` exists. Files that were compressed by it cannot be "
            "read without it. Keep a copy and pass `--overwrite` to replace it."
        )


def main() -> None:
    """Reads the arguments, trains and saves the context model."""
    parser = script_parser(__doc__)
    parser.add_argument("model", help="model folder")
    parser.add_argument("token_sets", nargs="+", help="token sets of the model, with some scales")
    parser.add_argument("--held_out", nargs="+", default=[], help="token sets whose bits per id are printed")
    parser.add_argument("--max_steps", type=int, default=8000)
    parser.add_argument("--learning_rate", type=float, default=3e-3)
    parser.add_argument("--hidden", type=int, default=256, help="width of the hidden layers")
    parser.add_argument("--features", type=int, default=64, help="width of the layer before the members of a group")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--overwrite", action="store_true", help="replace the context model that MODEL has")
    options = parser.parse_args()
    if not Path(options.model).is_dir():
        raise ValueError(f"MODEL must be a folder, which the context model is saved in, got `{options.model}`.")
    if min(options.max_steps, options.hidden, options.features) < 1:
        raise ValueError("`--max_steps`, `--hidden` and `--features` must be at least 1.")
    if not options.overwrite:
        check_no_context_model(options.model)
    model = SVQVAE.from_pretrained(options.model)
    fingerprint = model.codebook_fingerprint()
    pyramids = [pyramid for name in options.token_sets for pyramid in read_pyramids(name, model)]
    held_out = {name: read_pyramids(name, model) for name in options.held_out}

    torch.manual_seed(options.seed)
    codes = model.quantize.embedding.table().detach().float()
    codes = F.normalize(codes, dim=1) if model.config["codebook_l2_norm"] else codes / codes.abs().max()
    finest = np.concatenate([unpad(pyramid[-1]).ravel() for pyramid in pyramids])
    counts = torch.from_numpy(np.bincount(finest, minlength=len(codes))).float()
    network = ContextNetwork(codes, counts, options.hidden, options.features)
    optimizer = torch.optim.AdamW(network.parameters(), options.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / WARM_UP) * (1 + math.cos(math.pi * step / options.max_steps)) / 2
    )
    batches = draw_batches(pyramids, network.codes.numpy(), options.seed)
    start, mean = time.monotonic(), 0.0
    for step in range(1, options.max_steps + 1):
        loss = network(*next(batches)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        mean += loss.item()
        if step % 500 == 0:
            print(f"step {step}: {mean / 500:.3f} bits per id, {time.monotonic() - start:.0f} s", flush=True)
            mean = 0.0
    context_model = network.to_integers(fingerprint)
    if not options.overwrite:
        check_no_context_model(options.model)  # that another run has saved meanwhile
    context_model.save_pretrained(options.model)
    for name, held in held_out.items():
        print(f"{name}: {bits_per_id(context_model, held)}")


if __name__ == "__main__":
    with one_line_errors():
        main()

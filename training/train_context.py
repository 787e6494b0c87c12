"""Trains the context model of an SVQVAE, which compresses its ids, and saves it in the folder of the model.

    python training/train_context.py MODEL TOKEN_SET... --held_out TOKEN_SET...

A model keeps its context model, because files that were compressed by one cannot be read by another: `--overwrite`
replaces it.

The integers of the context model are rounded from floats in each forward pass, and gradients pass straight through.
The network stands here a second time, because the one that reads files has integers and no gradients, in NumPy. Both
share their constants, and a test holds them equal.
"""

import argparse
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from svqvae_hf import SVQVAE
from svqvae_hf.token_sets.manifest import TokenSet
from svqvae_hf.token_sets.settings import read_settings, row_tokens
from svqvae_hf.tokens.context_model import FILE, ContextModel
from svqvae_hf.tokens.context_network import LOGIT_SHIFT, NEVER, SHIFTS, STEPS_PER_NAT
from svqvae_hf.tokens.neighbourhood import LIMIT, MARGIN, code_inputs, context, num_inputs, pad_ids
from svqvae_hf.trainer.data.held_out import check_held_out_tokens
from svqvae_hf.trainer.scripts import one_line_errors, script_parser

NAT = STEPS_PER_NAT << LOGIT_SHIFT  # one nat in integer logits
# Integers that stand for 1.0, by the names of the parameters of `ContextNetwork`
WEIGHTS = {"weight_1": 256, "weight_2": 256, "weight_member": 256, "weight_group": 64, "weight_code": 64}
BIASES = {"bias_1": 256 * 64, "bias_2": 256 * 64, "bias_member": 256 * 64, "bias_group": NAT, "bias_code": NAT}
SMOOTHING = 0.3  # occurrences of an id that never occurs
GRIDS = 64  # grids of ids in a batch
IDS_PER_GRID = 24  # ids of a grid that are predicted
FINEST_SHARE = 0.7  # fraction of grids at the finest scale; the others are at any scale
COARSE_SHARE = 0.35  # fraction of grids that are predicted given the next coarser one
WARM_UP = 100  # steps
LOGGED_STEPS = 500  # between lines of the log

Pyramid = list[np.ndarray]  # padded ids of an image, from the coarsest scale to the finest


class ContextNetwork(nn.Module):
    """Network of a [`ContextModel`] with weights in floats.

    Codes are divided into groups of similar ones. The network predicts the group of an id, and then which member of
    the group it is. The probability of an id is the product of both probabilities. So two short softmaxes replace one
    over all codes.

    The rank of a code is its position when the groups stand one after the other. With groups of 100 codes, the code of
    rank 305 is member 5 of group 3. `order` holds the id at each rank, and `rank` the rank of each id.

    Args:
        codes (`torch.Tensor` of shape `(codes, dim)`): Codebook, with numbers in [-1, 1].
        counts (`torch.Tensor` of shape `(codes,)`): Occurrences of each id, for the initial frequencies.
        hidden (`int`): Width of both hidden layers.
        features (`int`): Width of the layer before the members of a group.
    """

    order: torch.Tensor
    rank: torch.Tensor
    codes: torch.Tensor

    def __init__(self, codes: torch.Tensor, counts: torch.Tensor, hidden: int, features: int):
        super().__init__()
        num_codes, dim = codes.shape
        self.group_size = choose_group_size(num_codes)
        num_groups = math.ceil(num_codes / self.group_size)
        order = torch.from_numpy(order_codes(codes.numpy(), self.group_size))
        integer_codes = (codes * LIMIT).round()  # integers in [-LIMIT, LIMIT] for numbers in [-1, 1]
        self.register_buffer("codes", integer_codes)
        self.register_buffer("order", order)
        self.register_buffer("rank", order.argsort())  # the inverse of the permutation `order`
        # Two hidden layers
        self.weight_1 = random_weight(num_inputs(dim), hidden)
        self.weight_2 = random_weight(hidden, hidden)
        # Logits of the groups
        self.weight_group = random_weight(hidden, num_groups)
        # The features from which the logits of the members are made
        self.weight_member = random_weight(hidden, features)
        # Logits of the members. Codes are projected to the features at random, so that similar codes start with
        # similar weights.
        projection = torch.randn(dim, features)
        self.weight_code = nn.Parameter(0.25 * codes[order] @ projection)  # (codes, features)
        self.bias_1 = nn.Parameter(torch.zeros(hidden))
        self.bias_2 = nn.Parameter(torch.zeros(hidden))
        self.bias_member = nn.Parameter(0.1 * torch.randn(num_groups, features))
        # With the logarithms of frequencies as logits, a softmax returns the frequencies. So before training, the
        # biases alone predict how often each group occurs, and each code in its group.
        frequencies = group_frequencies(counts[order], self.group_size)
        self.bias_group = nn.Parameter(frequencies.of_groups.log())  # (groups,)
        self.bias_code = nn.Parameter(frequencies.within_groups.log())  # (codes,)

    def forward(self, inputs: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Bits of ids `(n,)` given their inputs `(n, inputs)`, which [`context`] makes."""
        rank = self.rank[ids]  # (n,)
        group = rank // self.group_size  # number of the group
        member = rank % self.group_size  # number within the group
        group_logits, member_logits = self.logits(inputs, group)
        group_nats = F.cross_entropy(group_logits / NAT, group, reduction="none")  # (n,)
        member_nats = F.cross_entropy(member_logits / NAT, member, reduction="none")  # (n,)
        return (group_nats + member_nats) / math.log(2)  # from nats to bits

    def logits(self, inputs: torch.Tensor, group: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits of ids as integers: a logit of 1.0 is the integer `NAT`.

        Args:
            inputs (`torch.Tensor` of shape `(n, inputs)`): Inputs of the ids.
            group (`torch.Tensor` of shape `(n,)`): Group of each id.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: Logits of all groups `(n, groups)`, and logits of the members of the
            group of each id `(n, members)`.
        """
        sums_1 = inputs @ self.integer_weight("weight_1") + self.integer_bias("bias_1")  # (n, hidden)
        hidden_1 = self.activate(sums_1, "1")
        sums_2 = hidden_1 @ self.integer_weight("weight_2") + self.integer_bias("bias_2")  # (n, hidden)
        hidden_2 = self.activate(sums_2, "2")
        group_logits = hidden_2 @ self.integer_weight("weight_group") + self.integer_bias("bias_group")  # (n, groups)
        # The layer before the members has one weight for all groups, and a bias for each group.
        bias_of_group = self.integer_bias("bias_member")[group]  # (n, features)
        member_sums = hidden_2 @ self.integer_weight("weight_member") + bias_of_group  # (n, features)
        features = self.activate(member_sums, "member")
        return group_logits, self.member_logits(features, group)

    def member_logits(self, features: torch.Tensor, group: torch.Tensor) -> torch.Tensor:
        """Integer logits `(n, members)` of the members of groups `(n,)`, from features `(n, features)`."""
        weight = self.integer_weight("weight_code")  # (codes, features), group by group
        bias = self.integer_bias("bias_code")  # (codes,)
        num_codes = len(bias)
        num_groups = len(self.bias_group)
        # The last group may have fewer members than the others. Members that are never predicted fill it up.
        num_missing = num_groups * self.group_size - num_codes
        missing_weight = weight.new_zeros(num_missing, weight.shape[1])
        missing_bias = bias.new_full((num_missing,), NEVER)
        all_weights = torch.cat([weight, missing_weight])  # (groups * members, features)
        all_biases = torch.cat([bias, missing_bias])  # (groups * members,)
        weight_of_groups = all_weights.unflatten(0, (num_groups, self.group_size))  # (groups, members, features)
        bias_of_groups = all_biases.unflatten(0, (num_groups, self.group_size))  # (groups, members)
        return linear_by_group(features, group, weight_of_groups, bias_of_groups)

    def integer_weight(self, name: str) -> torch.Tensor:
        """Parameter of this name, a weight of a layer, as integers in [-`LIMIT`, `LIMIT`]."""
        scaled = getattr(self, name) * WEIGHTS[name]
        return straight_through(scaled.clamp(-LIMIT, LIMIT), torch.round)

    def integer_bias(self, name: str) -> torch.Tensor:
        """Parameter of this name, a bias of a layer, as integers."""
        scaled = getattr(self, name) * BIASES[name]
        return straight_through(scaled, torch.round)

    def activate(self, summed: torch.Tensor, layer: str) -> torch.Tensor:
        """Drops the lowest bits of a layer's sums and limits them, as `activate` of the NumPy network does.

        Args:
            summed (`torch.Tensor`): Sums.
            layer (`str`): Key of `SHIFTS`: `"1"`, `"2"` or `"member"`.
        """
        shifted = straight_through(summed / 2 ** SHIFTS[layer], torch.floor)
        if layer == "member":
            return shifted.clamp(-LIMIT, LIMIT)
        return shifted.clamp(0, LIMIT)

    @torch.no_grad()
    def to_integers(self, codebook_fingerprint: str) -> ContextModel:
        """Returns the context model in integers."""
        tensors = {"codes": self.codes.to(torch.int8).numpy(), "order": self.order.to(torch.int32).numpy()}
        for name in WEIGHTS:
            tensors[name] = self.integer_weight(name).to(torch.int8).numpy()
        for name in BIASES:
            tensors[name] = self.integer_bias(name).to(torch.int32).numpy()
        return ContextModel(tensors, codebook_fingerprint)


def random_weight(inputs: int, outputs: int) -> nn.Parameter:
    """Random weight of a layer `(inputs, outputs)` that keeps the variance (He et al., arXiv 1502.01852)."""
    return nn.Parameter(torch.randn(inputs, outputs) * math.sqrt(2 / inputs))


def choose_group_size(num_codes: int) -> int:
    """Number of codes in a group, so that there are about as many groups as codes in each."""
    num_groups = 2 ** round(math.log2(num_codes) / 2)  # the power of two nearest to the square root
    return math.ceil(num_codes / num_groups)


@dataclass
class Frequencies:
    """Frequencies of codes, by groups.

    Args:
        of_groups (`torch.Tensor` of shape `(groups,)`): Fraction of all ids that belong to each group.
        within_groups (`torch.Tensor` of shape `(codes,)`): Fraction of the ids of a group that each code has, in the
            order of the groups.
    """

    of_groups: torch.Tensor
    within_groups: torch.Tensor


def group_frequencies(counts: torch.Tensor, group_size: int) -> Frequencies:
    """Frequencies of codes from their occurrences `(codes,)`, which are in the order of the groups."""
    num_codes = len(counts)
    num_groups = math.ceil(num_codes / group_size)
    num_missing = num_groups * group_size - num_codes  # members that the last group lacks
    padded_counts = F.pad(counts + SMOOTHING, (0, num_missing))
    counts_by_group = padded_counts.view(num_groups, group_size)  # (groups, members)
    group_counts = counts_by_group.sum(1, keepdim=True)  # (groups, 1)
    of_groups = group_counts[:, 0] / counts_by_group.sum()  # (groups,)
    within_groups = (counts_by_group / group_counts).flatten()[:num_codes]  # (codes,)
    return Frequencies(of_groups, within_groups)


def linear_by_group(
    features: torch.Tensor, group: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    """Applies to the features of each id the linear layer of its group.

    The features are first sorted in a table with a row per group. So one product multiplies all ids of a group by its
    weight, which is much faster than a product per id.

    Args:
        features (`torch.Tensor` of shape `(n, features)`): Features of the ids.
        group (`torch.Tensor` of shape `(n,)`): Number of the group of each id.
        weight (`torch.Tensor` of shape `(groups, members, features)`): Weight of each group.
        bias (`torch.Tensor` of shape `(groups, members)`): Bias of each group.

    Returns:
        `torch.Tensor` of shape `(n, members)`.
    """
    num_groups = len(weight)
    column = number_within_group(group, num_groups)  # (n,): 0 for the first id of a group, 1 for the second
    num_columns = int(column.max()) + 1  # as many as the largest group has ids
    # Table with the features of each id at `[group, column]`. Places without an id stay zeros.
    empty_table = features.new_zeros(num_groups, num_columns, features.shape[1])
    table = empty_table.index_put((group, column), features)  # (groups, columns, features)
    outputs = table @ weight.transpose(1, 2) + bias[:, None]  # (groups, columns, members)
    return outputs[group, column]  # (n, members)


def number_within_group(group: torch.Tensor, num_groups: int) -> torch.Tensor:
    """How many earlier ids have the same group, for each id `(n,)`."""
    counts = F.one_hot(group, num_groups).cumsum(0)  # (n, groups): ids of each group so far
    count_of_own_group = counts.gather(1, group[:, None])[:, 0]  # (n,), at least 1
    return count_of_own_group - 1


def straight_through(values: torch.Tensor, rounding: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Rounds values; the gradient passes straight through."""
    return values + (rounding(values) - values).detach()


def order_codes(codes: np.ndarray, group_size: int) -> np.ndarray:
    """Orders codes so that each group holds similar ones, by halving along principal components."""
    groups = halve_codes(codes, np.arange(len(codes)), group_size)
    return np.concatenate(groups)


def halve_codes(codes: np.ndarray, ids: np.ndarray, group_size: int) -> list[np.ndarray]:
    """Divides ids into groups of `group_size` similar codes. Only the last group may be smaller."""
    num_groups = math.ceil(len(ids) / group_size)
    if num_groups <= 1:
        return [ids]
    centred = codes[ids] - codes[ids].mean(0)  # (ids, dim)
    directions = np.linalg.eigh(centred.T @ centred).eigenvectors  # (dim, dim), by rising variance
    direction = directions[:, -1]  # of the largest variance
    order = np.argsort(centred @ direction, kind="stable")
    sorted_ids = ids[order]
    middle = num_groups // 2 * group_size  # a whole number of groups
    first_half = halve_codes(codes, sorted_ids[:middle], group_size)
    second_half = halve_codes(codes, sorted_ids[middle:], group_size)
    return first_half + second_half


def read_pyramids(token_set: str, model: SVQVAE) -> list[Pyramid]:
    """Reads the ids of all images of a token set.

    Raises:
        OSError: There is no such set.
        ValueError: It belongs to another model.
    """
    settings = read_settings(token_set)
    if settings.codebook_fingerprint != model.codebook_fingerprint():
        raise ValueError(f"`{token_set}` must hold ids of MODEL, but has others. Make it with `svqvae tokenize`.")
    if settings.context_model is not None:
        raise ValueError(f"`{token_set}` must hold plain ids, but they are compressed. Make it without `--compress`.")
    pyramids = []
    for row in TokenSet(token_set).rows():
        tokens = row_tokens(row, settings)
        grids = [ids.numpy() for ids in tokens.ids]
        grids.sort(key=np.size)  # from coarse to fine
        # Ids at the border of a grid have neighbours outside it. They get the number `codebook_size`, which is no id.
        pyramid = [pad_ids(grid, outside=settings.codebook_size) for grid in grids]
        pyramids.append(pyramid)
    return pyramids


def unpad(padded: np.ndarray) -> np.ndarray:
    """Ids without the margin of [`pad_ids`]."""
    return padded[MARGIN:-MARGIN, MARGIN:-MARGIN]


def draw_batches(pyramids: list[Pyramid], codes: np.ndarray, seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yields batches of inputs `(n, inputs)` of the network and ids `(n,)` to predict, at random positions."""
    random = np.random.default_rng(seed)
    inputs_of_codes = code_inputs(codes)
    while True:
        inputs = []
        targets = []
        for number in random.integers(len(pyramids), size=GRIDS):
            pyramid = pyramids[number]
            level = draw_level(random, len(pyramid))
            padded_ids = pyramid[level]
            padded_coarse_ids = draw_coarse_ids(random, pyramid, level)
            ids = unpad(padded_ids)  # (h, w)
            height, width = ids.shape
            rows = random.integers(height, size=IDS_PER_GRID)
            columns = random.integers(width, size=IDS_PER_GRID)
            inputs.append(context(inputs_of_codes, padded_ids, padded_coarse_ids, rows, columns))
            targets.append(ids[rows, columns])
        batch_inputs = torch.from_numpy(np.concatenate(inputs))
        batch_targets = torch.from_numpy(np.concatenate(targets))
        yield batch_inputs, batch_targets


def draw_level(random: np.random.Generator, num_levels: int) -> int:
    """Draws a level of a pyramid, mostly the finest."""
    if random.random() < FINEST_SHARE:
        return num_levels - 1
    return int(random.integers(num_levels))


def draw_coarse_ids(random: np.random.Generator, pyramid: Pyramid, level: int) -> np.ndarray | None:
    """Ids of the next coarser level for some grids. Other grids are predicted without them, as some files are."""
    if level > 0 and random.random() < COARSE_SHARE:
        return pyramid[level - 1]
    return None


def bits_per_id(context_model: ContextModel, pyramids: list[Pyramid]) -> str:
    """Bits per id of the finest scale alone, and of each scale given the coarser one."""
    finest_grids = [unpad(pyramid[-1]) for pyramid in pyramids]
    no_grids = [None] * len(pyramids)
    rate_alone = rate(context_model, finest_grids, coarse_grids=no_grids)
    texts = [f"finest alone {rate_alone:.3f}"]
    coarse_grids: Sequence[np.ndarray | None] = no_grids  # the coarsest scale has none
    num_scales = len(pyramids[0])
    for scale in range(num_scales):
        grids = [unpad(pyramid[scale]) for pyramid in pyramids]
        rate_of_scale = rate(context_model, grids, coarse_grids)
        texts.append(f"scale {scale} {rate_of_scale:.3f}")
        coarse_grids = grids  # of the next scale
    return ", ".join(texts)


def rate(context_model: ContextModel, grids: Sequence[np.ndarray], coarse_grids: Sequence[np.ndarray | None]) -> float:
    """Bits per id of one grid of each image, given the next coarser grid or none."""
    num_bytes = 0
    num_ids = 0
    for grid, coarse_grid in zip(grids, coarse_grids, strict=True):
        num_bytes += len(context_model.compress(grid, coarse_grid))
        num_ids += grid.size
    return 8 * num_bytes / num_ids


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


def read_arguments() -> argparse.Namespace:
    """Reads the command line.

    Raises:
        ValueError: MODEL is not a folder, it has a context model, or a number is out of range.
    """
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
    if options.learning_rate <= 0 or options.seed < 0:
        raise ValueError("`--learning_rate` must be above 0, and `--seed` must be at least 0.")
    if not options.overwrite:
        check_no_context_model(options.model)
    return options


def make_network(options: argparse.Namespace, model: SVQVAE, pyramids: list[Pyramid]) -> ContextNetwork:
    """Network for the codes of a model, whose initial frequencies are counted at the finest scale."""
    torch.manual_seed(options.seed)
    codes = model.quantize.embedding.table().detach().float()
    # The network reads the codes of neighbours as integers, for which all numbers must lie in [-1, 1].
    if model.config["codebook_l2_norm"]:
        codes = F.normalize(codes, dim=1)
    else:
        codes = codes / codes.abs().max()
    finest_ids = [unpad(pyramid[-1]).ravel() for pyramid in pyramids]  # (h * w,) of each image
    counts = np.bincount(np.concatenate(finest_ids), minlength=len(codes))  # (codes,)
    return ContextNetwork(codes, torch.from_numpy(counts).float(), options.hidden, options.features)


def train(options: argparse.Namespace, network: ContextNetwork, pyramids: list[Pyramid]) -> None:
    """Trains the network, and prints the mean bits per id of each 500 steps."""
    optimizer = torch.optim.AdamW(network.parameters(), options.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)

    def warm_up_and_cosine(step: int) -> float:
        warm_up = min(1, (step + 1) / WARM_UP)
        cosine = (1 + math.cos(math.pi * step / options.max_steps)) / 2
        return warm_up * cosine

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, warm_up_and_cosine)
    batches = draw_batches(pyramids, network.codes.numpy(), options.seed)
    start_time = time.monotonic()
    sum_of_losses = 0.0  # since the last line of the log
    for step in range(1, options.max_steps + 1):
        inputs, ids = next(batches)
        loss = network(inputs, ids).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        sum_of_losses += loss.item()
        if step % LOGGED_STEPS == 0:
            seconds = time.monotonic() - start_time
            mean_loss = sum_of_losses / LOGGED_STEPS
            print(f"step {step}: {mean_loss:.3f} bits per id, {seconds:.0f} s", flush=True)
            sum_of_losses = 0.0


def main() -> None:
    """Trains the context model, saves it beside the model, and prints its rates."""
    options = read_arguments()
    model = SVQVAE.from_pretrained(options.model)
    pyramids = []
    for token_set in options.token_sets:
        pyramids += read_pyramids(token_set, model)
    for token_set, held_out_set in itertools.product(options.token_sets, options.held_out):
        check_held_out_tokens(TokenSet(held_out_set), TokenSet(token_set), "--held_out")
    held_out = {token_set: read_pyramids(token_set, model) for token_set in options.held_out}
    network = make_network(options, model, pyramids)
    train(options, network, pyramids)
    context_model = network.to_integers(model.codebook_fingerprint())
    if not options.overwrite:
        check_no_context_model(options.model)  # again, because another run may have saved one meanwhile
    context_model.save_pretrained(options.model)
    for token_set, held_out_pyramids in held_out.items():
        print(f"{token_set}: {bits_per_id(context_model, held_out_pyramids)}")


if __name__ == "__main__":
    with one_line_errors():
        main()

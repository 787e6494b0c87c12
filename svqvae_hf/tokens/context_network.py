"""The network of a context model, in exact integers.

    inputs -> layer 1 -> layer 2 -> layer "group"                      -> frequencies of the groups of codes
                                 -> layer "member" -> layer "code"     -> frequencies of the members of a group

All weights and activations are integers, and every sum of products stays below 2**24, where float32 is exact in any
order of summation. The frequencies are therefore the same on every machine.
"""

from collections.abc import Mapping
from decimal import Context, Decimal
from functools import cache

import numpy as np

from svqvae_hf.tokens.neighbourhood import LIMIT, divide_rounding_up, num_inputs

LARGEST_INT8 = 2**7  # absolute value of the lowest integer of int8
EXACT_LIMIT = 2**24  # float32 holds all integers below this exactly
NEVER = -EXACT_LIMIT // 2  # logit of a member that does not exist
LAYERS = ("1", "2", "group", "member", "code")  # ends of the names of their weights and biases
SHIFTS = {"1": 9, "2": 8, "member": 8}  # bits dropped after each layer
# Logits are natural logarithms, so their unit is the nat. They have 2**LOGIT_SHIFT * STEPS_PER_NAT units per nat.
LOGIT_SHIFT = 5  # bits dropped from logits, so that STEPS_PER_NAT steps per nat are left
STEPS_PER_NAT = 128  # of the table of exponentials
NATS = 16  # that the table covers
LAST_ENTRY = STEPS_PER_NAT * NATS  # index of the last entry of the table, which is 0
PEAK = 2**20  # first entry of the table
TOTAL = 2**16  # sum of the frequencies of a distribution


class ContextNetwork:
    """Computes the frequencies of ids from the ids around them.

    The codes are ranked, so that similar codes follow each other, and split into groups of equally many members. An id
    is the number of its group and its number among the members of that group, so that few frequencies are computed for
    it. These are the ranks of 7 codes in 3 groups of 3 members:

        group 0    0  1  2
        group 1    3  4  5
        group 2    6  -  -      the last group may lack members

    Args:
        tensors (`Mapping[str, np.ndarray]`): As in [`~svqvae_hf.tokens.context_model.ContextModel`].

    Attributes:
        num_groups (`int`): Number of groups.
        num_members (`int`): Members per group; the last group may lack some.

    Raises:
        ValueError: A tensor has another type or shape, or a sum of products could reach 2**24.
    """

    def __init__(self, tensors: Mapping[str, np.ndarray]):
        check_tensors(tensors)
        self.weights = {name: tensor.astype(np.float32) for name, tensor in tensors.items()}
        num_codes = len(tensors["order"])
        self.num_groups, num_features = tensors["bias_member"].shape  # a row of biases for each group
        self.num_members = divide_rounding_up(num_codes, self.num_groups)
        # The last layer has a weight and a bias for each code, in the order of the ranks. The members that the last
        # group lacks get a weight of 0, and a bias so low that their logit is never the largest.
        num_missing = self.num_groups * self.num_members - num_codes
        missing_weights = np.zeros((num_missing, num_features), np.float32)
        missing_biases = np.full(num_missing, NEVER, np.float32)
        weight = np.concatenate([self.weights["weight_code"], missing_weights])  # (groups * members, features)
        bias = np.concatenate([self.weights["bias_code"], missing_biases])  # (groups * members,)
        # Split into groups, so that `member_logits` can look up the members of one group.
        self.code_weight = weight.reshape(self.num_groups, self.num_members, num_features)
        self.code_bias = bias.reshape(self.num_groups, self.num_members)

    def hidden(self, inputs: np.ndarray) -> np.ndarray:
        """Result `(n, hidden)` of the first two layers for inputs `(n, inputs)`."""
        first = activate(self._layer(inputs, "1"), "1")
        return activate(self._layer(first, "2"), "2")

    def group_logits(self, hidden: np.ndarray) -> np.ndarray:
        """Logits `(n, groups)`."""
        return self._layer(hidden, "group")

    def member_logits(self, hidden: np.ndarray, groups: np.ndarray) -> np.ndarray:
        """Logits `(n, members)` of the members of the group of each id, given the groups `(n,)`."""
        products = np.matmul(hidden, self.weights["weight_member"])  # (n, features)
        bias_of_groups = self.weights["bias_member"][groups]  # (n, features)
        features = activate(products + bias_of_groups, "member")  # (n, features)
        member_weights = self.code_weight[groups]  # (n, members, features)
        scores = np.matmul(member_weights, features[:, :, None])  # (n, members, 1)
        return scores[..., 0] + self.code_bias[groups]

    def _layer(self, values: np.ndarray, layer: str) -> np.ndarray:
        """Sums `(n, outputs)` of a layer for values `(n, inputs)`."""
        weight = self.weights[f"weight_{layer}"]  # (inputs, outputs)
        bias = self.weights[f"bias_{layer}"]
        return np.matmul(values, weight) + bias


def activate(summed: np.ndarray, layer: str) -> np.ndarray:
    """Drops bits of the sums of a layer, and limits them to `[0, LIMIT]`, or to `[-LIMIT, LIMIT]` for the members."""
    lowest = -LIMIT if layer == "member" else 0
    shifted = np.floor(summed / 2 ** SHIFTS[layer])
    return np.clip(shifted, lowest, LIMIT)


def probabilities(logits: np.ndarray) -> np.ndarray:
    """Converts logits to distributions.

    Args:
        logits (`np.ndarray` of shape `(n, symbols)`): Integers in float32.

    Returns:
        `np.ndarray` of shape `(n, symbols)`: Multiples of `1 / TOTAL` above 0 in float32, which sum to 1 per row.
    """
    num_rows, num_symbols = logits.shape
    weights = _softmax_weights(logits)  # (n, symbols), integers
    # Every symbol has a frequency of at least 1. The rest of the total is shared by weight, rounded down.
    total_to_share = TOTAL - num_symbols
    shares = weights * total_to_share // weights.sum(1, keepdims=True)  # (n, symbols), integers
    frequencies = 1 + shares
    # The likeliest symbol of each row takes what rounding left over.
    left_over = TOTAL - frequencies.sum(1)  # (n,)
    likeliest = logits.argmax(1)  # (n,)
    frequencies[np.arange(num_rows), likeliest] += left_over
    return (frequencies / TOTAL).astype(np.float32)


def _softmax_weights(logits: np.ndarray) -> np.ndarray:
    """Weights `exp(logit - peak)` of a softmax, where the peak is the largest logit of a row, as integers of a table.

    The first entry of the table is the weight of the peak. Each further entry is the weight one step further below the
    peak. A step is `2**LOGIT_SHIFT` units of a logit.
    """
    peaks = logits.max(1, keepdims=True)  # (n, 1)
    steps_below_peak = ((peaks - logits) / 2**LOGIT_SHIFT).astype(np.int64)  # (n, symbols), rounded down
    # The last entry is 0. It holds for all logits further below the peak, because their weights would round to 0.
    entries = np.minimum(steps_below_peak, LAST_ENTRY)  # (n, symbols)
    return exponentials()[entries]  # (n, symbols)


@cache
def exponentials() -> np.ndarray:
    """Table of `PEAK * exp(-step / STEPS_PER_NAT)` for each step below `LAST_ENTRY`, rounded down, and then a 0.

    It is computed with decimal numbers, because `exp` of floats differs between machines.
    """
    precision = Context(prec=30)  # digits
    entries = []
    for step in range(LAST_ENTRY):
        nats = Decimal(-step) / STEPS_PER_NAT
        entries.append(int(PEAK * nats.exp(precision)))
    entries.append(0)  # with the index LAST_ENTRY
    return np.array(entries)


def check_tensors(tensors: Mapping[str, np.ndarray]) -> None:
    """Raises unless the tensors fit each other and are exact: see [`ContextNetwork`]."""
    for tensor in tensors.values():
        if tensor.dtype not in (np.int8, np.int32):
            raise ValueError("the tensors of a context model must be in int8 and int32, but are not.")
    _check_shapes(tensors)
    all_ids = np.arange(len(tensors["codes"]))
    has_each_id_once = np.array_equal(np.sort(tensors["order"]), all_ids)
    if not has_each_id_once:
        raise ValueError("`order` must have each id once, but does not.")
    for layer in LAYERS:
        largest_sum = _largest_sum(tensors, layer)
        if largest_sum >= EXACT_LIMIT:
            raise ValueError(
                f"sums of layer {layer} must stay below {EXACT_LIMIT}, but could reach {largest_sum}. Retrain it."
            )


def _check_shapes(tensors: Mapping[str, np.ndarray]) -> None:
    """Raises ValueError unless the shapes of the tensors fit each other."""
    num_codes, code_dim = tensors["codes"].shape
    num_inputs_of_id = num_inputs(code_dim)
    num_groups, num_features = tensors["bias_member"].shape
    (width_1,) = tensors["bias_1"].shape
    (width_2,) = tensors["bias_2"].shape
    shapes = {
        "order": (num_codes,),
        "weight_1": (num_inputs_of_id, width_1),
        "weight_2": (width_1, width_2),
        "weight_group": (width_2, num_groups),
        "bias_group": (num_groups,),
        "weight_member": (width_2, num_features),
        "weight_code": (num_codes, num_features),
        "bias_code": (num_codes,),
    }
    for name, shape in shapes.items():
        if tensors[name].shape != shape:
            raise ValueError(f"`{name}` must have shape {shape}, got {tensors[name].shape}.")


def _largest_sum(tensors: Mapping[str, np.ndarray], layer: str) -> int:
    """Largest absolute value that a sum of products of a layer can reach, for any inputs in int8.

    It is the sum of the largest absolute values of the products. No partial sum can exceed it, whatever the order.
    """
    weight = np.abs(tensors[f"weight_{layer}"].astype(np.int64))  # (inputs, outputs), except in layer "code"
    bias = np.abs(tensors[f"bias_{layer}"].astype(np.int64))  # (outputs,), or (groups, outputs) in layer "member"
    if layer == "code":
        weight = weight.T  # (codes, features) -> (inputs, outputs), as the layer reads features
    largest_products = weight * LARGEST_INT8
    largest_sums = largest_products.sum(axis=0) + bias  # in the shape of the bias
    return largest_sums.max()

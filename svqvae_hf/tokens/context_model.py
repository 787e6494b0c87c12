"""Predicts ids from the ids around them, in exact integers, so that a range coder can store them in few bits.

    codes of 12 neighbours    -> layer -> layer -> frequencies of the groups of codes -> group of the id
    and of 5 coarser ids         layer, given the group -> frequencies of its members -> id

Similar codes form a group. An id is coded in two steps, so twice 128 frequencies are computed for it instead of
16,384. All weights and activations are integers, and every sum of products stays below 2**24, where float32 is exact
in any order of summation. The frequencies are therefore the same on every machine. An id depends only on earlier
diagonals, so a whole diagonal is coded at once.
"""

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from decimal import Context, Decimal
from functools import cache
from pathlib import Path
from typing import Any

import constriction
import numpy as np
import safetensors.numpy
from huggingface_hub import _CACHED_NO_EXIST, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError
from safetensors import SafetensorError, safe_open

from svqvae_files.outputs import write_file
from svqvae_hf.hub.repositories import from_hub, hub_reason

FILE = "context_model.safetensors"  # in the folder of a model

# Rows and columns from an id to its context: ids that are coded before it, and coarser ids around its place.
NEIGHBOURS = (
    *((0, -1), (0, -2), (-1, -2), (-1, -1), (-1, 0), (-1, 1)),
    *((-2, -2), (-2, -1), (-2, 0), (-2, 1), (-2, 2), (-3, 0)),
)
COARSE = ((0, 0), (-1, 0), (0, -1), (0, 1), (1, 0))
SLOPE = 2  # an id lies on the diagonal `column + SLOPE * row`, after the diagonals of its neighbours
MARGIN = 3  # largest distance to a neighbour
AT_ONCE = 256  # ids of a diagonal whose groups are coded before their members, at most; part of the format

LIMIT = 127  # of the absolute value of weights, activations and codes
EXACT = 2**24  # integers below are exact in float32
NEVER = -EXACT // 2  # logit of what does not exist
SHIFTS = {"1": 9, "2": 8, "member": 8}  # bits dropped after each layer
LOGIT_SHIFT = 5  # bits dropped from logits, which then have 128 steps per nat
STEPS_PER_NAT, NATS = 128, 16  # of the table of exponentials
PEAK = 2**20  # first entry of the table
TOTAL = 2**16  # sum of the frequencies of a distribution

Step = Callable[[np.ndarray, Any], np.ndarray]  # probabilities and known symbols, or None -> symbols


class ContextModel:
    """Distribution of ids given the ids around them, in integers, and coding of ids with it.

    Args:
        tensors (`Mapping[str, np.ndarray]`): Weights in int8 and biases in int32. `codes` `(codes, dim)`; `order`
            `(codes,)`, ids in the order of their groups; `weight_1`, `bias_1`, `weight_2`, `bias_2`, `weight_group`,
            `bias_group`, `weight_member`; `bias_member` `(groups, features)`; `weight_code` `(codes, features)` and
            `bias_code` `(codes,)`, both in that order.
        codebook_fingerprint (`str`): [`SVQVAE.codebook_fingerprint`] of the codebook.

    Raises:
        ValueError: If a tensor has another type, or a sum of products could reach 2**24.
    """

    def __init__(self, tensors: Mapping[str, np.ndarray], codebook_fingerprint: str):
        check_exact(tensors)
        self.tensors, self.codebook_fingerprint = dict(tensors), codebook_fingerprint
        content = b"".join(tensors[name].tobytes() for name in sorted(tensors))
        self.fingerprint = hashlib.sha256(content + codebook_fingerprint.encode()).hexdigest()
        self.order = tensors["order"].astype(np.int64)
        self.rank = np.argsort(self.order)
        self.weights = {name: tensor.astype(np.float32) for name, tensor in tensors.items()}
        groups, features = tensors["bias_member"].shape
        self.members = -(-len(self.order) // groups)
        padding = groups * self.members - len(self.order)
        shape = groups, self.members
        self.table = np.pad(self.weights["weight_code"], ((0, padding), (0, 0))).reshape(*shape, features)
        self.code_bias = np.pad(self.weights["bias_code"], (0, padding), constant_values=NEVER).reshape(shape)
        self.inputs = code_inputs(tensors["codes"])

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike, subfolder: str = "", **options: Any) -> "ContextModel":
        """Loads the context model that lies beside an [`SVQVAE`].

        Args:
            source (`str` or `os.PathLike`): Folder of the model, or `org/name` on the Hub.
            subfolder (`str`, defaults to `""`): Subfolder of the model there.
            **options: Further arguments of [`~huggingface_hub.hf_hub_download`], such as `revision`.

        Raises:
            OSError: The model has none.
            ValueError: Its file is damaged.
        """
        path = str(Path(source, subfolder, FILE))
        try:
            if not Path(source).exists():
                path = _download(str(source), str(Path(subfolder, FILE)), options)
            with safe_open(path, framework="numpy") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}
                return cls(tensors, file.metadata()["codebook_fingerprint"])
        except (FileNotFoundError, EntryNotFoundError) as error:
            raise FileNotFoundError(
                f"the model must have a context model, `{FILE}`, but `{source}` has none (training/train_context.py)."
            ) from error
        except (SafetensorError, IndexError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"`{path}` must be a context model, but is another file or damaged: {error}.") from error

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Writes the context model to the folder of its [`SVQVAE`]."""
        metadata = {"codebook_fingerprint": self.codebook_fingerprint}
        write_file(Path(folder, FILE), safetensors.numpy.save(self.tensors, metadata))

    def compress(self, ids: np.ndarray, coarse: np.ndarray | None = None) -> bytes:
        """Codes a grid of ids.

        Args:
            ids (`np.ndarray` of shape `(h, w)`): Ids.
            coarse (`np.ndarray`, *optional*): Ids of a smaller scale, which the decoder knows already.

        Raises:
            ValueError: If an id is out of range.
        """
        if not 0 <= ids.min() <= ids.max() < len(self.order):
            raise ValueError(f"ids must be in [0, {len(self.order)}), got [{ids.min()}, {ids.max()}].")
        encoder = constriction.stream.queue.RangeEncoder()

        def step(probabilities: np.ndarray, symbols: np.ndarray) -> np.ndarray:
            encoder.encode(symbols.astype(np.int32), categorical(), probabilities)
            return symbols

        self._code(step, ids.shape, self.rank[ids.astype(np.uint32)], coarse)
        return encoder.get_compressed().astype("<u4").tobytes()

    def decompress(self, content: bytes, shape: tuple[int, int], coarse: np.ndarray | None = None) -> np.ndarray:
        """Decodes a grid of ids `(h, w)`, int64, that [`~ContextModel.compress`] coded. Damage may give other ids."""
        decoder = constriction.stream.queue.RangeDecoder(np.frombuffer(content, "<u4").astype(np.uint32))
        try:
            ranks = self._code(lambda found, _: decoder.decode(categorical(), found), shape, None, coarse)
        except (AssertionError, IndexError) as error:  # of constriction, which encodes no such content, or of NumPy
            raise ValueError("its coded ids or its context model are damaged.") from error
        return self.order[ranks]

    def _code(
        self, step: Step, shape: tuple[int, ...], known: np.ndarray | None, coarse: np.ndarray | None
    ) -> np.ndarray:
        """Calls `step` for the groups and then the members of each diagonal, with known ranks or to find the ranks."""
        outside = len(self.order)
        ranks = np.zeros(shape, np.int64)
        padded = pad_ids(np.full(shape, outside), outside)
        coarse = None if coarse is None else pad_ids(coarse, outside)
        for rows, columns in diagonals(*shape):
            here = None if known is None else known[rows, columns]
            hidden = self._hidden(context(self.inputs, padded, coarse, rows, columns))
            group = step(self._group_probabilities(hidden), None if here is None else here // self.members)
            member = step(self._member_probabilities(hidden, group), None if here is None else here % self.members)
            ranks[rows, columns] = np.minimum(group * self.members + member, outside - 1)  # beyond it: damaged
            padded[rows + MARGIN, columns + MARGIN] = self.order[ranks[rows, columns]]
        return ranks

    def _hidden(self, inputs: np.ndarray) -> np.ndarray:
        first = activate(np.matmul(inputs, self.weights["weight_1"]) + self.weights["bias_1"], "1")
        return activate(np.matmul(first, self.weights["weight_2"]) + self.weights["bias_2"], "2")

    def _group_probabilities(self, hidden: np.ndarray) -> np.ndarray:
        return probabilities(np.matmul(hidden, self.weights["weight_group"]) + self.weights["bias_group"])

    def _member_probabilities(self, hidden: np.ndarray, group: np.ndarray) -> np.ndarray:
        summed = np.matmul(hidden, self.weights["weight_member"]) + self.weights["bias_member"][group]
        logits = np.matmul(self.table[group], activate(summed, "member")[:, :, None])  # (ids, members, 1)
        return probabilities(logits[..., 0] + self.code_bias[group])


def _download(source: str, file: str, options: Mapping[str, Any]) -> str:
    try:
        return from_hub(hf_hub_download, source, filename=file, **options)
    except OSError as error:
        if try_to_load_from_cache(source, file, revision=options.get("revision")) is _CACHED_NO_EXIST:  # seen online
            raise FileNotFoundError(file) from error
        raise OSError(f"could not look for `{file}`, the context model of `{source}`: {hub_reason(error)}") from error


def find_context_model(source: str | os.PathLike, codebook_fingerprint: str, **options: Any) -> ContextModel | None:
    """Context model beside a model if there is one for its codebook; see [`ContextModel.from_pretrained`].

    Args:
        source (`str` or `os.PathLike`): Folder of the model, or `org/name` on the Hub.
        codebook_fingerprint (`str`): [`SVQVAE.codebook_fingerprint`] of the model.
        **options: Further arguments of [`ContextModel.from_pretrained`].
    """
    try:
        found = ContextModel.from_pretrained(source, **options)
    except FileNotFoundError:
        return None
    return found if found.codebook_fingerprint == codebook_fingerprint else None


def code_inputs(codes: np.ndarray) -> np.ndarray:
    """Inputs for each id `(codes + 1, dim + 1)`: its code, and a mark. The last row stands for outside the grid."""
    inside = np.full((len(codes), 1), LIMIT)
    return np.pad(np.hstack([codes, inside]), ((0, 1), (0, 0))).astype(np.float32)


def pad_ids(ids: np.ndarray, outside: int) -> np.ndarray:
    """Pads a grid of ids by `MARGIN` on all sides with the number that stands for the outside."""
    return np.pad(ids, MARGIN, constant_values=outside)


def context(
    inputs: np.ndarray, padded: np.ndarray, coarse: np.ndarray | None, rows: np.ndarray, columns: np.ndarray
) -> np.ndarray:
    """Inputs of the network for some ids of a grid.

    Args:
        inputs (`np.ndarray` of shape `(codes + 1, dim + 1)`): Result of [`code_inputs`].
        padded (`np.ndarray`): Ids, padded by [`pad_ids`].
        coarse (`np.ndarray`, *optional*): Coarser ids, padded by [`pad_ids`].
        rows (`np.ndarray` of shape `(n,)`): Rows of the ids.
        columns (`np.ndarray` of shape `(n,)`): Columns of the ids.

    Returns:
        `np.ndarray` of shape `(n, inputs)`: Inputs for the neighbours, for the coarser ids around the same place, and
        for its position within the cell of its coarser id. The last two are zeros without coarser ids.
    """
    near = [inputs[padded[rows + MARGIN + y, columns + MARGIN + x]] for y, x in NEIGHBOURS]
    if coarse is None:
        return np.hstack([*near, np.zeros((len(rows), len(COARSE) * inputs.shape[1] + 2), np.float32)])
    places = []
    for steps, cells, side in zip((rows, columns), coarse.shape, padded.shape, strict=True):
        places.append(steps * (cells - 2 * MARGIN) * (LIMIT + 1) // (side - 2 * MARGIN))
    row, column = (MARGIN + place // (LIMIT + 1) for place in places)
    far = [inputs[coarse[row + y, column + x]] for y, x in COARSE]
    return np.hstack([*near, *far, np.stack(places, 1).astype(np.float32) % (LIMIT + 1)])


def diagonals(height: int, width: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields rows and columns of the ids of each diagonal in the order of coding, in parts of at most `AT_ONCE`."""
    for diagonal in range(width + SLOPE * (height - 1)):
        first, last = max(0, -(-(diagonal - width + 1) // SLOPE)), min(height - 1, diagonal // SLOPE)
        for start in range(first, last + 1, AT_ONCE):
            rows = np.arange(start, min(start + AT_ONCE, last + 1))
            yield rows, diagonal - SLOPE * rows


def activate(summed: np.ndarray, layer: str) -> np.ndarray:
    """Drops bits of the sums of a layer, and limits them to `[0, LIMIT]`, or to `[-LIMIT, LIMIT]` after the third."""
    return np.clip(np.floor(summed / 2 ** SHIFTS[layer]), -LIMIT if layer == "member" else 0, LIMIT)


def probabilities(logits: np.ndarray) -> np.ndarray:
    """Converts logits `(n, symbols)` to distributions in float32: multiples of `1 / TOTAL` above 0 that sum to 1."""
    steps = ((logits.max(1, keepdims=True) - logits) / 2**LOGIT_SHIFT).astype(np.int64)
    weights = exponentials()[np.minimum(steps, STEPS_PER_NAT * NATS)]
    frequencies = 1 + weights * (TOTAL - logits.shape[1]) // weights.sum(1, keepdims=True)
    frequencies[np.arange(len(logits)), logits.argmax(1)] += TOTAL - frequencies.sum(1)
    return (frequencies / TOTAL).astype(np.float32)


@cache
def exponentials() -> np.ndarray:
    """`PEAK * exp(-i / STEPS_PER_NAT)`, rounded down, in decimals: `exp` of floats differs between machines."""
    steps = range(STEPS_PER_NAT * NATS)
    return np.array([*(int(PEAK * (Decimal(-i) / STEPS_PER_NAT).exp(Context(prec=30))) for i in steps), 0])


@cache
def categorical() -> constriction.stream.model.Categorical:
    """Family of distributions of the range coder."""
    return constriction.stream.model.Categorical(perfect=False)


def check_exact(tensors: Mapping[str, np.ndarray]) -> None:
    """Raises unless every sum of products stays below `EXACT` in any order, for all inputs in int8."""
    if any(tensor.dtype not in (np.int8, np.int32) for tensor in tensors.values()):
        raise ValueError("the tensors of a context model must be in int8 and int32, but are not.")
    if not np.array_equal(np.sort(tensors["order"]), np.arange(len(tensors["codes"]))):
        raise ValueError("`order` must have each id once, but does not.")
    for layer in ("1", "2", "group", "member", "code"):
        weight, bias = (abs(tensors[f"{name}_{layer}"].astype(np.int64)) for name in ("weight", "bias"))
        largest = (weight.sum(1 if layer == "code" else 0) * (LIMIT + 1) + bias).max()
        if largest >= EXACT:
            raise ValueError(f"sums of layer {layer} must stay below {EXACT}, but could reach {largest}. Retrain it.")

"""Codes ids with the distributions that a network predicts from the ids around them, in few bits and without loss.

`neighbourhood.py` says what an id is predicted from, `context_network.py` computes the frequencies, and the range
coder of constriction turns ids and frequencies into bytes.

The ids are ranked, so that similar codes lie in one group of ranks: `rank = group * num_members + member`. An id is
coded in two steps: its group among all groups, and then its number among the members of that group.
"""

import hashlib
import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import constriction
import numpy as np
import safetensors.numpy
from huggingface_hub import _CACHED_NO_EXIST, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError
from safetensors import SafetensorError, safe_open

from svqvae_files.hub import check_may_be_on_hub, hub_reason
from svqvae_files.outputs import write_file
from svqvae_hf.hub.repositories import from_hub
from svqvae_hf.tokens.context_network import ContextNetwork, probabilities
from svqvae_hf.tokens.neighbourhood import MARGIN, code_inputs, context, diagonals, pad_ids

FILE = "context_model.safetensors"  # in the folder of a model


class ContextModel:
    """Distribution of ids given the ids around them, in integers, and coding of ids with it.

    Args:
        tensors (`Mapping[str, np.ndarray]`): Weights in int8 and biases in int32. `codes` `(codes, dim)`; `order`
            `(codes,)`, ids in the order of their groups; `weight_1`, `bias_1`, `weight_2`, `bias_2`, `weight_group`,
            `bias_group`, `weight_member`; `bias_member` `(groups, features)`; `weight_code` `(codes, features)` and
            `bias_code` `(codes,)`, both in that order.
        codebook_fingerprint (`str`): [`SVQVAE.codebook_fingerprint`] of the codebook.

    Attributes:
        fingerprint (`str`): SHA-256 of the tensors and of the codebook's fingerprint, in hexadecimal.

    Raises:
        ValueError: A tensor has another type or shape, or a sum of products could reach 2**24.
    """

    def __init__(self, tensors: Mapping[str, np.ndarray], codebook_fingerprint: str):
        self.network = ContextNetwork(tensors)
        self.tensors = dict(tensors)
        self.codebook_fingerprint = codebook_fingerprint
        self.fingerprint = _fingerprint(tensors, codebook_fingerprint)
        self.order = tensors["order"].astype(np.int64)  # (codes,): the id of each rank
        self.rank = np.argsort(self.order)  # (codes,): the rank of each id
        # What the network reads for each id, `(codes + 1, dim + 1)`: a row for each id, and a last row for places
        # outside the grid. A row holds the code of the id, and a mark of places inside the grid.
        self.inputs_of_ids = code_inputs(tensors["codes"])
        self.outside = len(self.order)  # the index of the last row, in place of an id

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
        try:
            path = _find_file(source, subfolder, options)
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"the model must have a context model, `{FILE}`, but `{source}` has none (training/train_context.py)."
            ) from error
        try:
            with safe_open(path, framework="numpy") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}
                codebook_fingerprint = file.metadata()["codebook_fingerprint"]
            return cls(tensors, codebook_fingerprint)
        except (SafetensorError, IndexError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"`{path}` must be a context model, but is another file or damaged: {error}.") from error

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Writes the context model to the folder of its [`SVQVAE`]."""
        metadata = {"codebook_fingerprint": self.codebook_fingerprint}
        write_file(Path(folder, FILE), safetensors.numpy.save(self.tensors, metadata))

    def compress(self, ids: np.ndarray, coarse: np.ndarray | None = None) -> bytes:
        """Codes a grid of ids, diagonal by diagonal. Of each diagonal first the groups of its ids, then the members.

        Args:
            ids (`np.ndarray` of shape `(h, w)`): Ids.
            coarse (`np.ndarray`, *optional*): Ids of a smaller scale, which the decoder knows already.

        Raises:
            ValueError: If an id is out of range.
        """
        num_codes = len(self.order)
        if ids.min() < 0 or ids.max() >= num_codes:
            raise ValueError(f"ids must be in [0, {num_codes}), got [{ids.min()}, {ids.max()}].")
        # A rank is `group * num_members + member`, and similar codes are in one group.
        ranks = self.rank[ids.astype(np.int64)]  # (h, w)
        groups = ranks // self.network.num_members  # (h, w)
        members = ranks % self.network.num_members  # (h, w)
        padded = pad_ids(ids, self.outside)
        padded_coarse = None if coarse is None else pad_ids(coarse, self.outside)
        encoder = constriction.stream.queue.RangeEncoder()
        height, width = ids.shape
        for rows, columns in diagonals(height, width):  # both (n,), for the n ids of a diagonal
            inputs = context(self.inputs_of_ids, padded, padded_coarse, rows, columns)  # (n, inputs)
            hidden = self.network.hidden(inputs)  # (n, hidden)
            group = groups[rows, columns]  # (n,)
            group_probabilities = probabilities(self.network.group_logits(hidden))  # (n, groups)
            encoder.encode(group.astype(np.int32), categorical(), group_probabilities)
            member = members[rows, columns]  # (n,)
            member_probabilities = probabilities(self.network.member_logits(hidden, group))  # (n, members)
            encoder.encode(member.astype(np.int32), categorical(), member_probabilities)
        words = encoder.get_compressed()
        return words.astype("<u4").tobytes()

    def decompress(self, content: bytes, shape: tuple[int, int], coarse: np.ndarray | None = None) -> np.ndarray:
        """Decodes a grid of ids.

        Args:
            content (`bytes`): Result of [`~ContextModel.compress`]. Another content may decode to any ids.
            shape (`tuple[int, int]`): Height and width of the grid.
            coarse (`np.ndarray`, *optional*): Ids of the smaller scale that [`~ContextModel.compress`] was given.

        Returns:
            `np.ndarray` of shape `(h, w)`: Ids in int64.

        Raises:
            ValueError: The content is damaged.
        """
        height, width = shape
        empty_grid = np.full(shape, self.outside)
        padded = pad_ids(empty_grid, self.outside)  # the loop fills in the ids, diagonal by diagonal
        padded_coarse = None if coarse is None else pad_ids(coarse, self.outside)
        words = np.frombuffer(content, "<u4").astype(np.uint32)
        decoder = constriction.stream.queue.RangeDecoder(words)
        try:
            for rows, columns in diagonals(height, width):  # both (n,), for the n ids of a diagonal
                inputs = context(self.inputs_of_ids, padded, padded_coarse, rows, columns)  # (n, inputs)
                padded[rows + MARGIN, columns + MARGIN] = self._decode_ids(decoder, inputs)
        except (AssertionError, IndexError) as error:  # constriction raises the first for content that nobody encoded
            raise ValueError("its coded ids or its context model are damaged.") from error
        return padded[MARGIN:-MARGIN, MARGIN:-MARGIN].copy()

    def _decode_ids(self, decoder: constriction.stream.queue.RangeDecoder, inputs: np.ndarray) -> np.ndarray:
        """Decodes the next ids `(n,)`, from the inputs of the network for them, `(n, inputs)`."""
        hidden = self.network.hidden(inputs)  # (n, hidden)
        group_probabilities = probabilities(self.network.group_logits(hidden))  # (n, groups)
        group = decoder.decode(categorical(), group_probabilities)  # (n,)
        member_probabilities = probabilities(self.network.member_logits(hidden, group))  # (n, members)
        member = decoder.decode(categorical(), member_probabilities)  # (n,)
        rank = group * self.network.num_members + member
        last_rank = len(self.order) - 1
        rank = np.minimum(rank, last_rank)  # damaged content may decode to a member that does not exist
        return self.order[rank]


def find_context_model(source: str | os.PathLike, codebook_fingerprint: str, **options: Any) -> ContextModel | None:
    """Context model beside a model, if there is one; see [`ContextModel.from_pretrained`].

    Args:
        source (`str` or `os.PathLike`): Folder of the model, or `org/name` on the Hub.
        codebook_fingerprint (`str`): [`SVQVAE.codebook_fingerprint`] of the model.
        **options: Further arguments of [`ContextModel.from_pretrained`].

    Raises:
        OSError: Whether there is one cannot be looked up on the Hub.
        ValueError: It is damaged, or was made for another codebook.
    """
    try:
        context_model = ContextModel.from_pretrained(source, **options)
    except FileNotFoundError:
        return None
    if context_model.codebook_fingerprint != codebook_fingerprint:
        raise ValueError(
            f"the context model `{FILE}` of `{source}` must be for the codebook of its model, with fingerprint "
            f"{codebook_fingerprint:.16}, but is for {context_model.codebook_fingerprint:.16}. Delete it, or train "
            "one with training/train_context.py."
        )
    return context_model


@cache
def categorical() -> constriction.stream.model.Categorical:
    """Kind of distribution for the range coder: a probability for each symbol, in one row per coded symbol."""
    return constriction.stream.model.Categorical(perfect=False)


def _fingerprint(tensors: Mapping[str, np.ndarray], codebook_fingerprint: str) -> str:
    """SHA-256 of the tensors, in the order of their names, and of the codebook's fingerprint, in hexadecimal."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(tensors[name].tobytes())
    digest.update(codebook_fingerprint.encode())
    return digest.hexdigest()


def _find_file(source: str | os.PathLike, subfolder: str, options: Mapping[str, Any]) -> str:
    """Path of the file of a context model, which is downloaded if necessary.

    Raises:
        FileNotFoundError: The model has none.
        OSError: Whether the model has one cannot be looked up on the Hub.
    """
    if Path(source).exists():
        path = Path(source, subfolder, FILE)
        if not path.is_file():
            raise FileNotFoundError(path)
        return str(path)
    check_may_be_on_hub(source)
    repository = str(source)
    file = str(Path(subfolder, FILE))
    try:
        return from_hub(hf_hub_download, repository, filename=file, **options)
    except EntryNotFoundError as error:
        raise FileNotFoundError(file) from error
    except OSError as error:
        reason = hub_reason(error)
    # The Hub does not answer. Within `except`, Python would link this error to the Hub's error. Commands look for such
    # a link, and would report that the model itself cannot be loaded.
    raise _error_without_hub(repository, file, options.get("revision"), reason)


def _error_without_hub(repository: str, file: str, revision: str | None, reason: str) -> OSError:
    """Error if the Hub does not answer: FileNotFoundError if the cache knows that the repository lacks the file."""
    cached = try_to_load_from_cache(repository, file, revision=revision)
    is_known_to_be_absent = cached is _CACHED_NO_EXIST  # the Hub said so at an earlier look-up
    if is_known_to_be_absent:
        return FileNotFoundError(file)
    return OSError(f"whether `{repository}` has a context model, `{file}`, cannot be looked up: {reason}")

"""The validations that a run remembers: the first, and the last or best."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from svqvae_hf.trainer.identity import changed_names

STATE = ("first", "chosen", "ids", "step", "weights", "measured")  # attributes that checkpoints store

Numbers = dict[str, dict[str, float]]  # of each set, by its name, in the order of `--validation_data_dir`


class Validations:
    """Remembers two validations of a run: the first one, and a chosen one, which is the best or the last.

    Args:
        network (`nn.Module`): The bare network.
        keep_best (`bool`): Choose the validation with the highest PSNR on the first set (the mean over its scales),
            among those that quantised, and keep its weights. Further sets are only watched. Otherwise, the last
            validation is chosen.
        measured (`dict[str, Any]`): What is measured, by the option that says it.

    Attributes:
        first, chosen (`dict[str, dict[str, float]]`): Numbers of each set in the first and the chosen validation.
        step (`int`): Steps done before the chosen validation.
        weights (`dict[str, torch.Tensor]`): Weights of the chosen validation on the CPU, with `keep_best`.
    """

    def __init__(self, network: nn.Module, keep_best: bool, measured: Mapping[str, Any]):
        self.network = network
        self.keep_best = keep_best
        # What must be equal in a resumed run, so that its validations can be compared with earlier ones.
        self.measured = {"load_best_model_at_end": keep_best, **measured}
        self.first: Numbers = {}
        self.chosen: Numbers = {}
        self.ids: dict[str, torch.Tensor] = {}  # of each set, in the first validation that quantised
        self.step = 0
        self.weights: dict[str, torch.Tensor] = {}

    @property
    def start_was_best(self) -> bool:
        """Whether the weights before the first step are the best, so that the result has learned nothing."""
        has_best = self.keep_best and bool(self.weights)
        return has_best and self.step == 0

    @property
    def score(self) -> float:
        """Score of the chosen validation; minus infinity if none is chosen."""
        if not self.chosen:
            return float("-inf")
        return score_of(self.chosen)

    def add(self, steps_done: int, numbers: Numbers, ids: Mapping[str, torch.Tensor]) -> None:
        """Adds a validation, while the network has the weights that were validated.

        Args:
            steps_done (`int`): Steps done before it.
            numbers (`dict[str, dict[str, float]]`): Numbers of each set. `ids_kept` is added: the fraction of ids that
                have not changed since the first validation that quantised.
            ids (`dict[str, torch.Tensor]`): Ids `(n,)` of each set in an order that does not depend on batches; empty
                if nothing was quantised.
        """
        was_quantised = has_ids(ids)
        if was_quantised:
            self._add_ids_kept(numbers, ids)
        if not self.first:
            self.first = numbers
        if not self.keep_best:
            self._choose(steps_done, numbers)  # the last validation is always the chosen one
            return
        # Without quantisation, reconstructions are better than they can be with it, and say nothing about the result.
        if was_quantised:
            self._choose_if_best(steps_done, numbers)

    def _choose_if_best(self, steps_done: int, numbers: Numbers) -> None:
        """Chooses a validation and copies the weights of the network, if it has the highest score so far."""
        if score_of(numbers) > self.score:
            self._choose(steps_done, numbers)
            self.weights = {name: value.cpu().clone() for name, value in self.network.state_dict().items()}

    def _choose(self, steps_done: int, numbers: Numbers) -> None:
        """Remembers the step and the numbers of a validation as those of the chosen one."""
        self.step = steps_done
        self.chosen = numbers

    def _add_ids_kept(self, numbers: Numbers, ids: Mapping[str, torch.Tensor]) -> None:
        """Adds to the numbers of each set the fraction of its ids that are as in the first quantised validation."""
        if not has_ids(self.ids):  # this validation is the first one that quantised
            self.ids = dict(ids)
        for name, current_ids in ids.items():
            is_kept = current_ids == self.ids[name]  # (n,)
            numbers[name]["ids_kept"] = is_kept.float().mean().item()

    def state_dict(self) -> dict[str, Any]:
        """All that the run remembers."""
        return {name: getattr(self, name) for name in STATE}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from a state.

        Raises:
            ValueError: If the run of the state has validated already, and with other images, other scales or another
                `--load_best_model_at_end` than this run.
        """
        numbers_of_first_validation = state["first"]  # empty if there was no validation
        has_validated = len(numbers_of_first_validation) > 0
        changed = changed_names(state["measured"], self.measured)
        if has_validated and changed:
            raise ValueError(
                f"`--{changed[0]}` must be as in the checkpoint, and so must the images that it names, because later "
                "validations are compared with earlier ones. Restore it, or start a new run in another `--output_dir`."
            )
        for name in STATE:
            if name != "measured":
                setattr(self, name, state[name])


def has_ids(ids: Mapping[str, torch.Tensor]) -> bool:
    """Whether a validation quantised."""
    return any(len(ids_of_set) > 0 for ids_of_set in ids.values())


def score_of(numbers: Numbers) -> float:
    """PSNR of the first set, which decides which validation is the best."""
    first_set = next(iter(numbers))
    return mean_psnr(numbers[first_set])


def mean_psnr(numbers_of_set: Mapping[str, float]) -> float:
    """Mean PSNR of a set over its scales."""
    values = [value for name, value in numbers_of_set.items() if name.startswith("psnr@")]
    return sum(values) / len(values)

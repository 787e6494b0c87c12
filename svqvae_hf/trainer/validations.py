"""The validations that a run remembers: the first, and the last or best."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn


class Validations:
    """The first validation of a run and a chosen one, the best or the last. Each has the numbers of some sets.

    Args:
        network (`nn.Module`): The bare network.
        keep_best (`bool`): Choose the one of the highest mean PSNR over sets and scales, among those that quantised,
            and keep its weights.
        measured (`list`): Names and sizes of the sets, and scales.

    Attributes:
        first, chosen (`dict[str, dict[str, float]]`): Numbers of each set in the first and the chosen validation.
        step (`int`): Steps done before the chosen validation.
        weights (`dict[str, torch.Tensor]`): Its weights, on the CPU, with `keep_best`.
    """

    def __init__(self, network: nn.Module, keep_best: bool, measured: list[Any]):
        self.network, self.keep_best, self.measured = network, keep_best, [keep_best, *measured]
        self.first: dict[str, dict[str, float]] = {}
        self.chosen: dict[str, dict[str, float]] = {}
        self.ids: dict[str, torch.Tensor] = {}
        self.step, self.score = 0, float("-inf")
        self.weights: dict[str, torch.Tensor] = {}

    def add(self, steps_done: int, numbers: dict[str, dict[str, float]], ids: dict[str, torch.Tensor]) -> None:
        """Adds a validation, while the network has the weights that were validated.

        Args:
            steps_done (`int`): Steps done before it.
            numbers (`dict[str, dict[str, float]]`): Numbers of each set. `ids_kept` is added: the fraction of ids that
                have not changed since the first validation that quantised.
            ids (`dict[str, torch.Tensor]`): Ids `(n,)` of each set; empty if nothing was quantised.
        """
        self.first, self.ids = self.first or numbers, self.ids if any(map(len, self.ids.values())) else ids
        for name, now in ids.items():
            if len(now) == len(self.ids.get(name, "")) > 0:
                numbers[name]["ids_kept"] = (now == self.ids[name]).float().mean().item()
        score = sum(value for each in numbers.values() for name, value in each.items() if name.startswith("psnr@"))
        if not self.keep_best or (score > self.score and any(map(len, ids.values()))):
            self.score, self.step, self.chosen = score, steps_done, numbers
            weights = self.network.state_dict() if self.keep_best else {}
            self.weights = {name: value.cpu().clone() for name, value in weights.items()}

    def state_dict(self) -> dict[str, Any]:
        """All of it."""
        return {name: value for name, value in vars(self).items() if name not in ("network", "keep_best")}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from a state.

        Raises:
            ValueError: If its validations measured something else, or kept the weights of the best or not.
        """
        if state["first"] and state.get("measured", self.measured) != self.measured:
            raise ValueError(f"Validations must be of {state['measured']}, as in the checkpoint, got {self.measured}.")
        vars(self).update(state, measured=self.measured)

"""Muon for the matrices of layers, and Adam for all other weights, as one optimizer."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

MOMENTUM = 0.95


class MuonAndAdam(torch.optim.Optimizer):
    """Muon (arXiv 2502.16982) for a group of matrices, and Adam for a group of other weights.

    Muon's updates have the size of Adam's, so both have one learning rate.

    Args:
        params (`Sequence[dict]`): Two groups, from [`muon_groups`].
        lr (`float`): Learning rate.
        betas (`tuple[float, float]`): Decays of Adam's means of gradients and of squared gradients.
    """

    def __init__(self, params: Sequence[dict[str, Any]], lr: float, betas: tuple[float, float]):
        matrix_group, other_group = params
        self.muon = torch.optim.Muon([matrix_group], lr=lr, momentum=MOMENTUM, adjust_lr_fn="match_rms_adamw")
        self.adam = torch.optim.AdamW([other_group], lr=lr, betas=betas)
        super().__init__([matrix_group, other_group], {"lr": lr, "betas": betas})
        self.share_groups()

    def share_groups(self) -> None:
        """Lets a schedule of the learning rate change both optimizers."""
        self.param_groups = self.muon.param_groups + self.adam.param_groups

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates all weights."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.muon.step()
        self.adam.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """States of both optimizers."""
        return {"muon": self.muon.state_dict(), "adam": self.adam.state_dict()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Loads the states of both optimizers."""
        self.muon.load_state_dict(state_dict["muon"])
        self.adam.load_state_dict(state_dict["adam"])
        self.share_groups()


def muon_groups(model: PreTrainedModel, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups of trained weights: matrices of linear layers, which decay, and all others.

    The embeddings of tokens and the head count as others, although they are matrices.
    """
    token_tables: set[int] = set()  # identities of their weights
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        if layer is not None:
            token_tables.add(id(layer.weight))
    matrices: list[nn.Parameter] = []
    other_weights: dict[int, nn.Parameter] = {}  # by identity, because the head may share the embeddings' weight
    for module in model.modules():
        for weight in module.parameters(recurse=False):
            if not weight.requires_grad:
                continue
            is_layer_matrix = isinstance(module, nn.Linear) and weight.ndim == 2
            if is_layer_matrix and id(weight) not in token_tables:
                matrices.append(weight)
            else:
                other_weights[id(weight)] = weight
    decayed_group = {"params": matrices, "weight_decay": weight_decay}
    other_group = {"params": list(other_weights.values()), "weight_decay": 0.0}
    return [decayed_group, other_group]

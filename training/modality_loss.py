"""Loss of the next token, summed over texts and over images apart."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from svqvae_hf.trainer.examples import IGNORED


@dataclass(frozen=True)
class ModalitySums:
    """Sums over the tokens of texts or of images.

    Args:
        loss (`float`): Cross-entropy in nats.
        tokens (`float`): Number of tokens.
        hits (`float`): Tokens that the model thinks most likely.
    """

    loss: float
    tokens: float
    hits: float


class ModalityLoss:
    """Cross-entropy of the next token. Also sums the loss over texts and over images, since the last log.

    Sums are tensors `(2, 3)`: a row for texts and a row for images, with the columns loss, tokens and hits, as in
    [`ModalitySums`].

    Args:
        codes (`range`): Tokens that are codes.
    """

    def __init__(self, codes: range):
        self.codes = codes
        self.training_sums = torch.zeros(2, 3)
        self.validation_sums = torch.zeros(2, 3)

    def __call__(self, outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        """Mean loss of logits `(batch, length, vocab_size)` and labels `(batch, length)`.

        The Trainer passes `num_items_in_batch`, the number of learned tokens of all batches of a step.
        """
        targets = labels[:, 1:].flatten()  # (tokens,)
        logits = outputs.logits[:, :-1].flatten(0, 1).float()  # (tokens, vocab_size)
        losses = F.cross_entropy(logits, targets, reduction="none", ignore_index=IGNORED)  # (tokens,)
        self._add_sums(logits, targets, losses)
        if num_items_in_batch is None:
            num_items_in_batch = (targets != IGNORED).sum()
        return losses.sum() / num_items_in_batch

    @torch.no_grad()
    def _add_sums(self, logits: torch.Tensor, targets: torch.Tensor, losses: torch.Tensor) -> None:
        """Adds a batch to the sums of training or of a validation."""
        is_counted = targets != IGNORED
        is_code = (targets >= self.codes.start) & (targets < self.codes.stop)
        is_text = is_counted & ~is_code
        is_image = is_counted & is_code
        masks = torch.stack([is_text, is_image]).float()  # (2, tokens): 1 where a token counts
        is_hit = (logits.argmax(-1) == targets).float()  # (tokens,)
        loss_sums = masks @ losses  # (2,), of texts and of images
        token_counts = masks.sum(1)  # (2,)
        hit_counts = masks @ is_hit  # (2,)
        sums = torch.stack([loss_sums, token_counts, hit_counts], dim=1)  # (2, 3)
        is_training = losses.requires_grad  # validations compute no gradients
        if is_training:
            self.training_sums = self.training_sums.to(sums.device) + sums
        else:
            self.validation_sums = self.validation_sums.to(sums.device) + sums

    def take_training_sums(self) -> torch.Tensor:
        """Returns the sums `(2, 3)` of training since the last call."""
        sums = self.training_sums
        self.training_sums = torch.zeros(2, 3)
        return sums

    def take_validation_sums(self) -> torch.Tensor:
        """Returns the sums `(2, 3)` of validations since the last call."""
        sums = self.validation_sums
        self.validation_sums = torch.zeros(2, 3)
        return sums

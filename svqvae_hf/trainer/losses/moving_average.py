"""A moving average without start-up bias."""

import torch
from torch import nn


class MovingAverage(nn.Module):
    """Moving average of batches, in which each batch counts `decay` times as much as the next one.

    The weights of all batches so far sum to 1, so the average starts at the first batch (the bias correction of Adam,
    arXiv 1412.6980, section 3). Before the first batch it is 0.

    Args:
        shape (`tuple[int, ...]`): Shape of the average.
        decay (`float`): In [0, 1).
    """

    mean: torch.Tensor
    filled: torch.Tensor

    def __init__(self, shape: tuple[int, ...], decay: float):
        super().__init__()
        self.decay = decay
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("filled", torch.zeros(()))  # 1 - decay ** batches

    @torch.no_grad()
    def update(self, batch: torch.Tensor) -> None:
        """Adds a batch, unless one of its values is not finite.

        Args:
            batch (`torch.Tensor`): Mean of the batch over all processes, of the average's shape.
        """
        filled = self.decay * self.filled + (1 - self.decay)
        mean = torch.lerp(self.mean, batch.float(), (1 - self.decay) / filled)
        finite = batch.isfinite().all()
        # New tensors, because a loss whose backward pass is still to come may hold the old ones.
        self.mean, self.filled = torch.where(finite, mean, self.mean), torch.where(finite, filled, self.filled)

"""A moving average that starts without bias."""

import torch
from torch import nn


class MovingAverage(nn.Module):
    """Mean of batches in which each counts `decay` times as much as the one after it.

    The weights of all batches so far sum to 1, so the first batch is the first mean: no start value to outgrow (the
    bias correction of Adam, arXiv 1412.6980, section 3). Before the first batch the mean is 0.

    Args:
        shape (`tuple[int, ...]`): Shape of the mean.
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
            batch (`torch.Tensor`): Mean of the batch over all processes, in the shape of the mean.
        """
        filled = self.decay * self.filled + (1 - self.decay)
        mean = torch.lerp(self.mean, batch.float(), (1 - self.decay) / filled)
        finite = batch.isfinite().all()
        # New tensors, since a loss that is yet to be differentiated may hold the old ones.
        self.mean, self.filled = torch.where(finite, mean, self.mean), torch.where(finite, filled, self.filled)

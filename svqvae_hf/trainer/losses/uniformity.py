"""Loss that spreads latents over the whole sphere, and the moving average it needs."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from svqvae_hf.models.quantizer import flatten_latents

DECAY = 0.98


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


class UniformityLoss(nn.Module):
    """Pulls the first two moments of normalised latents to the moments of a uniform distribution on the sphere.

    Let m be the mean of the latents z, and M the mean of z z^T. The loss minimises |m|^2 + |M - I/dim|^2, which is 0
    for uniform latents; |m|^2 is the mean cosine of two latents. A batch is too small to estimate m and M, so they are
    moving averages, treated as constants. The loss `mean(2 z.m + 2 z^T (M - I/dim) z)` then has the same gradient.

    Why: with a squared error alone, latents shrink into a narrow cone. In the first bundled model the mean cosine of
    two latents was 0.64 and two of the eight dimensions were unused. Unquantised latents decoded only 0.16 dB better
    than quantised ones: the unused dimensions limited the model, not the codebook.

    Args:
        dim (`int`): Dimension of the latents.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.dim = dim
        self.moments = MovingAverage((1 + dim, dim), DECAY)  # m, then the rows of M

    def forward(self, latents: torch.Tensor, reduce: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """Adds latents to the moments and returns their loss, in float32 even under autocast.

        If a latent of any process is not finite, the moments stay as they were.

        Args:
            latents (`torch.Tensor` of shape `(batch, dim, h, w)`): Latents before quantisation, equally many on each
                process.
            reduce (`Callable`): Averages a tensor over processes, so that all have the same moments:
                `partial(accelerator.reduce, reduction="mean")`.

        Returns:
            `torch.Tensor`: Loss of this process's latents, a scalar.
        """
        with torch.autocast(latents.device.type, enabled=False):
            flat = F.normalize(flatten_latents(latents.float()), dim=-1)  # (n, dim)
            detached = flat.detach()
            self.moments.update(reduce(torch.cat([detached.mean(0, keepdim=True), detached.T @ detached / len(flat)])))
            mean, second = self.moments.mean[0], self.moments.mean[1:]
            excess = second - torch.eye(self.dim, device=second.device) / self.dim
            return 2 * ((mean + flat @ excess) * flat).sum(-1).mean()

    @property
    def mean_cosine(self) -> torch.Tensor:
        """Mean cosine of two latents, a scalar in [0, 1]: 0 if they are spread over the sphere."""
        return self.moments.mean[0].square().sum()

"""Where a codebook starts, k-means of latents, and how its dead codes come back."""

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.training_utils import EMAModel
from torch import nn

from svqvae_hf.models.quantizer import VectorQuantizer

KMEANS_ITERATIONS = 20


@torch.no_grad()
def initialise_codebook(quantizer: VectorQuantizer, latents: torch.Tensor, seed: int) -> None:
    """Sets the codes to the k-means centres of latents, on the unit sphere if the codebook is normalised.

    A code without latents starts again at a random latent. Latents that are not finite are left out. On a CPU the same
    latents and seed give the same codes.

    Args:
        quantizer ([`VectorQuantizer`]): Its codes are replaced.
        latents (`torch.Tensor` of shape `(n, codebook_embed_dim)`): Latents before quantisation.
        seed (`int`): Seed of the first centres and of the restarts.

    Raises:
        ValueError: If there are fewer latents than codes.
    """
    size = quantizer.size
    latents = latents[latents.isfinite().all(-1)]
    if len(latents) < size:
        raise ValueError(
            f"k-means needs at least as many finite latents as codes, {size}, but has {len(latents)}. Raise "
            f"`--kmeans_batches`."
        )
    generator = torch.Generator().manual_seed(seed)

    def draw(count: int) -> torch.Tensor:
        return latents[torch.randperm(len(latents), generator=generator)[:count].to(latents.device)]

    latents = F.normalize(latents.float(), dim=-1) if quantizer.l2_norm else latents.float()
    codes = quantizer.embedding.weight
    codes.copy_(draw(size))
    for _ in range(KMEANS_ITERATIONS):
        ids = quantizer.embedding(latents)
        counts = torch.bincount(ids, minlength=size).unsqueeze(-1)
        sums = torch.zeros_like(codes).index_add_(0, ids, latents)
        centres = torch.where(counts > 0, sums / counts.clamp(min=1), draw(size))
        codes.copy_(F.normalize(centres, dim=-1) if quantizer.l2_norm else centres)


class CodeRevival(nn.Module):
    """Replaces codes that no latent finds by latents, so that the whole codebook stays in use.

    A code is dead if no latent of any process found it since the last revival.

    Args:
        size (`int`): Number of codes.
    """

    counts: torch.Tensor

    def __init__(self, size: int):
        super().__init__()
        self.register_buffer("counts", torch.zeros(size, dtype=torch.int64))

    def observe(self, counts: torch.Tensor) -> None:
        """Adds how often each code was found.

        Args:
            counts (`torch.Tensor` of shape `(size,)`): int64, summed over all processes.
        """
        self.counts += counts

    @torch.no_grad()
    def revive(self, quantizer: VectorQuantizer, latents: torch.Tensor, seed: int, step: int) -> torch.Tensor:
        """Replaces each dead code by a random latent, on the unit sphere if the codebook is, and counts anew.

        No latent is used twice: of more dead codes than latents, a random part is replaced. Latents that are not
        finite are left out. The same counts, latents, seed and step give the same codes, bit by bit, on every process.

        Args:
            quantizer ([`VectorQuantizer`]): Its codes are replaced.
            latents (`torch.Tensor` of shape `(n, codebook_embed_dim)`): Latents before quantisation, of all processes,
                in the same order on each.
            seed (`int`): Seed of the run.
            step (`int`): Step of the run.

        Returns:
            `torch.Tensor`: Replaced codes, sorted, int64; for [`reset_code_state`] and [`copy_codes_to_ema`].
        """
        rng = np.random.default_rng((seed, step))
        latents = latents[latents.isfinite().all(-1)].float()
        dead = (self.counts == 0).nonzero().flatten()
        count = min(len(dead), len(latents))

        def draw(rows: torch.Tensor) -> torch.Tensor:
            return rows[torch.from_numpy(rng.permutation(len(rows))[:count]).to(rows.device)]

        replaced = draw(dead).sort().values
        codes = draw(latents)
        quantizer.embedding.weight[replaced] = F.normalize(codes, dim=-1) if quantizer.l2_norm else codes
        self.counts.zero_()
        return replaced


def reset_code_state(optimizer: torch.optim.Optimizer, weight: nn.Parameter, indices: torch.Tensor) -> None:
    """Clears what AdamW remembers of the gradients of replaced codes; nothing before its first step.

    Args:
        optimizer (`torch.optim.Optimizer`): AdamW, or Accelerate's wrapper of it.
        weight (`nn.Parameter` of shape `(size, dim)`): The codebook.
        indices (`torch.Tensor`): Replaced codes.
    """
    state = optimizer.state.get(weight, {})
    for name in state.keys() & {"exp_avg", "exp_avg_sq"}:
        state[name][indices] = 0


@torch.no_grad()
def copy_codes_to_ema(ema: EMAModel, model: nn.Module, weight: nn.Parameter, indices: torch.Tensor) -> None:
    """Copies replaced codes to the averaged weights, which would else mix them with what they replace.

    Args:
        ema (`EMAModel`): Averages of `model.parameters()`.
        model (`nn.Module`): The model that holds the codebook.
        weight (`nn.Parameter` of shape `(size, dim)`): The codebook.
        indices (`torch.Tensor`): Replaced codes.
    """
    average = dict(zip(model.parameters(), ema.shadow_params, strict=True))[weight]
    average[indices.to(average.device)] = weight[indices].to(average)

"""Codebook outside gradient descent: k-means of latents, their moving average, and replacement of dead codes."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.training_utils import EMAModel
from torch import nn

from svqvae_hf.models.quantizer import VectorQuantizer
from svqvae_hf.trainer.losses.causal import Mean, mean_of_one_process
from svqvae_hf.trainer.tracking import progress

KMEANS_ITERATIONS = 20
FORGOTTEN = 1e-6  # an average with a smaller weight has had no latents for so long that its code stays where it is


@torch.no_grad()
def initialise_codebook(quantizer: VectorQuantizer, latents: torch.Tensor, seed: int) -> None:
    """Sets the codes to the k-means centres of latents, on the unit sphere if the codebook is normalised.

    A code without latents restarts at a random latent. Latents that are not finite are left out. On a CPU, equal
    latents and seeds give equal codes.

    Args:
        quantizer ([`VectorQuantizer`]): Quantizer whose codes are replaced.
        latents (`torch.Tensor` of shape `(n, codebook_embed_dim)`): Latents before quantisation.
        seed (`int`): Seed of the first centres and of the restarts.

    Raises:
        ValueError: If there are fewer latents than codes.
    """
    size = quantizer.size
    latents = finite_rows(latents)
    if len(latents) < size:
        raise ValueError(
            f"k-means needs a finite latent per code, {size}, got {len(latents)}. Raise `--kmeans_batches`."
        )
    latents = as_codes(quantizer, latents.float())
    generator = torch.Generator().manual_seed(seed)
    codes = quantizer.embedding.weight
    codes.copy_(_draw_rows(latents, size, generator))
    for _ in progress(range(KMEANS_ITERATIONS), "k-means: rounds", KMEANS_ITERATIONS):
        ids = quantizer.embedding.nearest(latents)  # (n,)
        counts = torch.bincount(ids, minlength=size).unsqueeze(-1)  # (size, 1)
        sums = torch.zeros_like(codes).index_add_(0, ids, latents)  # (size, C)
        means = sums / counts.clamp(min=1)
        restarts = _draw_rows(latents, size, generator)
        centres = torch.where(counts > 0, means, restarts)
        codes.copy_(as_codes(quantizer, centres))


def _draw_rows(rows: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
    """Draws random rows without repetition, by PyTorch's generator."""
    order = torch.randperm(len(rows), generator=generator)
    return rows[order[:count].to(rows.device)]


def as_codes(quantizer: VectorQuantizer, latents: torch.Tensor) -> torch.Tensor:
    """Latents `(n, codebook_embed_dim)` as codes of a quantizer: on the unit sphere, if its codes lie there."""
    if quantizer.l2_norm:
        return F.normalize(latents, dim=-1)
    return latents


def finite_rows(latents: torch.Tensor) -> torch.Tensor:
    """Latents `(n, codebook_embed_dim)` without those that are not finite."""
    return latents[latents.isfinite().all(-1)]


class CodebookAverage(nn.Module):
    """Moves each code to the moving average of its latents, instead of by the gradient of the codebook loss.

    Source: VQ-VAE (arXiv 1711.00937, appendix A.1).

    Args:
        quantizer ([`VectorQuantizer`]): Quantizer whose codes move.
        decay (`float`): Decay of the average per update.
    """

    weights: torch.Tensor
    sums: torch.Tensor

    def __init__(self, quantizer: VectorQuantizer, decay: float):
        super().__init__()
        self.decay = decay
        all_ids = torch.arange(quantizer.size, device=quantizer.embedding.weight.device)
        self.register_buffer("weights", torch.ones(quantizer.size))  # 1 if a code is used as often as the mean code
        self.register_buffer("sums", quantizer.embedding.lookup(all_ids).detach())

    @torch.no_grad()
    def restart(self, quantizer: VectorQuantizer, replaced: torch.Tensor) -> None:
        """Restarts the averages of replaced codes at the codes, with the weight of an average code.

        Args:
            quantizer ([`VectorQuantizer`]): Quantizer that holds the codes.
            replaced (`torch.Tensor`): Ids of the replaced codes.
        """
        self.weights[replaced] = 1
        self.sums[replaced] = quantizer.embedding.lookup(replaced)

    @torch.no_grad()
    def update(
        self,
        quantizer: VectorQuantizer,
        latents: torch.Tensor,
        ids: torch.Tensor,
        mean: Mean = mean_of_one_process,
    ) -> None:
        """Adds the latents of a batch to the averages, and moves the codes there.

        A batch with a latent that is not finite is left out.

        Args:
            quantizer ([`VectorQuantizer`]): Quantizer whose codes move.
            latents (`torch.Tensor` of shape `(n, codebook_embed_dim)`): Latents before quantisation.
            ids (`torch.Tensor` of shape `(n,)`): Ids of their codes.
            mean (`Callable`, *optional*): Averages a tensor over all processes; not needed for one process.
        """
        latents = as_codes(quantizer, latents.float())
        # If all codes were used equally, each would have len(ids) / size latents. The weights of so many sum to 1.
        weight_of_latent = quantizer.size / len(ids)
        latent_weights = torch.full((len(ids),), weight_of_latent, device=ids.device)  # (n,)
        weighted_latents = latents * latent_weights[:, None]  # (n, C)
        # For each code, sums over the latents whose id it is
        weights = torch.zeros_like(self.weights).index_add_(0, ids, latent_weights)  # (size,)
        sums = torch.zeros_like(self.sums).index_add_(0, ids, weighted_latents)  # (size, C)
        weights = mean(weights)
        sums = mean(sums)
        if not sums.isfinite().all():
            return  # a code that is not finite would never recover
        share_of_batch = 1 - self.decay  # in the new averages
        self.weights.lerp_(weights, share_of_batch)
        self.sums.lerp_(sums, share_of_batch)
        is_averaged = self.weights > FORGOTTEN  # (size,)
        centres = self.sums[is_averaged] / self.weights[is_averaged, None]
        quantizer.embedding.weight[is_averaged] = as_codes(quantizer, centres)


class DeadCodeReset(nn.Module):
    """Replaces dead codes by latents, so that the whole codebook stays in use.

    A code is dead if no latent of any process was quantised to it since the last reset, as `counts` says.

    Args:
        size (`int`): Number of codes.
    """

    counts: torch.Tensor

    def __init__(self, size: int):
        super().__init__()
        self.register_buffer("counts", torch.zeros(size, dtype=torch.int64))

    @torch.no_grad()
    def reset(
        self, quantizer: VectorQuantizer, latents: torch.Tensor, limit: int, seed: int, step: int
    ) -> torch.Tensor:
        """Replaces dead codes by random latents, normalised if the codebook is, and sets the counts to 0.

        If more codes than `limit` are dead, a random subset is replaced: after few steps, a code that was not used
        may only be rare. No latent is used twice. Latents that are not finite are left out. Equal arguments and counts
        give bit-equal codes on every process.

        Args:
            quantizer ([`VectorQuantizer`]): Quantizer whose dead codes are replaced.
            latents (`torch.Tensor` of shape `(n, codebook_embed_dim)`): Latents before quantisation of all processes,
                in the same order on each process.
            limit (`int`): Maximum number of codes to replace.
            seed (`int`): Seed of the run.
            step (`int`): Step of the run.

        Returns:
            `torch.Tensor` of shape `(replaced,)`: Ids of the replaced codes, sorted, int64. The optimizer and averages
                still remember the old codes, so pass the ids to [`forget_codes`] and [`CodebookAverage.restart`].
        """
        rng = np.random.default_rng((seed, step))
        latents = finite_rows(latents).float()
        dead_ids = (self.counts == 0).nonzero().flatten()
        num_replaced = min(len(dead_ids), len(latents), limit)
        drawn_ids = _draw(dead_ids, num_replaced, rng)
        drawn_latents = _draw(latents, num_replaced, rng)  # (replaced, C)
        replaced_ids = drawn_ids.sort().values
        quantizer.embedding.weight[replaced_ids] = as_codes(quantizer, drawn_latents)
        self.counts.zero_()
        return replaced_ids


def _draw(rows: torch.Tensor, count: int, rng: np.random.Generator) -> torch.Tensor:
    """Draws random rows without repetition, by NumPy's generator."""
    order = torch.from_numpy(rng.permutation(len(rows)))
    return rows[order[:count].to(rows.device)]


@torch.no_grad()
def forget_codes(
    model: nn.Module,
    codes: nn.Parameter,
    replaced: torch.Tensor,
    optimizer: torch.optim.Optimizer,
    ema: EMAModel | None = None,
) -> None:
    """Clears what the optimizer and the average of weights remember of replaced codes.

    The optimizer's moments become 0. The average restarts at the new codes, because it would otherwise mix them with
    old ones.

    Args:
        model (`nn.Module`): Model that holds the codebook, and whose weights are averaged.
        codes (`nn.Parameter` of shape `(size, dim)`): The codebook.
        replaced (`torch.Tensor`): Ids of the replaced codes.
        optimizer (`torch.optim.Optimizer`): AdamW or SOAP, or Accelerate's wrapper of it.
        ema (`EMAModel`, *optional*): Average of `model.parameters()`.
    """
    state_of_codes = optimizer.state.get(codes, {})
    _clear_moments(state_of_codes, replaced)
    if ema is not None:
        _restart_average(ema, model, codes, replaced)


def _clear_moments(state: Mapping[str, Any], rows: torch.Tensor) -> None:
    """Sets the moments of some rows of a weight to 0, in the state that AdamW or SOAP has of it.

    If SOAP rotates the rows, its second moments belong to no single row, and remain.
    """
    moments = ["exp_avg"]
    if not _rotates_rows(state):
        moments.append("exp_avg_sq")
    for name in moments:
        if name in state:
            state[name][rows] = 0


def _rotates_rows(state: Mapping[str, Any]) -> bool:
    """Whether SOAP rotates the rows of a weight.

    `Q` in its state lists a rotation per dimension of the weight, or an empty list for one that is not rotated.
    """
    if "Q" not in state:
        return False
    rotation_of_rows = state["Q"][0]
    return len(rotation_of_rows) > 0


def _restart_average(ema: EMAModel, model: nn.Module, codes: nn.Parameter, replaced: torch.Tensor) -> None:
    """Restarts the averages of replaced codes at the codes themselves."""
    for parameter, average in zip(model.parameters(), ema.shadow_params, strict=True):
        if parameter is codes:
            rows = replaced.to(average.device)
            average[rows] = codes[replaced].to(average)

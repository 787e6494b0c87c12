"""The vector quantizer: one codebook, searched exactly, with the losses of VQ-VAE.

Sources: VQ-VAE (arXiv 1711.00937), and LlamaGen (arXiv 2406.06525, section 3.1) for codes on the unit sphere.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import distributed, nn

from .checks import check_finite

SEARCH_SCORES = 1 << 21  # scores held at once on CPU, where 8 MiB stay in the cache
SEARCH_SCORES_GPU = 1 << 24  # on other devices, where each chunk costs a kernel launch: 64 MiB
ENTROPY_TEMPERATURE = 0.01


class VQLosses(NamedTuple):
    """Losses of one quantisation, scalar tensors in float32.

    Args:
        vq (`torch.Tensor`): `mean((q - sg[z])^2)`, moves the codes to the latents.
        commit (`torch.Tensor`): `commit_loss_beta * mean((sg[q] - z)^2)`, moves the latents to the codes.
        entropy (`torch.Tensor`): `entropy_loss_ratio` times the entropy term; 0 if the ratio is 0, and in evaluation.
    """

    vq: torch.Tensor
    commit: torch.Tensor
    entropy: torch.Tensor

    @property
    def total(self) -> torch.Tensor:
        """Sum of the losses."""
        return self.vq + self.commit + self.entropy


class Codebook(nn.Module):
    """Code vectors, kept in float32.

    All methods read the weight by calling the module, because hooks that offload weights load them only for a call.

    Args:
        size (`int`): Number of codes.
        dim (`int`): Dimension of a code.
        l2_norm (`bool`): Whether codes are used at unit length.
    """

    def __init__(self, size: int, dim: int, l2_norm: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(size, dim))  # uniform on the sphere once normalised
        self.l2_norm = l2_norm

    def forward(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns all codes, `(size, dim)`, as stored, and as they are compared, at unit length if `l2_norm`.

        Neither is the weight itself, because hooks move it elsewhere after the call.
        """
        stored = self.weight.clone()
        if self.l2_norm:
            return stored, F.normalize(self.weight.float(), dim=-1)
        return stored, stored.float()

    def table(self) -> torch.Tensor:
        """All codes as stored, not normalised, `(size, dim)`."""
        stored, _ = self()
        return stored

    def codes(self) -> torch.Tensor:
        """All codes as they are compared, `(size, dim)` in float32, at unit length if `l2_norm`."""
        _, codes = self()
        return codes

    def lookup(self, ids: torch.Tensor) -> torch.Tensor:
        """Codes `(*ids.shape, dim)` in float32, at unit length if `l2_norm`, of ids of any shape and integer type."""
        if torch.is_grad_enabled():
            # For the backward pass, PyTorch keeps the ids, and it refuses to keep ids from `torch.inference_mode()`.
            ids = ids.clone()
        return F.embedding(ids, self.codes())

    def nearest(self, latents: torch.Tensor) -> torch.Tensor:
        """Ids `(n,)` in int64 of the nearest codes, the lowest on a tie, without gradients.

        Args:
            latents (`torch.Tensor` of shape `(n, dim)`): Latents in float32, normalised if the codes are.
        """
        return find_nearest(latents.detach(), self.codes().detach(), self.l2_norm)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "Codebook":
        """Follows the model's device but stays float32, because rounding the codes would change the ids."""

        def move(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)  # on another device, of another type, or both
            keeps_dtype = moved.dtype == tensor.dtype
            if keeps_dtype:
                return moved
            # The codes in `moved` are rounded to another type. So the original codes go to its device.
            return tensor.to(moved.device)

        return super()._apply(move, recurse)


def find_nearest(latents: torch.Tensor, codes: torch.Tensor, l2_norm: bool) -> torch.Tensor:
    """Ids `(n,)` of the codes `(size, dim)` nearest to latents `(n, dim)`, in chunks that bound the memory.

    The nearest code e of a latent z has the smallest |z - e|^2 = |z|^2 - 2 (z e - |e|^2 / 2), and so the largest score
    z e - |e|^2 / 2. Among unit vectors it has the largest z e.
    """
    scores_at_once = SEARCH_SCORES if latents.device.type == "cpu" else SEARCH_SCORES_GPU
    rows_at_once = max(1, scores_at_once // len(codes))
    num_chunks = -(-len(latents) // rows_at_once)  # rounded up
    half_squares = codes.square().sum(-1) / 2  # (size,)
    ids_of_chunks = []
    # Chunks of equal size: a small remainder would use another kernel and round differently.
    for chunk in latents.tensor_split(num_chunks):
        scores = chunk @ codes.T  # (rows, size)
        if not l2_norm:
            scores = scores - half_squares
        ids_of_chunks.append(scores.argmax(-1))
    return torch.cat(ids_of_chunks)


class VectorQuantizer(nn.Module):
    """Replaces each latent by its nearest code, in float32 and outside autocast.

    Args:
        size (`int`): Number of codes.
        dim (`int`): Dimension of a code.
        commit_loss_beta (`float`): Weight of the commitment loss.
        entropy_loss_ratio (`float`): Weight of the entropy loss; at 0 it is not computed.
        l2_norm (`bool`): Whether latents and codes are normalised to unit length first.
    """

    def __init__(self, size: int, dim: int, commit_loss_beta: float, entropy_loss_ratio: float, l2_norm: bool):
        super().__init__()
        self.size = size
        self.l2_norm = l2_norm
        self.commit_loss_beta = commit_loss_beta
        self.entropy_loss_ratio = entropy_loss_ratio
        self.embedding = Codebook(size, dim, l2_norm)

    def forward(self, latents: torch.Tensor) -> tuple[torch.Tensor, VQLosses, tuple[None, None, torch.Tensor]]:
        """Quantises latents, with the straight-through gradient.

        Args:
            latents (`torch.Tensor` of shape `(batch, codebook_embed_dim, h, w)`): Latents before quantisation.

        Returns:
            `tuple`: Quantised latents in the shape and type of `latents`; [`VQLosses`]; and `(None, None, ids)` with
            flat ids `(batch * h * w,)` in int64, as the quantizer of diffusers' `VQModel` returns them.
        """
        # One row per latent: `flat` and `codes` are (batch * h * w, dim), `ids` is (batch * h * w,).
        flat, ids, codes = self.search(latents)
        losses = VQLosses(
            vq=F.mse_loss(codes, flat.detach()),
            commit=self.commit_loss_beta * F.mse_loss(flat, codes.detach()),
            entropy=self._entropy_loss(flat),
        )
        # The straight-through gradient: the values are the codes, and the gradient reaches the latents unchanged.
        zero_with_gradient = flat - flat.detach()
        quantized = codes.detach() + zero_with_gradient  # (batch * h * w, dim)
        batch, _, height, width = latents.shape
        quantized = quantized.view(batch, height, width, -1).permute(0, 3, 1, 2)  # (batch, dim, h, w)
        return quantized.to(latents.dtype).contiguous(), losses, (None, None, ids)

    def search(self, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Finds the nearest code of each latent `(batch, codebook_embed_dim, h, w)`.

        Returns:
            `tuple`: The latents as they are compared, their ids and their codes, one row per latent.
        """
        with _without_autocast(latents.device.type):
            flat = flatten_latents(self.normalise(latents.float()))
            ids = self.embedding.nearest(flat)
            codes = self.embedding.lookup(ids)
        return flat, ids, codes

    def nearest_ids(self, latents: torch.Tensor) -> torch.Tensor:
        """Finds the nearest code of each latent.

        Args:
            latents (`torch.Tensor` of shape `(batch, codebook_embed_dim, h, w)`): Latents before quantisation.

        Returns:
            `torch.Tensor`: Ids `(batch, h, w)` in int64.

        Raises:
            ValueError: If latents are NaN or infinite. One such pixel spreads to all latents of its image. A compiled
                graph does not check.
        """
        check_finite(latents)
        _, ids, _ = self.search(latents)
        batch, _, height, width = latents.shape
        return ids.view(batch, height, width)

    def get_codebook_entry(self, ids: torch.Tensor, shape: tuple[int, int, int, int] | None = None) -> torch.Tensor:
        """Looks up codes.

        Args:
            ids (`torch.Tensor`): Integers in `[0, codebook_size)`, of any shape.
            shape (`tuple[int, int, int, int]`, *optional*): `(batch, h, w, codebook_embed_dim)`.

        Returns:
            `torch.Tensor`: Codes in float32: `(batch, codebook_embed_dim, h, w)` with a shape, `(*ids.shape,
            codebook_embed_dim)` without.
        """
        codes = self.embedding.lookup(ids)
        if shape is None:
            return codes
        return codes.view(shape).permute(0, 3, 1, 2).contiguous()

    def usage(self, ids: torch.Tensor) -> float:
        """Fraction of the codebook that occurs in ids of any shape."""
        return ids.unique().numel() / self.size

    def normalise(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents `(batch, codebook_embed_dim, h, w)` at unit length if codes are, not quantised."""
        if not self.l2_norm:
            return latents
        return F.normalize(latents.float(), dim=1).to(latents.dtype)

    def _entropy_loss(self, flat: torch.Tensor) -> torch.Tensor:
        """Entropy loss, `entropy_loss_ratio * (entropy - entropy_of_mean)`, which training makes small.

        It rewards a low entropy of each latent's soft assignment, so that latents lie near codes, and a high entropy
        of the mean assignment, so that all codes are used.

        The mean assignment is over the latents of all processes, but its gradient in a process is only for the latents
        of this process. Training with several processes takes the mean of their gradients. As each process has equally
        many latents, this is the gradient for the joined batch. Source: LlamaGen, `compute_entropy_loss`.
        """
        if self.entropy_loss_ratio == 0 or not self.training:
            return flat.new_zeros(())
        all_ids = torch.arange(self.size, device=flat.device)
        codes = self.embedding.lookup(all_ids)  # (size, dim)
        squared_distances = torch.cdist(flat, codes).square()  # (latents, size)
        log_probs = F.log_softmax(-squared_distances / ENTROPY_TEMPERATURE, dim=-1)
        probs = log_probs.exp()
        entropy = -(probs * log_probs).sum(-1).mean()
        mean_probs = _mean_over_processes(probs.mean(0))  # (size,)
        smallest = torch.finfo(mean_probs.dtype).tiny
        log_mean_probs = mean_probs.clamp(min=smallest).log()  # finite for unused codes, too
        entropy_of_mean = -(mean_probs * log_mean_probs).sum()
        return self.entropy_loss_ratio * (entropy - entropy_of_mean)


def flatten_latents(latents: torch.Tensor) -> torch.Tensor:
    """`(batch, channels, h, w)` -> one row per latent, `(batch * h * w, channels)`."""
    return latents.permute(0, 2, 3, 1).flatten(0, 2)


def _without_autocast(device_type: str) -> AbstractContextManager:
    """Context in which operations on a device run in the type of their inputs."""
    if device_type == "meta":  # meta tensors have no autocast
        return nullcontext()
    return torch.autocast(device_type, enabled=False)


def _mean_over_processes(value: torch.Tensor) -> torch.Tensor:
    """Mean of a value over all processes. Its gradient is the gradient of the value of this process."""
    is_distributed = distributed.is_available() and distributed.is_initialized()
    if not is_distributed:
        return value
    mean = value.detach().clone()
    distributed.all_reduce(mean)
    mean /= distributed.get_world_size()
    difference = mean - value.detach()  # without gradient, so that the sum below has the gradient of `value`
    return value + difference

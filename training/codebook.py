"""Where a codebook starts: k-means of latents."""

import torch
import torch.nn.functional as F

from svqvae_hf.modeling_svqvae import VectorQuantizer

KMEANS_ITERATIONS = 20


@torch.no_grad()
def initialise_codebook(quantizer: VectorQuantizer, latents: torch.Tensor, seed: int) -> None:
    """Sets the codes to the k-means centres of latents, on the unit sphere if the codebook is normalised.

    A code without latents starts again at a random latent. The same latents and seed give the same codes.

    Args:
        quantizer ([`VectorQuantizer`]): Its codes are replaced.
        latents (`torch.Tensor` of shape `(n, codebook_embed_dim)`): Latents before quantisation.
        seed (`int`): Seed of the first centres and of the restarts.

    Raises:
        ValueError: If there are fewer latents than codes.
    """
    size = quantizer.size
    if len(latents) < size:
        raise ValueError(
            f"k-means needs at least as many latents as codes, {size}, but has {len(latents)}. Raise "
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

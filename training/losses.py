"""What training minimises: reconstruction at several scales, and the losses of the codebook."""

import torch
import torch.nn.functional as F
from torch import nn

from svqvae_hf import SVQVAE
from svqvae_hf.modeling_svqvae import resize_latents


class Objective(nn.Module):
    """An SVQVAE with its losses, as the one module that is prepared for training.

    Args:
        vqvae ([`SVQVAE`]): Model to train.
        vq_loss_weight (`float`): Weight of the vq and commitment losses beside the reconstruction loss.
    """

    def __init__(self, vqvae: SVQVAE, vq_loss_weight: float):
        super().__init__()
        self.vqvae = vqvae
        self.vq_loss_weight = vq_loss_weight

    def forward(
        self, sample: torch.Tensor, scales: list[float], quantize: bool
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Loss of one batch.

        The reconstruction loss is the mean squared error over the pixels of all scales, in units of the pixel range,
        against the image resized by area. The losses of the codebook are likewise means over the latents of all
        scales.

        Args:
            sample (`torch.Tensor` of shape `(batch, 3, height, width)`): Images in the model's `pixel_range`.
            scales (`list[float]`): Scales of the reconstructions, each a whole number of latents; 1 is the last.
            quantize (`bool`): Whether latents are quantised, or only normalised as the quantizer would.

        Returns:
            `tuple`: Loss, and what to log of scale 1, all scalar tensors; `usage` is of all scales since the counts
            were reset.
        """
        low, high = self.vqvae.config["pixel_range"]
        latents = self.vqvae.encode(sample).latents
        loss = sample.new_zeros(())
        for scale in scales:
            scaled = resize_latents(latents, scale)
            logs = {}
            if quantize:
                scaled, quantizer_losses, (perplexity, _, _) = self.vqvae.quantize(scaled)
                logs = {**quantizer_losses._asdict(), "perplexity": perplexity}
            elif self.vqvae.config["codebook_l2_norm"]:
                scaled = F.normalize(scaled.float(), dim=1)
            output = self.vqvae.decode(scaled, force_not_quantize=True).sample.float()
            mse = F.mse_loss(output, F.interpolate(sample, output.shape[-2:], mode="area")) / (high - low) ** 2
            share = scale**2 / sum(each**2 for each in scales)
            loss = loss + share * mse
            if quantize:
                codebook_loss = quantizer_losses.vq + quantizer_losses.commit + quantizer_losses.entropy
                loss = loss + share * self.vq_loss_weight * codebook_loss
        logs["psnr"] = -10 * mse.log10()
        return loss, {name: value.detach() for name, value in logs.items()}

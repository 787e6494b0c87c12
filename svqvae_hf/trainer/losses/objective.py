"""What training minimises: reconstructions at several scales, and the losses of codebook and latents."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from svqvae_hf.models.modeling_svqvae import SVQVAE, resize_latents
from svqvae_hf.models.quantizer import VQLosses
from svqvae_hf.trainer.losses.adversarial import (
    MIN_SIDE,
    LeCAM,
    adaptive_weight,
    hinge_discriminator_loss,
    hinge_generator_loss,
)
from svqvae_hf.trainer.losses.uniformity import LatentSpread
from svqvae_hf.trainer.train_options import TrainConfig


class Reconstructions(NamedTuple):
    """What [`MultiScaleForward`] gives.

    Args:
        samples (`list[torch.Tensor]`): Reconstruction `(batch, 3, height, width)` at each scale in `pixel_range`, not
            clamped.
        latents (`torch.Tensor` of shape `(batch, codebook_embed_dim, h, w)`): Latents before quantisation.
        losses (`list[VQLosses]`): Losses of each quantisation; empty if nothing was quantised.
        ids (`list[torch.Tensor]`): Flat ids of each scale; empty likewise.
    """

    samples: list[torch.Tensor]
    latents: torch.Tensor
    losses: list[VQLosses]
    ids: list[torch.Tensor]


class MultiScaleForward(nn.Module):
    """An SVQVAE and its forward pass in training, as the one module that is prepared for it.

    Args:
        vqvae ([`SVQVAE`]): Model to train.
    """

    def __init__(self, vqvae: SVQVAE):
        super().__init__()
        self.vqvae = vqvae

    def forward(self, sample: torch.Tensor, scales: Sequence[float], quantize: bool) -> Reconstructions:
        """Encodes once, and reconstructs at each scale.

        Args:
            sample (`torch.Tensor` of shape `(batch, 3, height, width)`): Images in the model's `pixel_range`.
            scales (`Sequence[float]`): Scales of the reconstructions.
            quantize (`bool`): Whether latents are quantised, or only normalised as the quantizer would.
        """
        output = Reconstructions([], self.vqvae.encode(sample).latents, [], [])
        for scale in scales:
            scaled = resize_latents(output.latents, scale)
            if quantize:
                scaled, losses, (_, _, ids) = self.vqvae.quantize(scaled)
                output.losses.append(losses)
                output.ids.append(ids)
            elif self.vqvae.config["codebook_l2_norm"]:
                scaled = F.normalize(scaled.float(), dim=1)
            output.samples.append(self.vqvae.decode(scaled, force_not_quantize=True).sample.float())
        return output


class Pair(NamedTuple):
    """A reconstruction beside what it should be, both `(batch, 3, h, w)` with black at 0 and white at 1.

    `share` is its part of the pixels that are compared at all scales.
    """

    target: torch.Tensor
    output: torch.Tensor
    share: float

    def clamped(self) -> "Pair":
        """With the reconstruction between black and white."""
        return self._replace(output=self.output.clamp(0, 1))

    def first(self, count: int) -> "Pair":
        """The first images."""
        return self._replace(target=self.target[:count], output=self.output[:count])

    def fits(self, side: int) -> bool:
        """Whether the shorter side has at least `side` pixels."""
        return min(self.output.shape[-2:]) >= side


def compare(
    sample: torch.Tensor, outputs: Sequence[torch.Tensor], pixel_range: Sequence[float], scale_target: str
) -> list[Pair]:
    """Pairs each reconstruction with its target.

    Args:
        sample (`torch.Tensor` of shape `(batch, 3, height, width)`): Images in `pixel_range`.
        outputs (`Sequence[torch.Tensor]`): Reconstructions at each scale in `pixel_range`.
        pixel_range (`tuple[float, float]`): Values of black and white.
        scale_target (`str`): `"resized"`: the image is brought to the size of the reconstruction; `"upsampled"`: the
            reconstruction to that of the image. By area where that is smaller, bicubic where it is larger.
    """
    low, high = pixel_range
    sample = (sample - low) / (high - low)
    outputs = [(output - low) / (high - low) for output in outputs]
    if scale_target == "resized":
        pairs = [(_resize(sample, output.shape[-2:]), output) for output in outputs]
    else:
        pairs = [(sample, _resize(output, sample.shape[-2:])) for output in outputs]
    pixels = [output[0, 0].numel() for _, output in pairs]
    return [Pair(*pair, count / sum(pixels)) for pair, count in zip(pairs, pixels, strict=True)]


def _resize(sample: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    if sample.shape[-2:] == tuple(size):
        return sample
    return F.interpolate(sample, tuple(size), mode="area" if size[0] < sample.shape[-2] else "bicubic")


def step_scales(config: TrainConfig, latent_side: int, step: int) -> list[float]:
    """The scales of a step, the full one last: the fixed ones, or random latent sides beside the full one.

    Of random sides (FlexVAR, section 3.3) the largest are dropped until all scales together have at most
    `token_budget` times the tokens of the full one.
    """
    if config.scales:
        return sorted(config.scales)
    rng = np.random.default_rng((config.seed, step))
    count = min(config.num_scales - 1, latent_side - 1)
    sides = sorted(rng.choice(np.arange(1, latent_side), size=count, replace=False).tolist())
    if config.token_budget is not None:
        while sides and sum(side**2 for side in sides) > (config.token_budget - 1) * latent_side**2:
            sides.pop()
    return [*(side / latent_side for side in sides), 1.0]


class Objective:
    """The weighted sum of losses, each from its start step on.

    Losses are means: those of pixels over the compared pixels of all scales, those of the quantizer over the latents
    of all scales. LPIPS and the discriminator leave out the scales whose output is too small for them.

    Args:
        config ([`TrainConfig`]): Weights and start steps.
        vqvae ([`SVQVAE`]): The model that is trained, on its device.
        lpips (`nn.Module`, *optional*): Frozen LPIPS, needed for its weight.
        discriminator (`nn.Module`, *optional*): Patch discriminator, needed for the adversarial weight.
        mean (`Callable`): Averages a tensor over all processes.
    """

    def __init__(
        self,
        config: TrainConfig,
        vqvae: SVQVAE,
        lpips: nn.Module | None,
        discriminator: nn.Module | None,
        mean: Callable[[torch.Tensor], torch.Tensor],
    ):
        self.config = config
        self.pixel_range = vqvae.config["pixel_range"]
        self.last_weight = vqvae.decoder.conv_out.weight
        self.lpips = lpips
        self.discriminator = discriminator
        self.mean = mean
        self.spread = LatentSpread(vqvae.config["codebook_embed_dim"]).to(vqvae.device)
        self.lecam = LeCAM().to(vqvae.device)

    def weight(self, part: str, step: int) -> float:
        """Weight of a part of the objective at a step: 0 before its start."""
        return getattr(self.config, f"{part}_weight") if step >= getattr(self.config, f"{part}_start") else 0.0

    def pairs(self, sample: torch.Tensor, output: Reconstructions) -> list[Pair]:
        """Reconstructions beside their targets."""
        return compare(sample, output.samples, self.pixel_range, self.config.scale_target)

    def __call__(
        self, pairs: Sequence[Pair], output: Reconstructions, step: int
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Loss of the model at a step, and its parts without their weights, all scalar tensors.

        Args:
            pairs (`Sequence[Pair]`): What [`~Objective.pairs`] gives for `output`.
            output ([`Reconstructions`]): Of this step.
            step (`int`): Steps done before.
        """
        parts = self._reconstruction_losses(pairs, step)
        reconstruction = self._sum(parts, step)
        codebook = self._codebook_losses(output, step)
        loss = reconstruction + self._sum(codebook, step)
        parts |= codebook
        if self.weight("adversarial", step):
            parts["adversarial"] = self._generator_loss(pairs)
            weight = self.weight("adversarial", step)
            if self.config.adversarial_adaptive:
                weight *= adaptive_weight(reconstruction, parts["adversarial"], self.last_weight, self.mean)
                parts["adversarial_weight"] = weight
            loss = loss + weight * parts["adversarial"]
        return loss, {name: value.detach() for name, value in parts.items()}

    def discriminator_loss(
        self, pairs: Sequence[Pair], discriminator: nn.Module
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Loss of the discriminator on the pairs of the model's step, and its parts, all scalar tensors.

        Args:
            pairs (`Sequence[Pair]`): What [`~Objective.pairs`] gave, one of them large enough.
            discriminator (`nn.Module`): The discriminator as prepared for training.
        """
        large = [pair for pair in pairs if pair.fits(MIN_SIDE)]
        shares = [pair.share for pair in large]
        real = [discriminator(2 * pair.target - 1) for pair in large]
        fake = [discriminator(2 * pair.output.detach() - 1) for pair in large]
        parts = {
            "discriminator": _weighted(shares, map(hinge_discriminator_loss, real, fake)),
            "real_logits": _weighted(shares, (logits.mean() for logits in real)) / sum(shares),
            "fake_logits": _weighted(shares, (logits.mean() for logits in fake)) / sum(shares),
        }
        loss = parts["discriminator"]
        if self.config.lecam_weight:
            self.lecam.update(*(self.mean(parts[name].detach()) for name in ("real_logits", "fake_logits")))
            parts["lecam"] = _weighted(shares, map(self.lecam.loss, real, fake))
            loss = loss + self.config.lecam_weight * parts["lecam"]
        return loss, {name: value.detach() for name, value in parts.items()}

    def _sum(self, parts: Mapping[str, torch.Tensor], step: int) -> torch.Tensor:
        return sum((self.weight(name, step) * value for name, value in parts.items()), start=torch.zeros(()))

    def _reconstruction_losses(self, pairs: Sequence[Pair], step: int) -> dict[str, torch.Tensor]:
        shares = [pair.share for pair in pairs]
        parts = {}
        for name, loss in (("l2", F.mse_loss), ("l1", F.l1_loss)):
            if self.weight(name, step):
                parts[name] = _weighted(shares, (loss(pair.output, pair.target) for pair in pairs))
        large = [pair for pair in pairs if self.lpips is not None and pair.fits(self.lpips.min_side)]
        if self.weight("lpips", step) and large:
            distances = (self.lpips(2 * pair.output - 1, 2 * pair.target - 1) for pair in large)
            parts["lpips"] = _weighted([pair.share for pair in large], distances)
        return parts

    def _codebook_losses(self, output: Reconstructions, step: int) -> dict[str, torch.Tensor]:
        tokens = [ids.numel() for ids in output.ids]
        shares = [count / sum(tokens) for count in tokens]
        parts = {}
        for name, field in (("vq", "vq"), ("commitment", "commit"), ("entropy", "entropy")):
            if output.losses and self.weight(name, step):
                parts[name] = _weighted(shares, (getattr(losses, field) for losses in output.losses))
        if self.weight("spread", step):
            parts["spread"] = self.spread(output.latents, self.mean)
        return parts

    def _generator_loss(self, pairs: Sequence[Pair]) -> torch.Tensor:
        large = [pair for pair in pairs if pair.fits(MIN_SIDE)]
        losses = (hinge_generator_loss(self.discriminator(2 * pair.output - 1)) for pair in large)
        return _weighted([pair.share for pair in large], losses)


def _weighted(shares: Sequence[float], losses: Iterable[torch.Tensor]) -> torch.Tensor:
    return torch.stack([share * loss for share, loss in zip(shares, losses, strict=True)]).sum()

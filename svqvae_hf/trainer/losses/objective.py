"""The objective: weighted losses of reconstructions at several scales, of the codebook and of the latents."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from svqvae_hf.evaluation.perceptual import LPIPS
from svqvae_hf.models.image_processing_svqvae import resize_area
from svqvae_hf.models.modeling_svqvae import SVQVAE
from svqvae_hf.trainer.losses.adversarial import (
    MIN_SIDE,
    LeCAM,
    adaptive_weight,
    hinge_discriminator_loss,
    hinge_generator_loss,
)
from svqvae_hf.trainer.losses.uniformity import UniformityLoss
from svqvae_hf.trainer.losses.weights import LossWeights
from svqvae_hf.trainer.network.model import Reconstructions


class Pair(NamedTuple):
    """Target and reconstruction at one scale, both `(batch, 3, h, w)` with black at 0 and white at 1.

    `weight` is the fraction of this scale's pixels in the pixels of all scales.
    """

    target: torch.Tensor
    output: torch.Tensor
    weight: float

    def clamped(self) -> "Pair":
        """The pair with its reconstruction clamped to [0, 1]."""
        return self._replace(output=self.output.clamp(0, 1))

    def first(self, count: int) -> "Pair":
        """The first images of the batch."""
        return self._replace(target=self.target[:count], output=self.output[:count])

    def fits(self, side: int) -> bool:
        """Whether the shorter side has at least `side` pixels."""
        return min(self.output.shape[-2:]) >= side


def make_pairs(
    sample: torch.Tensor, outputs: Sequence[torch.Tensor], pixel_range: Sequence[float], scale_target: str
) -> list[Pair]:
    """Pairs each reconstruction with its target.

    Images are shrunk by area and enlarged by bicubic interpolation.

    Args:
        sample (`torch.Tensor` of shape `(batch, 3, height, width)`): Images in `pixel_range`.
        outputs (`Sequence[torch.Tensor]`): Reconstructions at each scale in `pixel_range`.
        pixel_range (`tuple[float, float]`): Values of black and white.
        scale_target (`str`): `"resized"`: the image is resized to the reconstruction; `"upsampled"`: the
            reconstruction is resized to the image.
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
    if size[0] < sample.shape[-2]:
        return resize_area(sample, size)
    return F.interpolate(sample, tuple(size), mode="bicubic")


class Term(NamedTuple):
    """A loss and its weight in the objective."""

    weight: float | torch.Tensor
    loss: torch.Tensor


class Objective:
    """Weighted sum of losses.

    Pixel losses are means over the compared pixels of all scales. The quantizer's losses are means over the latents of
    all scales. LPIPS and the discriminator skip scales whose reconstruction is too small for them.

    Args:
        weights ([`LossWeights`]): Weights and first steps.
        vqvae ([`SVQVAE`]): Model to train, on its device.
        lpips ([`LPIPS`], *optional*): Perceptual distance, needed for its weight.
        discriminator (`nn.Module`, *optional*): Patch discriminator, needed for the adversarial weight.
        scale_target (`str`, defaults to `"resized"`): Target of each scale, see [`make_pairs`].
        adversarial_adaptive (`bool`, defaults to `False`): Multiply the adversarial weight by [`adaptive_weight`].
        lecam_weight (`float`, defaults to 0.0): Weight of the discriminator's LeCAM regularisation.
        mean (`Callable`, *optional*): Averages a tensor over all processes; not needed for one process.
    """

    def __init__(
        self,
        weights: LossWeights,
        vqvae: SVQVAE,
        lpips: LPIPS | None = None,
        discriminator: nn.Module | None = None,
        *,
        scale_target: str = "resized",
        adversarial_adaptive: bool = False,
        lecam_weight: float = 0.0,
        mean: Callable[[torch.Tensor], torch.Tensor] = lambda value: value,
    ):
        self.weights = weights
        self.pixel_range = vqvae.config["pixel_range"]
        self.last_layer_weight = vqvae.decoder.conv_out.weight
        self.codebook = vqvae.quantize.embedding
        self.lpips = lpips
        self.discriminator = discriminator
        self.scale_target = scale_target
        self.adversarial_adaptive = adversarial_adaptive
        self.lecam_weight = lecam_weight
        self.mean = mean
        self.uniformity = UniformityLoss(vqvae.config["codebook_embed_dim"]).to(vqvae.device)
        self.lecam = LeCAM().to(vqvae.device)

    def pairs(self, sample: torch.Tensor, output: Reconstructions) -> list[Pair]:
        """Pairs of targets and reconstructions, one per scale."""
        return make_pairs(sample, output.samples, self.pixel_range, self.scale_target)

    def __call__(
        self, pairs: Sequence[Pair], output: Reconstructions, step: int
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Computes the loss of the model.

        Args:
            pairs (`Sequence[Pair]`): From [`~Objective.pairs`], for `output`.
            output ([`Reconstructions`]): Output of the model.
            step (`int`): Steps done before this one.

        Returns:
            The loss to minimise, and each loss without its weight by name, all scalar tensors.
        """
        pixel_terms, codebook_terms = self._pixel_terms(pairs, step), self._codebook_terms(output, step)
        reconstruction_loss = _weighted_total(pixel_terms)
        loss = reconstruction_loss + _weighted_total(codebook_terms)
        loss = loss + 0 * self.codebook.stored().sum()  # a gradient in every step, for which DDP waits
        numbers = {name: term.loss.detach() for name, term in (pixel_terms | codebook_terms).items()}
        if self.weights.adversarial.at(step):
            weight, adversarial = self._adversarial_term(pairs, reconstruction_loss, step)
            loss = loss + weight * adversarial
            numbers["adversarial"] = adversarial.detach()
            if isinstance(weight, torch.Tensor):
                numbers["adversarial_weight"] = weight
        return loss, numbers

    def discriminator_loss(
        self, pairs: Sequence[Pair], discriminator: nn.Module
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Computes the loss of the discriminator.

        Args:
            pairs (`Sequence[Pair]`): From [`~Objective.pairs`], at least one of them large enough.
            discriminator (`nn.Module`): The discriminator as `accelerator.prepare` returned it.

        Returns:
            The loss to minimise, and its parts and mean logits by name, all scalar tensors.
        """
        large = [pair for pair in pairs if pair.fits(MIN_SIDE)]
        weights = [pair.weight for pair in large]
        real = [discriminator(2 * pair.target - 1) for pair in large]
        fake = [discriminator(2 * pair.output.detach() - 1) for pair in large]
        loss = _weighted_sum(weights, map(hinge_discriminator_loss, real, fake))
        numbers = {
            "discriminator": loss,
            "real_logits": _weighted_sum(weights, (logits.mean() for logits in real)) / sum(weights),
            "fake_logits": _weighted_sum(weights, (logits.mean() for logits in fake)) / sum(weights),
        }
        if self.lecam_weight:
            self.lecam.update(*(self.mean(numbers[name].detach()) for name in ("real_logits", "fake_logits")))
            numbers["lecam"] = _weighted_sum(weights, map(self.lecam.loss, real, fake))
            loss = loss + self.lecam_weight * numbers["lecam"]
        return loss, {name: value.detach() for name, value in numbers.items()}

    def _pixel_terms(self, pairs: Sequence[Pair], step: int) -> dict[str, Term]:
        weights = [pair.weight for pair in pairs]
        terms = {}
        if weight := self.weights.l2.at(step):
            terms["l2"] = Term(
                weight, _weighted_sum(weights, (F.mse_loss(pair.output, pair.target) for pair in pairs))
            )
        if weight := self.weights.l1.at(step):
            terms["l1"] = Term(weight, _weighted_sum(weights, (F.l1_loss(pair.output, pair.target) for pair in pairs)))
        weight, lpips = self.weights.lpips.at(step), self.lpips
        if weight and lpips is not None and (large := [pair for pair in pairs if pair.fits(lpips.min_side)]):
            distances = (lpips(2 * pair.output - 1, 2 * pair.target - 1) for pair in large)
            terms["lpips"] = Term(weight, _weighted_sum([pair.weight for pair in large], distances))
        return terms

    def _codebook_terms(self, output: Reconstructions, step: int) -> dict[str, Term]:
        num_tokens = sum(ids.numel() for ids in output.ids)
        fractions = [ids.numel() / num_tokens for ids in output.ids]
        terms = {}
        if output.losses:
            if weight := self.weights.vq.at(step):
                terms["vq"] = Term(weight, _weighted_sum(fractions, (losses.vq for losses in output.losses)))
            if weight := self.weights.commitment.at(step):
                terms["commitment"] = Term(weight, _weighted_sum(fractions, (each.commit for each in output.losses)))
            if weight := self.weights.entropy.at(step):
                terms["entropy"] = Term(weight, _weighted_sum(fractions, (each.entropy for each in output.losses)))
        if weight := self.weights.spread.at(step):
            terms["spread"] = Term(weight, self.uniformity(output.latents, self.mean))
        return terms

    def _adversarial_term(self, pairs: Sequence[Pair], reconstruction_loss: torch.Tensor, step: int) -> Term:
        if self.discriminator is None:
            raise ValueError("An adversarial weight needs a `discriminator`, but the objective has none.")
        large = [pair for pair in pairs if pair.fits(MIN_SIDE)]
        losses = [hinge_generator_loss(self.discriminator(2 * pair.output - 1)) for pair in large]
        loss = _weighted_sum([pair.weight for pair in large], losses)
        weight = self.weights.adversarial.at(step)
        if not self.adversarial_adaptive:
            return Term(weight, loss)
        return Term(weight * adaptive_weight(reconstruction_loss, loss, self.last_layer_weight, self.mean), loss)


def _weighted_total(terms: Mapping[str, Term]) -> torch.Tensor:
    return sum((term.weight * term.loss for term in terms.values()), start=torch.zeros(()))


def _weighted_sum(weights: Sequence[float], losses: Iterable[torch.Tensor]) -> torch.Tensor:
    return torch.stack([weight * loss for weight, loss in zip(weights, losses, strict=True)]).sum()

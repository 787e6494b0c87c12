"""The objective: weighted losses of reconstructions at several scales and of the codebook."""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from svqvae_hf.evaluation.perceptual import load_lpips
from svqvae_hf.models.modeling_svqvae import SVQVAE, SVQVAEOutput
from svqvae_hf.models.resizing import resize
from svqvae_hf.trainer.losses.adversarial import (
    MIN_SIDE,
    PatchDiscriminator,
    adaptive_weight,
    hinge_discriminator_loss,
    hinge_generator_loss,
)
from svqvae_hf.trainer.losses.causal import Mean, causal_loss
from svqvae_hf.trainer.train_options import TrainOptions

Term = tuple[float, torch.Tensor]  # weight and loss
Losses = tuple[torch.Tensor, dict[str, torch.Tensor]]  # the loss to minimise, and numbers for the log by name


class Pair(NamedTuple):
    """Target and reconstruction at one scale, both `(batch, 3, h, w)` with black at 0 and white at 1.

    `weight` is the fraction of this scale's pixels in the pixels of all scales.
    """

    target: torch.Tensor
    output: torch.Tensor
    weight: float

    def first(self, count: int) -> "Pair":
        """The first images of the batch."""
        return self._replace(target=self.target[:count], output=self.output[:count])

    def fits(self, side: int) -> bool:
        """Whether the shorter side has at least `side` pixels."""
        return min(self.output.shape[-2:]) >= side


class Objective:
    """Weighted sum of losses.

    The squared error and the quantizer's losses always count. Pixel losses are means over the compared pixels of all
    scales, and the quantizer's over their latents. LPIPS and the discriminator skip scales whose reconstruction is
    too small for them.

    Args:
        options ([`TrainOptions`]): Weights of the other losses.
        vqvae ([`SVQVAE`]): Model to train, on its device.
        mean (`Callable`, *optional*): Averages a tensor over all processes; not needed for one process.
    """

    def __init__(self, options: TrainOptions, vqvae: SVQVAE, mean: Mean = lambda value: value):
        self.options = options
        self.pixel_range = vqvae.config["pixel_range"]
        self.last_layer_weight = vqvae.decoder.conv_out.weight
        self.codebook = vqvae.quantize.embedding
        self.mean = mean
        self.lpips = self.discriminator = None
        if options.lpips_weight:
            self.lpips = load_lpips(options.lpips_net, options.lpips_weights).to(vqvae.device)
        if options.adversarial_weight:
            self.discriminator = PatchDiscriminator()

    def is_adversarial(self, step: int) -> bool:
        """Whether the discriminator takes part in a step."""
        return self.discriminator is not None and step >= self.options.adversarial_start

    def pairs(self, sample: torch.Tensor, output: SVQVAEOutput) -> list[Pair]:
        """Pairs each reconstruction with the image resized to it: by area, or larger by bicubic interpolation."""
        (low, high), total = self.pixel_range, sum(each[0, 0].numel() for each in output.sample)
        target, pairs = (sample - low) / (high - low), []
        for each in output.sample:
            resized = resize(target, each.shape[-2:], "area" if each.shape[-2] < target.shape[-2] else "bicubic")
            pairs.append(Pair(resized, (each.float() - low) / (high - low), each[0, 0].numel() / total))
        return pairs

    def __call__(self, pairs: Sequence[Pair], output: SVQVAEOutput, step: int) -> Losses:
        """Computes the loss of the model.

        Args:
            pairs (`Sequence[Pair]`): From [`~Objective.pairs`], for `output`.
            output ([`SVQVAEOutput`]): Output of the model at a list of scales.
            step (`int`): Steps done before this one.

        Returns:
            The loss to minimise, and each loss without its weight by name, all scalar tensors.
        """
        pixel_terms, codebook_terms = self._pixel_terms(pairs), self._codebook_terms(output)
        reconstruction_loss = _weighted_total(pixel_terms)
        loss = reconstruction_loss + _weighted_total(codebook_terms)
        loss = loss + 0 * self.codebook.table().sum()  # a gradient in every step, for which DDP waits
        numbers = {name: value.detach() for name, (_, value) in (pixel_terms | codebook_terms).items()}
        if self.discriminator is not None and self.is_adversarial(step):
            large = [pair for pair in pairs if pair.fits(MIN_SIDE)]
            losses = [hinge_generator_loss(self.discriminator(2 * pair.output - 1)) for pair in large]
            adversarial = _weighted_sum([pair.weight for pair in large], losses)
            ratio = adaptive_weight(reconstruction_loss, adversarial, self.last_layer_weight, self.mean)
            weight = self.options.adversarial_weight * ratio
            loss = loss + weight * adversarial
            numbers |= {"adversarial": adversarial.detach(), "adversarial_weight": weight}
        return loss, numbers

    def discriminator_loss(self, pairs: Sequence[Pair], discriminator: nn.Module) -> Losses:
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
        return loss, {name: value.detach() for name, value in numbers.items()}

    def _pixel_terms(self, pairs: Sequence[Pair]) -> dict[str, Term]:
        squares = (F.mse_loss(pair.output, pair.target) for pair in pairs)
        terms = {"l2": (1.0, _weighted_sum([pair.weight for pair in pairs], squares))}
        lpips = self.lpips
        if lpips is not None and (large := [pair for pair in pairs if pair.fits(lpips.min_side)]):
            distances = (lpips(2 * pair.output - 1, 2 * pair.target - 1) for pair in large)
            loss = _weighted_sum([pair.weight for pair in large], distances)
            terms["lpips"] = (self.options.lpips_weight, loss)
        return terms

    def _codebook_terms(self, output: SVQVAEOutput) -> dict[str, Term]:
        ids, losses = (list(each or []) for each in (output.ids, output.losses))
        if not losses:
            return {}
        num_tokens = sum(each.numel() for each in ids)
        fractions = [each.numel() / num_tokens for each in ids]
        kinds = zip(("vq", "commitment", "entropy"), zip(*losses, strict=True), strict=True)
        terms = {name: (1.0, _weighted_sum(fractions, at_scales)) for name, at_scales in kinds}
        if self.options.causal_weight:
            loss = _weighted_sum(fractions, (causal_loss(each, self.mean) for each in output.latents or []))
            terms["causal"] = (self.options.causal_weight, loss)
        return terms


def _weighted_total(terms: Mapping[str, Term]) -> torch.Tensor:
    return sum((weight * loss for weight, loss in terms.values()), start=torch.zeros(()))


def _weighted_sum(weights: Sequence[float], losses: Iterable[torch.Tensor]) -> torch.Tensor:
    return torch.stack([weight * loss for weight, loss in zip(weights, losses, strict=True)]).sum()

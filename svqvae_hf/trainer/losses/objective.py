"""The objective: weighted losses of reconstructions at several scales and of the codebook."""

from collections.abc import Sequence
from dataclasses import dataclass
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
from svqvae_hf.trainer.losses.causal import Mean, causal_loss, mean_of_one_process
from svqvae_hf.trainer.train_options import TrainOptions

Numbers = dict[str, torch.Tensor]  # scalars for the log, by name


class Pair(NamedTuple):
    """Target and reconstruction at one scale, both `(batch, 3, h, w)` with black at 0 and white at 1.

    `weight` is the fraction of this scale's pixels in the pixels of all scales.
    """

    target: torch.Tensor
    output: torch.Tensor
    weight: float

    def images(self, rows: list[int]) -> "Pair":
        """These images of the batch."""
        return self._replace(target=self.target[rows], output=self.output[rows])

    def fits(self, side: int) -> bool:
        """Whether the shorter side has at least `side` pixels."""
        return min(self.output.shape[-2:]) >= side

    @property
    def signed_target(self) -> torch.Tensor:
        """Target with black at -1 and white at 1, as LPIPS and the discriminator read it."""
        return 2 * self.target - 1

    @property
    def signed_output(self) -> torch.Tensor:
        """Reconstruction with black at -1 and white at 1."""
        return 2 * self.output - 1


@dataclass
class Term:
    """One loss of the sum.

    Args:
        name (`str`): Name in the log.
        weight (`float` or `torch.Tensor`): Factor in the sum.
        value (`torch.Tensor`): The loss without its weight, a scalar.
    """

    name: str
    weight: float | torch.Tensor
    value: torch.Tensor


class SquaredError:
    """Mean squared error over the compared pixels of all scales."""

    def __call__(self, pairs: Sequence[Pair]) -> Term:
        """Computes the loss of reconstructions."""
        weights = [pair.weight for pair in pairs]
        errors = [F.mse_loss(pair.output, pair.target) for pair in pairs]
        return Term("l2", 1.0, weighted_sum(weights, errors))


class PerceptualLoss:
    """LPIPS of the scales whose reconstruction is large enough for its network.

    Args:
        options ([`TrainOptions`]): Weight, network and file of weights.
        device (`torch.device`): Device of the model.
    """

    def __init__(self, options: TrainOptions, device: torch.device):
        self.weight = options.lpips_weight
        self.lpips = load_lpips(options.lpips_net, options.lpips_weights).to(device)

    def __call__(self, pairs: Sequence[Pair]) -> Term | None:
        """Computes the loss of reconstructions; `None` if all are too small."""
        weights = []
        distances = []
        for pair in pairs_of_side(pairs, self.lpips.min_side):
            weights.append(pair.weight)
            distances.append(self.lpips(pair.signed_output, pair.signed_target))
        if not distances:
            return None
        return Term("lpips", self.weight, weighted_sum(weights, distances))


class CodebookLosses:
    """Losses of the quantizer, means over the latents of all scales."""

    names = ("vq", "commitment", "entropy")  # in the order in which the quantizer returns them

    def __call__(self, output: SVQVAEOutput) -> list[Term]:
        """Computes the losses of an output of the model that was quantised."""
        weights_of_scales = fractions_of_latents(output)
        losses_of_scales = output.losses or []  # for each scale, a tuple with one value per name
        terms = []
        for index, name in enumerate(self.names):
            values = [losses[index] for losses in losses_of_scales]  # the loss of this name at each scale
            mean_over_latents = weighted_sum(weights_of_scales, values)
            terms.append(Term(name, 1.0, mean_over_latents))
        return terms


class CausalLoss:
    """Loss of latents that earlier ones do not predict, a mean over the latents of all scales.

    Args:
        weight (`float`): Factor in the sum.
        mean (`Callable`): Averages a tensor over all processes.
    """

    def __init__(self, weight: float, mean: Mean):
        self.weight = weight
        self.mean = mean

    def __call__(self, output: SVQVAEOutput) -> Term:
        """Computes the loss of an output of the model that was quantised."""
        fractions = fractions_of_latents(output)
        latents_of_scales = output.latents or []
        losses = [causal_loss(latents, self.mean) for latents in latents_of_scales]
        return Term("causal", self.weight, weighted_sum(fractions, losses))


class AdversarialLoss:
    """Losses of the model and of its discriminator, for scales whose reconstruction is large enough.

    Args:
        weight (`float`): Factor of the adaptive weight.
        last_layer_weight (`torch.Tensor`): Weight of the decoder's last convolution.
        mean (`Callable`): Averages a tensor over all processes.
    """

    def __init__(self, weight: float, last_layer_weight: torch.Tensor, mean: Mean):
        self.weight = weight
        self.last_layer_weight = last_layer_weight
        self.mean_over_processes = mean
        self.discriminator = PatchDiscriminator()

    def __call__(self, pairs: Sequence[Pair], reconstruction_loss: torch.Tensor) -> Term:
        """Computes the loss of the model, whose weight depends on the loss of its reconstructions."""
        weights = []
        losses = []
        for pair in pairs_of_side(pairs, MIN_SIDE):
            fake_logits = self.discriminator(pair.signed_output)
            weights.append(pair.weight)
            losses.append(hinge_generator_loss(fake_logits))
        loss = weighted_sum(weights, losses)
        ratio = adaptive_weight(reconstruction_loss, loss, self.last_layer_weight, self.mean_over_processes)
        return Term("adversarial", self.weight * ratio, loss)

    def discriminator_loss(self, pairs: Sequence[Pair], discriminator: nn.Module) -> tuple[torch.Tensor, Numbers]:
        """Computes the loss of the discriminator, and numbers for the log."""
        large_pairs = pairs_of_side(pairs, MIN_SIDE)
        weights = [pair.weight for pair in large_pairs]
        logits_of_targets = [discriminator(pair.signed_target) for pair in large_pairs]
        logits_of_outputs = [discriminator(pair.signed_output.detach()) for pair in large_pairs]
        losses = []
        for real_logits, fake_logits in zip(logits_of_targets, logits_of_outputs, strict=True):
            losses.append(hinge_discriminator_loss(real_logits, fake_logits))
        loss = weighted_sum(weights, losses)
        numbers = {
            "discriminator": loss.detach(),
            "real_logits": mean_logit(weights, logits_of_targets),
            "fake_logits": mean_logit(weights, logits_of_outputs),
        }
        return loss, numbers


class Objective:
    """Weighted sum of losses.

    The squared error and the quantizer's losses always count. Pixel losses are means over the compared pixels of all
    scales, and the quantizer's over their latents. LPIPS and the discriminator skip scales whose reconstruction is
    too small for them.

    Args:
        options ([`TrainOptions`]): Weights of the other losses.
        vqvae ([`SVQVAE`]): Model to train, on its device.
        mean (`Callable`, *optional*): Averages a tensor over all processes; not needed for one process.

    Attributes:
        discriminator (`nn.Module`, *optional*): Discriminator of the adversarial loss, if there is one.
    """

    def __init__(self, options: TrainOptions, vqvae: SVQVAE, mean: Mean = mean_of_one_process):
        self.options = options
        self.pixel_range = vqvae.config["pixel_range"]
        self.codebook = vqvae.quantize.embedding
        self.squared_error = SquaredError()
        self.codebook_losses = CodebookLosses()
        self.perceptual: PerceptualLoss | None = None
        self.causal: CausalLoss | None = None
        self.adversarial: AdversarialLoss | None = None
        self.discriminator: PatchDiscriminator | None = None
        if options.lpips_weight:
            self.perceptual = PerceptualLoss(options, vqvae.device)
        if options.causal_weight:
            self.causal = CausalLoss(options.causal_weight, mean)
        if options.adversarial_weight:
            last_layer_weight = vqvae.decoder.conv_out.weight
            self.adversarial = AdversarialLoss(options.adversarial_weight, last_layer_weight, mean)
            self.discriminator = self.adversarial.discriminator

    def is_adversarial(self, step: int) -> bool:
        """Whether the discriminator takes part in a step."""
        return self.adversarial is not None and step >= self.options.adversarial_start

    def pairs(self, sample: torch.Tensor, output: SVQVAEOutput) -> list[Pair]:
        """Pairs each reconstruction with the image resized to it: by area, or larger by bicubic interpolation.

        Args:
            sample (`torch.Tensor` of shape `(batch, 3, height, width)`): Images in the model's `pixel_range`.
            output ([`SVQVAEOutput`]): Output of the model at a list of scales.
        """
        black, white = self.pixel_range
        full_target = (sample - black) / (white - black)  # (B, 3, H, W) in [0, 1]
        full_height = full_target.shape[-2]
        pixels_of_scales = [pixels_per_image(reconstruction) for reconstruction in output.sample]
        pixels_of_all_scales = sum(pixels_of_scales)
        pairs = []
        for reconstruction, num_pixels in zip(output.sample, pixels_of_scales, strict=True):
            height, width = reconstruction.shape[-2:]
            mode = "area" if height < full_height else "bicubic"
            target = resize(full_target, (height, width), mode)  # (B, 3, h, w)
            unit_output = (reconstruction.float() - black) / (white - black)  # (B, 3, h, w), black at 0, white at 1
            pairs.append(Pair(target, unit_output, weight=num_pixels / pixels_of_all_scales))
        return pairs

    def __call__(self, pairs: Sequence[Pair], output: SVQVAEOutput, step: int) -> tuple[torch.Tensor, Numbers]:
        """Computes the loss of the model.

        Args:
            pairs (`Sequence[Pair]`): From [`~Objective.pairs`], for `output`.
            output ([`SVQVAEOutput`]): Output of the model at a list of scales.
            step (`int`): Steps done before this one.

        Returns:
            The loss to minimise, and each loss without its weight by name, all scalar tensors.
        """
        pixel_terms = self._pixel_terms(pairs)
        codebook_terms = self._codebook_terms(output)
        reconstruction_loss = total_of(pixel_terms)
        loss = reconstruction_loss + total_of(codebook_terms)
        # DDP waits for a gradient of every weight, and the codes have none in a step that does not quantise.
        loss = loss + 0 * self.codebook.table().sum()
        numbers = {term.name: term.value.detach() for term in pixel_terms + codebook_terms}
        if self.adversarial is not None and self.is_adversarial(step):
            term = self.adversarial(pairs, reconstruction_loss)
            loss = loss + term.weight * term.value
            numbers["adversarial"] = term.value.detach()
            numbers["adversarial_weight"] = torch.as_tensor(term.weight)
        return loss, numbers

    def discriminator_loss(self, pairs: Sequence[Pair], discriminator: nn.Module) -> tuple[torch.Tensor, Numbers]:
        """Computes the loss of the discriminator.

        Args:
            pairs (`Sequence[Pair]`): From [`~Objective.pairs`], at least one of them large enough.
            discriminator (`nn.Module`): The discriminator as `accelerator.prepare` returned it.

        Returns:
            The loss to minimise, and its parts and mean logits by name, all scalar tensors.

        Raises:
            ValueError: The objective has no adversarial loss.
        """
        if self.adversarial is None:
            raise ValueError("The objective must have an adversarial loss. Set `adversarial_weight`.")
        return self.adversarial.discriminator_loss(pairs, discriminator)

    def _pixel_terms(self, pairs: Sequence[Pair]) -> list[Term]:
        """Losses of the reconstructions, without the adversarial one."""
        terms = [self.squared_error(pairs)]
        if self.perceptual is not None:
            perceptual_term = self.perceptual(pairs)
            if perceptual_term is not None:
                terms.append(perceptual_term)
        return terms

    def _codebook_terms(self, output: SVQVAEOutput) -> list[Term]:
        """Losses of the latents and codes; none if nothing was quantised."""
        if not output.losses:
            return []
        terms = self.codebook_losses(output)
        if self.causal is not None:
            terms.append(self.causal(output))
        return terms


def pairs_of_side(pairs: Sequence[Pair], side: int) -> list[Pair]:
    """Pairs whose shorter side has at least so many pixels."""
    return [pair for pair in pairs if pair.fits(side)]


def pixels_per_image(sample: torch.Tensor) -> int:
    """Number of pixels of each image of a batch `(batch, channels, height, width)`."""
    height, width = sample.shape[-2:]
    return height * width


def fractions_of_latents(output: SVQVAEOutput) -> list[float]:
    """Fraction of each scale's latents in the latents of all scales."""
    ids_of_scales = output.ids or []
    counts = [ids.numel() for ids in ids_of_scales]
    total = sum(counts)
    return [count / total for count in counts]


def mean_logit(weights: Sequence[float], logits: Sequence[torch.Tensor]) -> torch.Tensor:
    """Mean logit over some scales by their weights, for the log."""
    means = [scale_logits.detach().mean() for scale_logits in logits]
    return weighted_sum(weights, means) / sum(weights)


def total_of(terms: Sequence[Term]) -> torch.Tensor:
    """Sum of losses by their weights."""
    total = torch.zeros(())
    for term in terms:
        total = total + term.weight * term.value
    return total


def weighted_sum(weights: Sequence[float], losses: Sequence[torch.Tensor]) -> torch.Tensor:
    """Sum of the losses of some scales by their weights."""
    weighted = [weight * loss for weight, loss in zip(weights, losses, strict=True)]
    return torch.stack(weighted).sum()

"""Weights of the losses, and the steps at which they begin."""

from typing import NamedTuple


class LossWeight(NamedTuple):
    """Weight of a loss from its first step on."""

    weight: float
    first_step: int = 0

    def at(self, step: int) -> float:
        """Weight at a step, 0 before the first step."""
        return self.weight if step >= self.first_step else 0.0


class LossWeights(NamedTuple):
    """Weights of the losses of an SVQVAE; a weight of 0 leaves a loss out.

    Args:
        l2 ([`LossWeight`]): Squared error of pixels.
        l1 ([`LossWeight`]): Absolute error of pixels.
        lpips ([`LossWeight`]): Perceptual distance.
        adversarial ([`LossWeight`]): Hinge loss of the model against the discriminator.
        vq ([`LossWeight`]): Loss that moves codes to latents.
        commitment ([`LossWeight`]): Loss that moves latents to codes.
        entropy ([`LossWeight`]): Low entropy of each latent's choice of code, high entropy of their average.
        spread ([`LossWeight`]): Distance of latents from uniformity on the sphere, [`UniformityLoss`].
    """

    l2: LossWeight = LossWeight(1.0)
    l1: LossWeight = LossWeight(0.0)
    lpips: LossWeight = LossWeight(0.0)
    adversarial: LossWeight = LossWeight(0.0)
    vq: LossWeight = LossWeight(1.0)
    commitment: LossWeight = LossWeight(1.0)
    entropy: LossWeight = LossWeight(0.0)
    spread: LossWeight = LossWeight(0.0)

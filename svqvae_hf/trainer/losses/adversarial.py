"""Adversarial loss: discriminator, hinge losses and the adaptive weight."""

import torch
import torch.nn.functional as F
from torch import nn

from svqvae_hf.trainer.losses.causal import Mean

MIN_SIDE = 24  # pixels: the last layer turns them into one logit
NUM_GROUPS = 32
INIT_STD = 0.02
MAX_ADAPTIVE_WEIGHT = 1e4
GRADIENT_NORM_EPS = 1e-4  # as in taming-transformers; the paper has 1e-6
GRADIENT_SCALE = 2.0**10  # without it, gradients of means over pixels underflow in float16


class PatchDiscriminator(nn.Module):
    """PatchGAN of three strided layers: one logit per patch of 70 pixels, high where the patch looks real.

    It has group normalisation in place of batch normalisation. A logit depends on its patch and on statistics of its
    own image, but neither on the rest of the batch nor on the number of processes.

    Source: pix2pix (arXiv 1611.07004, section 3.2.2), in the form of taming-transformers' `NLayerDiscriminator`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            # Three strided layers: (B, 3, H, W) -> (B, 256, H / 8, W / 8)
            nn.Conv2d(3, 64, kernel_size=4, stride=2, padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(64, 128, kernel_size=4, stride=2, padding=1),
            nn.GroupNorm(NUM_GROUPS, 128),
            nn.LeakyReLU(0.2),
            nn.Conv2d(128, 256, kernel_size=4, stride=2, padding=1),
            nn.GroupNorm(NUM_GROUPS, 256),
            nn.LeakyReLU(0.2),
            # Two layers without stride, each of which loses a row and a column: -> (B, 1, H / 8 - 2, W / 8 - 2)
            nn.Conv2d(256, 512, kernel_size=4, padding=1),
            nn.GroupNorm(NUM_GROUPS, 512),
            nn.LeakyReLU(0.2),
            nn.Conv2d(512, 1, kernel_size=4, padding=1),
        )
        self._initialise()

    def _initialise(self) -> None:
        """Draws the weights as taming-transformers does: around 0 for convolutions, around 1 for norms."""
        for layer in self.layers:
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, mean=0.0, std=INIT_STD)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
            elif isinstance(layer, nn.GroupNorm):
                nn.init.normal_(layer.weight, mean=1.0, std=INIT_STD)
                nn.init.zeros_(layer.bias)

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        """Returns a logit per patch.

        Args:
            sample (`torch.Tensor` of shape `(batch, 3, height, width)`): Images in [-1, 1], sides at least `MIN_SIDE`.

        Returns:
            `torch.Tensor`: Logits `(batch, 1, height // 8 - 2, width // 8 - 2)`.
        """
        return self.layers(sample)


def hinge_discriminator_loss(real_logits: torch.Tensor, fake_logits: torch.Tensor) -> torch.Tensor:
    """Hinge loss of the discriminator: 0 for logits above 1 of real images and below -1 of fake ones.

    Args:
        real_logits (`torch.Tensor`): Logits of real images, of any shape.
        fake_logits (`torch.Tensor`): Logits of reconstructions, detached from the model.

    Returns:
        `torch.Tensor`: Scalar in float32, half the sum of the two means (taming-transformers, `hinge_d_loss`).
    """
    real_loss = F.relu(1 - real_logits.float()).mean()
    fake_loss = F.relu(1 + fake_logits.float()).mean()
    return (real_loss + fake_loss) / 2


def hinge_generator_loss(fake_logits: torch.Tensor) -> torch.Tensor:
    """Hinge loss of the model: minus the mean logit of its reconstructions, a scalar in float32."""
    return -fake_logits.float().mean()


def adaptive_weight(
    reconstruction_loss: torch.Tensor, generator_loss: torch.Tensor, last_layer_weight: torch.Tensor, mean: Mean
) -> torch.Tensor:
    """Weight with which the generator loss pulls the decoder's last layer as hard as the reconstruction loss does.

    The graph is kept for the backward pass.

    Args:
        reconstruction_loss (`torch.Tensor`): Mean over the batch of this process, a scalar.
        generator_loss (`torch.Tensor`): Mean over the batch of this process, a scalar.
        last_layer_weight (`torch.Tensor`): Weight of the decoder's last convolution.
        mean (`Callable`): Averages a tensor over all processes, so that the weight is right for their joined batch:
            `partial(accelerator.reduce, reduction="mean")`.

    Returns:
        `torch.Tensor`: Scalar in [0, 1e4] in float32, without gradient (VQGAN, arXiv 2012.09841, equation 7).
    """
    reconstruction_gradient = _gradient(reconstruction_loss, last_layer_weight)
    generator_gradient = _gradient(generator_loss, last_layer_weight)
    gradients = mean(torch.stack([reconstruction_gradient, generator_gradient]))  # (2, *shape of the weight)
    reconstruction_norm, generator_norm = gradients.flatten(1).norm(dim=1)
    ratio = reconstruction_norm / (generator_norm + GRADIENT_NORM_EPS)
    return ratio.clamp(max=MAX_ADAPTIVE_WEIGHT)


def _gradient(loss: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Gradient of a loss in float32, whose graph is kept."""
    (gradient,) = torch.autograd.grad(GRADIENT_SCALE * loss, weight, retain_graph=True)
    return gradient.float() / GRADIENT_SCALE

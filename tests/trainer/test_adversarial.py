import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from svqvae_hf.trainer.losses import adversarial
from svqvae_hf.trainer.losses.adversarial import adaptive_weight, hinge_discriminator_loss


@pytest.fixture(scope="module")
def discriminator():
    torch.manual_seed(0)
    return adversarial.PatchDiscriminator().requires_grad_(False)


def one_process(tensor):
    return tensor


# Discriminator


def test_a_logit_sees_a_patch_of_70_pixels(discriminator):
    local = copy.deepcopy(discriminator)
    for name, layer in local.layers.named_children():
        if isinstance(layer, nn.GroupNorm):  # sees the whole image
            local.layers[int(name)] = nn.Identity()
    sample = torch.rand(1, 3, 160, 160, requires_grad=True)
    logits = local(sample)
    for row, column in ((8, 8), (9, 8), (8, 10)):
        (gradient,) = torch.autograd.grad(logits[0, 0, row, column], sample, retain_graph=True)
        rows, columns = (gradient[0, 0].ne(0).any(axis).nonzero().flatten().tolist() for axis in (1, 0))
        assert rows == list(range(8 * row - 23, 8 * row + 47))
        assert columns == list(range(8 * column - 23, 8 * column + 47))


# Hinge losses


def test_hinge_is_zero_beyond_its_margins_and_pushes_within():
    real = torch.tensor([-1.0, 0.0, 0.9, 1.1, 5.0], requires_grad=True)
    fake = torch.tensor([-5.0, -1.1, -0.9, 0.0, 1.0], requires_grad=True)
    loss = hinge_discriminator_loss(real, fake)
    loss.backward()
    assert loss.item() == pytest.approx((2 + 1 + 0.1 + 0.1 + 1 + 2) / 5 / 2)
    torch.testing.assert_close(real.grad, torch.tensor([-1.0, -1, -1, 0, 0]) / 10)
    torch.testing.assert_close(fake.grad, torch.tensor([0.0, 0, 1, 1, 1]) / 10)
    assert hinge_discriminator_loss(real[3:], fake[:2]) == 0
    assert adversarial.hinge_generator_loss(fake) == -fake.mean()


# Adaptive weight


class LastLayer:
    """A last convolution, and two losses of its output."""

    def __init__(self, batch=4, scale=1.0):
        torch.manual_seed(0)
        self.conv = nn.Conv2d(8, 3, 3, padding=1)
        self.features, self.target, self.weights = (torch.randn(batch, dim, 16, 16) for dim in (8, 3, 3))
        self.scale = scale

    def losses(self, rows=slice(None)):
        output = self.conv(self.features[rows]).float()
        reconstruction = F.mse_loss(output, self.target[rows])
        return self.scale * reconstruction, self.scale * 20 * (output * self.weights[rows]).sum((1, 2, 3)).mean()

    def gradient(self, loss):
        return torch.autograd.grad(loss, self.conv.weight, retain_graph=True)[0]


@pytest.mark.parametrize("factor", [1, 1e3, -0.1])
def test_weighted_generator_loss_pulls_as_hard_as_the_reconstruction_loss(factor):
    layer = LastLayer()
    reconstruction, generator = layer.losses()
    weight = adaptive_weight(reconstruction, factor * generator, layer.conv.weight, one_process)
    assert not weight.requires_grad
    pull = layer.gradient(weight * factor * generator).norm()
    torch.testing.assert_close(pull, layer.gradient(reconstruction).norm(), rtol=1e-4, atol=0)
    (reconstruction + weight * factor * generator).backward()
    assert layer.conv.weight.grad.isfinite().all()


def test_small_gradients_survive_float16():
    layer = LastLayer(scale=1e-5)  # of a mean over 1e5 times the pixels
    expected = adaptive_weight(*layer.losses(), layer.conv.weight, one_process)
    with torch.autocast("cpu", dtype=torch.float16):
        weight = adaptive_weight(*layer.losses(), layer.conv.weight, one_process)
    torch.testing.assert_close(weight, expected, rtol=0.02, atol=0)

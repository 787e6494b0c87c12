import math

import pytest
import torch
import torch.nn.functional as F
from conftest import make_tiny

from svqvae_hf.evaluation.perceptual import LPIPS
from svqvae_hf.trainer.losses.causal import FLOOR, NEIGHBOURS, causal_loss
from svqvae_hf.trainer.losses.objective import Objective
from svqvae_hf.trainer.train_options import TrainOptions

WEIGHTS = ("causal_weight", "lpips_weight", "adversarial_weight")


@pytest.fixture(autouse=True)
def random_lpips(monkeypatch):
    monkeypatch.setattr("svqvae_hf.trainer.losses.objective.load_lpips", lambda net, weights: LPIPS("squeeze"))


def make_objective(model, **weights):
    torch.manual_seed(1)
    needed = {"output_dir": "out", "train_data_dir": "x", "model_config_name_or_path": "y"}
    return Objective(TrainOptions(**needed, **({"adversarial_start": 0} | weights)), model)


def forward(model, sample, scales, quantize=True):
    return model(sample, scales, scale_from="latents", force_not_quantize=not quantize)


def gradient(step, **weights):
    """Gradient of a step."""
    model = make_tiny(entropy_loss_ratio=1.0).train()
    torch.manual_seed(2)
    sample = torch.rand(2, 3, 64, 64)
    objective = make_objective(model, adversarial_start=10, **weights)
    output = forward(model, sample, [0.5, 1.0])
    loss, numbers = objective(objective.pairs(sample, output), output, step)
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}, numbers


@pytest.mark.parametrize("name", WEIGHTS)
def test_each_weighted_loss_changes_the_gradient(name):
    without, numbers = gradient(10)
    assert {"l2", "vq", "commitment", "entropy"} == numbers.keys()
    after, numbers = gradient(10, **{name: 0.5})
    assert numbers[name.removesuffix("_weight")].isfinite()
    part = "encoder" if name == "causal_weight" else "decoder"
    assert any(key.startswith(part) and not torch.equal(after[key], without[key]) for key in after)
    assert all(each.isfinite().all() for each in after.values())


def test_the_adversarial_loss_is_off_before_its_first_step():
    without, _ = gradient(9)
    before, numbers = gradient(9, adversarial_weight=0.5)
    assert "adversarial" not in numbers
    assert all(torch.equal(before[key], without[key]) for key in without)


@pytest.mark.parametrize("quantize", [False, True])
def test_loss_is_the_mean_over_the_pixels_of_all_scales(quantize):
    model = make_tiny(pixel_range=(-1, 1)).train()
    sample = torch.rand(2, 3, 32, 32) * 2 - 1
    objective = make_objective(model)
    output = forward(model, sample, [0.25, 1.0], quantize)
    loss, _ = objective(objective.pairs(sample, output), output, step=0)
    expected = []
    latents = model.encode(sample).latents
    for side in (2, 8):
        scaled = F.adaptive_avg_pool2d(latents, side)
        quantized, losses, _ = model.quantize(scaled)
        decoded = model.decode(quantized if quantize else F.normalize(scaled, dim=1), force_not_quantize=True).sample
        mse = (decoded - F.adaptive_avg_pool2d(sample, side * 4)).square().mean() / 4
        expected.append((mse + (losses.vq + losses.commit) * quantize) * side**2 / (2**2 + 8**2))
    torch.testing.assert_close(loss, torch.stack(expected).sum())
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, f"DDP would wait for {name}"
        assert parameter.grad.isfinite().all()
    assert model.quantize.embedding.weight.grad.any() == quantize


def test_lpips_and_discriminator_skip_small_outputs():
    model = make_tiny().train()
    sample = torch.rand(2, 3, 32, 32)
    objective = make_objective(model, lpips_weight=1.0, adversarial_weight=1.0)
    output = forward(model, sample, [0.5, 1.0])
    pairs = objective.pairs(sample, output)
    assert [min(pair.output.shape[-2:]) for pair in pairs] == [16, 32]
    _, both = objective(pairs, output, step=0)
    large = pairs[-1]._replace(weight=1.0)
    _, alone = objective([large], output, step=0)
    for part in ("lpips", "adversarial"):
        torch.testing.assert_close(both[part], pairs[-1].weight * alone[part])
    loss, numbers = objective.discriminator_loss(pairs, objective.discriminator)
    loss_alone, _ = objective.discriminator_loss([large], objective.discriminator)
    torch.testing.assert_close(loss, pairs[-1].weight * loss_alone)
    real = objective.discriminator(2 * large.target - 1)
    torch.testing.assert_close(numbers["real_logits"], real.mean().detach())


def test_discriminator_loss_trains_only_the_discriminator():
    model = make_tiny().train()
    sample = torch.rand(1, 3, 32, 32)
    objective = make_objective(model, adversarial_weight=1.0)
    output = forward(model, sample, [1.0])
    loss, _ = objective.discriminator_loss(objective.pairs(sample, output), objective.discriminator)
    loss.backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(parameter.grad is not None for parameter in objective.discriminator.parameters())


def test_causal_loss_is_low_for_latents_that_follow_from_earlier_ones():
    assert all(neighbour < (0, 0) for neighbour in NEIGHBOURS)
    noise = torch.randn(4, 8, 16, 16, generator=torch.Generator().manual_seed(0))
    of_noise = causal_loss(noise).item()
    assert of_noise == pytest.approx(math.log(1 / 8 + FLOOR), abs=0.15)
    assert causal_loss(3 * noise).item() == pytest.approx(of_noise, abs=1e-5)
    assert causal_loss(noise[..., :1, :1].expand(-1, -1, 16, 16)) < of_noise - 1
    assert causal_loss(noise[:1, :, :2, :1]).isfinite()

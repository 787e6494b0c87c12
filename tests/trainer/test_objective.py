import pytest
import torch
import torch.nn.functional as F
from conftest import make_tiny

from svqvae_hf.evaluation.perceptual import LPIPS
from svqvae_hf.trainer.losses.adversarial import PatchDiscriminator
from svqvae_hf.trainer.losses.objective import Objective, make_pairs
from svqvae_hf.trainer.losses.weights import LossWeight, LossWeights
from svqvae_hf.trainer.network.model import MultiScaleForward

LOSSES = LossWeights._fields


def make_objective(model, lecam_weight=0.0, **weights):
    torch.manual_seed(1)
    weights = LossWeights(**weights)
    lpips = LPIPS("squeeze") if weights.lpips.weight else None
    discriminator = PatchDiscriminator() if weights.adversarial.weight else None
    return Objective(weights, model, lpips, discriminator, lecam_weight=lecam_weight)


def gradient(step, name, weight):
    """Gradient of a step with one loss, which starts at step 10, beside a pixel loss."""
    weights = dict.fromkeys(LOSSES, LossWeight(0.0)) | {"l1" if name == "l2" else "l2": LossWeight(1.0)}
    model = make_tiny(entropy_loss_ratio=1.0).train()
    torch.manual_seed(2)
    sample = torch.rand(2, 3, 64, 64)
    objective = make_objective(model, **(weights | {name: LossWeight(weight, 10)}))
    output = MultiScaleForward(model)(sample, [0.5, 1.0], quantize=True)
    loss, numbers = objective(objective.pairs(sample, output), output, step)
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return gradients, numbers


@pytest.mark.parametrize("name", LOSSES)
def test_each_loss_changes_the_gradient_and_is_off_before_its_first_step(name):
    without, _ = gradient(10, name, weight=0.0)
    before, numbers = gradient(9, name, weight=0.5)
    assert name not in numbers
    assert before.keys() == without.keys()
    assert all(torch.equal(before[key], without[key]) for key in without)
    after, numbers = gradient(10, name, weight=0.5)
    assert numbers[name].isfinite()
    changed = {key for key in after if key not in without or not torch.equal(after[key], without[key])}
    reached = {"vq": "quantize", "commitment": "encoder", "spread": "encoder", "entropy": "quantize"}
    assert any(key.startswith(reached.get(name, "decoder")) for key in changed)
    assert all(each.isfinite().all() for each in after.values())


@pytest.mark.parametrize("quantize", [False, True])
def test_loss_is_the_mean_over_the_pixels_of_all_scales(quantize):
    model = make_tiny(pixel_range=(-1, 1)).train()
    sample = torch.rand(2, 3, 32, 32) * 2 - 1
    objective = make_objective(model, vq=LossWeight(0.5), commitment=LossWeight(0.5))
    output = MultiScaleForward(model)(sample, [0.25, 1.0], quantize)
    loss, _ = objective(objective.pairs(sample, output), output, step=0)
    expected = []
    latents = model.encode(sample).latents
    for side in (2, 8):
        scaled = F.adaptive_avg_pool2d(latents, side)
        quantized, losses, _ = model.quantize(scaled)
        decoded = model.decode(quantized if quantize else F.normalize(scaled, dim=1), force_not_quantize=True).sample
        mse = (decoded - F.adaptive_avg_pool2d(sample, side * 4)).square().mean() / 4
        expected.append((mse + 0.5 * (losses.vq + losses.commit) * quantize) * side**2 / (2**2 + 8**2))
    torch.testing.assert_close(loss, torch.stack(expected).sum())
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, f"DDP would wait for {name}"
        assert parameter.grad.isfinite().all()
    assert model.quantize.embedding.weight.grad.any() == quantize


def test_targets_are_the_resized_image_or_the_image():
    sample = torch.rand(1, 3, 32, 32) * 2 - 1
    outputs = [F.interpolate(sample, size, mode="area") for size in (8, 16, 32)]
    pairs = make_pairs(sample, outputs, (-1, 1), "resized")
    assert [pair.output.shape[-1] for pair in pairs] == [8, 16, 32]
    for pair in pairs:
        torch.testing.assert_close(pair.output, pair.target)
    assert [pair.weight for pair in pairs] == pytest.approx([64 / 1344, 256 / 1344, 1024 / 1344])
    for pair in make_pairs(sample, outputs, (-1, 1), "upsampled"):
        torch.testing.assert_close(pair.target, (sample + 1) / 2)
        assert pair.output.shape == sample.shape
        assert pair.weight == pytest.approx(1 / 3)


def test_lpips_and_discriminator_skip_small_outputs():
    model = make_tiny().train()
    sample = torch.rand(2, 3, 32, 32)
    objective = make_objective(model, lpips=LossWeight(1.0), adversarial=LossWeight(1.0))
    output = MultiScaleForward(model)(sample, [0.5, 1.0], quantize=True)
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
    objective = make_objective(model, adversarial=LossWeight(1.0), lecam_weight=1.0)
    output = MultiScaleForward(model)(sample, [1.0], quantize=True)
    loss, numbers = objective.discriminator_loss(objective.pairs(sample, output), objective.discriminator)
    loss.backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(parameter.grad is not None for parameter in objective.discriminator.parameters())
    assert numbers["lecam"] > 0
    assert objective.lecam.means.mean.tolist() == pytest.approx(
        [numbers["real_logits"].item(), numbers["fake_logits"].item()]
    )


def test_adversarial_weight_without_a_discriminator_is_an_error():
    model, sample = make_tiny().train(), torch.rand(1, 3, 32, 32)
    objective = Objective(LossWeights(adversarial=LossWeight(1.0)), model)
    output = MultiScaleForward(model)(sample, [1.0], quantize=True)
    with pytest.raises(ValueError, match="needs a `discriminator`, but the objective has none"):
        objective(objective.pairs(sample, output), output, step=0)

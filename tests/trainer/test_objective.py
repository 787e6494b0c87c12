import pytest
import torch
import torch.nn.functional as F
from conftest import make_tiny

from svqvae_hf.evaluation.perceptual import LPIPS
from svqvae_hf.trainer.losses.adversarial import PatchDiscriminator
from svqvae_hf.trainer.losses.objective import MultiScaleForward, Objective, compare, step_scales
from svqvae_hf.trainer.train_options import TrainConfig

PARTS = ("l2", "l1", "lpips", "adversarial", "vq", "commitment", "entropy", "spread")


def make_config(**options):
    return TrainConfig(output_dir="out", model_config_name_or_path="x", train_data_dir="y", **options)


def make_objective(model, **options):
    torch.manual_seed(1)
    config = make_config(**{"lpips_net": "squeeze"} | options)
    lpips = LPIPS("squeeze") if config.lpips_weight else None
    discriminator = PatchDiscriminator() if config.adversarial_weight else None
    return Objective(config, model, lpips, discriminator, lambda value: value)


def gradient(step, part, weight):
    """Gradient of a step with one part beside a pixel loss, which starts at step 10."""
    base = "l1" if part == "l2" else "l2"
    weights = dict.fromkeys((f"{name}_weight" for name in PARTS), 0.0) | {f"{base}_weight": 1.0}
    model = make_tiny(entropy_loss_ratio=1.0).train()
    torch.manual_seed(2)
    sample = torch.rand(2, 3, 64, 64)
    objective = make_objective(model, **(weights | {f"{part}_weight": weight, f"{part}_start": 10}))
    output = MultiScaleForward(model)(sample, [0.5, 1.0], quantize=True)
    loss, parts = objective(objective.pairs(sample, output), output, step)
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return gradients, parts


@pytest.mark.parametrize("part", PARTS)
def test_each_part_changes_the_gradient_and_is_off_before_its_start(part):
    without, _ = gradient(10, part, weight=0.0)
    before, parts = gradient(9, part, weight=0.5)
    assert part not in parts
    assert before.keys() == without.keys()
    assert all(torch.equal(before[name], without[name]) for name in without)
    after, parts = gradient(10, part, weight=0.5)
    assert parts[part].isfinite()
    changed = {name for name in after if name not in without or not torch.equal(after[name], without[name])}
    reached = {"vq": "quantize", "commitment": "encoder", "spread": "encoder", "entropy": "quantize"}
    assert any(name.startswith(reached.get(part, "decoder")) for name in changed)
    assert all(each.isfinite().all() for each in after.values())


@pytest.mark.parametrize("quantize", [False, True])
def test_loss_is_the_mean_over_the_pixels_of_all_scales(quantize):
    model = make_tiny(pixel_range=(-1, 1)).train()
    sample = torch.rand(2, 3, 32, 32) * 2 - 1
    objective = make_objective(model, vq_weight=0.5, commitment_weight=0.5)
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
        reached = parameter.grad is not None and parameter.grad.isfinite().all()
        assert reached == (quantize or name != "quantize.embedding.weight"), name


def test_targets_are_the_resized_image_or_the_image():
    sample = torch.rand(1, 3, 32, 32) * 2 - 1
    outputs = [F.interpolate(sample, size, mode="area") for size in (8, 16, 32)]
    pairs = compare(sample, outputs, (-1, 1), "resized")
    assert [pair.output.shape[-1] for pair in pairs] == [8, 16, 32]
    for pair in pairs:
        torch.testing.assert_close(pair.output, pair.target)
    assert [pair.share for pair in pairs] == pytest.approx([64 / 1344, 256 / 1344, 1024 / 1344])
    for pair in compare(sample, outputs, (-1, 1), "upsampled"):
        torch.testing.assert_close(pair.target, (sample + 1) / 2)
        assert pair.output.shape == sample.shape
        assert pair.share == pytest.approx(1 / 3)


def test_small_outputs_are_left_out_of_lpips_and_discriminator():
    model = make_tiny().train()
    sample = torch.rand(2, 3, 32, 32)
    objective = make_objective(model, lpips_weight=1.0, adversarial_weight=1.0, adversarial_start=0)
    output = MultiScaleForward(model)(sample, [0.5, 1.0], quantize=True)
    pairs = objective.pairs(sample, output)
    assert [min(pair.output.shape[-2:]) for pair in pairs] == [16, 32]
    _, both = objective(pairs, output, step=0)
    large = pairs[-1]._replace(share=1.0)
    _, alone = objective([large], output, step=0)
    for part in ("lpips", "adversarial"):
        torch.testing.assert_close(both[part], pairs[-1].share * alone[part])
    loss, numbers = objective.discriminator_loss(pairs, objective.discriminator)
    loss_alone, _ = objective.discriminator_loss([large], objective.discriminator)
    torch.testing.assert_close(loss, pairs[-1].share * loss_alone)
    real = objective.discriminator(2 * large.target - 1)
    torch.testing.assert_close(numbers["real_logits"], real.mean().detach())


def test_discriminator_loss_trains_the_discriminator_alone():
    model = make_tiny().train()
    sample = torch.rand(1, 3, 32, 32)
    objective = make_objective(model, adversarial_weight=1.0, adversarial_start=0, lecam_weight=1.0)
    output = MultiScaleForward(model)(sample, [1.0], quantize=True)
    loss, numbers = objective.discriminator_loss(objective.pairs(sample, output), objective.discriminator)
    loss.backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(parameter.grad is not None for parameter in objective.discriminator.parameters())
    assert numbers["lecam"] > 0
    assert objective.lecam.means.mean.tolist() == pytest.approx(
        [numbers["real_logits"].item(), numbers["fake_logits"].item()]
    )


def test_random_scales_hold_the_full_one_last_and_differ():
    config = make_config(num_scales=4)
    seen = [step_scales(config, 8, step) for step in range(50)]
    for scales in seen:
        assert scales[-1] == 1
        assert scales == sorted(set(scales))
        assert all(scale * 8 == round(scale * 8) for scale in scales)
    assert {round(scale * 8) for scales in seen for scale in scales} == set(range(1, 9))
    assert step_scales(config, 8, step=7) == seen[7]
    assert step_scales(make_config(num_scales=9), 2, step=0) == [0.5, 1.0]
    assert step_scales(make_config(scales=[1.0, 0.25]), 8, step=3) == [0.25, 1.0]


def test_random_scales_stay_within_the_token_budget():
    free = [step_scales(make_config(num_scales=4), 16, step) for step in range(50)]
    kept = [step_scales(make_config(num_scales=4, token_budget=1.5), 16, step) for step in range(50)]
    assert any(sum(scale**2 for scale in scales) > 1.5 for scales in free)
    assert all(sum(scale**2 for scale in scales) <= 1.5 for scales in kept)
    assert all(set(some) <= set(more) and some[-1] == 1 for some, more in zip(kept, free, strict=True))
    assert any(len(scales) > 2 for scales in kept)

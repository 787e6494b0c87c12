import torch
import torch.nn.functional as F

from svqvae_hf.trainer.losses.uniformity import MovingAverage, UniformityLoss

DIM = 4


def one_process(tensor):
    return tensor


def draw_latents(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).requires_grad_()


def excess(latents):
    """|m|^2 + |M - I/dim|^2 of the normalised latents."""
    flat = F.normalize(latents.movedim(1, -1).flatten(0, 2), dim=-1)
    mean, second = flat.mean(0), flat.T @ flat / len(flat)
    return mean.square().sum() + (second - torch.eye(latents.shape[1]) / latents.shape[1]).square().sum()


def test_gradient_of_a_first_batch_is_the_gradient_of_its_moments():
    latents = draw_latents(2, DIM, 3, 5)
    (gradient,) = torch.autograd.grad(UniformityLoss(DIM)(latents, one_process), latents)
    (expected,) = torch.autograd.grad(excess(latents), latents)
    torch.testing.assert_close(gradient, expected)


def test_latents_leave_a_cone_for_the_whole_sphere():
    cone = torch.tensor([1.0, 0, 0, 0]).view(1, DIM, 1, 1) + 0.1 * draw_latents(1, DIM, 16, 16)
    latents = cone.detach().requires_grad_()
    loss = UniformityLoss(DIM)
    optimizer = torch.optim.SGD([latents], lr=3)
    assert excess(latents) > 1.6
    for _ in range(500):
        optimizer.zero_grad()
        loss(latents, one_process).backward()
        optimizer.step()
    assert excess(latents) < 1e-3
    assert loss.mean_cosine < 1e-3


def test_latents_that_are_not_finite_keep_the_moments():
    loss = UniformityLoss(DIM)
    loss(draw_latents(1, DIM, 4, 4), one_process)
    before = loss.moments.mean.clone()
    broken = draw_latents(1, DIM, 4, 4).detach()
    broken[0, 1, 2, 3] = torch.nan
    assert loss(broken, one_process).isnan()
    assert torch.equal(loss.moments.mean, before)


# The moving average


def test_mean_weighs_each_batch_by_its_age():
    torch.manual_seed(0)
    batches = torch.randn(30, 2, 3, dtype=torch.float64)
    average = MovingAverage((2, 3), decay=0.9)
    assert average.mean.eq(0).all()
    for count, batch in enumerate(batches, 1):
        average.update(batch)
        weights = 0.9 ** torch.arange(count - 1, -1, -1, dtype=torch.float64)
        expected = (weights[:, None, None] * batches[:count]).sum(0) / weights.sum()
        torch.testing.assert_close(average.mean, expected.float())

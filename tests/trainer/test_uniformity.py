import torch
import torch.nn.functional as F

from svqvae_hf.trainer.losses.uniformity import UniformityLoss

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


def test_loss_of_uniform_latents_is_zero():
    latents = torch.cat([torch.eye(DIM), -torch.eye(DIM)]).view(2 * DIM, DIM, 1, 1)
    assert UniformityLoss(DIM)(latents, one_process) == 0


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


def test_mean_cosine_is_the_mean_over_all_pairs():
    latents, loss = draw_latents(2, DIM, 3, 3) + 1, UniformityLoss(DIM)
    loss(latents, one_process)
    flat = F.normalize(latents.movedim(1, -1).flatten(0, 2), dim=-1)
    torch.testing.assert_close(loss.mean_cosine, (flat @ flat.T).mean())


def test_two_processes_equal_one_with_the_joined_batch():
    halves = [draw_latents(4, DIM, 3, 3)[i::2].detach().requires_grad_() for i in range(2)]
    sent = []
    for half in halves:
        UniformityLoss(DIM)(half, lambda moments: sent.append(moments) or moments)
    losses = [UniformityLoss(DIM)(half, lambda _: torch.stack(sent).mean(0)) for half in halves]
    joined = torch.cat(halves).detach().requires_grad_()
    expected = UniformityLoss(DIM)(joined, one_process)
    torch.testing.assert_close(sum(losses) / 2, expected)
    (gradient,) = torch.autograd.grad(expected, joined)
    torch.testing.assert_close(torch.cat(torch.autograd.grad(sum(losses) / 2, halves)), gradient)


def test_latents_that_are_not_finite_keep_the_moments():
    loss = UniformityLoss(DIM)
    loss(draw_latents(1, DIM, 4, 4), one_process)
    before = loss.moments.mean.clone()
    broken = draw_latents(1, DIM, 4, 4).detach()
    broken[0, 1, 2, 3] = torch.nan
    assert loss(broken, one_process).isnan()
    assert torch.equal(loss.moments.mean, before)


def test_moments_are_in_float32_under_autocast():
    latents = draw_latents(2, DIM, 8, 8)
    expected = UniformityLoss(DIM)(latents, one_process)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(UniformityLoss(DIM)(latents, one_process), expected)


def test_moments_continue_from_their_state():
    loss, resumed = UniformityLoss(DIM), UniformityLoss(DIM)
    first, second = draw_latents(2, 1, DIM, 4, 4)
    loss(first, one_process)
    resumed.load_state_dict(loss.state_dict())
    assert torch.equal(resumed(second, one_process), loss(second, one_process))

import pytest
import torch
import torch.nn.functional as F
from conftest import make_tiny
from diffusers.training_utils import EMAModel
from pytorch_optimizer.optimizer.soap import SOAP
from torch import nn

from svqvae_hf.models.quantizer import VectorQuantizer
from svqvae_hf.trainer.codebook import CodebookAverage, DeadCodeReset, forget_codes, initialise_codebook

SIZE, DIM = 64, 8


def make_quantizer(l2_norm=True):
    torch.manual_seed(0)
    return VectorQuantizer(SIZE, DIM, 0.25, 0.0, l2_norm)


def reset(dead, latents, l2_norm=True, limit=SIZE, seed=0, step=0):
    """Codes before and after a reset, and the ids of the replaced ones."""
    quantizer, dead_codes = make_quantizer(l2_norm), DeadCodeReset(SIZE)
    before = quantizer.embedding.weight.detach().clone()
    counts = torch.ones(SIZE, dtype=torch.int64)
    counts[dead] = 0
    dead_codes.counts += counts
    replaced = dead_codes.reset(quantizer, latents, limit, seed, step)
    assert dead_codes.counts.eq(0).all()
    return before, quantizer.embedding.weight.detach(), replaced


# k-means


@pytest.mark.parametrize("l2_norm", [True, False])
def test_kmeans_finds_planted_centres(l2_norm):
    torch.manual_seed(0)
    centres = torch.randn(16, DIM)
    centres = F.normalize(centres, dim=-1) if l2_norm else centres * 3
    latents = centres.repeat(200, 1) + 0.01 * torch.randn(3200, DIM)
    quantizer = make_quantizer(l2_norm)
    initialise_codebook(quantizer, latents, seed=0)
    codes = quantizer.embedding.weight.detach()
    assert torch.cdist(centres, codes).min(1).values.max() < 0.05
    assert quantizer.embedding.nearest(F.normalize(latents, dim=-1) if l2_norm else latents).unique().numel() > 48
    if l2_norm:
        torch.testing.assert_close(codes.norm(dim=-1), torch.ones(SIZE))
    again, other = make_quantizer(l2_norm), make_quantizer(l2_norm)
    torch.manual_seed(123)
    initialise_codebook(again, latents, seed=0)
    initialise_codebook(other, latents, seed=1)
    assert torch.equal(again.embedding.weight, codes)
    assert not torch.equal(other.embedding.weight, codes)


# Moving average


@pytest.mark.parametrize("l2_norm", [True, False])
def test_codes_move_to_the_mean_of_their_latents(l2_norm):
    quantizer = make_quantizer(l2_norm)
    average = CodebookAverage(quantizer, decay=0.9)
    average.restart(quantizer, torch.arange(SIZE))
    before = quantizer.embedding.lookup(torch.arange(SIZE))
    torch.manual_seed(1)
    centres = torch.randn(4, DIM)
    latents = centres.repeat(100, 1) + 0.01 * torch.randn(400, DIM)
    ids = torch.arange(4).repeat(100)
    for _ in range(200):
        average.update(quantizer, latents, ids)
    codes = quantizer.embedding.lookup(torch.arange(SIZE))
    means = F.normalize(latents, dim=-1) if l2_norm else latents
    means = torch.stack([means[ids == code].mean(0) for code in range(4)])
    torch.testing.assert_close(codes[:4], F.normalize(means, dim=-1) if l2_norm else means, atol=1e-4, rtol=0)
    torch.testing.assert_close(codes[4:], before[4:])  # a code without latents stays


def test_latents_that_are_not_finite_move_no_code():
    quantizer = make_quantizer()
    average = CodebookAverage(quantizer, 0.9)
    latents = torch.randn(64, DIM)
    before = quantizer.embedding.weight.clone(), average.sums.clone(), average.weights.clone()
    latents[3, 1] = torch.nan
    average.update(quantizer, latents, torch.randint(SIZE, (64,)))
    after = quantizer.embedding.weight, average.sums, average.weights
    assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))


# Dead codes


@pytest.mark.parametrize("l2_norm", [True, False])
def test_only_dead_codes_become_latents(l2_norm):
    dead, latents = [3, 20, 63], 5 * torch.randn(100, DIM)
    before, after, replaced = reset(dead, latents, l2_norm)
    assert replaced.tolist() == dead
    assert (after != before).any(1).nonzero().flatten().tolist() == dead
    candidates = F.normalize(latents, dim=-1) if l2_norm else latents
    sources = (after[dead][:, None] == candidates).all(-1).nonzero()[:, 1]
    assert sources.unique().numel() == len(dead)
    if l2_norm:
        torch.testing.assert_close(after[dead].norm(dim=-1), torch.ones(len(dead)))


def test_code_is_dead_if_unused_since_the_last_reset():
    quantizer, dead_codes = make_quantizer(), DeadCodeReset(SIZE)
    latents = torch.randn(100, DIM)
    found = torch.zeros(SIZE, dtype=torch.int64)
    found[:60] = 1
    dead_codes.counts += found
    dead_codes.counts += found.flip(0)
    assert dead_codes.reset(quantizer, latents, SIZE, seed=0, step=0).tolist() == []
    dead_codes.counts += found
    assert dead_codes.reset(quantizer, latents, SIZE, seed=0, step=1).tolist() == [60, 61, 62, 63]


# State of replaced codes


def test_optimizer_forgets_only_replaced_codes():
    model = make_tiny().train()
    weight = model.quantize.embedding.weight
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    replaced = torch.tensor([2, 40])
    forget_codes(model, weight, replaced, optimizer)
    assert not optimizer.state
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    forget_codes(model, weight, replaced, optimizer)
    for parameter, state in optimizer.state.items():
        assert state["step"] == 1
        for name in ("exp_avg", "exp_avg_sq"):
            cleared = (state[name].flatten(1) if state[name].ndim > 1 else state[name][:, None]).eq(0).any(1)
            assert cleared.nonzero().flatten().tolist() == (replaced.tolist() if parameter is weight else [])


@pytest.mark.parametrize("max_dim", [2048, 32], ids=["rotated", "by code"])
def test_replaced_codes_do_not_jump_with_soap(max_dim):
    torch.manual_seed(1)
    weight, target, used = nn.Parameter(torch.randn(SIZE, DIM)), torch.randn(SIZE, DIM), torch.rand(SIZE) < 0.8
    optimizer = SOAP([weight], lr=1e-3, betas=(0.95, 0.95), max_precondition_dim=max_dim, weight_decay=0.0)
    moves = []
    for step in range(60):
        if step == 50:
            forget_codes(nn.Module(), weight, (~used).nonzero().flatten(), optimizer)
            used[:] = True
        noise = 0.3 * torch.randn(SIZE, DIM)
        weight.grad = torch.where(used[:, None], weight.detach() - target + noise, 0)
        before = weight.detach().clone()
        optimizer.step()
        moves.append((weight.detach() - before).abs().max().item())
    assert max(moves[50:]) < 3 * max(moves[40:50])


def test_average_of_replaced_codes_restarts_at_them():
    model = make_tiny()
    weight = model.quantize.embedding.weight
    ema = EMAModel(model.parameters(), decay=0.9)
    before = [average.clone() for average in ema.shadow_params]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    forget_codes(model, weight, torch.tensor([2, 40]), torch.optim.AdamW([weight]), ema)
    for parameter, average, old in zip(model.parameters(), ema.shadow_params, before, strict=True):
        if parameter is weight:
            changed = (average != old).any(1)
            assert changed.nonzero().flatten().tolist() == [2, 40]
            assert torch.equal(average[changed], weight[changed])
        else:
            assert torch.equal(average, old)

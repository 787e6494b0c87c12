import math

import pytest
import torch
import torch.nn.functional as F

from svqvae_hf.models.quantizer import SEARCH_SCORES, Codebook, VectorQuantizer

pytestmark = pytest.mark.usefixtures("few_windows")


def exhaustive_ids(latents, codes):
    return torch.cdist(latents.double(), codes.double()).argmin(-1)


@pytest.mark.parametrize("l2_norm", [True, False])
def test_nearest_ids_equal_exhaustive_search(l2_norm):
    torch.manual_seed(0)
    codebook, latents = Codebook(100, 8, l2_norm), torch.randn(5000, 8)
    codes = codebook.weight.detach()
    if l2_norm:
        latents, codes = F.normalize(latents, dim=-1), F.normalize(codes, dim=-1)
    assert torch.equal(codebook.nearest(latents), exhaustive_ids(latents, codes))


@pytest.mark.parametrize("rows", [1, 7, 999, 4000])
def test_search_in_chunks_is_bit_equal_to_one_search(rows, monkeypatch):
    torch.manual_seed(0)
    codebook, latents = Codebook(300, 8, l2_norm=True), F.normalize(torch.randn(4000, 8), dim=-1)
    unchunked = codebook.nearest(latents)
    monkeypatch.setattr("svqvae_hf.models.quantizer.SEARCH_SCORES", rows * 300)
    assert torch.equal(codebook.nearest(latents), unchunked)


def test_search_holds_a_bounded_number_of_scores(monkeypatch):
    largest = []
    argmax = torch.Tensor.argmax

    def watched(scores, dim):
        largest.append(scores.numel())
        return argmax(scores, dim)

    monkeypatch.setattr(torch.Tensor, "argmax", watched)
    Codebook(16384, 8, l2_norm=True).nearest(torch.randn(1000, 8))
    assert max(largest) <= SEARCH_SCORES
    assert len(largest) > 1


def test_lowest_id_wins_a_tie():
    codebook = Codebook(6, 4, l2_norm=True)
    codebook.weight.data[:] = torch.eye(4)[[0, 1, 1, 2, 2, 2]]
    assert codebook.nearest(torch.eye(4)[[2, 1, 0]]).tolist() == [3, 1, 0]


@pytest.mark.parametrize("l2_norm", [True, False])
def test_losses_and_straight_through_gradient(l2_norm):
    quantizer = VectorQuantizer(32, 4, commit_loss_beta=0.25, entropy_loss_ratio=0.0, l2_norm=l2_norm)
    latents = torch.randn(2, 4, 3, 5, requires_grad=True)
    quantized, losses, (_, _, ids) = quantizer(latents)
    flat = latents.detach().permute(0, 2, 3, 1).flatten(0, 2)
    codes = quantizer.embedding.weight.detach()
    if l2_norm:
        flat, codes = F.normalize(flat, dim=-1), F.normalize(codes, dim=-1)
    distance = (codes[ids] - flat).square().mean()
    torch.testing.assert_close(losses.vq.detach(), distance)
    torch.testing.assert_close(losses.commit.detach(), 0.25 * distance)
    torch.testing.assert_close(quantized.detach().permute(0, 2, 3, 1).flatten(0, 2), codes[ids])
    upstream = torch.randn_like(quantized)
    (gradient,) = torch.autograd.grad(quantized, latents, upstream)
    normed = F.normalize(latents, dim=1) if l2_norm else latents * 1
    torch.testing.assert_close(gradient, torch.autograd.grad(normed, latents, upstream)[0])


def test_entropy_loss_rewards_confident_and_even_use():
    quantizer = VectorQuantizer(4, 4, commit_loss_beta=0.25, entropy_loss_ratio=1.0, l2_norm=True).train()
    quantizer.embedding.weight.data.copy_(torch.eye(4))
    even = quantizer(torch.eye(4).view(1, 4, 4, 1))[1].entropy
    one_code = quantizer(torch.eye(4)[:1].expand(4, 4).T.reshape(1, 4, 4, 1))[1].entropy
    unsure = quantizer(torch.ones(1, 4, 4, 1))[1].entropy
    assert even < one_code
    assert even < unsure
    assert even.item() == pytest.approx(-math.log(4), abs=1e-3)


def test_gradients_are_summed_in_the_order_of_a_plain_reference():
    """Rounding depends on the order, so with another one no training would repeat bit by bit."""
    torch.manual_seed(0)
    quantizer = VectorQuantizer(32, 4, commit_loss_beta=0.25, entropy_loss_ratio=0.1, l2_norm=True).train()
    latents, upstream = torch.randn(2, 4, 16, 16, requires_grad=True), torch.randn(2, 4, 16, 16)
    inputs = latents, quantizer.embedding.weight
    quantized, losses, (_, _, ids) = quantizer(latents)
    found = torch.autograd.grad((upstream * quantized).sum() + losses.total, inputs)

    flat = F.normalize(latents.permute(0, 2, 3, 1).flatten(0, 2), dim=-1)
    codes = F.embedding(ids, F.normalize(quantizer.embedding.weight, dim=-1))
    vq, commit = F.mse_loss(codes, flat.detach()), 0.25 * F.mse_loss(flat, codes.detach())
    total = vq + commit + quantizer._entropy_loss(flat)
    straight_through = (flat + (codes - flat).detach()).view(2, 16, 16, 4).permute(0, 3, 1, 2)  # after the losses
    expected = torch.autograd.grad((upstream * straight_through).sum() + total, inputs)
    assert all(map(torch.equal, found, expected))


def test_quantizer_stays_in_float32_under_autocast(tiny_model):
    images = torch.rand(1, 3, 32, 32)
    latents = tiny_model.encode(images).latents
    expected = tiny_model.quantize.nearest_ids(latents)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(tiny_model.quantize.nearest_ids(latents), expected)
        assert torch.equal(tiny_model.quantize(latents)[2][2], expected.flatten())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_codebook_stays_float32_when_the_model_is_cast(tiny_model, dtype):
    fingerprint = tiny_model.codebook_fingerprint()
    tiny_model.to(dtype)
    assert tiny_model.encoder.conv_in.weight.dtype == dtype
    assert tiny_model.codebook_fingerprint() == fingerprint
    assert tiny_model.half().codebook_fingerprint() == fingerprint
    assert tiny_model.to("meta").quantize.embedding.weight.device.type == "meta"


def test_usage_is_the_fraction_of_codes_that_occur(tiny_model):
    assert tiny_model.quantize.usage(torch.tensor([[3, 3], [63, 0]])) == 3 / 64
    sample = torch.rand(1, 3, 64, 48)
    output = tiny_model(sample, scales=[1, 0.5])
    _, losses = tiny_model(sample, scales=[1, 0.5], return_dict=False)
    for (*of_tuple, usage), expected, ids in zip(losses, output.losses, output.ids, strict=True):
        assert of_tuple == [*expected]
        assert usage == len(set(ids.flatten().tolist())) / 64

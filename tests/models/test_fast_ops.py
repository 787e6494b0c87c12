import itertools
import sys

import psutil
import pytest
import torch
import torch.nn.functional as F

from svqvae_hf.models.layers.fast_ops import (
    Conv3x3,
    HalvingConv2d,
    RepeatConv2d,
    cat_on_own_pages,
    make_cuts,
    trim_heap,
)

pytestmark = pytest.mark.usefixtures("few_windows")


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (4, 7)])
def test_repeat_conv_equals_upsampling_and_convolution_with_gradients(size):
    torch.manual_seed(0)
    fast = RepeatConv2d(6).double()
    plain = torch.nn.Conv2d(6, 6, 3, padding=1).double()
    plain.load_state_dict(fast.state_dict())
    hidden = torch.randn(2, 6, *size, dtype=torch.float64, requires_grad=True)
    outputs = fast(hidden), plain(F.interpolate(hidden, scale_factor=2.0, mode="nearest"))
    torch.testing.assert_close(*outputs)
    weight = torch.randn_like(outputs[0])
    gradients = (
        torch.autograd.grad((output * weight).sum(), [hidden, *module.parameters()])
        for output, module in zip(outputs, (fast, plain), strict=True)
    )
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("tiled", [False, True])
def test_fast_inference_equals_inference_with_gradients(tiny_model, tiled):
    """Without gradients: channels_last, activations in place, norms of tiles in one kernel."""
    sample = torch.rand(1, 3, 44, 100)
    if tiled:
        tiny_model.enable_tiling(32, 8)
    with torch.enable_grad():
        latents, ids = tiny_model.encode(sample).latents, tiny_model.encode_tokens(sample)
        decoded = tiny_model.decode(ids).sample
    with torch.no_grad():
        fast_latents, fast_ids = tiny_model.encode(sample).latents, tiny_model.encode_tokens(sample)
        fast_decoded = tiny_model.decode(ids).sample
    assert fast_latents.is_contiguous()
    assert fast_decoded.is_contiguous()
    assert torch.equal(fast_ids, ids)
    torch.testing.assert_close(fast_latents, latents.detach())
    torch.testing.assert_close(fast_decoded, decoded.detach())


def pad_sides(hidden, sides):
    """Pads by 1: repeats the edge where a side is True, zeros elsewhere."""
    padded = F.pad(hidden, (1, 1, 1, 1), mode="replicate")
    borders = [padded[..., 0, :], padded[..., -1, :], padded[..., 0], padded[..., -1]]
    for repeated, border in zip(sides, borders, strict=True):
        if not repeated:
            border.zero_()
    return padded


@pytest.mark.usefixtures("no_grad")
@pytest.mark.parametrize("sides", [*itertools.product([False, True], repeat=4)])
def test_convolutions_repeat_the_edges_of_a_cut(sides):
    """Whichever sides are cut, and for each window of a batch apart."""
    hidden = torch.randn(2, 4, 6, 8)
    both = sides, (False, True, True, False)
    cuts = make_cuts(both, hidden)

    def pad(values):
        return torch.cat([pad_sides(window[None], each) for window, each in zip(values, both, strict=True)])

    plain, half, twice = Conv3x3(4, 5), HalvingConv2d(4), RepeatConv2d(4)
    enlarged = F.interpolate(hidden, scale_factor=2.0)
    for output, padded, layer, stride in (
        (plain(hidden, cuts), pad(hidden), plain, 1),
        (half(hidden, cuts), pad(hidden)[..., 1:, 1:], half, 2),
        (twice(hidden, cuts), pad(enlarged), twice, 1),
    ):
        torch.testing.assert_close(output, F.conv2d(padded, layer.weight, layer.bias, stride))


@pytest.mark.usefixtures("no_grad")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("lengths", [[9], [1, 6, 2]])
def test_cat_on_own_pages_is_cat_and_keeps_the_layout(dtype, layout, lengths):
    rows = torch.randn(3, 8, 12, 10, dtype=dtype).contiguous(memory_format=layout)[..., 2:11, :]
    joined = cat_on_own_pages(list(rows.split(lengths, -2)), -2)
    assert torch.equal(joined, rows)
    assert joined.is_contiguous(memory_format=layout)
    assert joined.untyped_storage().nbytes() == rows.nbytes
    joined.zero_()
    assert rows.any()


@torch.no_grad()
def test_cat_without_pages_of_its_own_is_cat(monkeypatch):
    """Where the system refuses them, PyTorch's allocator decides whether memory is exhausted."""

    def refuse(*args, **options):
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr("mmap.mmap", refuse)
    parts = torch.rand(4, 3).split(2)
    assert torch.equal(cat_on_own_pages(parts, 0), torch.cat(parts))


def test_cat_on_own_pages_passes_gradients():
    parts = [torch.randn(1, 4, 2, 2, requires_grad=True) for _ in range(2)]
    cat_on_own_pages(parts, 0)[1].sum().backward()
    assert parts[0].grad.sum() == 0
    assert parts[1].grad.sum() == 16


@pytest.mark.skipif(sys.platform != "linux", reason="reads resident memory from /proc")
@pytest.mark.usefixtures("no_grad")
def test_memory_of_own_pages_returns_between_others():
    """The heap would keep what lies before a block that is still used."""
    process, block = psutil.Process(), torch.randn(1, 1, 1024, 256)  # 1 MiB
    before = process.memory_info().rss
    copies = [cat_on_own_pages([block], 0) for _ in range(100)]
    assert process.memory_info().rss - before > 90 << 20
    del copies[:-1]
    assert process.memory_info().rss - before < 10 << 20


@pytest.mark.skipif(sys.platform != "linux", reason="reads resident memory from /proc")
def test_trimming_returns_what_lies_before_a_block_that_is_still_used():
    process = psutil.Process()
    blocks = [torch.ones(1 << 14) for _ in range(1600)]  # 100 MiB, in the heap
    del blocks[:-1]
    before = process.memory_info().rss
    trim_heap()
    assert before - process.memory_info().rss > 50 << 20

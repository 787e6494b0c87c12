import pytest
import torch
import torch.nn.functional as F

from svqvae_hf.models.layers import Area, Conv3x3, RepeatConv2d, TileContext, make_cuts, pad_edges

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
@pytest.mark.parametrize("sides", [(True, False, False, True), (False, False, True, False)])
def test_convolutions_repeat_the_edges_of_a_cut(sides):
    """Whichever sides are cut, and for each window of a batch apart."""
    hidden = torch.randn(2, 4, 6, 8)
    sides_of_windows = [sides, (False, True, True, False)]
    shared = TileContext((6, 8), Area.of_size((6, 8)), make_cuts(sides_of_windows, hidden))

    def pad(values):
        first, second = values.split(1)
        return torch.cat([pad_sides(first, sides_of_windows[0]), pad_sides(second, sides_of_windows[1])])

    plain, half, twice = Conv3x3(4, 5), torch.nn.Conv2d(4, 4, 3, stride=2), RepeatConv2d(4)
    enlarged = F.interpolate(hidden, scale_factor=2.0)
    for output, padded, layer, stride in (
        (plain(hidden, shared), pad(hidden), plain, 1),
        (half(pad_edges(hidden, shared, before=0)), pad(hidden)[..., 1:, 1:], half, 2),
        (twice(hidden, shared), pad(enlarged), twice, 1),
    ):
        torch.testing.assert_close(output, F.conv2d(padded, layer.weight, layer.bias, stride))

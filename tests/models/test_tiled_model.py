import dataclasses

import pytest
import torch
from conftest import make_tiny, psnr, smooth_images
from torch.utils.flop_counter import FlopCounterMode

from svqvae_hf import SVQVAE
from svqvae_hf.models import tiling
from svqvae_hf.models.layers import Area, GroupNorm, WindowSample
from svqvae_hf.models.modeling_svqvae import AttnBlock
from svqvae_hf.models.tiling import TiledRun, Tiles, sample_windows

pytestmark = pytest.mark.usefixtures("few_windows", "no_grad")


def test_default_overlap_fits_any_tile(tiny_model):
    tiny_model.enable_tiling(tile_size=64)
    assert (tiny_model.tile_size, tiny_model.overlap) == (64, 16)
    tiny_model.enable_tiling(tile_size=64, overlap=28)
    assert tiny_model.tiles_of_call() == (64, 28)
    assert tiny_model.tiles_of_call(tile_size=64) == (64, 16)
    deep = make_tiny(encoder_ch_mult=(1,) * 7, decoder_ch_mult=(1,) * 7)  # f = 64
    deep.enable_tiling()
    assert (deep.tile_size, deep.overlap) == (256, 0)
    images = torch.rand(1, 3, 400, 300)
    assert deep(images, tile_size=256).sample.shape == images.shape


@pytest.mark.parametrize("core", [((13, 14), (20, 27)), ((0, 9), (30, 40)), ((0, 40), (0, 40))])
@pytest.mark.parametrize(
    "config", [{"num_res_blocks": 3}, {"decoder_ch_mult": (1, 2, 2, 4), "encoder_ch_mult": (1,) * 4}]
)
def test_decoding_a_core_is_exact_and_cheaper(config, core):
    model = make_tiny(**config)
    codes = model.quantize(torch.randn(1, 8, 40, 40))[0]
    run = TiledRun(model.decode_window, lambda rows, columns: codes[..., rows, columns], (40, 40), tile=16, overlap=0)
    sample = sample_windows(run)
    rows, columns = (slice(model.f * start, model.f * stop) for start, stop in core)
    core = Area(*(slice(*span) for span in core))
    cropped = sample.context_of_tile(codes, core, input_stride=1)
    uncropped = dataclasses.replace(cropped, core=Area.of_size((40, 40)))
    with FlopCounterMode(display=False) as of_window:
        whole = model.decode_window(codes, uncropped)
    with FlopCounterMode(display=False) as of_core:
        decoded = model.decode_window(codes, cropped)
    torch.testing.assert_close(decoded, whole[..., rows, columns], rtol=1e-5, atol=2e-5)
    share = of_core.get_total_flops() / of_window.get_total_flops()
    assert share == 1 if core.rows == slice(0, 40) else share < 0.9


def test_tiles_of_a_call_are_those_that_would_be_enabled(tiny_model):
    images = torch.rand(1, 3, 60, 100)
    ids = tiny_model.encode_tokens(images, tiles=(32, 8))
    scales = tiny_model.encode_scales(images, [1, 0.5], tiles=Tiles(32, 8))
    decoded = tiny_model.decode_tokens(ids, tiles=(32, 8))
    (listed,) = tiny_model.decode_tokens([ids], tiles=(32, 8))
    assert not torch.equal(decoded, tiny_model.decode_tokens(ids))
    tiny_model.enable_tiling(32, 8)
    assert torch.equal(tiny_model.encode_tokens(images), ids)
    assert all(map(torch.equal, tiny_model.encode_scales(images, [1, 0.5]), scales))
    assert torch.equal(tiny_model.decode_tokens(ids), decoded)
    assert torch.equal(listed, decoded)


def test_image_of_one_tile_is_not_tiled(tiny_model):
    images = torch.rand(1, 3, 61, 64)
    whole = tiny_model(images).sample
    tiny_model.enable_tiling(64, 8)
    assert torch.equal(tiny_model(images).sample, whole)
    tiny_model.disable_tiling()
    assert torch.equal(tiny_model(images).sample, whole)


def test_networks_see_no_more_than_a_tile(tiny_model, encoder_inputs):
    tiny_model.enable_tiling(64, 8)
    tiny_model.encode(torch.rand(1, 3, 100, 300))
    assert len(encoder_inputs) > 10
    assert max(max(shape[-2:]) for shape in encoder_inputs) <= 64


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_tiles_work_in_half_precision(tiny_model, tmp_path, dtype):
    tiny_model.save_pretrained(tmp_path)
    model = SVQVAE.from_pretrained(tmp_path, torch_dtype=dtype).eval()
    images = smooth_images(48, 40)
    expected = tiny_model(images, tile_size=32, overlap=8).sample
    output = model(images.to(dtype), tile_size=32, overlap=8).sample
    assert output.dtype == dtype
    assert psnr(output, expected) > 25


@pytest.mark.slow
def test_tiles_equal_the_whole_image_if_the_windows_are_the_whole_image(monkeypatch):
    """Tiles then differ from the whole image only by what their overlap does not reach."""

    def whole(run):
        return sample_windows(dataclasses.replace(run, tile=max(run.size)))

    monkeypatch.setattr(tiling, "CONTEXT_WINDOW_SIDE", 200)
    monkeypatch.setattr(tiling, "sample_windows", whole)
    model = make_tiny()
    images = torch.stack([smooth_images(200, 168)[0], torch.rand(3, 200, 168)])
    latents = model.encode(images).latents
    sample = model.decode(latents, force_not_quantize=True).sample
    model.enable_tiling(160, 72)
    assert psnr(model.encode(images).latents, latents) - psnr(torch.zeros_like(latents), latents) > 60
    assert psnr(model.decode(latents, force_not_quantize=True).sample, sample) > 60


def random_attention() -> AttnBlock:
    block = AttnBlock(6, 2)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return block


def test_blocks_on_all_windows_equal_blocks_on_the_whole_image():
    blocks, norm_out = [random_attention(), random_attention()], GroupNorm(2, 6)
    hidden = torch.randn(2, 6, 10, 12) * 3 + 20
    expected = hidden
    for block in blocks:
        expected = block(expected)
    sample = WindowSample((10, 4), Area.of_size((10, 4)), cuts=None, images=2)
    windows = torch.stack(hidden.split(4, dim=-1), dim=1).flatten(0, 1)
    for block in blocks:
        windows = block(windows, sample)
    norm_out(windows, sample)
    tile = hidden[..., 2:9, 3:]
    context = sample.context_of_tile(tile, Area.of_size((7, 9)), input_stride=1)
    for block in blocks:
        tile = block(tile, context)
    torch.testing.assert_close(tile, expected[..., 2:9, 3:], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(norm_out(tile, context), norm_out(expected)[..., 2:9, 3:], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_tiles_leave_no_dark_border_and_no_dead_latents(tiny_model):
    for layer, value in [(tiny_model.decoder.conv_out, 0.5), (tiny_model.quant_conv, 0.3)]:
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.constant_(layer.bias, value)
    images = torch.rand(1, 3, 50, 61)
    for sample in tiny_model(images, tile_size=32, overlap=8, scales=[0.5, 1, 2]).sample:
        torch.testing.assert_close(sample, torch.full_like(sample, 0.5))
    tiny_model.enable_tiling(32, 8)
    latents = tiny_model.encode(images).latents
    torch.testing.assert_close(latents, torch.full_like(latents, 0.3))


@torch.enable_grad()
@pytest.mark.parametrize("name", ["encoder.conv_in.weight", "encoder.norm_out.weight", "decoder.conv_in.weight"])
def test_gradient_through_tiles_equals_finite_differences(name):
    model = make_tiny(codebook_l2_norm=False).double()  # latents are normalised in float32
    model.enable_tiling(32, 8)
    images = smooth_images(48, 48).double()
    parameter = dict(model.named_parameters())[name]
    direction = torch.randn_like(parameter)

    def loss():
        return model.decode(model.encode(images).latents, force_not_quantize=True).sample.square().mean()

    (gradient,) = torch.autograd.grad(loss(), parameter)
    change = 0
    with torch.no_grad():
        for sign in (1, -1):
            parameter += sign * 1e-5 * direction
            change += sign * loss() / 2e-5
            parameter -= sign * 1e-5 * direction
    torch.testing.assert_close((gradient * direction).sum(), change, rtol=1e-4, atol=1e-8)


@torch.enable_grad()
def test_tiles_with_gradient_checkpointing_are_refused():
    model = make_tiny().train()
    model.enable_gradient_checkpointing()
    with pytest.raises(ValueError, match="Disable gradient checkpointing, tiling or gradients"):
        model(torch.rand(1, 3, 48, 48), tile_size=32)
    with torch.no_grad():
        model(torch.rand(1, 3, 48, 48), tile_size=32)


@pytest.mark.slow
def test_two_compiled_graphs_serve_all_tiles():
    """One for the sample of windows and one for tiles."""
    model, graphs = make_tiny(encoder_ch_mult=(1, 2), decoder_ch_mult=(1, 2)), []
    torch.compiler.reset()
    model.enable_tiling(40, 12)
    ids = torch.randint(64, (1, 47, 60))
    expected = model.decode_tokens(ids)
    model.decoder.forward = torch.compile(
        model.decoder.forward, fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph
    )
    torch.testing.assert_close(model.decode_tokens(ids), expected, rtol=1e-5, atol=1e-5)
    assert len(graphs) == 2

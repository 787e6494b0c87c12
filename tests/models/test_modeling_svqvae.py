import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import gradients_with_checkpointing, make_tiny, offload, psnr, smooth_images
from torch.nn.attention import SDPBackend, sdpa_kernel

from svqvae_hf import SVQVAE
from svqvae_hf.models.checks import SCALE_SOURCES
from svqvae_hf.models.modeling_svqvae import ResolutionBlock
from svqvae_hf.models.resizing import resize_latents, resize_sample

pytestmark = pytest.mark.usefixtures("few_windows", "no_grad")
SIZES = [(1, 1), (3, 200), (65, 130)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("tiled", [False, True])
@pytest.mark.parametrize("scales", [None, [1.5, 0.5, 1, 0.3]])
def test_output_has_the_size_of_the_image_at_each_scale(tiny_model, size, tiled, scales):
    if tiled:
        tiny_model.enable_tiling(64, 8)
    outputs = tiny_model(torch.rand(1, 3, *size), scales=scales).sample
    for output, scale in zip(outputs if scales else [outputs], scales or [1], strict=True):
        assert output.shape == (1, 3, *(max(1, round(scale * side)) for side in size))
        assert output.min() >= 0
        assert output.max() <= 1


def test_ids_made_in_inference_mode_are_decoded_outside(tiny_model):
    with torch.inference_mode():
        ids = tiny_model.encode_tokens(torch.rand(1, 3, 32, 32))
        expected = tiny_model.decode_tokens(ids)
    with torch.enable_grad():
        sample = tiny_model.decode_tokens(ids)
    torch.testing.assert_close(sample.detach(), expected)
    assert sample.requires_grad


def test_decode_tells_ids_from_latents_by_type(tiny_model):
    latents = tiny_model.encode(torch.rand(2, 3, 16, 24)).latents
    quantized, _, (_, _, flat) = tiny_model.quantize(latents)
    expected = tiny_model.decode(quantized, force_not_quantize=True).sample
    torch.testing.assert_close(tiny_model.decode(latents).sample, expected)
    for ids, shape in [(flat.view(2, 4, 6), None), (flat, (2, 4, 6, 8)), (flat.view(2, 24), (2, 4, 6, 8))]:
        torch.testing.assert_close(tiny_model.decode(ids, shape=shape, force_not_quantize=True).sample, expected)
    assert not torch.allclose(tiny_model.decode(latents, force_not_quantize=True).sample, expected)


def test_outputs_read_as_object_mapping_and_tuple(tiny_model):
    images = torch.rand(1, 3, 16, 16)
    encoded = tiny_model.encode(images)
    assert encoded.latents is encoded["latents"]
    assert torch.equal(tiny_model.encode(images, return_dict=False)[0], encoded.latents)
    decoded = tiny_model.decode(encoded.latents)
    assert torch.equal(tiny_model.decode(encoded.latents, return_dict=False)[0], decoded["sample"])
    sample, (vq, commit, entropy, usage) = tiny_model(images, return_dict=False)
    assert torch.equal(sample, tiny_model(images).sample)
    torch.testing.assert_close(commit, 0.25 * vq)
    assert entropy == 0
    assert 0 < usage <= 1


@pytest.mark.parametrize("scale_from", SCALE_SOURCES)
def test_output_holds_the_latents_and_ids_of_each_scale(tiny_model, scale_from):
    images = torch.rand(2, 3, 30, 16)
    output = tiny_model(images, [0.5, 1], scale_from=scale_from)
    latents = tiny_model.encode_scales(images, [0.5, 1], scale_from)
    assert all(map(torch.equal, output.latents, latents))
    assert all(map(torch.equal, output.ids, tiny_model.encode_tokens(images, [0.5, 1], scale_from)))
    assert torch.equal(latents[1], tiny_model.encode(images).latents)
    for losses in output.losses:
        assert losses.total == losses.vq + losses.commit + losses.entropy


def test_latents_that_are_not_quantised_are_decoded_at_unit_length(tiny_model):
    images = torch.rand(1, 3, 16, 16)
    output = tiny_model(images, force_not_quantize=True)
    assert output.losses is output.ids is None
    latents = tiny_model.encode(images).latents
    expected = tiny_model._decode(F.normalize(latents, dim=1), None).clamp(0, 1)
    torch.testing.assert_close(output.sample, expected)
    torch.testing.assert_close(tiny_model.decode(latents, force_not_quantize=True).sample.clamp(0, 1), expected)


def test_pixel_range_maps_images_in_and_out(tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path)
    images = torch.rand(1, 3, 20, 20)
    signed = SVQVAE.from_pretrained(tmp_path, pixel_range=(-1, 1)).eval()
    torch.testing.assert_close(signed(images * 2 - 1).sample, tiny_model(images).sample * 2 - 1)


@pytest.mark.parametrize("scale_from", SCALE_SOURCES)
def test_slicing_changes_no_result(tiny_model, encoder_inputs, scale_from):
    images = torch.rand(3, 3, 40, 24)
    (whole,) = tiny_model(images, [0.5], scale_from=scale_from).sample
    tiny_model.enable_slicing()
    torch.testing.assert_close(tiny_model(images, [0.5], scale_from=scale_from).sample[0], whole)
    assert [shape[0] for shape in encoder_inputs] == [3, 1, 1, 1]


def test_scales_keep_the_callers_order(tiny_model):
    images = torch.rand(1, 3, 32, 32)
    sides = [sample.shape[-1] for sample in tiny_model(images, scales=[1, 4, 0.25, 2]).sample]
    assert sides == [32, 128, 8, 64]
    assert [ids.shape[-1] for ids in tiny_model.encode_tokens(images, scales=[1, 4, 0.25, 2])] == [8, 32, 2, 16]


@pytest.mark.parametrize("scale_from", SCALE_SOURCES)
@pytest.mark.parametrize("scale", [0.5, 1, np.float32(1.5)])
def test_a_number_is_one_scale(tiny_model, scale, scale_from):
    images = torch.rand(1, 3, 32, 24)
    (ids,) = tiny_model.encode_tokens(images, [scale], scale_from)
    assert torch.equal(tiny_model.encode_tokens(images, scale, scale_from), ids)
    (sample,) = tiny_model(images, scales=[scale], scale_from=scale_from).sample
    assert torch.equal(tiny_model(images, scales=scale, scale_from=scale_from).sample, sample)


def test_the_encoder_runs_for_each_scale_or_once_for_scales_from_latents(tiny_model, encoder_inputs):
    image = torch.rand(1, 3, 30, 32)
    tiny_model(image, scales=[0.5, 1, 2])
    tiny_model.encode_tokens(image, scales=[0.5, 1, 2])
    assert encoder_inputs == [(1, 3, 16, 16), (1, 3, 32, 32), (1, 3, 64, 64)] * 2
    encoder_inputs.clear()
    tiny_model(image, scales=(scale for scale in (0.5, 1, 2)), scale_from="latents")
    assert len(tiny_model.encode_scales(image, (scale for scale in (0.5, 1, 2)), "latents")) == 3
    tiny_model(image, patch_nums=[1, 2])
    assert encoder_inputs == [(1, 3, 32, 32)] * 3


@pytest.mark.slow
@pytest.mark.parametrize("tiled", [False, True])
def test_levels_of_a_pyramid_are_resized_images_encoded_by_themselves(tiny_model, tiled):
    if tiled:
        tiny_model.enable_tiling(32, 8)
    image = smooth_images(64, 80)
    ids = tiny_model.encode_tokens(image, [0.5, 1, 0.25, 2], scale_from="image")
    half = F.interpolate(image, scale_factor=0.5, mode="bicubic", antialias=True)
    double = F.interpolate(image, scale_factor=2, mode="bicubic", antialias=True)
    levels = [half, image, F.avg_pool2d(image, 4), double]
    for level, grid in zip(levels, ids, strict=True):
        assert (tiny_model.encode_tokens(level) == grid).float().mean() > 0.99
    assert torch.equal(tiny_model.encode_tokens(image), ids[1])


@pytest.mark.parametrize("scale", [0.01, 0.3, 0.77, 2])
def test_a_resized_image_has_the_latent_grid_of_its_scale(tiny_model, scale):
    f = tiny_model.f
    for size in [(1, 1), (5, 300), (37, 41), (64, 90), (97, 3)]:
        latents = torch.rand(1, 8, *(-(-side // f) for side in size))
        grid = resize_latents(latents, scale).shape[2:]
        assert resize_sample(torch.rand(1, 3, *size), scale, f).shape[2:] == (grid[0] * f, grid[1] * f)


@torch.enable_grad()
def test_gradient_passes_through_each_level_of_a_pyramid():
    model = make_tiny().train()
    image = torch.rand(1, 3, 30, 30, requires_grad=True)
    for output in model(image, [0.2, 0.5, 2], scale_from="image").sample:
        (gradient,) = torch.autograd.grad(output.square().mean(), image, retain_graph=True)
        assert gradient.isfinite().all()
        assert gradient.abs().amin(1).amax() > 0


def test_patch_nums_equal_their_scales(tiny_model):
    images = torch.rand(1, 3, 32, 32)
    by_patches = tiny_model(images, patch_nums=[4, 1, 2], tile_size=32, overlap=4).sample
    by_scales = tiny_model(images, scales=[0.5, 0.125, 0.25], scale_from="latents").sample
    assert [sample.shape[-1] for sample in by_patches] == [16, 4, 8]
    for one, other in zip(by_patches, by_scales, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("scale", [0.3, 1.37])
@pytest.mark.parametrize("scale_from", SCALE_SOURCES)
def test_content_keeps_its_position_at_every_scale(tiny_model, scale, scale_from, monkeypatch):
    """With networks that only resample, a scaled reconstruction is the scaled image, to its last column."""
    f = tiny_model.f
    monkeypatch.setattr(tiny_model, "_encode", lambda sample, tiles: F.avg_pool2d(sample, f).repeat(1, 3, 1, 1)[:, :8])
    monkeypatch.setattr(tiny_model.quantize, "normalise", lambda latents: latents)
    monkeypatch.setattr(tiny_model, "_decode", lambda latents, tiles: F.interpolate(latents[:, :3], scale_factor=f))
    ramp = torch.linspace(0, 1, 160).expand(1, 3, 120, 160).contiguous()
    (scaled,) = tiny_model(ramp, scales=[scale], scale_from=scale_from, force_not_quantize=True).sample
    expected = torch.linspace(0, 1, scaled.shape[-1])
    assert (scaled[0, 0, 0] - expected).abs().max() < 2.5 * f / 160


@torch.enable_grad()
def test_encode_tokens_saves_no_activations(tiny_model):
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda tensor: tensor):
        tiny_model.encode_tokens(torch.rand(1, 3, 16, 16))
    assert not kept


def test_constructor_runs_no_network(monkeypatch):
    monkeypatch.setattr(torch.nn.Conv2d, "forward", lambda *_: pytest.fail("the constructor ran a convolution"))
    with torch.device("meta"):
        assert make_tiny().f == 4


def test_attention_never_holds_all_pairs_of_positions(tiny_model):
    images = torch.rand(2, 3, 32, 40)
    expected = tiny_model(images).sample
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # fails where the inputs do not suit the fused kernel
        torch.testing.assert_close(tiny_model(images).sample, expected)


@torch.enable_grad()
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_parameter_gets_a_finite_gradient(autocast, checkpointing):
    model = make_tiny(dropout_p=0.1).train()
    if checkpointing:
        model.enable_gradient_checkpointing()
    images = torch.rand(2, 3, 32, 32)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = model(images, scales=[0.5, 1])
    loss = sum(sample.float().square().mean() for sample in output.sample)
    loss = loss + sum(losses.vq + losses.commit for losses in output.losses)
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name


@torch.enable_grad()
def test_gradient_checkpointing_changes_no_gradient():
    sample = torch.linspace(0, 1, 3 * 32 * 32).view(1, 3, 32, 32)
    _, recomputed = gradients_with_checkpointing(make_tiny, lambda model: model(sample).sample.square().mean())
    levels = [level for level in make_tiny().modules() if isinstance(level, ResolutionBlock)]
    assert recomputed == sum(len(level.res) + len(level.attn) for level in levels)


def test_training_output_is_not_clamped():
    model = make_tiny().train()
    torch.nn.init.constant_(model.decoder.conv_out.bias, 3.0)
    images = torch.rand(1, 3, 16, 16)
    assert model(images).sample.max() > 1
    assert model.eval()(images).sample.max() == 1


@pytest.mark.slow
def test_compiles_without_graph_breaks():
    model, images = make_tiny(encoder_ch_mult=(1, 2), decoder_ch_mult=(1, 2)), torch.rand(1, 3, 30, 41)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(images, scales=[0.5]).sample, model(images, scales=[0.5]).sample)


def test_device_map(tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path)
    images = torch.rand(1, 3, 32, 32)
    loaded = SVQVAE.from_pretrained(tmp_path, device_map="auto").eval()
    torch.testing.assert_close(loaded(images).sample, tiny_model(images).sample)


def test_layerwise_casting(tiny_model):
    images = torch.rand(1, 3, 32, 32)
    expected = tiny_model(images).sample
    tiny_model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert tiny_model.encoder.conv_in.weight.dtype == torch.float8_e4m3fn
    assert tiny_model.quantize.embedding.weight.dtype == torch.float32
    assert tiny_model.encoder.norm_out.weight.dtype == torch.float32
    assert psnr(tiny_model(images).sample, expected) > 20


def use_everything(model, images):
    reconstruction = model(images, scales=[0.5, 1]).sample
    assert model.codebook_fingerprint() == make_tiny().codebook_fingerprint()
    decoded = model.decode_tokens(model.encode_tokens(images)), model.decode(model.encode(images).latents).sample
    return [*reconstruction, *decoded, model(images, tile_size=16).sample]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["leaf_level", "block_level", "sequential"])
def test_offloading_changes_no_result(tiny_model, tmp_path, kind):
    images = torch.rand(1, 3, 32, 32)
    expected = use_everything(tiny_model, images)
    offload(tiny_model, kind, tmp_path)
    for output, wanted in zip(use_everything(tiny_model, images), expected, strict=True):
        torch.testing.assert_close(output, wanted)

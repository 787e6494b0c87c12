import json
import math

import pytest
import torch
import torch.nn.functional as F
from accelerate import cpu_offload
from conftest import make_tiny
from diffusers import AutoModel, VQModel
from safetensors.torch import load_file, save_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from svqvae_hf import SVQVAE
from svqvae_hf.models.modeling_svqvae import (
    SAMPLE_WINDOWS,
    SEARCH_SCORES,
    AttnBlock,
    Codebook,
    Level,
    RepeatConv2d,
    TileContext,
    VectorQuantizer,
    gather_context,
    resize_latents,
)
from svqvae_hf.models.tiling import WindowSample

pytestmark = pytest.mark.usefixtures("small_sample")
SIZES = [(1, 1), (3, 200), (65, 64), (257, 300)]
WEIGHTS = "diffusion_pytorch_model.safetensors"


def psnr(output, target):
    return -10 * F.mse_loss(output.float(), target.float()).log10().item()


def smooth_images(*size, batch=1):
    """Images with content at many scales, which a random network answers more evenly than noise."""
    torch.manual_seed(1)
    return F.interpolate(torch.rand(batch, 3, 9, 9), size, mode="bicubic").clamp(0, 1)


# Config


def test_config_round_trip(tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path)
    loaded = SVQVAE.from_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["block_out_channels"] == [8, 16, 16]
    ours = {key: value for key, value in loaded.config.items() if not key.startswith("_")}
    assert ours == {key: stored[key] for key in ours}
    for key, weight in tiny_model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], weight)


def test_config_gives_the_names_that_pipelines_read():
    config = make_tiny(codebook_embed_dim=4).config
    assert (config.latent_channels, config.vq_embed_dim, config.num_vq_embeddings) == (4, 4, 64)
    assert config.lookup_from_codebook
    assert 2 ** (len(config.block_out_channels) - 1) == 4


def test_loading_a_saved_model_does_not_warn(tiny_model, tmp_path, caplog):
    tiny_model.save_pretrained(tmp_path)
    SVQVAE.from_pretrained(tmp_path, pixel_range=(-1, 1))
    assert not caplog.records


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"norm_num_groups": 3}, "`norm_num_groups` must divide .* 3 does not divide 8"),
        ({"decoder_ch_mult": (1, 2)}, "as many levels, .* 3 and 2"),
        ({"pixel_range": (1, 0)}, r"`pixel_range` must be two finite numbers \(low, high\).*\(1, 0\)"),
        ({"network_range": "ab"}, "`network_range` must be two finite numbers .* but is 'ab'"),
        ({"network_range": (0, float("nan"))}, "`network_range` must be two finite numbers"),
        ({"base_channels": "eight"}, "`base_channels` must be made of whole numbers above 0, but is 'eight'"),
        ({"z_channels": -3}, "`z_channels` .* but is -3"),
        ({"norm_num_groups": 0}, "`norm_num_groups` .* but is 0"),
        ({"encoder_ch_mult": None}, "`encoder_ch_mult` .* but is None"),
        ({"encoder_ch_mult": (1, 0, 2)}, r"`encoder_ch_mult` .* but is \(1, 0, 2\)"),
    ],
)
def test_config_that_does_not_fit_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        make_tiny(**config)


@pytest.mark.parametrize("shards", [None, "40KB"])
def test_save_and_load_is_bit_equal(tiny_model, tmp_path, shards):
    tiny_model.save_pretrained(tmp_path, **({"max_shard_size": shards} if shards else {}))
    assert len(list(tmp_path.glob("*.safetensors"))) == 1 or shards
    loaded = SVQVAE.from_pretrained(tmp_path)
    assert loaded.state_dict().keys() == tiny_model.state_dict().keys()
    assert all(torch.equal(loaded.state_dict()[key], weight) for key, weight in tiny_model.state_dict().items())


def test_loading_in_half_precision_keeps_the_codebook(tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path)
    half = SVQVAE.from_pretrained(tmp_path, torch_dtype=torch.float16)
    assert half.dtype == torch.float16
    assert half.codebook_fingerprint() == tiny_model.codebook_fingerprint()
    half.save_pretrained(tmp_path, variant="fp16")
    assert (tmp_path / "diffusion_pytorch_model.fp16.safetensors").stat().st_size < (tmp_path / WEIGHTS).stat().st_size
    assert SVQVAE.from_pretrained(tmp_path, variant="fp16").codebook_fingerprint() == half.codebook_fingerprint()


def test_loading_is_strict(tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / WEIGHTS)
    del weights["encoder.conv_in.bias"], weights["decoder.conv_in.bias"]
    weights["surplus"] = torch.zeros(1)
    save_file(weights, tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match="missing: decoder.conv_in.bias, encoder.conv_in.bias; unexpected: surplus"):
        SVQVAE.from_pretrained(tmp_path)


def test_weights_of_another_shape_are_refused_always(tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"expected shape torch.Size\(\[128, 8\]\), but got torch.Size\(\[64, 8\]\)"):
        SVQVAE.from_pretrained(tmp_path, codebook_size=128)
    with pytest.raises(ValueError, match=r"mismatched: \('quantize.embedding.weight', "):
        SVQVAE.from_pretrained(tmp_path, codebook_size=128, ignore_mismatched_sizes=True, low_cpu_mem_usage=False)


def test_loading_takes_no_argument_that_means_nothing(tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path)
    with pytest.raises(TypeError, match="config values of SVQVAE, but these are neither: pixel_rang"):
        SVQVAE.from_pretrained(tmp_path, pixel_rang=(-1, 1))
    loaded = SVQVAE.from_pretrained(
        tmp_path,
        pixel_range=(-1, 1),
        torch_dtype=torch.float16,
        device_map=None,
        low_cpu_mem_usage=False,
        local_files_only=True,
        use_safetensors=True,
        revision="main",
        token=None,
        subfolder="",
        cache_dir=tmp_path / "cache",
    )
    assert loaded.config["pixel_range"] == (-1, 1)
    assert loaded.quantize.embedding.weight.dtype == torch.float32


def test_a_subclass_loads_it(tiny_model, tmp_path):
    class Subclass(SVQVAE):
        """Of a user."""

    tiny_model.save_pretrained(tmp_path)
    assert isinstance(Subclass.from_pretrained(tmp_path), Subclass)


def test_unused_arguments_are_given_back(tiny_model):
    model, unused = SVQVAE.from_config(tiny_model.config, return_unused_kwargs=True, codebook_size=32, surplus=1)
    assert unused["surplus"] == 1
    assert model.config["codebook_size"] == 32


def test_auto_model_finds_the_class(tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path)
    assert isinstance(AutoModel.from_pretrained(str(tmp_path)), SVQVAE)


def test_a_folder_of_another_class_is_named(tmp_path):
    VQModel(block_out_channels=(32,)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="must be of class SVQVAE, but is of VQModel. Load it by that class"):
        SVQVAE.from_pretrained(tmp_path)


@pytest.mark.usefixtures("no_grad")
def test_default_overlap_fits_any_tile(tiny_model):
    tiny_model.enable_tiling(tile_size=64)
    assert (tiny_model.tile_size, tiny_model.overlap) == (64, 28)
    deep = make_tiny(encoder_ch_mult=(1,) * 7, decoder_ch_mult=(1,) * 7)  # f = 64
    deep.enable_tiling()
    assert (deep.tile_size, deep.overlap) == (256, 0)
    images = torch.rand(1, 3, 400, 300)
    assert deep(images, tile_size=256).sample.shape == images.shape


def test_usage_log_of_original_files_is_no_weight(tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path)
    save_file(load_file(tmp_path / WEIGHTS) | {"quantize.codebook_used": torch.zeros(65536)}, tmp_path / WEIGHTS)
    loaded = SVQVAE.from_pretrained(tmp_path)
    assert "quantize.codebook_used" not in loaded.state_dict()


# Encoding and decoding


@pytest.mark.usefixtures("no_grad")
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("tiled", [False, True])
@pytest.mark.parametrize("scales", [None, [1.5, 0.5, 1, 0.3]])
def test_every_size_passes(tiny_model, size, tiled, scales):
    if tiled:
        tiny_model.enable_tiling(64, 8)
    outputs = tiny_model(torch.rand(1, 3, *size), scales=scales).sample
    for output, scale in zip(outputs if scales else [outputs], scales or [1], strict=True):
        assert output.shape == (1, 3, *(max(1, round(scale * side)) for side in size))
        assert output.min() >= 0
        assert output.max() <= 1


@pytest.mark.usefixtures("no_grad")
@pytest.mark.parametrize("tiled", [False, True])
def test_photo_of_three_megapixels_passes(tiled):
    model = make_tiny(encoder_ch_mult=(1, 1, 1, 1, 1), decoder_ch_mult=(1, 1, 1, 1, 1))
    if tiled:
        model.enable_tiling(256, 32)
    half, whole = model(smooth_images(1536, 2048), scales=[0.5, 1]).sample
    assert half.shape == (1, 3, 768, 1024)
    assert whole.shape == (1, 3, 1536, 2048)


@pytest.mark.usefixtures("no_grad")
@pytest.mark.parametrize("tiled", [False, True])
def test_decoding_the_tokens_is_the_reconstruction(tiny_model, tiled):
    if tiled:
        tiny_model.enable_tiling(32, 8)
    images = torch.rand(2, 3, 48, 72)
    ids = tiny_model.encode_tokens(images)
    assert ids.shape == (2, 12, 18)
    assert ids.dtype == torch.int64
    assert torch.equal(tiny_model.decode_tokens(ids), tiny_model(images).sample)
    scales = [0.5, 2]
    pairs = zip(
        tiny_model.decode_tokens(tiny_model.encode_tokens(images, scales)),
        tiny_model(images, scales).sample,
        strict=True,
    )
    for decoded, reconstruction in pairs:
        torch.testing.assert_close(decoded, reconstruction)


@pytest.mark.usefixtures("no_grad")
def test_decode_tells_ids_from_latents_by_type(tiny_model):
    latents = tiny_model.encode(torch.rand(2, 3, 16, 24)).latents
    quantized, _, (_, _, flat) = tiny_model.quantize(latents)
    expected = tiny_model.decode(quantized, force_not_quantize=True).sample
    torch.testing.assert_close(tiny_model.decode(latents).sample, expected)
    for ids, shape in [(flat.view(2, 4, 6), None), (flat, (2, 4, 6, 8)), (flat.view(2, 24), (2, 4, 6, 8))]:
        torch.testing.assert_close(tiny_model.decode(ids, shape=shape, force_not_quantize=True).sample, expected)
    assert not torch.allclose(tiny_model.decode(latents, force_not_quantize=True).sample, expected)


@pytest.mark.usefixtures("no_grad")
def test_outputs_are_objects_mappings_and_tuples(tiny_model):
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


@pytest.mark.usefixtures("no_grad")
def test_pixel_range_is_the_callers(tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path)
    images = torch.rand(1, 3, 20, 20)
    signed = SVQVAE.from_pretrained(tmp_path, pixel_range=(-1, 1)).eval()
    torch.testing.assert_close(signed(images * 2 - 1).sample, tiny_model(images).sample * 2 - 1)


@pytest.fixture
def encoder_inputs(tiny_model, monkeypatch):
    """Shapes of all that the encoder is given."""
    shapes = []
    tiny_model.encoder.register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape)))
    return shapes


@pytest.mark.usefixtures("no_grad")
def test_slices_are_the_batch(tiny_model, encoder_inputs):
    images = torch.rand(3, 3, 40, 24)
    whole = tiny_model(images).sample
    tiny_model.enable_slicing()
    torch.testing.assert_close(tiny_model(images).sample, whole)
    assert [shape[0] for shape in encoder_inputs] == [3, 1, 1, 1]


@pytest.mark.usefixtures("no_grad")
def test_half_precision_model_decodes_its_codes(tiny_model):
    codes = tiny_model.quantize.get_codebook_entry(torch.arange(4).view(1, 2, 2), (1, 2, 2, 8))
    assert codes.dtype == torch.float32
    sample = tiny_model.to(torch.bfloat16).decode(codes, force_not_quantize=True).sample
    assert sample.dtype == torch.bfloat16


@pytest.mark.usefixtures("no_grad")
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.uint16])
def test_ids_may_be_of_any_integer_type(tiny_model, dtype):
    ids = torch.randint(64, (1, 3, 4))
    assert torch.equal(tiny_model.decode_tokens(ids.to(dtype)), tiny_model.decode_tokens(ids))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: m.encode(torch.rand(1, 1, 8, 8)), ValueError, r"\(batch, 3, height, width\).*\(1, 1, 8, 8\)"),
        (lambda m: m.encode(torch.rand(3, 8, 8)), ValueError, r"has shape \(3, 8, 8\)"),
        (lambda m: m.encode(torch.rand(0, 3, 8, 8)), ValueError, "none of them 0"),
        (lambda m: m.encode(torch.zeros(1, 3, 8, 8, dtype=torch.uint8)), TypeError, "is torch.uint8"),
        (lambda m: m.decode(torch.rand(1, 3, 4, 4)), ValueError, "Pass the output of `encode`, not an image"),
        (lambda m: m.decode(torch.zeros(4, dtype=torch.int64)), ValueError, r"\(batch, h, w\).*\(4,\)"),
        (lambda m: m.decode_tokens(torch.full((1, 2, 2), 64)), ValueError, r"\[0, 64\).*\[64, 64\]"),
        (lambda m: m.decode_tokens(torch.full((1, 2, 2), -1)), ValueError, r"\[-1, -1\]"),
        (lambda m: m.decode(torch.full((1, 2, 2), 64)), ValueError, r"\[0, 64\).*\[64, 64\]"),
        (lambda m: m.decode_tokens(torch.rand(1, 8, 2, 2)), TypeError, "integer type, but are torch.float32"),
        (lambda m: m(torch.rand(1, 3, 8, 8), patch_nums=[1], tile_size=0), ValueError, "positive multiple"),
        (lambda m: m(torch.rand(1, 3, 8, 8), scales=[0]), ValueError, "more than 0, but one is 0"),
        (lambda m: m(torch.rand(1, 3, 8, 8), scales=[math.nan]), ValueError, "finite .* nan"),
        (lambda m: m(torch.rand(1, 3, 8, 8), scales=[math.inf]), ValueError, "finite .* inf"),
        (lambda m: m(torch.rand(1, 3, 8, 8), scales=[1], patch_nums=[1]), ValueError, "both were"),
        (lambda m: m.enable_tiling(62, 8), ValueError, "f = 4, but is 62. The nearest that fits is 64"),
        (lambda m: m.enable_tiling(0, 0), ValueError, "positive .* fits is 4"),
        (lambda m: m.enable_tiling(64, 6), ValueError, "f = 4 .* but is 6. The nearest that fits is 8"),
        (lambda m: m.enable_tiling(64, 32), ValueError, "less than half .* fits is 28"),
        (lambda m: m(torch.rand(1, 3, 8, 8), tile_size=30), ValueError, "fits is 32"),
        (lambda m: m(torch.rand(1, 3, 8, 8), tile_size="16"), ValueError, "whole number of pixels, but is '16'"),
        (lambda m: m.enable_tiling(64.0), ValueError, "`tile_size` must be a whole number of pixels, but is 64.0"),
        (lambda m: m(torch.rand(1, 3, 8, 8), scales=0.5), TypeError, "a list of numbers, but are 0.5"),
        (lambda m: m(torch.rand(1, 3, 8, 8), scales="1"), TypeError, "a list of numbers, but are '1'"),
        (lambda m: m(torch.rand(1, 3, 8, 8), patch_nums=3), TypeError, "a list of numbers, but are 3"),
        (lambda m: m.decode(torch.zeros(30, dtype=int), shape=(1, 5, 6)), ValueError, r"be \(batch, h, w, 8\) of as"),
        (lambda m: m.decode(torch.zeros(30, dtype=int), shape=(1, 5, 6, 4)), ValueError, r"30 for \(1, 5, 6, 4\)"),
        (lambda _: make_tiny(codebook_l2_norm="false"), ValueError, "must be True or False, but is 'false'"),
    ],
)
def test_wrong_calls_say_what_to_do(tiny_model, call, error, message):
    with pytest.raises(error, match=message):
        call(tiny_model)


# Scales


@pytest.mark.usefixtures("no_grad")
def test_scales_keep_the_callers_order(tiny_model):
    images = torch.rand(1, 3, 32, 32)
    sides = [sample.shape[-1] for sample in tiny_model(images, scales=[1, 4, 0.25, 2]).sample]
    assert sides == [32, 128, 8, 64]
    assert [ids.shape[-1] for ids in tiny_model.encode_tokens(images, scales=[1, 4, 0.25, 2])] == [8, 32, 2, 16]


@pytest.mark.usefixtures("no_grad")
def test_latents_are_resized_by_area_and_bilinearly():
    latents = torch.rand(1, 8, 6, 8)
    torch.testing.assert_close(resize_latents(latents, 0.5), F.avg_pool2d(latents, 2))
    torch.testing.assert_close(resize_latents(latents, 2), F.interpolate(latents, (12, 16), mode="bilinear"))
    assert resize_latents(latents, 1) is latents


@pytest.mark.usefixtures("no_grad")
def test_encoder_runs_once_for_all_scales(tiny_model, encoder_inputs):
    tiny_model(torch.rand(1, 3, 32, 32), scales=(scale for scale in (0.5, 1, 2)))
    tiny_model.encode_tokens(torch.rand(1, 3, 32, 32), scales=[0.5, 1, 2])
    assert encoder_inputs == [(1, 3, 32, 32)] * 2


@pytest.mark.usefixtures("no_grad")
def test_patch_nums_are_latents_along_a_tile(tiny_model):
    images = torch.rand(1, 3, 32, 32)
    by_patches = tiny_model(images, patch_nums=[4, 1, 2], tile_size=32, overlap=4).sample
    by_scales = tiny_model(images, scales=[0.5, 0.125, 0.25]).sample
    assert [sample.shape[-1] for sample in by_patches] == [16, 4, 8]
    for one, other in zip(by_patches, by_scales, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.usefixtures("no_grad")
@pytest.mark.parametrize("scale", [0.3, 0.77, 1.37])
def test_content_keeps_its_place_at_every_scale(tiny_model, scale, monkeypatch):
    """With networks that only resample, a scaled reconstruction is the scaled image, to its last column."""
    f = tiny_model.f
    monkeypatch.setattr(tiny_model, "_encode", lambda sample, tiles: F.avg_pool2d(sample, f).repeat(1, 3, 1, 1)[:, :8])
    monkeypatch.setattr(tiny_model.quantize, "forward", lambda latents: (latents, None, None))
    monkeypatch.setattr(tiny_model, "_decode", lambda latents, tiles: F.interpolate(latents[:, :3], scale_factor=f))
    ramp = torch.linspace(0, 1, 160).expand(1, 3, 120, 160).contiguous()
    (scaled,) = tiny_model(ramp, scales=[scale]).sample
    expected = torch.linspace(0, 1, scaled.shape[-1])
    assert (scaled[0, 0, 0] - expected).abs().max() < 2.5 * f / 160


def test_ids_keep_no_activations_for_a_backward_pass(tiny_model):
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda tensor: tensor):
        tiny_model.encode_tokens(torch.rand(1, 3, 16, 16))
    assert not kept


# Tiles


@pytest.fixture
def full_sample(small_sample, monkeypatch):
    monkeypatch.setattr("svqvae_hf.models.modeling_svqvae.SAMPLE_WINDOWS", SAMPLE_WINDOWS)


@pytest.mark.usefixtures("no_grad")
@pytest.mark.parametrize("core", [((13, 14), (20, 27)), ((0, 9), (30, 40)), ((0, 40), (0, 40))])
@pytest.mark.parametrize("config", [{}, {"decoder_ch_mult": (1, 2, 2, 4), "encoder_ch_mult": (1, 1, 1, 1)}])
@pytest.mark.parametrize("num_res_blocks", [1, 3])
def test_core_of_a_decoded_window_does_not_depend_on_what_is_left_out(config, num_res_blocks, core):
    model = make_tiny(num_res_blocks=num_res_blocks, **config)
    codes = model.quantize(torch.randn(1, 8, 40, 40))[0]
    context = gather_context(model.decode_window, lambda y, x: codes[..., y, x], (40, 40), 16, source_cell=1)
    rows, columns = (slice(model.f * start, model.f * stop) for start, stop in core)
    with FlopCounterMode(display=False) as of_window:
        whole = model.decode_window(codes, context)
    with FlopCounterMode(display=False) as of_core:
        decoded = model.decode_window(codes, context, tuple(slice(*span) for span in core))
    torch.testing.assert_close(decoded, whole[..., rows, columns], rtol=1e-5, atol=2e-5)
    share = of_core.get_total_flops() / of_window.get_total_flops()
    assert share == 1 if core[0] == (0, 40) else share < 0.9


@pytest.mark.usefixtures("no_grad", "full_sample")
def test_tiles_agree_with_the_whole_where_context_is_local():
    """Without attention's global view and with wide halos, tiles differ from the whole by their statistics alone."""
    model = make_tiny(norm_num_groups=1)
    images = smooth_images(392, 400)
    whole = model.encode(images).latents
    model.enable_tiling(96, 32)
    assert psnr(model.encode(images).latents, whole) - psnr(torch.zeros_like(whole), whole) > 20


@pytest.mark.usefixtures("no_grad")
def test_image_of_one_tile_is_not_tiled(tiny_model):
    images = torch.rand(1, 3, 61, 64)
    whole = tiny_model(images).sample
    tiny_model.enable_tiling(64, 8)
    assert torch.equal(tiny_model(images).sample, whole)
    tiny_model.disable_tiling()
    assert torch.equal(tiny_model(images).sample, whole)


@pytest.mark.usefixtures("no_grad")
def test_networks_see_no_more_than_a_tile(tiny_model, encoder_inputs):
    tiny_model.enable_tiling(64, 8)
    tiny_model.encode(torch.rand(1, 3, 200, 300))
    assert len(encoder_inputs) > 20
    assert max(max(shape[-2:]) for shape in encoder_inputs) <= 64


@pytest.mark.usefixtures("no_grad")
def test_small_tile_takes_a_smaller_overlap(tiny_model, encoder_inputs):
    tiny_model(torch.rand(1, 3, 200, 300), tile_size=32)
    assert max(max(shape[-2:]) for shape in encoder_inputs) <= 32


@pytest.mark.usefixtures("no_grad")
@pytest.mark.parametrize(
    ("size", "whole"), [((72, 64), True), ((16, 288), True), ((76, 64), False), ((16, 292), False)]
)
def test_tiles_begin_where_an_image_has_more_latents_than_the_sample(tiny_model, encoder_inputs, size, whole):
    tiny_model.enable_tiling(64, 8)  # 16 latents a side; the sample is 2 windows of 12 latents a side, 288 in all
    tiny_model.encode_tokens(torch.rand(1, 3, *size))
    assert (encoder_inputs == [(1, 3, *size)]) == whole


def test_tiles_keep_results_on_the_device():
    with torch.device("meta"):
        model = make_tiny()
        latents = model.encode(torch.rand(1, 3, 100, 100)).latents
        model.enable_tiling(32, 8)
        assert model.encode(torch.rand(1, 3, 100, 100)).latents.device.type == "meta"
        assert model.decode(latents, force_not_quantize=True).sample.device.type == "meta"


@pytest.mark.usefixtures("no_grad", "full_sample")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tiles_work_in_every_precision(tiny_model, tmp_path, dtype):
    tiny_model.save_pretrained(tmp_path)
    model = SVQVAE.from_pretrained(tmp_path, torch_dtype=dtype).eval()
    images = smooth_images(264, 260)
    expected = tiny_model(images, tile_size=32, overlap=8).sample
    output = model(images.to(dtype), tile_size=32, overlap=8).sample
    assert output.dtype == dtype
    assert psnr(output, expected) > 25


@pytest.mark.usefixtures("no_grad")
def test_tiles_are_the_whole_where_the_sample_is(monkeypatch):
    """If the sample is the whole image, tiles differ from it only by what their halo does not reach."""

    def whole(size, *_):
        return WindowSample([(0, 0)], tuple(size), (0, 0))

    monkeypatch.setattr("svqvae_hf.models.modeling_svqvae.sample_windows", whole)
    model = make_tiny()
    images = torch.stack([smooth_images(200, 168)[0], torch.rand(3, 200, 168)])
    latents = model.encode(images).latents
    sample = model.decode(latents, force_not_quantize=True).sample
    model.enable_tiling(160, 72)
    assert psnr(model.encode(images).latents, latents) - psnr(torch.zeros_like(latents), latents) > 60
    assert psnr(model.decode(latents, force_not_quantize=True).sample, sample) > 60


@pytest.mark.usefixtures("no_grad")
def test_windows_pass_through_norm_and_attention_as_the_whole_does():
    block = AttnBlock(6, 2)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter)
    hidden = torch.randn(2, 6, 10, 12) * 3 + 20
    expected = block(hidden)
    context = TileContext(batch=2, window=(10, 4), margin=(0, 0))
    windows = torch.stack(hidden.split(4, dim=-1), dim=1).flatten(0, 1)
    gathered = block(windows, context).unflatten(0, (2, 3))
    torch.testing.assert_close(torch.cat(gathered.unbind(1), dim=-1), expected, rtol=1e-4, atol=1e-4)
    context.gathering = False
    torch.testing.assert_close(block(hidden[..., 2:9, 3:], context), expected[..., 2:9, 3:], rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("no_grad")
def test_what_is_next_to_a_cut_does_not_count():
    block = AttnBlock(6, 2)
    contexts = []
    windows = torch.randn(3, 6, 24, 12)
    for border in (0.0, 100.0):
        padded = F.pad(windows[..., 4:-4, :], (0, 0, 4, 4), value=border)
        contexts.append(TileContext(batch=1, window=(12, 12), margin=(2, 0)))
        block(padded, contexts[-1])
    (one, other) = ([*context.moments[block.norm], *context.keys[block]] for context in contexts)
    assert one[2].shape == (1, 1, 3 * 16 * 12, 6)
    for before, after in zip(one, other, strict=True):
        torch.testing.assert_close(before, after)


# The original's faults (facts of the field): each failed there


@pytest.mark.usefixtures("no_grad")
def test_tiles_leave_no_dark_border_and_no_dead_latents(tiny_model):
    for layer, value in [(tiny_model.decoder.conv_out, 0.5), (tiny_model.quant_conv, 0.3)]:
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.constant_(layer.bias, value)
    images = torch.rand(1, 3, 90, 101)
    for sample in tiny_model(images, tile_size=32, overlap=8, scales=[0.5, 1, 2]).sample:
        torch.testing.assert_close(sample, torch.full_like(sample, 0.5))
    tiny_model.enable_tiling(32, 8)
    latents = tiny_model.encode(images).latents
    torch.testing.assert_close(latents, torch.full_like(latents, 0.3))


@pytest.mark.usefixtures("no_grad")
def test_scales_work_on_images_smaller_than_a_tile_and_above_one(tiny_model):
    assert tiny_model(torch.rand(1, 3, 20, 20), patch_nums=[32, 64], tile_size=128).sample[1].shape[-1] == 40
    assert tiny_model(torch.rand(1, 3, 80, 80), scales=[2.5], tile_size=32, overlap=4).sample[0].shape[-1] == 200


@pytest.mark.usefixtures("no_grad")
def test_one_image_has_one_id_grid_however_it_is_tiled(tiny_model):
    tiny_model.enable_tiling(32, 8)
    images = smooth_images(72, 100)
    ids = tiny_model.encode_tokens(images)
    assert ids.shape == (1, 18, 25)
    torch.testing.assert_close(tiny_model.decode_tokens(ids), tiny_model(images).sample)


@pytest.mark.usefixtures("no_grad")
def test_sides_that_are_no_multiple_of_f_do_not_shrink(tiny_model):
    assert tiny_model(torch.rand(1, 3, 9, 14)).sample.shape == (1, 3, 9, 14)


def test_constructor_runs_no_network(monkeypatch):
    monkeypatch.setattr(torch.nn.Conv2d, "forward", lambda *_: pytest.fail("the constructor ran a convolution"))
    with torch.device("meta"):
        assert make_tiny().f == 4


def test_usage_counts_are_exact_integers_outside_the_weights(tiny_model):
    model = tiny_model.to(torch.bfloat16).train()
    assert model.quantize.code_counts.dtype == torch.int64
    assert not any("count" in key or "used" in key for key in model.state_dict())
    for _ in range(2):
        _, losses, (_, _, ids) = model.quantize(torch.randn(1, 8, 400, 400))
    assert model.quantize.code_counts.sum() == 2 * ids.numel()
    assert losses.usage == 1
    model.quantize.reset_counts()
    assert model.quantize(torch.randn(1, 8, 1, 1))[1].usage == 1 / 64


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (4, 7)])
def test_convolution_of_repeated_pixels_is_the_plain_one_with_its_gradients(size):
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
def test_what_makes_inference_fast_changes_no_result(tiny_model, tiled):
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


@pytest.mark.usefixtures("no_grad")
def test_attention_never_holds_all_pairs_of_positions(tiny_model):
    images = torch.rand(2, 3, 32, 40)
    expected = tiny_model(images).sample
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # fails where the inputs do not suit the fused kernel
        torch.testing.assert_close(tiny_model(images).sample, expected)


# The quantizer


def exhaustive_ids(latents, codes):
    return torch.cdist(latents.double(), codes.double()).argmin(-1)


@pytest.mark.parametrize("l2_norm", [True, False])
def test_search_finds_the_nearest_code(l2_norm):
    torch.manual_seed(0)
    codebook, latents = Codebook(100, 8, l2_norm), torch.randn(5000, 8)
    codes = codebook.weight.detach()
    if l2_norm:
        latents, codes = F.normalize(latents, dim=-1), F.normalize(codes, dim=-1)
    assert torch.equal(codebook(latents), exhaustive_ids(latents, codes))


@pytest.mark.parametrize("rows", [1, 7, 999, 4000])
def test_search_in_chunks_is_bit_equal_to_the_unchunked(rows, monkeypatch):
    torch.manual_seed(0)
    codebook, latents = Codebook(300, 8, l2_norm=True), F.normalize(torch.randn(4000, 8), dim=-1)
    unchunked = codebook(latents)
    monkeypatch.setattr("svqvae_hf.models.modeling_svqvae.SEARCH_SCORES", rows * 300)
    assert torch.equal(codebook(latents), unchunked)


def test_search_holds_a_bounded_number_of_scores(monkeypatch):
    largest = []
    argmax = torch.Tensor.argmax

    def watched(scores, dim):
        largest.append(scores.numel())
        return argmax(scores, dim)

    monkeypatch.setattr(torch.Tensor, "argmax", watched)
    Codebook(16384, 8, l2_norm=True)(torch.randn(1000, 8))
    assert max(largest) <= SEARCH_SCORES
    assert len(largest) > 1


def test_lowest_id_wins_a_tie():
    codebook = Codebook(6, 4, l2_norm=True)
    codebook.weight.data[:] = torch.eye(4)[[0, 1, 1, 2, 2, 2]]
    assert codebook(torch.eye(4)[[2, 1, 0]]).tolist() == [3, 1, 0]


@pytest.mark.parametrize("l2_norm", [True, False])
def test_losses_and_straight_through_gradient(l2_norm):
    quantizer = VectorQuantizer(32, 4, commit_loss_beta=0.25, entropy_loss_ratio=0.0, l2_norm=l2_norm)
    latents = torch.randn(2, 4, 3, 5, requires_grad=True)
    quantized, losses, (perplexity, _, ids) = quantizer(latents)
    flat = latents.detach().permute(0, 2, 3, 1).flatten(0, 2)
    codes = quantizer.embedding.weight.detach()
    if l2_norm:
        flat, codes = F.normalize(flat, dim=-1), F.normalize(codes, dim=-1)
    distance = (codes[ids] - flat).square().mean()
    torch.testing.assert_close(losses.vq.detach(), distance)
    torch.testing.assert_close(losses.commit.detach(), 0.25 * distance)
    torch.testing.assert_close(quantized.detach().permute(0, 2, 3, 1).flatten(0, 2), codes[ids])
    share = torch.bincount(ids, minlength=32) / len(ids)
    assert perplexity.item() == pytest.approx(math.exp(-sum(p * math.log(p) for p in share.tolist() if p)), rel=1e-4)
    upstream = torch.randn_like(quantized)
    (gradient,) = torch.autograd.grad(quantized, latents, upstream)
    normed = F.normalize(latents, dim=1) if l2_norm else latents * 1
    torch.testing.assert_close(gradient, torch.autograd.grad(normed, latents, upstream)[0])


def test_vq_loss_moves_codes_and_commitment_moves_latents():
    quantizer = VectorQuantizer(32, 4, commit_loss_beta=0.25, entropy_loss_ratio=0.0, l2_norm=True)
    latents = torch.randn(1, 4, 3, 5, requires_grad=True)
    losses = quantizer(latents)[1]
    inputs = (quantizer.embedding.weight, latents)
    vq = torch.autograd.grad(losses.vq, inputs, allow_unused=True, retain_graph=True)
    commit = torch.autograd.grad(losses.commit, inputs, allow_unused=True)
    assert vq[0].abs().sum() > 0
    assert vq[1] is None
    assert commit[0] is None
    assert commit[1].abs().sum() > 0


def test_entropy_loss_rewards_sure_and_even_use():
    quantizer = VectorQuantizer(4, 4, commit_loss_beta=0.25, entropy_loss_ratio=1.0, l2_norm=True).train()
    quantizer.embedding.weight.data.copy_(torch.eye(4))
    even = quantizer(torch.eye(4).view(1, 4, 4, 1))[1].entropy
    one_code = quantizer(torch.eye(4)[:1].expand(4, 4).T.reshape(1, 4, 4, 1))[1].entropy
    unsure = quantizer(torch.ones(1, 4, 4, 1))[1].entropy
    assert even < one_code
    assert even < unsure
    assert even.item() == pytest.approx(-math.log(4), abs=1e-3)


def test_quantizer_stays_in_float32_under_autocast(tiny_model):
    images = torch.rand(1, 3, 32, 32)
    latents = tiny_model.encode(images).latents
    expected = tiny_model.quantize.nearest_ids(latents)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(tiny_model.quantize.nearest_ids(latents), expected)
        assert torch.equal(tiny_model.quantize(latents)[2][2], expected.flatten())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_codebook_keeps_its_type_when_the_model_is_cast(tiny_model, dtype):
    fingerprint = tiny_model.codebook_fingerprint()
    tiny_model.to(dtype)
    assert tiny_model.encoder.conv_in.weight.dtype == dtype
    assert tiny_model.codebook_fingerprint() == fingerprint
    assert tiny_model.half().codebook_fingerprint() == fingerprint
    assert tiny_model.to("meta").quantize.embedding.weight.device.type == "meta"


def test_fingerprint_is_that_of_the_float32_bytes(tiny_model):
    fingerprint = tiny_model.codebook_fingerprint()
    tiny_model.quantize.embedding.weight.data[3, 2] += 1e-3
    assert tiny_model.codebook_fingerprint() != fingerprint
    assert len(fingerprint) == 64


# Training


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


def test_gradient_checkpointing_changes_no_gradient():
    gradients, recomputed = [], []

    def checkpoint_and_count(block, *args):
        recomputed.append(block)
        return torch.utils.checkpoint.checkpoint(block, *args, use_reentrant=False)

    for checkpointing in (False, True):
        model = make_tiny().train()
        if checkpointing:
            model.enable_gradient_checkpointing(checkpoint_and_count)
        model(torch.linspace(0, 1, 3 * 32 * 32).view(1, 3, 32, 32)).sample.square().mean().backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        if gradient is not None:
            torch.testing.assert_close(gradients[1][name], gradient)
    assert len(recomputed) == sum(
        len(level.res) + len(level.attn) for level in model.modules() if isinstance(level, Level)
    )


def test_training_output_is_not_clamped():
    model = make_tiny().train()
    torch.nn.init.constant_(model.decoder.conv_out.bias, 3.0)
    images = torch.rand(1, 3, 16, 16)
    assert model(images).sample.max() > 1
    assert model.eval()(images).sample.max() == 1


@pytest.mark.parametrize("name", ["encoder.conv_in.weight", "encoder.norm_out.weight", "decoder.conv_in.weight"])
def test_gradient_through_tiles_is_that_of_finite_differences(name):
    model = make_tiny().double()
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
            parameter += sign * 1e-3 * direction
            change += sign * loss() / 2e-3
            parameter -= sign * 1e-3 * direction
    torch.testing.assert_close((gradient * direction).sum(), change, rtol=1e-2, atol=1e-5)


def test_tiles_and_gradient_checkpointing_exclude_each_other():
    model = make_tiny().train()
    model.enable_gradient_checkpointing()
    with pytest.raises(ValueError, match="Disable it, tiling or gradients"):
        model(torch.rand(1, 3, 48, 48), tile_size=32)
    with torch.no_grad():
        model(torch.rand(1, 3, 48, 48), tile_size=32)


# What diffusers offers for every model


@pytest.mark.usefixtures("no_grad")
def test_compiles_without_graph_breaks(tiny_model):
    compiled = torch.compile(tiny_model, fullgraph=True, backend="aot_eager")
    for size in [(32, 32), (48, 36), (30, 41)]:
        images = torch.rand(1, 3, *size)
        torch.testing.assert_close(compiled(images).sample, tiny_model(images).sample)
    ids = torch.randint(64, (1, 5, 6))
    decode = torch.compile(tiny_model.decode_tokens, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(decode(ids), tiny_model.decode_tokens(ids))


@pytest.mark.usefixtures("no_grad")
def test_compiles_two_graphs_for_images_of_any_size(tiny_model):
    """One for square images and one for others."""
    graphs = []
    torch.compiler.reset()
    encode = torch.compile(
        tiny_model.encode_tokens, dynamic=True, fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph
    )
    for size in [(32, 32), (48, 36), (30, 41), (64, 64), (17, 90), (100, 72)]:
        images = torch.rand(2, 3, *size)
        assert torch.equal(encode(images), tiny_model.encode_tokens(images))
    assert len(graphs) == 2


@pytest.mark.usefixtures("no_grad")
def test_compiled_decoder_has_two_graphs_for_all_tiles(tiny_model):
    """One for the sample of windows and one for tiles."""
    graphs = []
    torch.compiler.reset()
    tiny_model.enable_tiling(80, 24)
    ids = torch.randint(64, (1, 47, 60))
    expected = tiny_model.decode_tokens(ids)
    tiny_model.decoder.forward = torch.compile(
        tiny_model.decoder.forward, fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph
    )
    torch.testing.assert_close(tiny_model.decode_tokens(ids), expected, rtol=1e-5, atol=1e-5)
    assert len(graphs) == 2


def test_forward_without_data(tiny_model):
    images = torch.rand(1, 3, 16, 20, device="meta")
    assert tiny_model.to("meta")(images).sample.shape == images.shape


@pytest.mark.usefixtures("no_grad")
def test_device_map(tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path)
    images = torch.rand(1, 3, 32, 32)
    loaded = SVQVAE.from_pretrained(tmp_path, device_map="auto").eval()
    torch.testing.assert_close(loaded(images).sample, tiny_model(images).sample)


@pytest.mark.usefixtures("no_grad")
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
    return [
        *reconstruction,
        model.decode_tokens(model.encode_tokens(images)),
        model.decode(model.encode(images).latents).sample,
    ]


@pytest.mark.usefixtures("no_grad")
@pytest.mark.parametrize("kind", ["leaf_level", "block_level", "sequential"])
def test_offloading_changes_no_result(tiny_model, tmp_path, kind):
    images = torch.rand(1, 3, 32, 32)
    expected = use_everything(tiny_model, images)
    if kind == "sequential":
        cpu_offload(tiny_model, torch.device("cpu"))
    else:
        # To disk, since weights that go from the CPU to the CPU never move, and a wrong read of them would pass.
        tiny_model.enable_group_offload(
            torch.device("cpu"), offload_type=kind, num_blocks_per_group=1, offload_to_disk_path=str(tmp_path)
        )
    for output, wanted in zip(use_everything(tiny_model, images), expected, strict=True):
        torch.testing.assert_close(output, wanted)

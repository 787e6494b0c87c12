import dataclasses

import numpy as np
import psutil
import pytest
import torch
from accelerate import cpu_offload
from conftest import make_tiny
from PIL import Image

from svqvae_hf.models.checks import SCALE_SOURCES
from svqvae_hf.models.image_processing_svqvae import SVQVAEImageProcessor
from svqvae_hf.models.loading import execution_device
from svqvae_hf.tokens.image_tokens import available_memory, choose_tiles, decode_image, encode_image, resize_image

pytestmark = pytest.mark.usefixtures("few_windows")
SCALES = (0.5, 1.0, 1.3)


@pytest.fixture
def crop(photo):
    return photo.crop((100, 100, 157, 135))  # 57 x 35: not multiples of f


def test_ids_alone_are_not_decoded(tiny_model):
    ids = torch.zeros(1, 2, 2, dtype=torch.int64)
    with pytest.raises(TypeError, match=r"must be ImageTokens, got Tensor.*`SVQVAE.decode_tokens` decodes ids alone"):
        decode_image(tiny_model, ids)


def test_equal_scales_are_refused_before_the_work(tiny_model, crop, monkeypatch):
    monkeypatch.setattr(tiny_model, "encode_tokens", pytest.fail)
    for scales in ([1, 1], [0.5, 1.0, 0.50000001]):
        with pytest.raises(ValueError, match="scales must differ within six digits"):
            encode_image(tiny_model, crop, scales)


@pytest.mark.parametrize("tiled", [False, True])
@pytest.mark.parametrize("scale_from", SCALE_SOURCES)
def test_decoding_the_encoded_is_the_forward_pass(tiny_model, crop, tiled, scale_from):
    if tiled:
        tiny_model.enable_tiling(32, 8)
    tokens = encode_image(tiny_model, crop, SCALES, scale_from)
    assert tokens.scales == SCALES
    assert tokens.scale_from == scale_from
    assert (tokens.height, tokens.width, tokens.f) == (35, 57, 4)
    assert (tokens.tile_size, tokens.overlap) == ((32, 8) if tiled else (None, None))
    processor = SVQVAEImageProcessor()
    with torch.no_grad():
        expected = tiny_model(processor(crop)["pixel_values"], scales=SCALES, scale_from=scale_from).sample
    for image, sample in zip(decode_image(tiny_model, tokens), expected, strict=True):
        (reference,) = processor.postprocess(sample)
        assert image.size == reference.size
        assert np.abs(np.asarray(image, int) - np.asarray(reference, int)).max() <= 1


def test_a_model_whose_weights_are_elsewhere_until_they_are_used(tiny_model, crop):
    expected = encode_image(tiny_model, crop, SCALES)
    images = decode_image(tiny_model, expected)
    cpu_offload(tiny_model, torch.device("cpu"))
    assert (tiny_model.device.type, execution_device(tiny_model).type) == ("meta", "cpu")
    tokens = encode_image(tiny_model, crop, SCALES)
    assert all(torch.equal(ids, wanted) for ids, wanted in zip(tokens.ids, expected.ids, strict=True))
    assert decode_image(tiny_model, tokens) == images


def test_ids_of_scale_1_do_not_depend_on_what_is_resized(tiny_model, crop):
    files = [encode_image(tiny_model, crop, scale_from=scale_from) for scale_from in SCALE_SOURCES]
    assert torch.equal(*(file.ids[0] for file in files))
    assert [file.scale_from for file in files] == ["latents", "latents"]


def test_an_image_with_an_exif_orientation(tiny_model, crop):
    crop.getexif()[0x0112] = 6  # rotated by a quarter turn
    tokens = encode_image(tiny_model, crop, [1.0])
    assert (tokens.height, tokens.width) == (57, 35)
    upright = crop.transpose(Image.Transpose.ROTATE_270)
    assert torch.equal(tokens.ids[0], encode_image(tiny_model, upright, [1.0]).ids[0])


def test_ids_of_another_model_raise(tiny_model, crop):
    tokens = encode_image(tiny_model, crop, [1.0])
    finer = dataclasses.replace(tokens, f=2, ids=[torch.zeros(18, 29, dtype=torch.int64)])
    with pytest.raises(ValueError, match="a model with f = 4, got 2"):
        decode_image(tiny_model, finer)
    with pytest.raises(ValueError, match="a codebook with this number of codes: 64, got 65"):
        decode_image(tiny_model, dataclasses.replace(tokens, codebook_size=65))
    with torch.no_grad():
        tiny_model.quantize.embedding.weight[0, 0] += 1
    with pytest.raises(ValueError, match="Use the model that encoded them"):
        decode_image(tiny_model, tokens)


@pytest.fixture
def available(monkeypatch):
    """The available memory, 8 GiB."""
    memory = type("Memory", (), {"available": 8 * 2**30})
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    return memory


def test_the_unused_reserve_of_a_gpu_is_available(monkeypatch):
    for name, value in (("mem_get_info", (1000, 9000)), ("memory_reserved", 500), ("memory_allocated", 200)):
        monkeypatch.setattr(torch.cuda, name, {torch.device("cuda", 1): value}.get)
    assert available_memory(torch.device("cuda", 1)) == 1000 + 500 - 200


def test_memory_depends_on_the_tile_and_on_the_image(tiny_model, available):
    available.available = 3 * 2**28
    tiles = {"tile_size": 256}
    assert choose_tiles(tiny_model, 2000, 2000, **tiles) == (256, 32)
    for size, more in ((20_000, {}), (2000, {"images": 8}), (2000, {"scales": [1, 10]})):
        with pytest.raises(ValueError, match=r"pixels in tiles of 256 pixels would take about"):
            choose_tiles(tiny_model, size, size, **tiles, **more)
    with pytest.raises(ValueError, match="1980 x 1980 pixels without tiles would take about 1.17 GiB of memory, but"):
        choose_tiles(tiny_model, 1980, 1980)


@pytest.mark.parametrize(("config", "channels"), [({}, 16), ({"encoder_ch_mult": (4, 2, 2)}, 32)])
def test_tiles_are_those_asked_for_or_enabled_or_for_images_of_more_than_a_gib(config, channels, available):
    model = make_tiny(**config)
    side = round(2**15 / channels**0.5 / 4)
    for size, scales, asked, tiles in [
        ((side, side - 9), [0.5, 1], {}, None),
        ((side, side + 9), [0.5], {}, (256, 32)),
        ((side, side - 9), [1.1], {}, (256, 32)),
        ((8, 8), [1], {"tile_size": 32}, (32, 8)),
        ((8, 8), [1], {"overlap": 8}, (256, 8)),
    ]:
        assert choose_tiles(model, *size, scales, **asked) == tiles
    model.enable_tiling(128)
    before = vars(model).copy()
    for asked, tiles in [({}, (128, 32)), ({"tile_size": 32}, (32, 8)), ({"overlap": 8}, (128, 8))]:
        assert choose_tiles(model, side, side + 9, **asked) == tiles
    assert vars(model) == before


def test_tiles_of_a_call_are_those_of_a_model_on_which_they_are_enabled(tiny_model, crop):
    by_call = encode_image(tiny_model, crop, SCALES, tiles=(32, 8))
    images = decode_image(tiny_model, by_call, tiles=by_call.tiles)
    assert not tiny_model.use_tiling
    assert by_call.tiles == (32, 8)
    tiny_model.enable_tiling(32, 8)
    enabled = encode_image(tiny_model, crop, SCALES)
    assert enabled.to_record() == by_call.to_record()
    assert all(torch.equal(one, other) for one, other in zip(enabled.ids, by_call.ids, strict=True))
    assert images == decode_image(tiny_model, enabled)
    tiny_model.enable_tiling(16, 4)
    assert images == decode_image(tiny_model, enabled, tiles=(32, 8))
    assert images != decode_image(tiny_model, enabled)


def test_images_are_resized_by_area_or_bicubic(crop):
    for size, resampling in (((57, 35), None), ((29, 40), "BOX"), ((80, 40), "BICUBIC")):
        expected = crop if resampling is None else crop.resize(size, Image.Resampling[resampling])
        assert np.array_equal(resize_image(crop, size), expected)

"""Properties that hold for every size, scale, tile, type and config, on inputs that hypothesis chooses."""

import json
import tempfile
from functools import cache

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from conftest import make_tiny
from hypothesis import HealthCheck, given, settings
from hypothesis.extra.numpy import array_shapes, arrays

from svqvae_hf import SVQVAE, SVQVAEImageProcessor
from svqvae_hf.models.checks import SCALE_SOURCES
from svqvae_hf.models.layers import TileContext
from svqvae_hf.models.resizing import grid_shape
from svqvae_hf.models.tiling import map_tiles, tile_axis

pytestmark = pytest.mark.usefixtures("few_windows")
DTYPES = {torch.float32: 1e-5, torch.bfloat16: 0.05, torch.float16: 0.01}
scales = st.lists(st.sampled_from([0.01, 0.3, 0.5, 1.0, 1.7, 2.0]), min_size=1, max_size=2)
sides = st.integers(1, 40)
dtypes = st.sampled_from(list(DTYPES))
tiles = st.none() | st.sampled_from([(8, 0), (16, 4), (20, 8), (32, 12)])  # f = 4


def examples(count: int):
    """The same inputs in every run."""
    allowed = [HealthCheck.function_scoped_fixture]
    return settings(max_examples=count, derandomize=True, database=None, deadline=None, suppress_health_check=allowed)


@cache
def model_of(dtype: torch.dtype) -> SVQVAE:
    return make_tiny().to(dtype)


def set_tiles(model: SVQVAE, tile: tuple[int, int] | None) -> None:
    if tile is None:
        model.disable_tiling()
    else:
        model.enable_tiling(*tile)


@pytest.mark.slow
@examples(15)
@given(st.integers(1, 2), sides, sides, scales, st.sampled_from(SCALE_SOURCES), tiles, dtypes, st.integers(0, 9))
def test_ids_decode_to_the_reconstruction(batch, height, width, scales, scale_from, tile, dtype, seed):
    model = model_of(dtype)
    set_tiles(model, tile)
    sample = torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(seed)).to(dtype)
    with torch.no_grad():
        grids = model.encode_tokens(sample, scales, scale_from)
        reconstructions = model(sample, scales=scales, scale_from=scale_from).sample
        decoded = [model.decode(ids).sample for ids in grids]
    for scale, ids, reconstruction, image in zip(scales, grids, reconstructions, decoded, strict=True):
        assert tuple(ids.shape) == (batch, *grid_shape(height, width, model.f, scale))
        assert ids.dtype == torch.int64
        assert 0 <= ids.min() <= ids.max() < model.config["codebook_size"]
        assert tuple(image.shape) == (batch, 3, ids.shape[1] * model.f, ids.shape[2] * model.f)
        assert reconstruction.shape == (batch, 3, *(max(1, round(scale * side)) for side in (height, width)))
        assert reconstruction.dtype == dtype
        assert 0 <= reconstruction.min() <= reconstruction.max() <= 1
        fitted = model.resize_to_image(image, (height, width), scale)
        torch.testing.assert_close(fitted, reconstruction, rtol=0, atol=DTYPES[dtype])


@pytest.mark.slow
@examples(12)
@given(sides, sides, tiles, st.integers(0, 9))
def test_images_of_a_batch_do_not_see_each_other(height, width, tile, seed):
    model = model_of(torch.float32)
    set_tiles(model, tile)
    pair = torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        together = model.encode(pair).latents
        apart = torch.cat([model.encode(image[None]).latents for image in pair])
    torch.testing.assert_close(together, apart, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@examples(60)
@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 20), st.data())
def test_tiles_equal_the_whole_if_the_overlap_covers_the_receptive_field(height, width, tile, data):
    overlap = data.draw(st.integers(0, (tile - 1) // 2))
    source = torch.arange(height * width, dtype=torch.float32).view(1, 1, height, width)
    reach = 2 * overlap + 1

    def widest(window: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.max_pool2d(window, reach, stride=1, padding=overlap)

    def widest_of_core(window: torch.Tensor, shared: TileContext | None = None) -> torch.Tensor:
        return widest(window) if shared is None else shared.core_of(widest(window))

    assert torch.equal(map_tiles(widest_of_core, source, tile, overlap), widest(source))
    axis = tile_axis(height, tile, overlap)
    assert [core.start for _, core in axis] == [0, *(core.stop for _, core in axis[:-1])]
    assert axis[-1][1].stop == height


@examples(30)
@given(arrays(np.float32, array_shapes(min_dims=1, max_dims=5, max_side=4), elements=st.floats(width=32)))
def test_any_array_is_an_image_or_refused(array):
    try:
        values = SVQVAEImageProcessor()(array)["pixel_values"]
    except (ValueError, TypeError):
        return
    assert values.isfinite().all()


SMALL = {
    "base_channels": st.sampled_from([4, 8]),
    "num_res_blocks": st.integers(1, 2),
    "norm_num_groups": st.sampled_from([1, 2, 4]),
    "z_channels": st.integers(1, 8),
    "codebook_size": st.integers(1, 70),
    "codebook_embed_dim": st.integers(1, 9),
    "codebook_l2_norm": st.booleans(),
    "commit_loss_beta": st.floats(0, 1),
    "pixel_range": st.sampled_from([(0.0, 1.0), (-1.0, 1.0), (0.0, 255.0)]),
    "network_range": st.sampled_from([(0.0, 1.0), (-1.0, 1.0)]),
    "scaling_factor": st.floats(0.01, 9),
}
multipliers = st.integers(1, 3).flatmap(lambda levels: st.lists(st.integers(1, 3), min_size=levels, max_size=levels))


def public_config(model):
    """Config of a model as JSON, without what diffusers adds."""
    values = {key: value for key, value in model.config.items() if not key.startswith("_")}
    return json.dumps(values, sort_keys=True)


@examples(10)
@given(st.fixed_dictionaries(SMALL), multipliers, st.data())
def test_any_config_makes_a_model_that_saves_and_loads(tmp_path, config, encoder, data):
    decoder = data.draw(st.permutations(encoder))
    model = make_tiny(encoder_ch_mult=tuple(encoder), decoder_ch_mult=tuple(decoder), **config)
    with tempfile.TemporaryDirectory(dir=tmp_path) as folder:
        model.save_pretrained(folder)
        again = SVQVAE.from_pretrained(folder).eval()
    assert public_config(again) == public_config(model)
    low, high = config["pixel_range"]
    sample = torch.rand(1, 3, 9, 6) * (high - low) + low
    with torch.no_grad():
        ids = model.encode_tokens(sample)
        assert torch.equal(again.encode_tokens(sample), ids)
        decoded = again.decode_tokens(ids)
    assert decoded.isfinite().all()
    assert low <= decoded.min() <= decoded.max() <= high

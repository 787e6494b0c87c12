import pytest
import torch
from transformers import DynamicCache, LlamaConfig, StaticCache

from svqvae_hf.pipelines.reserved_cache import reserve


@pytest.fixture
def caches():
    """A cache of transformers and a reserved one, each with the same four tokens of three sequences."""
    torch.manual_seed(0)
    pair = DynamicCache(), DynamicCache()
    keys, values = torch.randn(2, 3, 2, 4, 8)
    for cache in pair:
        for layer in range(2):
            cache.update(keys, values, layer)
    reserve(pair[1], 6)
    return pair


def assert_equal(plain, reserved):
    assert plain.get_seq_length() == reserved.get_seq_length()
    for one, other in zip(plain.layers, reserved.layers, strict=True):
        assert torch.equal(one.keys, other.keys)
        assert torch.equal(one.values, other.values)


def test_reserved_cache_equals_that_of_transformers(caches):
    places = [layer.keys.data_ptr() for layer in caches[1].layers]
    for tokens in (1, 3, 2):
        keys, values = torch.randn(2, 3, 2, tokens, 8)
        for layer in range(2):
            expected, result = (cache.update(keys, values, layer) for cache in caches)
            assert all(map(torch.equal, expected, result))
        assert_equal(*caches)
    assert places == [layer.keys.data_ptr() for layer in caches[1].layers], "tokens are not copied"


def test_part_of_the_batch_goes_on(caches):
    keys, values = torch.randn(2, 2, 2, 5, 8)
    for cache in caches:
        cache.batch_select_indices(torch.tensor([2, 0]))
        for layer in range(2):
            cache.update(keys, values, layer)
    assert_equal(*caches)


def test_other_caches_stay():
    cache = StaticCache(config=LlamaConfig(num_hidden_layers=2), max_cache_len=8)
    layers = list(cache.layers)
    reserve(cache, 4)
    reserve("a state of another kind", 4)
    assert cache.layers == layers

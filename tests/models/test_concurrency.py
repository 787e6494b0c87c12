"""One model in several threads and processes."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

pytestmark = pytest.mark.usefixtures("few_windows")


@pytest.mark.slow
def test_two_threads_use_one_model(tiny_model, tmp_path):
    tiny_model.enable_tiling(32, 8)
    samples = [torch.rand(1, 3, 24 + 4 * index, 50 - 3 * index) for index in range(4)]

    def work(sample):
        with torch.inference_mode():
            ids = tiny_model.encode_tokens(sample, [1.0, 0.5])
            return [*ids, *tiny_model.decode_tokens(ids), *tiny_model(sample, scales=[1.0, 0.5]).sample]

    alone = [work(sample) for sample in samples]
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(work, samples))
    for expected, found in zip(alone, together, strict=True):
        assert all(torch.equal(one, other) for one, other in zip(expected, found, strict=True))

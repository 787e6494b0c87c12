import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from context_models import make_context_model, pattern

from svqvae_hf.tokens.context_model import FILE, ContextModel, find_context_model
from svqvae_hf.tokens.context_network import EXACT_LIMIT, probabilities
from svqvae_hf.tokens.neighbourhood import NEIGHBOURS, diagonals

SHAPE = 9, 13
MATMUL = np.matmul
KNOWN = "1667bff8cf058083"  # start of the coded ids below


def some_ids(shape=SHAPE, codes=64):
    return pattern(shape, 3) % codes


def coded(model=None, **options):
    return (model or make_context_model()).compress(some_ids(), some_ids((5, 6)), **options)


def torch_matmul(left, right):
    return torch.matmul(torch.from_numpy(left), torch.from_numpy(right)).numpy()


def matmul_in_batches(size):
    def matmul(left, right):
        products = []
        for start in range(0, len(left), size):
            batch = slice(start, start + size)
            right_batch = right[batch] if right.ndim == 3 else right
            products.append(MATMUL(left[batch], right_batch))
        return np.concatenate(products)

    return matmul


@pytest.mark.parametrize("codes", [64, 100])
@pytest.mark.parametrize("coarse", [None, (1, 1), (5, 7)])
@pytest.mark.parametrize("shape", [(1, 1), (1, 6), (7, 1), SHAPE])
def test_ids_come_back(codes, coarse, shape):
    model = make_context_model(codes=codes)
    ids, coarse = some_ids(shape, codes), None if coarse is None else some_ids(coarse, codes)
    again = model.decompress(model.compress(ids, coarse), shape, coarse)
    assert again.dtype == np.int64
    assert np.array_equal(again, ids)


def test_a_diagonal_follows_the_diagonals_of_its_neighbours():
    height, width = SHAPE
    is_done = np.zeros(SHAPE, dtype=bool)
    for rows, columns in diagonals(height, width):
        for row, column in zip(rows.tolist(), columns.tolist(), strict=True):
            for down, right in NEIGHBOURS:
                is_inside = row + down >= 0 and 0 <= column + right < width
                assert not is_inside or is_done[row + down, column + right]
        assert not is_done[rows, columns].any()
        is_done[rows, columns] = True
    assert is_done.all()


def test_likely_ids_take_few_bits():
    model = make_context_model()
    likely = model.decompress(bytes(400), (20, 20))  # zeros decode to the first symbol of many
    assert len(model.compress(likely)) < len(model.compress(some_ids((20, 20)))) / 2


@pytest.mark.parametrize("matmul", [MATMUL, torch_matmul, matmul_in_batches(1), matmul_in_batches(16)])
@pytest.mark.parametrize("threads", [1, 2])
def test_bytes_depend_neither_on_the_library_nor_on_threads_nor_on_batches(monkeypatch, matmul, threads):
    before = torch.get_num_threads()
    monkeypatch.setattr(np, "matmul", matmul)
    torch.set_num_threads(threads)
    try:
        content = coded()
    finally:
        torch.set_num_threads(before)
    assert content.hex()[: len(KNOWN)] == KNOWN


# Without the package's own imports, which take seconds.
CODE_TWICE = f"""
import sys, types
package = sys.modules["svqvae_hf"] = types.ModuleType("svqvae_hf")
package.__path__ = [{str(ROOT / "svqvae_hf")!r}]
import numpy as np, test_context_model as test
print(test.coded().hex())
np.matmul = test.torch_matmul
print(test.coded().hex())
"""


@pytest.mark.slow
def test_bytes_do_not_depend_on_the_instructions_of_the_processor():
    plain = {"ATEN_CPU_CAPABILITY": "default", "OPENBLAS_CORETYPE": "Haswell"}  # no AVX-512 in torch and numpy
    threads = {"OMP_NUM_THREADS": "2", "OPENBLAS_NUM_THREADS": "2"}
    path = os.pathsep.join(map(str, (ROOT, ROOT / "tests", ROOT / "tests" / "tokens")))
    environment = os.environ | plain | threads | {"PYTHONPATH": path}
    found = subprocess.run([sys.executable, "-c", CODE_TWICE], env=environment, capture_output=True, check=True)
    assert found.stdout.decode().split() == [coded().hex()] * 2


def test_the_largest_sums_are_exact():
    model = make_context_model()
    weight = np.where(model.tensors["weight_1"] < 0, -128, 127).astype(np.int8)
    bias = (EXACT_LIMIT - 1 - 128 * abs(weight.astype(np.int64)).sum(0)).astype(np.int32)
    ContextModel(model.tensors | {"weight_1": weight, "bias_1": bias}, model.codebook_fingerprint)
    products = np.abs(weight.T.astype(np.float32)) * 128  # of inputs of -128 or 128
    for order in (slice(None), slice(None, None, -1)):
        summed = products[:, order].cumsum(1, dtype=np.float32)[:, -1] + bias.astype(np.float32)
        assert np.array_equal(summed, np.full(len(bias), EXACT_LIMIT - 1))
    bias[0] += 1
    with pytest.raises(ValueError, match="sums of layer 1 must stay below 16777216, but could reach 16777216"):
        ContextModel(model.tensors | {"weight_1": weight, "bias_1": bias}, model.codebook_fingerprint)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("weight_2", lambda tensor: tensor.astype(np.float32), "must be in int8 and int32"),
        ("order", np.zeros_like, "`order` must have each id once"),
        ("bias_code", lambda tensor: tensor[1:], r"`bias_code` must have shape \(64,\), got \(63,\)"),
        ("weight_1", lambda tensor: tensor[1:], r"`weight_1` must have shape \(155, 24\), got \(154, 24\)"),
    ],
)
def test_other_tensors_are_refused(name, change, message):
    model = make_context_model()
    with pytest.raises(ValueError, match=message):
        ContextModel(model.tensors | {name: change(model.tensors[name])}, model.codebook_fingerprint)


def test_distributions_are_above_0_and_sum_to_1():
    logits = np.stack([pattern((128,), salt).astype(np.float32) * 10**salt for salt in range(5)])
    found = probabilities(logits)
    assert found.min() >= 1 / 65536
    assert np.array_equal(found * 65536, np.floor(found * 65536))
    assert np.array_equal(found.astype(np.float64).sum(1), np.ones(5))
    exact = np.exp((logits[2] - logits[2].max()) / 4096)
    assert abs(found[2] - exact / exact.sum()).max() < 0.002


def test_saved_and_loaded(tmp_path):
    model = make_context_model()
    model.save_pretrained(tmp_path)
    again = ContextModel.from_pretrained(tmp_path)
    assert (again.fingerprint, again.codebook_fingerprint) == (model.fingerprint, model.codebook_fingerprint)
    assert coded(again) == coded(model)
    assert make_context_model(width=25).fingerprint != model.fingerprint != make_context_model("0" * 64).fingerprint


def test_a_missing_or_damaged_file_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"must have a context model, `{FILE}`, but `{tmp_path}` has none"):
        ContextModel.from_pretrained(tmp_path)
    for content in (b"", b"Dear diary,"):
        (tmp_path / FILE).write_bytes(content)
        with pytest.raises(ValueError, match="must be a context model, but is another file or damaged"):
            ContextModel.from_pretrained(tmp_path)


def test_ids_out_of_range_are_refused():
    with pytest.raises(ValueError, match="ids must be in "):
        make_context_model("a" * 64).compress(np.full((2, 2), 99_999))


def test_a_context_model_of_another_codebook_is_an_error(tmp_path, monkeypatch):
    context_model = make_context_model("a" * 64)
    assert find_context_model(tmp_path, "a" * 64) is None
    context_model.save_pretrained(tmp_path)
    assert find_context_model(tmp_path, "a" * 64).fingerprint == context_model.fingerprint
    with pytest.raises(ValueError, match="must be for the codebook .* fingerprint b{16}, but is for a{16}. Delete"):
        find_context_model(tmp_path, "b" * 64)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    message = "whether `org/gone` has a context model, `context_model.safetensors`, .* the Hub cannot be reached"
    with pytest.raises(OSError, match=message):
        find_context_model("org/gone", "a" * 64)

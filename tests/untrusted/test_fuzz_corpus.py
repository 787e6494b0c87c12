"""Replays the fuzzer's corpus; tests/fuzz/README.md explains it."""

import time

import pytest
from conftest import ROOT
from readers import READERS

CORPUS = ROOT / "tests" / "fuzz" / "corpus"
CPU_SECONDS = 10


@pytest.mark.slow
@pytest.mark.parametrize("reader", READERS)
def test_readers_return_or_raise_errors_that_name_the_file(reader, tmp_path):
    inputs = sorted((CORPUS / reader).iterdir())
    assert inputs
    for path in inputs:
        folder = tmp_path / path.name
        folder.mkdir()
        start = time.process_time()
        READERS[reader](path.read_bytes(), folder)
        assert time.process_time() - start < CPU_SECONDS, path.name

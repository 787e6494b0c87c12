"""The size of the code. Whoever adds a capability pays for it with something that is used less."""

import pytest
from code_lines import count_folder
from conftest import ROOT

BUDGETS = {"svqvae_hf": 10_200, "svqvae_cli": 1_300, "training": 1_740, "tests": 12_500, "benchmarks": 1_740}


@pytest.mark.parametrize("folder", BUDGETS)
def test_code_stays_within_its_budget(folder):
    assert count_folder(ROOT / folder) <= BUDGETS[folder]

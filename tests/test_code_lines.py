"""The size of the code. Whoever adds a capability pays for it with something that is used less."""

import pytest
from code_lines import count_code, count_folder
from conftest import ROOT

BUDGETS = {"svqvae_hf": 12_000, "svqvae_cli": 2_150, "training": 1_600, "tests": 17_500}


@pytest.mark.parametrize("folder", BUDGETS)
def test_code_stays_within_its_budget(folder):
    assert count_folder(ROOT / folder) <= BUDGETS[folder]


def test_blank_lines_comments_and_docstrings_do_not_count():
    source = (
        '"""Doc."""\n\n# why\ndef f(\n    x,\n):\n    """Doc.\n\n    More."""\n    return """a\n    b"""  # text\n'
    )
    assert count_code(source) == len(["def f(", "x,", "):", 'return """a', 'b"""'])

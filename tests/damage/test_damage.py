"""A sample of the damages of `damage.py`, by chance. `python tests/damage/damage.py` runs all of them."""

import random

import pytest
from damage import Checker, all_cases, check_cases, sample
from workspaces import make_workspace

SECONDS = 5


@pytest.mark.slow
@pytest.mark.usefixtures("few_windows")
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks for it
def test_damaged_files_change_no_output_without_a_word(tmp_path):
    seed = random.randrange(2**32)
    commands = [command for command in make_workspace(tmp_path) if not command.words.startswith("export")]  # slow
    cases = sample(all_cases(tmp_path, commands), seed)
    faults = []
    for case, fault in check_cases(Checker(tmp_path), cases, SECONDS):
        if fault is not None:
            faults.append(f"{case.command.words}, {case.file} {case.damage}: {fault}")
    assert not faults, f"seed {seed}: {faults}"

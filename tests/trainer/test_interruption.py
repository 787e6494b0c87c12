"""Signals of a run, and the process that launched it."""

import os
import subprocess
import sys

from svqvae_hf.trainer.interruption import stop_message

CODE = """
import sys
from svqvae_hf.trainer.interruption import Interruption
print(Interruption(None).launcher)
"""


def launcher_of(*words: str) -> str:
    """What the interruption of a process takes for its launcher, if a command starts the process."""
    env = {**os.environ, "ACCELERATE_MIXED_PRECISION": "bf16"}
    result = subprocess.run([*words, sys.executable, "-c", CODE], env=env, capture_output=True, text=True, check=True)
    return result.stdout.strip()


def test_an_exported_setting_of_accelerate_makes_no_launcher(tmp_path):
    assert launcher_of() == "None"
    launcher = tmp_path / "accelerate"
    launcher.write_text("import subprocess, sys; subprocess.run(sys.argv[1:], check=True)")
    assert launcher_of(sys.executable, str(launcher)).isdigit()


def test_a_command_that_resumes_already_is_not_told_to():
    assert stop_message(7, "latest") == "Stopped by a signal at step 7. Resume: the same command."
    for resumed_from in (None, "checkpoint-3"):
        assert stop_message(7, resumed_from).endswith("the same command with --resume_from_checkpoint latest.")
